"""Resuming what belongs to another run, with other options, after the end, or nothing."""

import os
import shutil

from reliability.harness import Act, Situation, prepared, refused, unharmed, warned
from reliability.tiny import SAVING, STEPS, Points, outcome, resumed, trained, trainer, vit

from hf_wash import MemberOverrides


def resume(requested="auto", **changes):
    return lambda place: resumed(place, requested, **changes)


def explicit(name="checkpoint-4", **changes):
    return lambda place: resumed(place, str(place.run / name), **changes)


def made(make, requested="auto", **changes):
    """After something has been put in place."""

    def do(place):
        make(place.run)
        prepared(place)
        return resumed(place, requested if requested != "explicit" else str(place.run / "checkpoint-4"), **changes)

    return do


REFUSED = {
    "a folder that is not there": (explicit("checkpoint-7"), ["there is no folder"]),
    "a folder that is a file": (
        made(lambda run: (run / "checkpoint-4" / "..").joinpath("notes").write_text("mine"), "run/notes"), ["notes"],
    ),
    "an empty path": (resume("   "), ["there is no folder"]),
    "a path with NUL": (resume("a\0b"), ["Cannot resume"]),
    "a model's folder": (
        made(lambda run: shutil.copytree(run / "checkpoint-4" / "member_0", run / "model"), "run/model"), ["population.json"],
    ),
    "a plain Trainer's checkpoint": (
        made(lambda run: (run / "checkpoint-4" / "population.json").unlink(), "explicit"), ["population.json"],
    ),
    "another population": (explicit(population_size=4), ["holds a population of 2", "run's is 4"]),
    "another seed": (explicit(seed=4), ["seed 3", "run's is 4"]),
    "a wider model": (explicit(given={"model": vit(hidden_size=32)}), ["another architecture", "shape"]),
    "a deeper model": (explicit(given={"model": vit(num_hidden_layers=2)}), ["another architecture"]),
    "a model of more classes": (explicit(given={"model": vit(num_labels=4)}), ["another architecture", "shape"]),
    "a model in half precision": (explicit(given={"model": vit().bfloat16()}), ["another architecture", "dtype"]),
    "another optimizer": (explicit(optim="sgd"), ["Cannot resume"]),
}  # fmt: skip

# What changes and takes effect, and what does not.
TOLD = {
    "p": ({"shuffle_probability": 0.25}, ["shuffle_probability was 0.5 and is 0.25", "effect"]),
    "the schedule of p": ({"shuffle_schedule": "constant"}, ["shuffle_schedule was 'decreasing' and is 'constant'"]),
    "the last shuffle": ({"shuffle_stop": 0.75}, ["shuffle_stop was 1.0 and is 0.75"]),
    "the first shuffle": ({"shuffle_start": 0.9}, ["shuffle_start was 0.0 and is 0.9"]),
    "the interval": ({"shuffle_interval": 2}, ["shuffle_interval was 1 and is 2"]),
    "mixing": ({"mixing": "independent"}, ["mixing was 'wash' and is 'independent'"]),
    "WASH+Opt": ({"shuffle_optimizer_state": True}, ["shuffle_optimizer_state was False and is True"]),
    "the soup": ({"soup": "greedy", "soup_holdout": 0.2}, ["soup was 'uniform' and is 'greedy'"]),
    "whose data": ({"member_data": "shard"}, ["member_data was 'full' and is 'shard'"]),
    "the learning rate": ({"learning_rate": 1e-3}, ["learning_rate was 0.01 and is 0.001", "without effect"]),
    "the weight decay": ({"weight_decay": 0.3}, ["weight_decay was 0.0 and is 0.3", "without effect"]),
    "Adam's betas": ({"adam_beta1": 0.5}, ["adam_beta1 was 0.9 and is 0.5", "without effect"]),
    "the batch size": ({"per_device_train_batch_size": 2}, ["per_device_train_batch_size was 4 and is 2"]),
    "the scheduler": ({"lr_scheduler_type": "cosine"}, ["lr_scheduler_type was 'linear' and is 'cosine'"]),
    "clipping": ({"max_grad_norm": 0.1}, ["max_grad_norm was 1.0 and is 0.1"]),
    "accumulation": ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps was 1 and is 2"]),
    "label smoothing": ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor was 0.0 and is 0.1"]),
    "the seed of the data": ({"data_seed": 5}, ["data_seed was None and is 5"]),
    "how long": ({"max_steps": 8}, ["max_steps was 6 and is 8"]),
    "how often it saves": ({"save_steps": 3}, ["save_steps was 2 and is 3", "without effect"]),
}

