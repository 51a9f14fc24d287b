"""
A member that diverges while nothing is shuffled, in a population of two: `not_finite_run.py FOLDER MODE...`. Each process
writes what it saw.
"""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from small_population import outcome, population, write_json
from transformers import TrainerCallback

from hf_wash.trainer.served_soup import NonFiniteMemberError


MODES = {
    "saving": {"shuffle_stop": 0.25, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "no"},
    "evaluating": {"mixing": "independent", "eval_steps": 4, "save_strategy": "steps", "save_steps": 8},
    "soup": {"mixing": "independent"},
    "greedy": {"mixing": "independent", "soup": "greedy", "soup_holdout": 0.1},
}

folder, modes = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
rank = int(os.environ.get("RANK", "0"))


class Poison(TrainerCallback):
    """Member 1 alone, on the one process that hosts it."""

    def on_step_end(self, args, state, control, **kwargs):
        for index, member in trainer.population:
            if state.global_step == 5 and index == 1:
                with torch.no_grad():
                    member.classifier.bias[3] = float("nan")


for mode in modes:
    trainer = population(folder / mode, size=2, trainer={"callbacks": [Poison()]}, **MODES[mode])
    try:
        trainer.train()
        result = {**outcome(trainer), **trainer.evaluate()}
        result["finite"] = all(bool(torch.isfinite(value).all()) for value in trainer.model.state_dict().values())
    except NonFiniteMemberError as error:
        result = {"error": str(error), "members": error.members, "step": error.step}
    write_json(folder / f"{mode}-{os.environ.get('WORLD_SIZE', '1')}-{rank}.json", result)
