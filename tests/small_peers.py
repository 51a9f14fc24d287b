"""A model of three weights and a buffer, whose steps are a few multiplications: for the tests of what peers do in a run."""

import re
import textwrap
from pathlib import Path

import torch
from torch import nn

from hf_wash import MemberOverrides, WashConfig, WashTrainer


EPOCH, LEARNING_RATE = 6, 0.1
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
PEERS = ("papa", "papa_all", "papa_2", "dart", "sparta", "local_sgd", "diloco")


class Tiny(nn.Module):
    """(w·x − y)² / 2, and a running mean of what it has seen, as BatchNorm has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x, labels):
        if self.training:
            self.seen.mul_(0.9).add_(0.1 * x.mean())
        return {"loss": ((x @ self.weight - labels) ** 2).mean() / 2, "logits": x @ self.weight}


class Same(torch.utils.data.Dataset):
    """One example over and over: whatever the order, a batch is the same."""

    def __init__(self, index, batches=EPOCH):
        self.x = torch.tensor([1.0, 0.5 * index, -1.0 + index])
        self.y = torch.tensor(float(index - 1))
        self.batches = batches

    def __len__(self):
        return 2 * self.batches

    def __getitem__(self, index):
        return {"x": self.x, "labels": self.y}


def tiny_trainer(output_dir, mixing, *, size=3, steps=20, data=Same, callbacks=None, eval_dataset=None, **options):
    """A population of [`Tiny`], each with an example of its own, and SGD on a schedule that falls to 0."""
    args = {
        "per_device_train_batch_size": 2, "max_steps": steps, "learning_rate": LEARNING_RATE, "optim": "sgd",
        "max_grad_norm": 0.0, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 5, "seed": 3, "evaluate_members": False, **options,
    }  # fmt: skip
    members = [MemberOverrides(train_dataset=data(index)) for index in range(size)]
    args = WashConfig(str(output_dir), population_size=size, mixing=mixing, **args)
    return WashTrainer(model=Tiny(), args=args, members=members, callbacks=callbacks, eval_dataset=eval_dataset)


def by_hand(exchange, size=3, steps=20):
    """
    The same with tensors alone. `exchange(step, weights, buffers, rate)` gets the step from 1, a list of each, and the
    learning rate that the scheduler has set for the next step, relative to the first.
    """
    weights = [Tiny().weight.detach().clone() for _ in range(size)]
    buffers = [torch.zeros(1) for _ in range(size)]
    data = [Same(index) for index in range(size)]
    for step in range(1, steps + 1):
        rate = LEARNING_RATE * (1 - (step - 1) / steps)
        for weight, buffer, own in zip(weights, buffers, data, strict=True):
            buffer.mul_(0.9).add_(0.1 * own.x.mean())
            weight.sub_(rate * (own.x @ weight - own.y) * own.x)
        exchange(step, weights, buffers, 1 - step / steps)
    return weights, buffers


def snippets():
    """The blocks of Python on the page on contributing."""
    found = re.findall(r"^ *```python\n(.*?)^ *```", CONTRIBUTING.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def add_the_pages_method():
    """Makes the method that the page on contributing adds a value of `mixing`; returns what the page defines."""
    mixer, _, added, _ = snippets()
    names = {"__name__": "contributing"}
    for block in (mixer, added):
        exec(compile(block, CONTRIBUTING.name, "exec"), names)
    return names
