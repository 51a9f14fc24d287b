"""Two processes that differ, of which one asks, fails, stands still or is lost: all end with the reason, or act together."""

import functools
import os
import sys
import time

import torch
from reliability.harness import KILLED, Act, Expected, Situation, refused, stopped, unharmed
from reliability.tiny import SAVING, On, Points, Stream, accuracy, die, outcome, trained, trainer, vit
from transformers import TrainerCallback

from hf_wash import WashTrainer


EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


def second(place, value, otherwise=None):
    """What process 1 has, and the others have not."""
    return value if place.rank == 1 else otherwise


# ---- What must agree ------------------------------------------------------------------------------------------------

OPTIONS = {
    "learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_epsilon": 1e-6, "max_grad_norm": 0.5,
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 4,
    "warmup_steps": 2, "lr_scheduler_type": "cosine", "label_smoothing_factor": 0.1, "seed": 4, "data_seed": 1,
    "optim": "sgd", "save_strategy": "epoch", "save_total_limit": 1, "save_only_model": True, "eval_strategy": "epoch",
    "logging_steps": 3, "logging_strategy": "epoch", "dataloader_drop_last": True, "full_determinism": True,
    "metric_for_best_model": "loss", "include_for_metrics": ["inputs"], "enable_jit_checkpoint": True,
    "population_size": 4, "mixing": "independent", "shuffle_probability": 0.25, "shuffle_schedule": "constant",
    "shuffle_optimizer_state": True, "shuffle_interval": 2, "shuffle_start": 0.5, "shuffle_stop": 0.5,
    "member_data": "shard", "soup": "greedy", "soup_holdout": 0.3, "soup_batch_norm": "average",
    "soup_batch_norm_batches": 3, "evaluate_members": False,
}  # fmt: skip


def other_option(name, value):
    return lambda place: trained(place, **second(place, {name: value}, {}))


def other(what, value, otherwise, **changes):
    """Another argument of the Trainer."""
    return lambda place: trained(place, given={what: second(place, value(), otherwise())}, **changes)


class Other(Points):
    """As many examples, others."""

    def __init__(self, *args):
        super().__init__(*args)
        self.images = self.images + 1


class OtherLabels(Points):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "labels": (index + 1) % 3}


class Unlabelled(Points):
    def __getitem__(self, index):
        return {"pixel_values": self.images[index]}


def weights(place):
    run = trainer(place)
    with torch.no_grad():
        run.population.members[0].classifier.bias += place.rank
    run.train()


def frozen(place):
    run = trainer(place)
    run.model.vit.requires_grad_(not place.rank)
    run.train()


DISAGREEMENTS = {
    "fewer training examples": (other("train_dataset", lambda: Points(12), Points), ["member"]),
    "a few training examples less": (other("train_dataset", lambda: Points(23), Points), ["examples to train on"]),
    "other training examples": (other("train_dataset", Other, Points), ["example"]),
    "other labels": (other("train_dataset", OtherLabels, Points), ["example"]),
    "no training data": (other("train_dataset", lambda: None, Points), ["needs a `train_dataset`"]),
    "an empty training set": (other("train_dataset", lambda: Points(0), Points), ["empty"]),
    "no labels": (other("train_dataset", Unlabelled, Points), ["no labels"]),
    "a stream": (other("train_dataset", Stream, Points), [""]),
    "fewer evaluation examples": (other("eval_dataset", lambda: Points(3), lambda: Points(7), **EVALUATING), ["evaluate on"]),
    "one evaluation example less": (other("eval_dataset", lambda: Points(6), lambda: Points(7), **EVALUATING), ["evaluate on"]),
    "several evaluation sets": (
        other("eval_dataset", lambda: {"a": Points(7)}, lambda: Points(7), **EVALUATING), ["evaluate on"],
    ),
    "no metrics": (other("compute_metrics", lambda: None, lambda: accuracy, **EVALUATING), ["compute_metrics"]),
    "a wider model": (other("model", lambda: vit(hidden_size=32), vit), ["member 1", "shape"]),
    "a deeper model": (other("model", lambda: vit(num_hidden_layers=2), vit), ["member 1"]),
    "more classes": (other("model", lambda: vit(num_labels=4), vit), ["member 1", "shape"]),
    "half precision": (other("model", lambda: vit().bfloat16(), vit), ["member 1", "dtype"]),
    "other weights": (weights, ["initial weights"]),
    "another part that is frozen": (frozen, ["architecture"]),
    "no evaluation data": (
        lambda place: trainer(place, given={"eval_dataset": second(place, None, Points(7))}, **EVALUATING), ["eval_dataset"],
    ),
    "no model": (lambda place: trainer(place, given={"model": second(place, None, vit())}), ["model"]),
    "a refused option": (other_option("shuffle_probability", 2.0), ["shuffle_probability"]),
    "a folder that is a file": (lambda place: _folder(place), ["file"]),
    "a folder that the other does not see": (
        lambda place: trained(place, folder=place.folder / f"run-{place.rank}", **SAVING), ["not visible to process(es) 1"],
    ),
    "a population that does not divide": (lambda place: trainer(place, population_size=3), ["does not divide among 2"]),
}  # fmt: skip


