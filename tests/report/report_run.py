"""A population that is reported on, on one process or several; what came of it, as JSON, from process 0."""

import json
import os
import sys
from pathlib import Path

import small_plane
import small_population as small

from hf_wash import PopulationDiagnostics
from hf_wash.report.gather import LAYER_KEY


def main(folder: str, model: str) -> None:
    make = {"vit": small.vit, "resnet": small.resnet}[model]
    trainer = small.population(
        folder,
        small.started(make),
        size=2,
        report=True,
        eval_steps=6,
        trainer={"callbacks": [PopulationDiagnostics(3, barrier=True)]},
    )
    trainer.train()
    place = trainer.args.process_index, trainer.args.world_size
    plane = small_plane.surveyed(*place)["plane"]
    if trainer.is_world_process_zero():
        kept = (LAYER_KEY, "barrier", "eval_members_disagreement")
        log = [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in trainer.state.log_history]
        outcome = {
            "log": [entry for entry in log if entry],
            "survey": json.loads((Path(folder) / "report/measurements.json").read_text()),
            "plane": plane,
        }
        say("OUTCOME " + json.dumps(outcome))
    say(f"AFTER A FAILURE OF THE LAST PROCESS {trainer.args.process_index}: {surveyed_where_one_fails(trainer)}")
    say(f"AFTER A FAILURE ON A PLANE {trainer.args.process_index}: {plane_where_one_fails(*place)}")


def say(text):
    """In one write, or the lines of two processes run into each other."""
    os.write(1, f"{text}\n".encode())


def plane_where_one_fails(rank, world_size):
    """The same of the plane, where the last process alone fails."""

    def answer_at(weights):
        if rank == world_size - 1:
            raise OSError("an image that cannot be read")
        return small_plane.answer_at(weights)

    try:
        small_plane.surveyed(rank, world_size, answer_at=answer_at)
    except RuntimeError as error:
        return error
    return "nothing"


def surveyed_where_one_fails(trainer):
    """What the report's measuring says on this process when the last process alone has a model that cannot answer."""
    answers_of = type(trainer)._answers_of

    def fail(*_):
        raise OSError("an image that cannot be read")

    try:
        if trainer.args.process_index == trainer.args.world_size - 1:
            type(trainer)._answers_of = fail
        trainer._survey()
    except RuntimeError as error:
        return error
    finally:
        type(trainer)._answers_of = answers_of
    return "nothing"


if __name__ == "__main__":
    main(*sys.argv[1:])
