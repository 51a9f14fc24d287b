"""
What each further member of a LoRA population costs in memory, over one frozen backbone of ViT-B's size: 86 million
random weights, adapters of rank 64 on all linear layers, AdamW.

    python examples/benchmarks/lora_memory.py              # populations of 1, 2, 4 and 8, each in a fresh process
    python examples/benchmarks/lora_memory.py --rank 16 --sizes 1 2

Measured is the peak over construction, training (shuffle included) and building the soup, of the tensors' bytes as
torch's allocator counts them and of the process's resident memory (`VmHWM`; with freed memory given back to the system
at once, or the C library would keep what it may need again). In one unit: an adapter's weights, gradients and AdamW's
two moments. Images are small (32×32, two of them) since activations are not in question: members compute one after the
other, so a population needs those of one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, set_seed

from hf_wash import WashConfig, WashTrainer


STEPS = 4


class Noise(torch.utils.data.Dataset):
    """Random images of 32×32 pixels."""

    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": torch.full((3, 32, 32), index / 8.0), "labels": index % 10}


def adapted(rank: int):
    """A frozen ViT-B with an adapter."""
    set_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, num_labels=10))
    linear = [
        name for name, module in model.named_modules() if type(module) is torch.nn.Linear and name != "classifier"
    ]
    return get_peft_model(model, LoraConfig(r=rank, target_modules=linear, modules_to_save=["classifier"]))


def resident() -> tuple[int, int]:
    """This process's anonymous memory now, and its peak of resident memory, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


class Peak:
    """The highest anonymous memory of this process, looked up every millisecond."""

    def __init__(self):
        self.bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self.bytes = max(self.bytes, resident()[0])

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self.bytes


def tensor_bytes(trainer: WashTrainer) -> int:
    """The distinct bytes of all members' parameters, their gradients and their optimizer's state."""
    storages = {}
    for member in trainer.population.members:
        for parameter in member.parameters():
            kept = [parameter, parameter.grad, *trainer.optimizer.state.get(parameter, {}).values()]
            for tensor in (value for value in kept if isinstance(value, torch.Tensor)):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


class AfterBackward(TrainerCallback):
    """Counts the tensors when all of them are there: before an optimizer step that is not the first."""

    trainer: WashTrainer  # which takes its callbacks when it is made

    def __init__(self):
        self.bytes = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.bytes = max(self.bytes, tensor_bytes(self.trainer))


def measure_one(size: int, rank: int, probability: float) -> None:
    """Train `size` members in this process and print what it took."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    peak = Peak()
    model = adapted(rank)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    counted = AfterBackward()
    with tempfile.TemporaryDirectory() as folder:
        args = WashConfig(
            folder, population_size=size, max_steps=STEPS, per_device_train_batch_size=2, shuffle_probability=probability,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = WashTrainer(model, args, train_dataset=Noise(), callbacks=[counted])
        counted.trainer = trainer
        trainer.train()
    anonymous = peak.end()
    print(
        json.dumps(
            {
                "adapter_state_bytes": 4 * trained,
                "peak_anonymous_bytes": anonymous,
                "peak_resident_bytes": resident()[1],
                "members_tensor_bytes": counted.bytes,
            }
        )
    )


def measure(size: int, rank: int, probability: float) -> dict:
    """[`measure_one`] in a process of its own."""
    # Blocks from 64 KiB on are mapped one by one, and unmapped when they are freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment["MALLOC_ARENA_MAX"] = "1"
    command = [sys.executable, __file__, "--one", str(size), "--rank", str(rank), "--probability", str(probability)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900, env=environment).stdout
    return json.loads(printed.strip().splitlines()[-1])


def main() -> None:
    """Measure each size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="populations, in rising order")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--probability", type=float, default=0.05, help="the shuffle's p")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one is not None:
        measure_one(chosen.one, chosen.rank, chosen.probability)
        return
    print(
        f"rank {chosen.rank}, p = {chosen.probability:g}; bytes in MiB; 'further': what each further member costs, in adapter states"
    )
    print(f"{'members':>7} {'state':>8} {'tensors':>9} {'further':>8} {'anonymous':>10} {'further':>8} {'resident':>9} {'further':>8}")  # fmt: skip
    before: tuple[int, dict] | None = None
    for size in chosen.sizes:
        found = measure(size, chosen.rank, chosen.probability)
        state = found["adapter_state_bytes"]
        line = f"{size:>7} {state / 2**20:>8.1f}"
        for name, width in (("members_tensor", 9), ("peak_anonymous", 10), ("peak_resident", 9)):
            value = found[f"{name}_bytes"]
            further = ""
            if before is not None:
                further = f"{(value - before[1][f'{name}_bytes']) / (size - before[0]) / state:.3f}"
            line += f" {value / 2**20:>{width}.1f} {further:>8}"
        print(line, flush=True)
        before = (size, found)


if __name__ == "__main__":
    main()