REWRITTEN = ("run/checkpoint-[46]", "run/checkpoint-[46]/*", "run/checkpoint-5", "run/checkpoint-5/*")


def weights_only(place):
    trained(place, save_only_model=True, **SAVING)
    prepared(place)
    resumed(place, "auto", max_steps=8)


def finished(place, requested="auto", **changes):
    """What a finished run hands out when it is resumed."""
    run = trainer(place, **{**SAVING, **changes})
    run.train(resume_from_checkpoint=requested)
    return outcome(run)


def _folder_of_the_users(run):
    (run / "checkpoint-99").mkdir()
    (run / "checkpoint-99" / "thesis.txt").write_text("mine")


def _names(run):
    for name in (
        "checkpoint-",
        "checkpoint-x",
        "checkpoint-04",
        "checkpoint-4.bak",
        "checkpoint--4",
        "Checkpoint-9",
        "checkpoint-٤",
    ):
        (run / name).mkdir()
        (run / name / "mine.txt").write_text("mine")


def _staging(run):
    (run / "_incomplete-checkpoint-9").mkdir()
    (run / "_incomplete-checkpoint-9" / "half").write_text("half")


def _link(run):
    os.rename(run / "checkpoint-4", run / "elsewhere")
    (run / "checkpoint-4").symlink_to("elsewhere", target_is_directory=True)


def other_run(place, **changes):
    """A second run in the folder of a first one, whose checkpoints stay."""
    trained(place, seed=9, **SAVING)
    os.rename(place.run / "checkpoint-6", place.run / "checkpoint-60")
    prepared(place)
    trained(place, **{**SAVING, "save_steps": 3, "max_steps": 3, **changes})


def auto_of_another(place):
    """`auto` where the newest checkpoint is of another run than the ones below it."""
    other = place.folder / "other"
    trained(place, folder=other, **SAVING)
    shutil.copytree(other / "checkpoint-6", place.run / "checkpoint-6")
    prepared(place)
    resumed(place, "auto", max_steps=8)


def twice(place):
    """Two runs in one folder at one time."""

    first = trainer(place, **SAVING)
    with first._alone_in_folder():
        prepared(place)
        second = trainer(place, **SAVING)
        second.train()


def more_data(place):
    return resumed(place, "auto", given={"train_dataset": Points(48)})


def _override(place):
    return resumed(place, "auto", given={"members": [MemberOverrides(), MemberOverrides(learning_rate=1e-3)]})