# What is wrong on process 1 alone: the other says whose reason it is.
ALONE = ("needs a `train_dataset`", "empty", "no labels")


def _folder(place):
    (place.folder / "notes").write_text("mine")
    from reliability.harness import prepared

    prepared(place)
    trainer(place, folder=place.folder / ("run" if place.rank else "notes"))


# ---- Requests of one process ----------------------------------------------------------------------------------------


def asking(flag: str, event: str = "step_end", rank: int = 1, **changes):
    """One process asks at step 3; what came of it."""

    def do(place):
        def ask(state, control):
            setattr(control, flag, True)

        given = {"callbacks": [On(event, ask, step=3)] if place.rank == rank else []}
        if event == "log":
            changes["logging_steps"] = 3
        run = trainer(place, given=given, **changes)
        run.train()
        logged = [(e["step"], sorted({"loss", "eval_loss"} & e.keys())) for e in run.state.log_history]
        found = sorted(path.name for path in place.run.glob("checkpoint-*"))
        return {"steps": run.state.global_step, "log": logged, "checkpoints": found, **outcome(run)}

    return do


def _stopped(place, result):
    return None if result["steps"] == 3 else f"it ran on to step {result['steps']}"


def _saved(place, result):
    return None if result["checkpoints"] == ["checkpoint-3"] and result["steps"] == 6 else str(result)


def _evaluated(place, result):
    return None if [3, ["eval_loss"]] in result["log"] and result["steps"] == 6 else str(result)


def _logged(place, result):
    return None if [3, ["loss"]] in result["log"] and result["steps"] == 6 else str(result)


REQUESTS = {
    "should_training_stop": _stopped, "should_save": _saved, "should_evaluate": _evaluated, "should_log": _logged,
}  # fmt: skip


def wall_clock(place):
    """Each process looks at its own clock."""
    began = time.monotonic()

    def ask(state, control):
        time.sleep(0.02 * place.rank)
        if time.monotonic() - began > 0.3 + 0.05 * place.rank:
            control.should_training_stop = True

    run = trainer(place, given={"callbacks": [On("step_end", ask)]}, max_steps=500)
    run.train()
    steps = run.population.gather_processes(run.state.global_step)
    assert len(set(steps)) == 1 and steps[0] < 500, steps


# ---- Failures of one process ----------------------------------------------------------------------------------------

LUCK = "no luck today"


def boom(*_, **__):
    raise ValueError(LUCK)


def at_event(event: str, do=boom, step: int | None = None, rank: int = 1, **changes):
    def act(place):
        callbacks = [On(event, lambda state, control: do(), step=step)] if place.rank == rank else []
        run = trainer(
            place, given={"callbacks": callbacks, "compute_metrics": accuracy}, **{**SAVING, **EVALUATING, **changes}
        )
        run.train()
        run.evaluate()

    return act


EVENTS = (
    "train_begin", "epoch_begin", "step_begin", "pre_optimizer_step", "optimizer_step", "step_end", "log", "evaluate",
    "prediction_step", "save", "epoch_end", "train_end",
)  # fmt: skip


def wrong(make, **changes):
    """Further arguments of the Trainer on process 1."""
    return lambda place: trained(place, given=second(place, make(), {}), **{**SAVING, **changes})


