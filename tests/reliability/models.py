"""Models that cannot be trained, copied, averaged or saved as they are."""

import threading
from types import SimpleNamespace

import torch
from reliability.harness import Act, Situation, refused, stopped, unharmed
from reliability.tiny import SAVING, Points, digest, options, trained, trainer, vit
from torch import nn

from hf_wash import WashConfig, WashTrainer


class Plain(nn.Module):
    """A model that is nobody's: no configuration, no `save_pretrained`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(192, 3)

    def logits(self, pixel_values):
        return self.linear(pixel_values.flatten(1))

    def forward(self, pixel_values, labels=None):
        logits = self.logits(pixel_values)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def like(name, **members):
    return type(name, (Plain,), members)


def train(make, **changes):
    return lambda place: trained(place, given={"model": make()}, **changes)


def frozen():
    return vit().requires_grad_(False)


def with_attribute(**attributes):
    def make():
        model = Plain()
        for name, value in attributes.items():
            setattr(model, name, value)
        return model

    return make


def _forward(answer):
    return like("Answering", forward=lambda self, pixel_values, labels=None: answer(self, pixel_values, labels))


def _raises(*_, **__):
    raise RuntimeError("the third layer has no memory left")


def _meta():
    with torch.device("meta"):
        return vit()


def _tied():
    class Tied(Plain):
        def __init__(self):
            super().__init__()
            self.same = self.linear

    return Tied()


def _with_parameter(value):
    class More(Plain):
        def __init__(self):
            super().__init__()
            self.more = nn.Parameter(value, requires_grad=value.is_floating_point() or value.is_complex())

        def logits(self, pixel_values):
            extra = self.more.sum()
            return super().logits(pixel_values) + (extra.real if extra.is_complex() else extra.float()) * 0

    return More()


def _batch_norm(synchronised=False):
    class Normed(Plain):
        def __init__(self):
            super().__init__()
            self.norm = nn.SyncBatchNorm(192) if synchronised else nn.BatchNorm1d(192)

        def logits(self, pixel_values):
            return self.linear(self.norm(pixel_values.flatten(1)))

    return Normed()


def unsavable():
    """Can be trained and never saved."""
    model = vit()
    model.save_pretrained = _raises
    return model


def init(make, **changes):
    return lambda place: trained(place, given={"model_init": make}, **changes)


def frozen_later(place):
    run = trainer(place)
    run.model.requires_grad_(False)
    run.train()


def swapped_later(place):
    """Another model is put in the Trainer's place after its making."""
    run = trainer(place)
    run.model = vit(hidden_size=32)
    run.train()
    return digest(run.population.members[0])


def one_for_all():
    """A `model_init` that always gives one and the same model."""
    made = vit()
    return init(lambda: made, same_init=False)


ERRORS = {
    "no trainable parameter": (train(frozen), refused("no trainable floating-point parameter")),
    "frozen after it was given": (frozen_later, refused("no trainable floating-point parameter")),
    "no parameter at all": (train(lambda: nn.Identity()), refused("no trainable floating-point parameter")),
    "on the meta device": (train(_meta), refused("meta", error="Exception")),
    "a text": (train(lambda: "google/vit"), refused("`model` must be a `torch.nn.Module`")),
    "a class": (train(lambda: Plain), refused("`model` must be a `torch.nn.Module`")),
    "what cannot be copied": (train(with_attribute(lock=threading.Lock())), refused("cannot be copied")),
    "a generator, which cannot be copied": (
        train(with_attribute(source=(number for number in range(3)))), refused("cannot be copied"),
    ),
    "no loss in what it returns": (
        train(_forward(lambda self, x, y: {"logits": self.logits(x)})), stopped("did not return a loss", error="ValueError"),
    ),
    "it returns None": (train(_forward(lambda *_: None)), stopped(error="TypeError")),
    "a loss for each example": (
        train(_forward(lambda self, x, y: {"loss": nn.functional.cross_entropy(self.logits(x), y, reduction="none")})),
        stopped("scalar", error="RuntimeError"),
    ),
    "a loss without a gradient": (
        train(_forward(lambda self, x, y: {"loss": torch.tensor(1.0)})), stopped("does not require grad", error="RuntimeError"),
    ),
    "a forward that raises": (train(_forward(_raises)), stopped("no memory left", error="RuntimeError")),
    "no labels in its forward": (
        train(like("NoLabels", forward=lambda self, pixel_values: {"logits": self.logits(pixel_values)})),
        stopped("loss", error="ValueError"),
    ),
    "it cannot be saved, with checkpoints": (train(unsavable, **SAVING), stopped("no memory left", error="RuntimeError")),
    "it cannot be saved at the end": (lambda place: _save(place, unsavable()), stopped("no memory left", error="RuntimeError")),
    "tied layers, which are saved as nobody reads them": (train(_tied, **SAVING), stopped("share memory", error="RuntimeError")),
    "memory that is not contiguous": (train(lambda: _transposed(), **SAVING), stopped("contiguous", error="RuntimeError")),
    "a `model_init` that raises": (init(lambda: _raises()), refused("no memory left", error="RuntimeError")),
    "a `model_init` that gives None": (init(lambda: None), refused("None", error="RuntimeError")),
    "a `model_init` with three arguments": (init(lambda a, b, c: vit()), refused("0 or 1 argument", error="RuntimeError")),
    "a `model_init` that is no function": (init("vit"), refused(error="Exception")),
    "members of other widths": (
        init(iter([vit(), vit(hidden_size=32), vit(), vit(hidden_size=32)]).__next__, same_init=False),
        refused("Member 1 does not have the architecture of member 0", "has shape"),
    ),
    "members of other dtypes": (
        init(iter([vit(), vit().bfloat16()] * 3).__next__, same_init=False), refused("Member 1 does not have the architecture of member 0", "dtype"),
    ),
    "members frozen otherwise": (
        init(iter([vit(), frozen()] * 3).__next__, same_init=False), refused("Member 1 does not have the architecture of member 0", "requires_grad"),
    ),
    "one model for all members": (one_for_all(), refused("model_init", "the same model")),
    "a label too few": (train(lambda: vit(num_labels=2)), stopped("out of bounds", error="IndexError")),
    "images of another size": (train(lambda: vit(image_size=16)), stopped("size", error="Exception")),
    "another model put in its place": (swapped_later, refused("model", error="Exception")),
}  # fmt: skip


