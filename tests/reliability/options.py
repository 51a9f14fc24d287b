"""Options of another type, outside their range, or that do not go with each other or with a population."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from reliability.harness import Act, Situation, refused
from reliability.tiny import Points, options, trainer, vit
from transformers import TrainingArguments

from hf_wash import MemberOverrides, PopulationArguments, WashConfig, WashTrainer


# Values that no option of the sort takes.
WHOLE = {
    "zero": 0, "negative": -1, "True": True, "text": "2", "a float": 2.0, "NaN": float("nan"), "infinite": float("inf"),
    "a list": [2], "numpy's float": np.float64(2.0), "a tensor": torch.tensor(2), "complex": 2j,
}  # fmt: skip
FRACTION = {
    "negative": -0.1, "above 1": 1.5, "True": True, "text": "0.1", "NaN": float("nan"), "infinite": float("inf"),
    "a list": [0.1], "numpy's True": np.True_, "a tensor": torch.tensor(0.1), "minus infinite": -float("inf"),
}  # fmt: skip
TRUTH = {"text": "False", "0": 0, "1": 1, "None": None, "numpy's 1": np.int64(1), "empty text": "", "a list": []}
NAME = {
    "capitals": "WASH",
    "empty": "",
    "True": True,
    "None": None,
    "a list": ["wash"],
    "a blank": " wash",
    "bytes": b"wash",
}

OF_SORT = {
    **dict.fromkeys(("population_size", "shuffle_interval", "average_interval", "soup_batch_norm_batches"), WHOLE),
    **dict.fromkeys(
        ("shuffle_probability", "shuffle_start", "shuffle_stop", "average_rate", "soup_holdout"), FRACTION
    ),
    **dict.fromkeys(("shuffle_optimizer_state", "same_init", "evaluate_members", "push_members", "report"), TRUTH),
    **dict.fromkeys(("mixing", "shuffle_schedule", "member_data", "soup", "soup_batch_norm"), NAME),
}
# An option that is not here is one whose values nobody has tried.
assert set(OF_SORT) == {field.name for field in dataclasses.fields(PopulationArguments)}


def _config(name: str, value: Any) -> Callable:
    return lambda place: WashConfig(**options(place.run, **{name: value})) and None


def _with(**given) -> Callable:
    """A Trainer's making."""
    return lambda place: trainer(place, **given) and None


def _set_later(**settings) -> Callable:
    """Options that need a package that is not here to be accepted at all."""

    def do(place):
        args = WashConfig(**options(place.run))
        for name, value in settings.items():
            setattr(args, name, value)
        WashTrainer(vit(), args, train_dataset=Points())

    return do


def _made_before(place):
    model = vit()
    trainer(place, given={"model": model, "optimizers": (torch.optim.SGD(model.parameters(), 0.1), None)})


def _plain_arguments(place):
    changes = {
        name: value for name, value in options(place.run).items() if name in TrainingArguments.__dataclass_fields__
    }
    WashTrainer(vit(), TrainingArguments(**changes), train_dataset=Points())


def _wrong_order(place):
    class Behind(TrainingArguments, PopulationArguments): ...


def _synchronised(place):
    import os

    os.environ["ACCELERATE_USE_FSDP"] = "true"
    trainer(place)


def _no_model(place):
    WashTrainer(args=WashConfig(**options(place.run)))


TOGETHER = {
    "a start behind the stop": (_with(shuffle_start=0.5, shuffle_stop=0.25), ["`shuffle_start` must be at most"]),
    "nothing held out": (_with(soup_holdout=0.0), ["`soup_holdout` must be"]),
    "all held out": (_with(soup_holdout=1), ["`soup_holdout` must be"]),
    "no interval": (_with(shuffle_interval=None), ["`shuffle_interval` must be"]),
    "starts that differ, of one model": (_with(same_init=False), ["`same_init=False` needs `model_init`"]),
    "an optimizer made before": (_made_before, ["`optimizers` cannot serve a population of 2"]),
    "overrides for one member": (_with(given={"members": [MemberOverrides()]}), ["lists 1 members", "has 2"]),
    "overrides for none": (_with(given={"members": []}), ["lists 0 members", "has 2"]),
    "a plain Trainer's arguments": (_plain_arguments, ["must be a `WashConfig`"]),
    "the population behind the arguments": (_wrong_order, ["must be the first base of `Behind`"]),
    "DeepSpeed": (_set_later(deepspeed={"zero_optimization": {"stage": 2}}), ["DeepSpeed"]),
    "FSDP in the environment": (_synchronised, ["FSDP"]),
    "noise on embeddings": (_set_later(neftune_noise_alpha=1.0), ["neftune_noise_alpha"]),
    "Liger kernels": (_set_later(use_liger_kernel=True), ["use_liger_kernel"]),
    "an optimizer in the backward pass": (_set_later(optim="adalomo"), ["backward pass"]),
    "GaLore, layer by layer": (_set_later(optim="galore_adamw_layerwise"), ["backward pass"]),
    "a search": (lambda place: trainer(place).hyperparameter_search(), ["needs `model_init`"]),
}  # fmt: skip


def _override(**given) -> Callable:
    return lambda place: (
        trainer(place, given={"members": [MemberOverrides(), MemberOverrides(**given)]}).train() and None
    )


OVERRIDES = {
    f"{name}: {what}": (_override(**{name: value}), [name])
    for name, values in {
        "learning_rate": {
            "text": "0.1",
            "negative": -0.1,
            "NaN": float("nan"),
            "True": True,
            "infinite": float("inf"),
        },
        "weight_decay": {"text": "0.1", "negative": -0.1, "NaN": float("nan"), "True": True},
        "label_smoothing_factor": {"text": "0.1", "negative": -0.1, "NaN": float("nan"), "above 1": 1.5},
    }.items()
    for what, value in values.items()
}

KIND = "options"
SITUATIONS = [
    *(
        Situation(KIND, f"`{name}` is {what}", (Act(_config(name, value), refused(f"`{name}` must be", "found")),))
        for name, values in OF_SORT.items()
        for what, value in values.items()
        # No number of members, or of p, is the default.
        if not (value is None and name in ("population_size", "shuffle_probability"))
    ),
    *(Situation(KIND, name, (Act(do, refused(*says)),)) for name, (do, says) in TOGETHER.items()),
    Situation(KIND, "no model", (Act(_no_model, refused("requires either a `model`", error="RuntimeError")),)),
    *(Situation(KIND, f"a member's {name}", (Act(do, refused(*says)),)) for name, (do, says) in OVERRIDES.items()),
]
