"""
Each scenario of `any_trainer.py` as a population of two, one after the other, in the processes this was launched in.

As a script: `any_trainer_run.py FOLDER NAME [NAME ...]`; process 0 writes `FOLDER/NAME-on-<processes>.json`.
"""

import os
import sys
from pathlib import Path


TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "trainer")]

import torch  # noqa: E402
from any_trainer import SCENARIOS, population_outcome, state_digest  # noqa: E402
from small_population import write_json  # noqa: E402


def run(folder: Path, name: str) -> dict:
    """*Collective.* Train, evaluate and save."""
    trainer = SCENARIOS[name]().population(folder, eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.save_model()
    return {**population_outcome(trainer), "first local member": state_digest(trainer.population.members[0])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, processes = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
    for name in sys.argv[2:]:
        outcome = run(folder / f"{name}-on-{processes}", name)
        if int(os.environ.get("RANK", "0")) == 0:
            write_json(folder / f"{name}-on-{processes}.json", outcome)
