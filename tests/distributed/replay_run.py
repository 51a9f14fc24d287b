"""`trainer.verify_checkpoint()` on two processes: each writes what it was told. `replay_run.py FOLDER CHECKPOINT...`"""

import dataclasses
import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from small_population import outcome, population


RUN = {"size": 4, "max_steps": 6, "logging_steps": 2, "eval_steps": 3, "save_strategy": "steps", "save_steps": 2}

if __name__ == "__main__":
    folder, checkpoints = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    trainer = population(folder / "here", **RUN)
    said = {}
    for checkpoint in checkpoints:
        try:
            replay = trainer.verify_checkpoint(checkpoint)
            said[checkpoint] = {**dataclasses.asdict(replay), "text": str(replay)}
        except ValueError as error:
            said[checkpoint] = str(error)
    # The run of this trainer is the one without.
    trainer.train()
    said["run"] = outcome(trainer)
    replay = trainer.verify_checkpoint(folder / "here" / "checkpoint-6")
    said["own"] = replay.identical
    (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(said))
