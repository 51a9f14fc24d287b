"""
A run that may be killed: resumes by itself and writes what came out of it.

`fault_run.py FOLDER STEPS [--slow-save SECONDS] [--full-disk-at STEP] [--jit] [--fail-rank RANK --at STEP]`
"""

import argparse
import errno
import os
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from small_population import outcome, population, write_json
from transformers import TrainerCallback

from hf_wash.trainer import checkpoint


parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("steps", type=int)
parser.add_argument("--slow-save", type=float, default=0.0)
parser.add_argument("--full-disk-at", type=int)
parser.add_argument("--jit", action="store_true")
parser.add_argument("--pace", type=float, default=0.0)
parser.add_argument("--die-rank", type=int)
parser.add_argument("--die-at", type=int)
arguments = parser.parse_args()
torch.set_num_threads(1)
rank = int(os.environ.get("RANK", "0"))


class Watch(TrainerCallback):
    """Tells the test where the run stands, and does what the test asked for."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(arguments.pace)
        if rank == 0:
            (arguments.folder / "step.txt").write_text(str(state.global_step))
        if arguments.die_rank == rank and arguments.die_at == state.global_step:
            os.kill(os.getpid(), 9)


write_member = checkpoint.write_member


def disturbed(folder, *rest, **more):
    time.sleep(arguments.slow_save)
    if arguments.full_disk_at is not None and f"checkpoint-{arguments.full_disk_at}" in str(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / checkpoint.MEMBER_WEIGHTS).write_bytes(b"half of the")
        raise OSError(errno.ENOSPC, "No space left on device")
    return write_member(folder, *rest, **more)


checkpoint.write_member = disturbed
arguments.folder.mkdir(parents=True, exist_ok=True)
trainer = population(
    arguments.folder / "run",
    size=2,
    max_steps=arguments.steps,
    save_strategy="steps",
    save_steps=3,
    save_total_limit=3,
    eval_steps=5,
    enable_jit_checkpoint=arguments.jit,
    trainer={"callbacks": [Watch()]},
)
trainer.train(resume_from_checkpoint="auto")
result = {**outcome(trainer), "step": trainer.state.global_step}
if rank == 0:
    write_json(arguments.folder / "outcome.json", result)
