"""
What a callback asks for on process 1 alone, on two processes, and what the only process asks for on one.
`requests_run.py FOLDER NAME...` writes `FOLDER/<name>-on-<processes>/said-<rank>.txt`: the outcome as JSON.
"""

import json
import os
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import forked_processes
import torch
from small_population import outcome, population
from transformers import TrainerCallback

from hf_wash.trainer import requests


torch.set_num_threads(1)

# name: (event, flag, options)
REQUESTS = {
    "stop": ("on_step_end", "should_training_stop", {}),
    "stop, mixing off": ("on_step_end", "should_training_stop", {"mixing": "independent"}),
    "stop, asked for before the step": ("on_step_begin", "should_training_stop", {}),
    "stop, within a step": ("on_substep_end", "should_training_stop", {"gradient_accumulation_steps": 2}),
    "stop, after an evaluation": ("on_evaluate", "should_training_stop", {"eval_steps": 3}),
    "stop, after a save": ("on_save", "should_training_stop", {"save_strategy": "steps", "save_steps": 3}),
    "end the epoch": ("on_step_end", "should_epoch_stop", {}),
    "save": ("on_step_end", "should_save", {}),
    "save, mixing off": ("on_step_end", "should_save", {"mixing": "independent"}),
    "save, after an evaluation": ("on_evaluate", "should_save", {"eval_steps": 3}),
    "save, after an epoch": ("on_epoch_end", "should_save", {"max_steps": 24}),
    "evaluate": ("on_step_end", "should_evaluate", {}),
    "evaluate, after a line of the log": ("on_log", "should_evaluate", {"logging_steps": 3}),
    "log": ("on_step_end", "should_log", {}),
}


class Ask(TrainerCallback):
    """Sets a flag once: at the first `event` from step 3 on."""

    def __init__(self, event, flag):
        self.flag, self.done = flag, False
        setattr(self, event, self.ask)

    def ask(self, args, state, control, **kwargs):
        if state.global_step >= 3 and not self.done:
            self.done = True
            setattr(control, self.flag, True)


class OnOneProcess(TrainerCallback):
    """Logs where no other process does."""

    def on_step_end(self, args, state, control, **kwargs):
        trainer.log({"own": 1.0})


def asked(folder, event, flag, options, rank):
    global trainer
    asks = rank == int(os.environ.get("WORLD_SIZE", "1")) - 1
    callbacks = [Ask(event, flag)] if asks else []
    trainer = population(folder / "run", size=2, trainer={"callbacks": callbacks}, **options)
    trainer.train()
    saved = sorted(path.name for path in (folder / "run").glob("checkpoint-*"))
    return json.dumps({**outcome(trainer), "step": trainer.state.global_step, "saved": saved})


def stop_beside_nccl(rank):
    """As if the default group could not carry what lies on the host."""
    requests._default_group_is_on_the_host = lambda: False
    return asked(folder, "on_step_end", "should_training_stop", {}, rank)


def chance(rank):
    """A metric that is chance, by which the best model is chosen and saved."""
    trainer = population(
        folder / "run",
        size=2,
        save_strategy="best",
        metric_for_best_model="chance",
        eval_steps=1,
        trainer={"compute_metrics": lambda _: {"chance": time.perf_counter() * (-1) ** rank}},
    )
    trainer.train()
    return trainer.state.best_global_step


def logs_alone(rank):
    global trainer
    callbacks = [OnOneProcess()] if rank else []
    trainer = population(folder / "run", size=2, trainer={"callbacks": callbacks})
    trainer.train()
    return trainer.state.global_step


if __name__ == "__main__":
    for name in sys.argv[2:]:
        if name not in REQUESTS:
            folder = Path(sys.argv[1]) / name
            forked_processes.run(globals()[name], folder, 2)
            continue
        for processes in (1, 2):
            folder = Path(sys.argv[1]) / f"{name}-on-{processes}"
            request = REQUESTS[name]
            forked_processes.run(lambda rank, f=folder, r=request: asked(f, *r, rank), folder, processes)
