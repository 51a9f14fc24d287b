"""Training and evaluation data that are not there, not whole, or not what the model takes."""

import datasets
import torch
from reliability.harness import Act, Situation, refused, stopped, unharmed, warned
from reliability.tiny import SAVING, Points, Stream, accuracy, outcome, trained, trainer

from hf_wash import MemberOverrides


class Unlabelled(Points):
    def __getitem__(self, index):
        return {"pixel_values": self.images[index]}


class Longer(Points):
    """Says that it holds more than it does."""

    def __len__(self):
        return len(self.images) + 8


class Unsized(Points):
    def __len__(self):
        raise RuntimeError("the archive is still being unpacked")


class Negative(Points):
    def __len__(self):
        return -1  # noqa: PLE0303


class Failing(Stream):
    """A stream that breaks off with an error."""

    def __iter__(self):
        for index in range(6):
            yield self.points[index]
        raise ConnectionError("the server has gone away")


def train(data=None, given=None, **changes):
    return lambda place: trained(place, given={"train_dataset": data, **(given or {})}, **changes)


def train_saving(data):
    """With checkpoints on the way, which have to stay."""
    return lambda place: trained(place, given={"train_dataset": data}, **SAVING)


def evaluate(data, metrics=None, **changes):
    """Evaluate once after training."""

    def do(place):
        run = trainer(place, given={"eval_dataset": data, "compute_metrics": metrics}, max_steps=2, **changes)
        run.train()
        return sorted(run.evaluate())

    return do


def overridden(*data, **changes):
    members = [MemberOverrides(train_dataset=own) if own is not None else MemberOverrides() for own in data]
    return lambda place: trained(place, given={"members": members}, **changes)


def example(wrong, at=5):
    """A training set with one example that is `wrong`."""
    return train_saving(Points(fails_at=at, wrong=wrong))


def collator(do, **changes):
    return lambda place: trained(place, given={"data_collator": do}, **changes)


def raises(error):
    def do(*_, **__):
        raise error

    return do


def picture(*shape, label=0, dtype=torch.float32):
    return {"pixel_values": torch.zeros(*shape).to(dtype), "labels": label}


IMAGE = (3, 8, 8)
NO_LABELS = ["member 0", "has no labels"]
TABLE = datasets.Dataset.from_dict({"pixel_values": torch.zeros(12, *IMAGE).tolist(), "labels": [0, 1, 2] * 4})

# Training

REFUSED = {
    "no training data": (train(), ["needs a `train_dataset`"]),
    "an empty training set": (train(Points(0)), ["training set of member 0 is empty"]),
    "an empty table": (train(TABLE.select([])), ["training set of member 0 is empty"]),
    "no labels": (train(Unlabelled()), NO_LABELS),
    "labels that are all None": (train(Points(labels=None)), NO_LABELS),
    "labels under another name": (train(TABLE.rename_column("labels", "kind").with_format("torch")), NO_LABELS),
    "a stream without a number of steps": (train(Stream(), max_steps=-1), ["max_steps"]),
    "fewer examples than members": (
        train(Points(1), member_data="shard"),
        ["1 examples cannot be dealt to 2 members"],
    ),
    "a stream that cannot be dealt": (train(Stream(), member_data="shard"), ["1 shard(s) do not divide among 2"]),
    "a stream to hold out from": (train(Stream(), soup="greedy"), ["needs a training set with a length"]),
    "one example, to be held out": (train(Points(1), soup="greedy"), ["leaves none to train on"]),
    "no batch for the second member": (overridden(None, Points(3), dataloader_drop_last=True), ["batch"]),
    "a member without examples": (overridden(None, Points(0)), ["training set of member 1 is empty"]),
    "members with other numbers of batches": (overridden(None, Points(12)), ["(member 0: 6, member 1: 3)"]),
    "members that would hold out others": (overridden(Points(20), Points(24), soup="greedy"), ["different lengths"]),
    "a member without labels": (overridden(None, Unlabelled()), ["member 1", "has no labels"]),
    "evaluation without data": (
        lambda place: trainer(place, given={"eval_dataset": None}, eval_strategy="epoch"),
        ["eval_dataset"],
    ),
    "a list of texts": (train(["a", "b", "c", "d"]), ["member 0"]),
    "a list of numbers": (train([1, 2, 3, 4]), ["member 0"]),
    "a list of None": (train([None, None, None]), ["member 0"]),
}

