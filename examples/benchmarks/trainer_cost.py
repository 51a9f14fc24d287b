"""
What a population costs beside a plain Trainer: time with mixing off, memory for each further member, and the part of a
step that the shuffle takes.

    python examples/benchmarks/trainer_cost.py            # all three, on the CPU
    python examples/benchmarks/trainer_cost.py overhead   # or memory, or mixing

Every figure is a ratio or a difference within this run: machines are noisy. Set `OMP_NUM_THREADS=1`.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_wash import WashConfig, WashTrainer


class Noise(torch.utils.data.Dataset):
    """Random images of shape `(3, size, size)`."""

    def __init__(self, count: int, size: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(16, 3, size, size, generator=generator)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index % 16], "labels": index % 10}


def vit(size: int, width: int, layers: int, patch: int) -> ViTForImageClassification:
    """A ViT for `size`² images."""
    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=size,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            intermediate_size=4 * width,
            num_labels=10,
        )
    )


def arguments(folder: str, steps: int, batch: int) -> dict:
    """What plain and population runs share."""
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": batch, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
    }  # fmt: skip


def measure_overhead(pairs: int, steps: int) -> dict:
    """A population of one with mixing off against a plain Trainer, in turns."""
    ratios, plain_times, ours_times = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(pairs + 1):
            times = {}
            for kind in ("plain", "ours") if pair % 2 else ("ours", "plain"):
                model, data = vit(32, 96, 4, 4), Noise(32 * steps, 32)
                shared = arguments(folder, steps, 32)
                if kind == "plain":
                    trainer = Trainer(model, TrainingArguments(**shared), train_dataset=data)
                else:
                    args = WashConfig(**shared, population_size=1, mixing="independent")
                    trainer = WashTrainer(model, args, train_dataset=data)
                began = time.perf_counter()
                trainer.train()
                times[kind] = time.perf_counter() - began
            if pair:  # the first pair warms up
                ratios.append(times["ours"] / times["plain"])
                plain_times.append(times["plain"])
                ours_times.append(times["ours"])
    return {
        "pairs": pairs, "steps": steps, "plain_seconds": statistics.median(plain_times),
        "population_of_one_seconds": statistics.median(ours_times), "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios), "ratio_max": max(ratios),
    }  # fmt: skip


def peak_memory(size: int) -> None:
    """Train `size` members in this process and print its peak memory in bytes, and the model's parameters."""
    model = vit(64, 384, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        args = WashConfig(**arguments(folder, 3, 32), population_size=size, mixing="wash", shuffle_probability=0.01)
        WashTrainer(model, args, train_dataset=Noise(32 * 3, 64)).train()
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, parameters]))


def measure_memory(sizes: list[int]) -> dict:
    """
    Peak memory for N members in one process, each N in a process of its own.

    glibc's heap keeps what is freed between larger blocks, which hides the difference; with a fixed threshold, tensors
    are mapped one by one and given back.
    """
    peaks = {}
    for size in sizes:
        printed = subprocess.run(
            [sys.executable, __file__, "peak", str(size)],
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        ).stdout
        peaks[size], parameters = json.loads(printed.strip().splitlines()[-1])
    state = 16 * parameters  # float32 weights, gradients and AdamW's two moments
    further = {
        f"{small} to {large}": (peaks[large] - peaks[small]) / (large - small) / state
        for small, large in itertools.pairwise(sizes)
    }
    return {
        "parameters": parameters,
        "state_bytes_of_a_member": state,
        "peak_bytes": peaks,
        "further_member_in_states": further,
    }


def mixing_share(steps: int, batch: int) -> None:
    """One of two processes of a ViT-S/16 population; process 0 prints the seconds of a step, of mixing and waiting."""
    model = vit(224, 384, 12, 16)
    with tempfile.TemporaryDirectory() as folder:
        args = WashConfig(**arguments(folder, steps, batch), population_size=2, shuffle_probability=0.001)
        trainer = WashTrainer(model, args, train_dataset=Noise(batch * steps, 224))
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    if trainer.is_world_process_zero():
        print(json.dumps([seconds / steps, trainer.mixing.seconds / steps, trainer.mixing.wait_seconds / steps]))


def measure_mixing(steps: int, batch: int) -> dict:
    """The part of a step of ViT-S/16 at 224² that `mix()` takes, on two processes, with and without waiting."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    printed = subprocess.run(
        [*command, "share", str(steps), str(batch)], capture_output=True, text=True, check=True, timeout=1800
    ).stdout
    line = next(line for line in printed.splitlines() if line.startswith("["))
    step, mixing, waiting = json.loads(line)
    return {
        "steps": steps, "batch": batch, "step_seconds": step, "mix_seconds": mixing, "waiting_seconds": waiting,
        "share_without_waiting": (mixing - waiting) / step, "share_with_waiting": mixing / step,
    }  # fmt: skip


def main() -> None:
    """Run what was asked for and print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", help="all, overhead, memory or mixing")
    parser.add_argument("numbers", nargs="*", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs for the overhead")
    chosen = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if chosen.what == "peak":
        peak_memory(*chosen.numbers)
    elif chosen.what == "share":
        mixing_share(*chosen.numbers)
    elif chosen.what in ("all", "overhead", "memory", "mixing"):
        results = {}
        if chosen.what in ("all", "overhead"):
            results["overhead"] = measure_overhead(chosen.pairs, steps=60)
        if chosen.what in ("all", "memory"):
            results["memory"] = measure_memory([1, 2, 4, 8])
        if chosen.what in ("all", "mixing"):
            results["mixing"] = measure_mixing(steps=6, batch=8)
        print(json.dumps({"threads": torch.get_num_threads(), **results}, indent=1))
    else:
        parser.error(f"what to measure must be all, overhead, memory or mixing, found {chosen.what!r}")


if __name__ == "__main__":
    main()
