"""`trainer.check()` on two processes: each writes what it was told. `check_run.py FOLDER MODE...`"""

import dataclasses
import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from small_population import Digits, outcome, population


folder, modes = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
rank = int(os.environ.get("RANK", "0"))


class Gone(Digits):
    def __getitem__(self, index):
        raise OSError("the disk is gone")


def saving(output_dir, **options):
    return population(output_dir, size=2, save_strategy="steps", save_steps=6, **options)


def well():
    trainer = saving(folder / "well")
    report = dataclasses.asdict(trainer.check())
    left = sorted(path.name for path in (folder / "well").rglob("*"))
    trainer.train()
    return {"report": report, "left": left, "run": outcome(trainer)}


def without():
    trainer = saving(folder / "without")
    trainer.train()
    return {"run": outcome(trainer)}


def gone():
    saving(folder / "gone", trainer={"train_dataset": Gone(0, 330) if rank == 1 else Digits(0, 330)}).check()


def nothing():
    saving(folder / "nothing", trainer={"train_dataset": Digits(0, 330) if rank == 1 else None}).check()


def option():
    saving(folder / "option", learning_rate=1e-3 * (rank + 1)).check()


def steps():
    saving(folder / "steps", trainer={"train_dataset": Digits(0, 330 - 100 * rank)}).check()


def folders():
    saving(folder / f"of-process-{rank}").check()


def disk():
    import shutil
    from collections import namedtuple

    shutil.disk_usage = lambda path: namedtuple("usage", ["total", "used", "free"])(10, 5, 5)
    saving(folder / "disk").check()


for mode in modes:
    try:
        said = globals()[mode]()
    except ValueError as error:
        said = str(error)
    (folder / f"{mode}-{rank}.json").write_text(json.dumps(said))
