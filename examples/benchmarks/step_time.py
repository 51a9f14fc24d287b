"""
Whether a step of a population takes longer than it did: this tree against another one, such as an earlier commit.

    git worktree add /tmp/before COMMIT
    python examples/benchmarks/step_time.py /tmp/before              # a ViT of 96 × 4, two members
    python examples/benchmarks/step_time.py /tmp/before --vit_s      # ViT-S/16 at 224²
    python examples/benchmarks/step_time.py /tmp/before --processes 2   # a member in each of two processes

Two runs, one of each tree, train in turns, a few steps at a time, so that a machine's moods reach both alike. A turn is
timed from the beginning of its first step to that of the next turn's, with all that comes between, by the clock and by
the processor (of the first process), which other work on the machine disturbs less. Every figure is a ratio within a pair of
turns. Set `OMP_NUM_THREADS=1`.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


HERE = Path(__file__).resolve().parents[2]


def train(tree: str, vit_s: bool, turns: int, steps: int) -> None:
    """Train; before each turn wait for a line, and print what the one before took: seconds, and the processor's."""
    import torch
    from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, set_seed

    import hf_wash
    from hf_wash import WashConfig, WashTrainer

    assert Path(hf_wash.__file__).is_relative_to(tree), f"{hf_wash.__file__} is not of {tree}"
    size, width, layers, patch, batch = (224, 384, 12, 16, 4) if vit_s else (32, 96, 4, 4, 32)

    class Turns(TrainerCallback):
        began = None

        def end_turn(self):
            if self.began is not None:
                clock, processor = self.began
                print(time.perf_counter() - clock, time.process_time() - processor, flush=True)

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % steps == 0:
                self.end_turn()
                if not sys.stdin.readline():
                    os._exit(0)  # nobody waits for another turn
                self.began = time.perf_counter(), time.process_time()

        def on_train_end(self, args, state, control, **kwargs):
            self.end_turn()

    class Noise(torch.utils.data.Dataset):
        images = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0))

        def __len__(self):
            return batch * turns * steps

        def __getitem__(self, index):
            return {"pixel_values": self.images[index % 16], "labels": index % 10}

    torch.set_num_threads(1)
    set_seed(0)
    shape = {"image_size": size, "patch_size": patch, "hidden_size": width, "intermediate_size": 4 * width}
    model = ViTForImageClassification(
        ViTConfig(**shape, num_hidden_layers=layers, num_attention_heads=width // 32, num_labels=10)
    )
    with tempfile.TemporaryDirectory() as folder:
        args = WashConfig(
            folder, max_steps=turns * steps, per_device_train_batch_size=batch, population_size=2,
            shuffle_probability=0.01, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True,
        )  # fmt: skip
        if hasattr(args, "report"):
            args.report = False
        # The other processes wait for the first one wherever members meet.
        callbacks = [Turns()] if os.environ.get("RANK", "0") == "0" else []
        WashTrainer(model, args, train_dataset=Noise(), callbacks=callbacks).train()


def begun(tree: Path, vit_s: bool, turns: int, steps: int, processes: int) -> subprocess.Popen:
    """A run with a tree's code."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, str(tree), "--train"]
    command += ["--turns", str(turns), "--steps", str(steps), *(["--vit_s"] if vit_s else [])]
    # Far from any tree, so that none is found by the current folder.
    return subprocess.Popen(
        command, env=environment, cwd=tempfile.gettempdir(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def seconds(process: subprocess.Popen) -> tuple[float, float]:
    """Let a run train for one turn; what that took. A `RuntimeError` if it has ended."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("\n")
        process.stdin.flush()
    for line in process.stdout:
        try:
            clock, processor = map(float, line.split())
        except ValueError:
            continue  # what the Trainer prints
        return clock, processor
    raise RuntimeError("A run ended before it should; what it said stands above.")


def main() -> None:
    """Compare, and print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the tree to compare with: a folder that holds hf_wash/")
    parser.add_argument("--vit_s", action="store_true", help="ViT-S/16 at 224² in the place of a ViT of 96 × 4")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2), help="that the two members are dealt to")
    parser.add_argument("--turns", type=int, default=40, help="pairs of turns, at least 2; two more warm up")
    parser.add_argument("--steps", type=int, help="steps in a turn; by default 10, 3 of ViT-S")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    steps = chosen.steps if chosen.steps is not None else (3 if chosen.vit_s else 10)
    if steps < 1 or chosen.turns < 2:
        parser.error("--steps must be at least 1 and --turns at least 2")
    other = chosen.other.resolve()
    if chosen.train:
        train(str(other), chosen.vit_s, chosen.turns, steps)
        return
    if not (other / "hf_wash").is_dir():
        parser.error(f"{chosen.other} holds no hf_wash/")
    pairs = []
    runs = [begun(tree, chosen.vit_s, chosen.turns + 2, steps, chosen.processes) for tree in (HERE, other)]
    try:
        for turn in range(chosen.turns + 2):
            order = runs if turn % 2 else runs[::-1]
            took = {run: seconds(run) for run in order}
            pairs.append([took[run] for run in runs])
    finally:
        for run in runs:
            assert run.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                run.stdin.close()  # at which it ends
        for run in runs:
            run.wait(120)
    found = {
        "model": "ViT-S/16 at 224²" if chosen.vit_s else "ViT of 96 × 4", "members": 2, "processes": chosen.processes,
        "pairs": chosen.turns, "steps_in_a_turn": steps,
    }  # fmt: skip
    for number, name in enumerate(("seconds", "processor_seconds")):
        ours, theirs = ([both[run][number] / steps for both in pairs[2:]] for run in range(2))
        ratios = statistics.quantiles((a / b for a, b in zip(ours, theirs, strict=True)), n=4)
        found |= {
            f"{name}_a_step": statistics.median(ours), f"other_{name}_a_step": statistics.median(theirs),
            f"{name}_ratio_quartiles": [round(value, 4) for value in ratios],
        }  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