ERRORS = {
    "a KeyError": KeyError("image_5.png"),
    "an OSError": OSError(5, "Input/output error", "image_5.png"),
    "a ValueError": ValueError("image_5.png is truncated"),
    "a RuntimeError": RuntimeError("image_5.png is truncated"),
    "a MemoryError": MemoryError("image_5.png is too large"),
    "an IndexError": IndexError("image_5.png"),
    "a UnicodeDecodeError": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "image_5.png"),
}
IN_MID_RUN = {
    **{
        f"an example raises {what}": (example(error), type(error).__name__, ["image_5.png"])
        for what, error in ERRORS.items()
    },
    "an example raises in a worker": (
        train(Points(fails_at=5, wrong=OSError(5, "Input/output error", "image_5.png")), dataloader_num_workers=1),
        "OSError",
        ["image_5.png"],
    ),
    "an image of another size": (example(picture(3, 16, 16)), "RuntimeError", ["size"]),
    "an image of one channel": (example(picture(1, 8, 8)), "RuntimeError", ["size"]),
    "an image without an axis": (example(picture(8, 8)), "RuntimeError", ["size"]),
    "a label out of range": (example(picture(*IMAGE, label=99)), "IndexError", ["Target 99 is out of bounds"]),
    "a negative label": (example(picture(*IMAGE, label=-2)), "IndexError", ["Target -2 is out of bounds"]),
    "an example that is a text": (example("image_5.png"), "Exception", []),
    "an example that is a list": (example([1, 2]), "Exception", []),
    "an example without its image": (example({"labels": 0}), "Exception", []),
    "an example with an empty image": (example(picture(0)), "RuntimeError", ["size"]),
    "a set that says it is longer": (train_saving(Longer()), "IndexError", ["out of bounds"]),
    "a set that cannot tell its length": (train(Unsized()), "RuntimeError", ["still being unpacked"]),
    "a set of negative length": (train(Negative()), "ValueError", ["__len__() should return >= 0"]),
    "a stream that breaks off": (train_saving(Failing()), "ConnectionError", ["gone away"]),
    "a collator that raises": (
        collator(raises(ValueError("cannot stack these"))),
        "ValueError",
        ["cannot stack these"],
    ),
    "a loss that raises": (
        train(Points(), {"compute_loss_func": raises(ValueError("no loss today"))}),
        "ValueError",
        ["no loss today"],
    ),
}

GOES_ON = {
    "a single example": train(Points(1)),
    "fewer examples than a batch": train(Points(2)),
    "one class only": train(Points(8, labels=1)),
    "a stream shorter than the run": train(Stream(8)),
    "a table": train(TABLE.with_format("torch")),
    "a part of a set": train(torch.utils.data.Subset(Points(), range(8))),
    "a label to be ignored": example(picture(*IMAGE, label=-100)),
    "members whose parts do not divide": train(Points(13), member_data="shard"),
    "worker processes": train(Points(), dataloader_num_workers=1),
    "further columns": train(Points(note="mine")),
}

# Evaluation


def _raising(prediction):
    raise ZeroDivisionError("no examples of class 2")


IN_EVALUATION = {
    "no evaluation data": (evaluate(None), "ValueError", ["eval_dataset"]),
    "an evaluation example raises": (
        evaluate(Points(7, fails_at=5, wrong=OSError(5, "Input/output error", "image_5.png"))),
        "OSError",
        ["image_5.png"],
    ),
    "an evaluation label out of range": (evaluate(Points(7, labels=77)), "IndexError", ["Target 77"]),
    "metrics that raise": (evaluate(Points(7), _raising), "ZeroDivisionError", ["no examples of class 2"]),
    "metrics that are a number": (evaluate(Points(7), lambda prediction: 1.0), "Exception", []),
    "metrics that are None": (evaluate(Points(7), lambda prediction: None), "Exception", []),
    "a best metric that is not there": (
        lambda place: trained(
            place, **SAVING, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="f1"
        ),
        "KeyError",
        ["eval_f1"],
    ),
}  # fmt: skip


def not_a_number(place):
    """A metric that is NaN: it is nobody's best, and no checkpoint is lost by it."""
    run = trainer(
        place, **SAVING, eval_strategy="steps", eval_steps=2,
        given={"compute_metrics": lambda prediction: {"accuracy": float("nan")}},
    )  # fmt: skip
    run.train()
    return outcome(run)


EVALUATES = {
    "evaluation data without labels": evaluate(Unlabelled(7)),
    "fewer evaluation examples than a batch": evaluate(Points(1), accuracy),
    "evaluation examples that fill their batches": evaluate(Points(8), accuracy),
    "metrics that are NaN": not_a_number,
    "metrics that are NumPy's": evaluate(
        Points(7), lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()}
    ),
    "several evaluation sets": lambda place: evaluate({"a": Points(7), "b": Points(3)}, accuracy)(place),
    "an empty evaluation set": evaluate(Points(0)),
    "an evaluation stream": evaluate(Stream(7)),
}

KIND = "data"
SITUATIONS = [
    *(Situation(KIND, name, (Act(do, refused(*says)),)) for name, (do, says) in REFUSED.items()),
    *(
        Situation(KIND, name, (Act(do, stopped(*says, error=error)),))
        for name, (do, error, says) in (IN_MID_RUN | IN_EVALUATION).items()
    ),
    *(Situation(KIND, name, (Act(do, unharmed()),)) for name, do in (GOES_ON | EVALUATES).items()),
    Situation(KIND, "an empty stream", (Act(train(Stream(0)), warned("not to be a single sample")),)),
    Situation(
        KIND,
        "no batch, since the last is dropped",
        (Act(train(Points(3), dataloader_drop_last=True), warned("not to be a single sample")),),
    ),
]
