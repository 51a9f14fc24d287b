"""
Whether a step of a population takes longer than it did: this tree against another one, such as an earlier commit.

    git worktree add /tmp/before COMMIT
    python examples/benchmarks/step_time.py /tmp/before              # a ViT of 96 × 4, two members
    python examples/benchmarks/step_time.py /tmp/before --vit_s      # ViT-S/16 at 224²

Two processes, one for each tree, train in turns, a few steps at a time, so that a machine's moods reach both alike. Every
figure is a ratio within such a pair. Set `OMP_NUM_THREADS=1`.
"""

import argparse
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
    """Train; before each turn wait for a line, after it print the seconds that it took."""
    import torch
    from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, set_seed

    import hf_wash
    from hf_wash import WashConfig, WashTrainer

    assert Path(hf_wash.__file__).is_relative_to(tree), f"{hf_wash.__file__} is not of {tree}"
    size, width, layers, patch, batch = (224, 384, 12, 16, 4) if vit_s else (32, 96, 4, 4, 32)

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % steps == 0:
                sys.stdin.readline()
                self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % steps == 0:
                print(time.perf_counter() - self.began, flush=True)

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
        WashTrainer(model, args, train_dataset=Noise(), callbacks=[Turns()]).train()


def begun(tree: Path, vit_s: bool, turns: int, steps: int) -> subprocess.Popen:
    """A process that trains with a tree's code."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(tree), "--turns", str(turns), "--steps", str(steps), "--train"]
    command += ["--vit_s"] if vit_s else []
    # Far from any tree, so that none is found by the current folder.
    return subprocess.Popen(
        command, env=environment, cwd=tempfile.gettempdir(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def seconds(process: subprocess.Popen) -> float:
    """Let a process train for one turn. A `RuntimeError` if it has ended."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        try:
            return float(line)
        except ValueError:
            continue  # what the Trainer prints
    raise RuntimeError("A process ended; what it said stands above.")


def main() -> None:
    """Compare, and print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the tree to compare with: a folder that holds hf_wash/")
    parser.add_argument("--vit_s", action="store_true", help="ViT-S/16 at 224² in the place of a ViT of 96 × 4")
    parser.add_argument("--turns", type=int, default=40, help="pairs of turns; two more warm up")
    parser.add_argument("--steps", type=int, help="steps in a turn; by default 10, 1 of ViT-S")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    steps = chosen.steps or (1 if chosen.vit_s else 10)
    other = chosen.other.resolve()
    if chosen.train:
        train(str(other), chosen.vit_s, chosen.turns, steps)
        return
    if not (other / "hf_wash").is_dir():
        parser.error(f"{chosen.other} holds no hf_wash/")
    pairs = []
    processes = [begun(tree, chosen.vit_s, chosen.turns + 2, steps) for tree in (HERE, other)]
    try:
        for turn in range(chosen.turns + 2):
            order = processes if turn % 2 else processes[::-1]
            took = {process: seconds(process) for process in order}
            pairs.append([took[process] / steps for process in processes])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    measured = pairs[2:]
    ratios = [ours / theirs for ours, theirs in measured]
    first, median, third = statistics.quantiles(ratios, n=4)
    print(
        json.dumps(
            {
                "model": "ViT-S/16 at 224²" if chosen.vit_s else "ViT of 96 × 4", "members": 2,
                "pairs": chosen.turns, "steps_in_a_turn": steps,
                "seconds_a_step": statistics.median(ours for ours, _ in measured),
                "other_seconds_a_step": statistics.median(theirs for _, theirs in measured),
                "ratio_quartiles": [round(value, 4) for value in (first, median, third)],
            },
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
