"""
What a population costs beside a plain Trainer: time with mixing off, memory for each further member, the part of a
step that the shuffle takes, and the time of saving.

    python examples/benchmarks/trainer_cost.py                       # all of these, on the CPU
    python examples/benchmarks/trainer_cost.py overhead              # or memory, mixing, saving, diagnostics
    python examples/benchmarks/trainer_cost.py overhead --members 4  # against four plain runs one after the other
    python examples/benchmarks/trainer_cost.py overhead --vit_s      # ViT-S/16 at 224² in the place of a ViT of 96 × 4

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
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_wash import PopulationDiagnostics, WashConfig, WashTrainer
from hf_wash.soup.weights import open_member


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


def measure_overhead(pairs: int, members: int, vit_s: bool) -> dict:
    """A population with mixing off against as many plain runs one after the other, in turns."""
    ratios, plain_times, ours_times = [], [], []
    steps, batch, shape = (6, 4, (224, 384, 12, 16)) if vit_s else (60, 32, (32, 96, 4, 4))
    data = Noise(batch * steps, shape[0])
    with tempfile.TemporaryDirectory() as folder:
        shared = arguments(folder, steps, batch)

        def trained(make) -> float:
            trainer = make(vit(*shape))
            began = time.perf_counter()
            trainer.train()
            return time.perf_counter() - began

        def plain() -> float:
            args = TrainingArguments(**shared)
            return sum(trained(lambda model: Trainer(model, args, train_dataset=data)) for _ in range(members))

        def ours() -> float:
            args = WashConfig(**shared, population_size=members, mixing="independent", report=False)
            return trained(lambda model: WashTrainer(model, args, train_dataset=data))

        for pair in range(pairs + 1):
            if pair % 2:
                plain_seconds, our_seconds = plain(), ours()
            else:
                our_seconds, plain_seconds = ours(), plain()
            if pair:  # the first pair warms up
                ratios.append(our_seconds / plain_seconds)
                plain_times.append(plain_seconds)
                ours_times.append(our_seconds)
    return {
        "model": "ViT-S/16 at 224²" if vit_s else "ViT of 96 × 4", "members": members, "pairs": pairs, "steps": steps,
        "batch": batch, "plain_seconds": statistics.median(plain_times),
        "population_seconds": statistics.median(ours_times), "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios), "ratio_max": max(ratios),
    }  # fmt: skip


class _Timed(TrainerCallback):
    """
    Notes when a step has ended and when its checkpoint has been written.

    Before that it takes as much of the page cache as a checkpoint will, and gives it back: a virtual machine returns what
    is free to its host, and the first to touch it again waits for it, up to ten times as long as the writing takes.
    """

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        with tempfile.TemporaryFile(dir=args.output_dir, buffering=0) as scratch:
            for _ in range(1 << 10):
                scratch.write(bytes(1 << 20))
        self._began = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._began)


def measure_saving(rounds: int) -> dict:
    """Seconds to save ViT-S: a checkpoint of two members and the final soup, each beside the plain Trainer's own."""
    found: dict[str, list[float]] = {name: [] for name in ("plain_model", "plain_checkpoint", "soup", "checkpoint")}
    checked, looked = [], []
    with tempfile.TemporaryDirectory() as folder:
        shared = {**arguments(folder, 2, 2), "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
        for _ in range(rounds):
            for kind in ("plain", "ours"):
                timed, model, data = _Timed(), vit(224, 384, 12, 16), Noise(4, 224)
                if kind == "plain":
                    trainer = Trainer(model, TrainingArguments(**shared), train_dataset=data, callbacks=[timed])
                else:
                    args = WashConfig(**shared, population_size=2, shuffle_probability=0.001, report=False)
                    trainer = WashTrainer(model, args, train_dataset=data, callbacks=[timed])
                trainer.train()
                found["plain_checkpoint" if kind == "plain" else "checkpoint"] += timed.seconds
                began = time.perf_counter()
                assert open_member(model.state_dict(), 0).first_not_finite() is None
                looked.append(time.perf_counter() - began)
                for number in range(2):
                    began = time.perf_counter()
                    trainer.save_model(f"{folder}/final")
                    seconds = time.perf_counter() - began
                    # The final soup is loaded back once, at the first save.
                    if kind == "ours" and number == 0:
                        checked.append(seconds)
                    else:
                        found["plain_model" if kind == "plain" else "soup"].append(seconds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "rounds": rounds, **{f"{name}_seconds": value for name, value in medians.items()},
        "soup_with_its_check_seconds": statistics.median(checked),
        "looking_for_what_is_not_finite_in_a_member_seconds": statistics.median(looked),
        "checkpoint_for_each_of_its_three_models": medians["checkpoint"] / 3 / medians["plain_checkpoint"],
    }  # fmt: skip


def peak_memory(size: int) -> None:
    """Train `size` members in this process and print its peak memory in bytes, and the model's parameters."""
    model = vit(64, 384, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        args = WashConfig(**arguments(folder, 3, 32), population_size=size, shuffle_probability=0.01, report=False)
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
        args = WashConfig(
            **arguments(folder, steps, batch), population_size=2, shuffle_probability=0.001, report=False
        )
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


class _TimedDiagnostics(PopulationDiagnostics):
    """Notes how long it takes at the ends of steps."""

    seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        began = time.perf_counter()
        super().on_step_end(args, state, control, **kwargs)
        self.seconds += time.perf_counter() - began


def measure_diagnostics(members: int) -> dict:
    """The part of training that `PopulationDiagnostics` takes at its default interval."""
    found = {}
    # A run has at most 50 measurements, or one at each step; of a run of 500 steps one in ten steps has one.
    for name, shape, steps, batch in (
        ("ViT of 96 × 4", (32, 96, 4, 4), 100, 32),
        ("ViT-S/16", (224, 384, 12, 16), 3, 4),
    ):
        with tempfile.TemporaryDirectory() as folder:
            diagnostics = _TimedDiagnostics()
            args = WashConfig(
                **arguments(folder, steps, batch), population_size=members, shuffle_probability=0.01, report=False
            )
            data = Noise(batch * steps, shape[0])
            trainer = WashTrainer(vit(*shape), args, train_dataset=data, eval_dataset=data, callbacks=[diagnostics])
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
            lines = sum(any(key.startswith("layer_spread/") for key in entry) for entry in trainer.state.log_history)
            found[name] = {
                "members": members, "steps": steps, "batch": batch, "measurements": lines,
                "step_seconds": seconds / steps, "measurement_seconds": diagnostics.seconds / lines,
                "share_of_a_run_of_500_steps": diagnostics.seconds / lines / (10 * seconds / steps),
            }  # fmt: skip
    return found


def main() -> None:
    """Run what was asked for and print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", help="all, overhead, memory, mixing, saving or diagnostics")
    parser.add_argument("numbers", nargs="*", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs for the overhead")
    parser.add_argument("--members", type=int, default=1, help="members of the population for the overhead")
    parser.add_argument("--vit_s", action="store_true", help="measure the overhead on ViT-S/16 at 224²")
    chosen = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if chosen.what == "peak":
        peak_memory(*chosen.numbers)
    elif chosen.what == "share":
        mixing_share(*chosen.numbers)
    elif chosen.what in ("all", "overhead", "memory", "mixing", "saving", "diagnostics"):
        results = {}
        if chosen.what in ("all", "overhead"):
            results["overhead"] = measure_overhead(chosen.pairs, chosen.members, chosen.vit_s)
        if chosen.what in ("all", "memory"):
            results["memory"] = measure_memory([1, 2, 4, 8])
        if chosen.what in ("all", "mixing"):
            results["mixing"] = measure_mixing(steps=6, batch=8)
        if chosen.what in ("all", "saving"):
            results["saving"] = measure_saving(rounds=3)
        if chosen.what in ("all", "diagnostics"):
            results["diagnostics"] = measure_diagnostics(members=4)
        print(json.dumps({"threads": torch.get_num_threads(), **results}, indent=1))
    else:
        parser.error(
            f"what to measure must be all, overhead, memory, mixing, saving or diagnostics, found {chosen.what!r}"
        )


if __name__ == "__main__":
    main()