def _save(place, model):
    run = trainer(place, given={"model": model}, max_steps=2)
    run.train()
    run.save_model()


def _saved(make, **changes):
    """Trains with checkpoints, saves, and resumes from half-way to the same weights."""
    changes = {**SAVING, **changes}

    def do(place):
        run = trainer(place, given={"model": make()}, **changes)
        run.train()
        run.save_model()
        again = trainer(place, given={"model": make()}, **changes)
        again.train(resume_from_checkpoint=str(place.run / "checkpoint-4"))
        assert digest(again.model) == digest(run.model), "resumed, the weights are others"

    return do


WORK = {
    "nobody's own class": Plain,
    "a complex parameter": lambda: _with_parameter(torch.ones(3, dtype=torch.complex64)),
    "an integer parameter": lambda: _with_parameter(torch.ones(3, dtype=torch.int64)),
    "an empty parameter": lambda: _with_parameter(torch.ones(0, 3)),
    "a parameter of one number": lambda: _with_parameter(torch.tensor(1.0)),
    "half precision": lambda: vit().bfloat16(),
    "double precision": lambda: vit().double(),
    "a frozen backbone": lambda: _with_frozen_backbone(),
    "BatchNorm": _batch_norm,
    "a namespace for an attribute": with_attribute(notes=SimpleNamespace(a=1)),
    "a lambda for an attribute": with_attribute(scale=lambda x: 2 * x),
    "evaluation mode": lambda: vit().eval(),
}


def _with_frozen_backbone():
    model = vit()
    model.vit.requires_grad_(False)
    return model


def _transposed():
    model = Plain()
    model.linear.weight.data = model.linear.weight.data.t().contiguous().t()
    return model


def _double(place):
    def collate(examples):
        return {
            "pixel_values": torch.stack([e["pixel_values"] for e in examples]).double(),
            "labels": torch.tensor([e["labels"] for e in examples]),
        }

    trained(place, given={"model": vit().double(), "data_collator": collate})


def _half(place):
    args = WashConfig(**options(place.run, **SAVING))
    run = WashTrainer(vit().bfloat16(), args, train_dataset=_Half())
    run.train()
    return digest(run.model)


class _Half(Points):
    def __getitem__(self, index):
        example = super().__getitem__(index)
        return {**example, "pixel_values": example["pixel_values"].bfloat16()}


KIND = "models"
SITUATIONS = [
    *(Situation(KIND, name, (Act(do, expected),)) for name, (do, expected) in ERRORS.items()),
    *(
        Situation(KIND, name, (Act(_saved(make, **({"optim": "adamw_torch"} if "complex" in name else {})), unharmed()),))
        for name, make in WORK.items()
        if name not in ("half precision", "double precision")
    ),
    Situation(KIND, "half precision", (Act(_half, unharmed()),)),
    Situation(KIND, "double precision", (Act(_double, unharmed()),)),
    Situation(
        KIND, "statistics of all processes",
        (Act(train(lambda: _batch_norm(True)), refused("SyncBatchNorm")),), processes=2,
    ),
]  # fmt: skip