KIND = "resuming"
SITUATIONS = [
    *(
        Situation(KIND, name, (Act(do, refused(*says)),), template="unfinished", may_change=("run/checkpoint-4/population.json",))
        for name, (do, says) in REFUSED.items()
    ),
    *(
        Situation(KIND, f"with another value of {name}", (Act(resume(**changes), warned(*says)),), template="unfinished",
                  may_change=REWRITTEN)
        for name, (changes, says) in TOLD.items()
    ),
    Situation(KIND, "with a member of its own rate", (Act(_override, warned("learning_rate")),), template="unfinished",
              may_change=REWRITTEN),
    Situation(KIND, "with more data", (Act(more_data, warned("batches")),), template="unfinished",
              may_change=REWRITTEN),
    *(
        Situation(KIND, f"`{value!r}`", (Act(resume(value), warned("Resuming from", "checkpoint-4", like="unfinished")),),
                  template="unfinished", may_change=REWRITTEN)
        for value in ("auto", True, "True", "true")
    ),
    *(
        Situation(KIND, f"`{value!r}` in an empty folder", (Act(resume(value), refused("No complete checkpoint")),))
        for value in (True, "True")
    ),
    Situation(KIND, "`auto` in an empty folder", (Act(resume(), warned("no complete checkpoint", like="undisturbed")),)),
    *(
        Situation(KIND, f"`{value!r}` is no wish to resume", (Act(resume(value), unharmed(like="undisturbed")),))
        for value in (None, False, "False", "false")
    ),
    Situation(KIND, "weights only", (Act(weights_only, refused("weights only")),)),
    *(
        Situation(KIND, f"a finished run, `{value!r}`", (Act(lambda p, v=value: finished(p, v), warned("finished", like="undisturbed")),),
                  template="undisturbed")
        for value in ("auto", True)
    ),
    Situation(KIND, "a finished run, for more steps", (Act(lambda p: finished(p, max_steps=STEPS + 2), warned("Resuming")),),
              template="undisturbed"),
    Situation(KIND, "a finished run, for fewer steps", (Act(lambda p: finished(p, max_steps=4), warned("finished")),),
              template="undisturbed"),
    *(
        Situation(KIND, name, (Act(made(make), expected),), template="unfinished", may_change=REWRITTEN)
        for name, (make, expected) in {
            "a folder of the user's called checkpoint-99": (_folder_of_the_users, warned("checkpoint-99", "skipped", like="unfinished")),
            "names that are almost a checkpoint's": (_names, unharmed(like="unfinished")),
            "a checkpoint that is a link": (_link, unharmed(like="unfinished")),
            "a file of the user's called checkpoint-9": (
                lambda run: (run / "checkpoint-9").write_text("mine"), unharmed(like="unfinished"),
            ),
        }.items()
    ),
    Situation(KIND, "what a killed run had begun to write", (Act(made(_staging), unharmed(like="unfinished")),),
              template="unfinished", may_change=(*REWRITTEN, "run/_incomplete*")),
    Situation(KIND, "a second run in the folder of a first", (Act(other_run, warned("another run")),),
              may_change=("run/checkpoint-3*",)),
    Situation(KIND, "a second run that rotates", (Act(lambda p: other_run(p, save_total_limit=1), warned("another run")),),
              may_change=("run/checkpoint-3*",)),
    Situation(KIND, "`auto` beside another run's later checkpoint", (Act(auto_of_another, refused("run")),), template="unfinished"),
    Situation(KIND, "two runs in one folder at one time", (Act(twice, refused("another run writes to")),),
              template="unfinished", may_change=("run/_running",)),
    *(
        Situation(KIND, f"two processes, {name}", (Act(do, expected),), 2, "unfinished", REWRITTEN)
        for name, (do, expected) in {
            "another seed": (explicit(seed=4), refused("seed 3")),
            "another population": (explicit(population_size=4), refused("holds a population of 2")),
            "a wider model": (explicit(given={"model": vit(hidden_size=32)}), refused("another architecture")),
            "a folder that is not there": (explicit("checkpoint-7"), refused("there is no folder")),
            "`auto`": (resume(), unharmed(like="unfinished")),
        }.items()
    ),
    Situation(
        KIND, "two processes that ask for different checkpoints",
        (Act(lambda p: resumed(p, str(p.run / f"checkpoint-{2 + 2 * p.rank}")), refused("checkpoint")),), 2, "unfinished",
    ),
    Situation(
        KIND, "two processes of which one resumes",
        (Act(lambda p: resumed(p, "auto" if p.rank else None), refused("resuming")),), 2, "unfinished",
    ),
]  # fmt: skip