class FailingTrainer(WashTrainer):
    """Fails in a method that a user may well have written."""

    fails_in = ""

    def compute_loss(self, *args, **kwargs):
        self._maybe("compute_loss", self.state.global_step == 3)
        return super().compute_loss(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        self._maybe("training_step", self.state.global_step == 3)
        return super().training_step(*args, **kwargs)

    def get_train_dataloader(self, *args, **kwargs):
        self._maybe("get_train_dataloader", True)
        return super().get_train_dataloader(*args, **kwargs)

    def get_eval_dataloader(self, *args, **kwargs):
        self._maybe("get_eval_dataloader", True)
        return super().get_eval_dataloader(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        self._maybe("create_optimizer", True)
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        self._maybe("create_scheduler", True)
        return super().create_scheduler(*args, **kwargs)

    def log(self, *args, **kwargs):
        self._maybe("log", True)
        return super().log(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        self._maybe("prediction_step", True)
        return super().prediction_step(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        self._maybe("evaluate", True)
        return super().evaluate(*args, **kwargs)

    def _save(self, *args, **kwargs):
        self._maybe("_save", True)
        return super()._save(*args, **kwargs)

    def _maybe(self, name, now):
        if now and self.fails_in == name:
            raise ValueError(LUCK)


def failing(method: str, rank: int = 1):
    def do(place):
        from reliability.tiny import options

        from hf_wash import WashConfig

        args = WashConfig(**options(place.run, **SAVING, **EVALUATING))
        run = FailingTrainer(vit(), args, train_dataset=Points(), eval_dataset=Points(7), compute_metrics=accuracy)
        run.fails_in = method if place.rank == rank else ""
        run.train()

    return do


METHODS = (
    "compute_loss", "training_step", "get_train_dataloader", "get_eval_dataloader", "create_optimizer", "create_scheduler",
    "log", "prediction_step", "evaluate",
)  # fmt: skip


def _model_that_fails():
    model = vit()
    own, calls = model.forward, []

    @functools.wraps(own)
    def forward(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs) if len(calls) < 4 else boom()

    model.forward = forward
    return model


def _collator():
    from transformers import default_data_collator

    calls = []

    def collate(examples):
        calls.append(1)
        return default_data_collator(examples) if len(calls) < 6 else boom()

    return collate


ARGUMENTS = {
    "a training example": wrong(lambda: {"train_dataset": Points(fails_at=17, wrong=ValueError(LUCK))}),
    "an evaluation example": wrong(lambda: {"eval_dataset": Points(7, fails_at=5, wrong=ValueError(LUCK))}, **EVALUATING),
    "the collator": wrong(lambda: {"data_collator": _collator()}),
    "the model's forward": wrong(lambda: {"model": _model_that_fails()}),
    "the metrics": lambda place: trained(
        place, given={"compute_metrics": second(place, boom, accuracy)}, **SAVING, **EVALUATING
    ),
    "the preprocessing of logits": lambda place: trained(
        place, given={"compute_metrics": accuracy, "preprocess_logits_for_metrics": second(place, boom, lambda logits, labels: logits)},
        **SAVING, **EVALUATING,
    ),
    "a `model_init`": lambda place: trained(place, given={"model_init": second(place, lambda: boom(), lambda: vit())}),
}  # fmt: skip


class AtInit(TrainerCallback):
    def on_init_end(self, args, state, control, **kwargs):
        boom()


def at_init(place):
    trainer(place, given={"callbacks": second(place, [AtInit()], [])}).train()


# ---- Processes that are lost, leave, or stand still -----------------------------------------------------------------


def lost(event: str, step: int | None = None, rank: int = 1, do=die, **changes):
    return at_event(event, do, step, rank, **changes)


def still(event: str, step: int | None = None, **changes):
    return at_event(event, lambda: time.sleep(6), step, ddp_timeout=2, **changes)


KIND_DIFFER = "two processes that differ"
KIND_ASK = "requests of one process"
KIND_FAIL = "exceptions on one process"
KIND_LOST = "a process that is lost or stands still"


def told_by(rank: int) -> tuple[Expected, dict[int, Expected]]:
    """What the others say, and the failing process itself."""
    return stopped(f"process {rank}", LUCK, error="Exception"), {rank: stopped(LUCK, error="ValueError")}


def fails(name: str, do, rank: int = 1) -> Situation:
    return Situation(KIND_FAIL, name, (Act(do, *told_by(rank)),), 2, limit=90)


SITUATIONS = [
    *(
        Situation(KIND_DIFFER, f"`{name}`", (Act(other_option(name, value), refused(name if name != "population_size" else "")),), 2)
        for name, value in OPTIONS.items()
    ),
    *(
        Situation(
            KIND_DIFFER, name,
            (Act(do, refused(*says, *(["process 1"] if says[0] in ALONE else []), error="Exception"), {1: refused(*says, error="Exception")}),), 2,
        )
        for name, (do, says) in DISAGREEMENTS.items()
    ),
    *(
        Situation(KIND_ASK, f"`{flag}` by process {rank}, {what}", (Act(asking(flag, rank=rank, **changes), unharmed(check=check)),), 2)
        for flag, check in REQUESTS.items()
        for what, changes in (("shuffled", {}), ("mixing off", {"mixing": "independent"}), ("after the last shuffle", {"shuffle_stop": 0.3}))
        for rank in ((0, 1) if what == "shuffled" else (1,))
    ),
    *(
        Situation(KIND_ASK, f"`{flag}` when a line is logged", (Act(asking(flag, "log"), unharmed(check=check)),), 2)
        for flag, check in (("should_training_stop", _stopped), ("should_save", _saved), ("should_evaluate", _evaluated))
    ),
    Situation(KIND_ASK, "`should_epoch_stop`", (Act(asking("should_epoch_stop"), unharmed(check=_stopped)),), 2),
    *(
        Situation(
            KIND_ASK, f"`{flag}` by the second of four members' processes",
            (Act(asking(flag, population_size=4), unharmed(check=check)),), 2,
        )
        for flag, check in (("should_training_stop", _stopped), ("should_save", _saved))
    ),
    Situation(KIND_ASK, "a wall-clock limit", (Act(wall_clock, unharmed()),), 2),
    *(fails(f"a callback at `on_{event}`", at_event(event)) for event in EVENTS),
    *(fails(f"a callback of the main one at `on_{event}`", at_event(event, rank=0), 0) for event in ("step_begin", "log", "evaluate", "save")),
    *(
        fails(f"a callback at `on_{event}`, mixing off", at_event(event, mixing="independent"))
        for event in ("step_begin", "step_end", "evaluate")
    ),
    *(fails(f"`{method}`", failing(method)) for method in METHODS),
    Situation(KIND_FAIL, "`_save` of the main one", (Act(failing("_save", 0), stopped("process 0", LUCK, error="RuntimeError")),), 2),
    *(fails(f"`{method}` of the main one", failing(method, 0), 0) for method in ("compute_loss", "get_eval_dataloader")),
    *(fails(name, do) for name, do in ARGUMENTS.items()),
    fails("a callback at `on_init_end`", at_init),
    *(
        Situation(KIND_LOST, f"killed {name}", (Act(do, stopped("process 1", error="RuntimeError"), {1: KILLED}),), 2)
        for name, do in {
            "at the beginning of a step": lost("step_begin", 3),
            "before the optimizer's step": lost("pre_optimizer_step", 3),
            "at the end of a step": lost("step_end", 3),
            "at the end of a step, mixing off": lost("step_end", 3, mixing="independent"),
            "in an evaluation": lost("prediction_step"),
            "after an evaluation": lost("evaluate"),
            "after a save": lost("save"),
            "before training": lost("train_begin"),
        }.items()
    ),
    Situation(KIND_LOST, "killed, the main one", (Act(lost("step_end", 3, rank=0), stopped("process 0", error="RuntimeError"), {0: KILLED}),), 2),
    Situation(
        KIND_LOST, "it leaves with exit code 0",
        (Act(lost("step_end", 3, do=lambda: os._exit(77)), stopped("process 1", error="RuntimeError"), {1: KILLED}),), 2,
    ),
    Situation(
        KIND_LOST, "it leaves with `sys.exit`",
        (Act(lost("step_end", 3, do=lambda: sys.exit(3)), stopped("process 1", error="RuntimeError"),
             {1: stopped(error="SystemExit")}),), 2,
    ),
    *(
        Situation(
            KIND_LOST, f"stands still {name}",
            (Act(do, stopped("process 1", "ddp_timeout", error="RuntimeError"), {1: stopped(error="RuntimeError")}),), 2, limit=90,
        )
        for name, do in {
            "in a step": still("step_begin", 3),
            "in a step, mixing off": still("step_begin", 3, mixing="independent"),
            "in an evaluation": still("evaluate"),
            "in a save": still("save"),
        }.items()
    ),
]  # fmt: skip
