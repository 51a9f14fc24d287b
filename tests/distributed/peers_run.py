"""
The peers' runs on the processes that it was launched in. `peers_run.py FOLDER`: process 0 writes the members of each
to `FOLDER/<case>-on-<processes>.pt`, and what each process was told of a run that cannot be to `FOLDER/<case>-<rank>.txt`.
"""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from small_peers import PEERS, add_the_pages_method, tiny_trainer
from small_population import population, resnet, started


def members_of(trainer):
    states = trainer.population.state_dicts()
    return [{name: value.clone() for name, value in state.items()} for state in states]


def tiny(folder, mixing, resume=None, **options):
    options |= {"shuffle_probability": 0.5} if mixing == "sparta" else {"average_interval": 4}
    trainer = tiny_trainer(folder, mixing, size=4, save_strategy="steps", save_steps=10, **options)
    trainer.train(resume_from_checkpoint=resume)
    return {"members": members_of(trainer), "moved": (trainer.values_moved, trainer.bytes_exchanged)}


def repaired(folder, mixing):
    settings = {"average_interval": 2, "max_steps": 5, "shuffle_probability": None, "eval_strategy": "no"}
    trainer = population(folder, started(resnet), size=4, mixing=mixing, **settings)
    trainer.train()
    return {"members": members_of(trainer), "moved": (trainer.values_moved, trainer.bytes_exchanged)}


def main():
    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def keep(case, result):
        if rank == 0:
            torch.save(result, place / f"{case}-on-{processes}.pt")

    add_the_pages_method()
    for mixing in (*PEERS, "pull"):
        keep(mixing, tiny(place / f"{mixing}-{processes}", mixing))
        if processes > 1 and mixing in ("papa", "sparta", "diloco", "pull"):  # after those on one
            checkpoint = str(place / f"{mixing}-1" / "checkpoint-10")
            keep(f"{mixing}-resumed", tiny(place / f"{mixing}-later", mixing, resume=checkpoint))
    for mixing in ("papa_all", "papa_2"):
        keep(f"{mixing}-repaired", repaired(place / f"{mixing}-repaired-{processes}", mixing))
    for case, options in {"too_long": {"average_interval": 30}, "never": {}}.items():
        said = "nothing"
        try:
            mixing = "papa" if case == "too_long" else "diloco"
            tiny_trainer(place / case, mixing, size=4, steps=-1, num_train_epochs=2, **options).train()
        except ValueError as error:
            said = str(error)
        (place / f"{case}-{rank}-of-{processes}.txt").write_text(said)


main()
