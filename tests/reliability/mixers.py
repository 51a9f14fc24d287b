"""[`WashMixer`] in a plain training loop: what it is given at its making, and what becomes of its members afterwards."""

import copy
import math
import os
import time

import torch
import torch.distributed as dist
from reliability.harness import KILLED, Act, Situation, refused, stopped, unharmed
from reliability.tiny import die, digest
from torch import nn

from hf_wash import WashMixer


def net(width=8, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def members(count=2, **changes):
    return [net(seed=seed, **changes) for seed in range(count)]


def made(given=None, optimizers=None, **changes):
    """A mixer's making that shall fail before anything has changed."""

    def do(place):
        held = given() if given is not None else members()
        before = [digest(m) for m in held if isinstance(m, nn.Module)]
        try:
            WashMixer(held, optimizers(held) if optimizers is not None else None, **{"probability": 0.5, **changes})
        finally:
            assert before == [digest(m) for m in held if isinstance(m, nn.Module)], "members have changed"

    return do


def mixed(disturb, step=1, before=1, **changes):
    """`before` good steps, a disturbance, and one step more, which shall fail without changing a member."""

    def do(place):
        held = members(3)
        optimizers = [torch.optim.Adam(m.parameters(), 0.1) for m in held]
        mixer = WashMixer(held, optimizers, **{"probability": 0.5, **changes})
        for number in range(before):
            _learn(held, optimizers)
            mixer.mix(number)
        given = disturb(held, optimizers)
        state = [copy.deepcopy(m.state_dict()) for m in held]
        try:
            mixer.mix(step if given is None else given)
        except Exception:
            for own, kept in zip(held, state, strict=True):
                for name, value in own.state_dict().items():
                    assert torch.equal(value.nan_to_num(), kept[name].nan_to_num()), "a member has changed"
            raise

    return do


def _learn(held, optimizers):
    for model, optimizer in zip(held, optimizers, strict=True):
        optimizer.zero_grad()
        model(torch.ones(4, 6)).square().mean().backward()
        optimizer.step()


def _fill(value, index=1):
    def do(held, optimizers):
        with torch.no_grad():
            held[index][0].weight.fill_(value)

    return do


def _two(held, optimizers):
    for index in (0, 2):
        _fill(math.nan, index)(held, optimizers)


def _shape(held, optimizers):
    held[1][0].weight.data = torch.zeros(9, 6)


def _dtype(held, optimizers):
    held[1].double()


def _replaced(held, optimizers):
    held[1][0].weight = nn.Parameter(torch.zeros(8, 6))


def _same_memory(held, optimizers):
    held[1][0].weight.data = held[0][0].weight.data


def _removed(held, optimizers):
    del held[1][0].weight


PROBABILITIES = {
    "negative": -0.1, "above 1": 1.1, "NaN": math.nan, "infinite": math.inf, "a text": "0.5", "None": None, "True": True,
    "a list": [0.5], "a tensor of two": torch.tensor([0.1, 0.2]),
}  # fmt: skip
SEEDS = {"negative": -1, "too large": 1 << 64, "a float": 1.0, "a text": "1", "None": None, "True": True}
STEPS = {
    "negative": -1,
    "too large": 1 << 63,
    "a float": 1.0,
    "a text": "1",
    "None": None,
    "NaN": math.nan,
    "True": True,
}
SCHEDULES = {
    "unknown": "rising", "None": None, "a number": 3, "a list": ["decreasing"], "of a module that is not there": {"9": 0.5},
    "of a probability above 1": {"0": 1.5}, "of a text": {"0": "0.5"}, "of NaN": {"0": math.nan},
}  # fmt: skip

AT_ITS_MAKING = {
    **{f"a probability that is {what}": (made(probability=value), ["probability must be"]) for what, value in PROBABILITIES.items()},
    **{f"a seed that is {what}": (made(seed=value), ["seed must be an integer"]) for what, value in SEEDS.items()},
    **{f"a schedule that is {what}": (made(schedule=value), ["schedule"]) for what, value in SCHEDULES.items()
       if not what.startswith("of a probability") and what not in ("of a text", "of NaN")},
    **{f"a schedule {what}": (made(schedule=SCHEDULES[what]), ["number between 0 and 1"])
       for what in ("of a probability above 1", "of a text", "of NaN")},
    "no members": (made(list), ["no members"]),
    "members that are texts": (made(lambda: ["a", "b"]), ["member"]),
    "members that are state dicts": (made(lambda: [m.state_dict() for m in members()]), ["member"]),
    "members of other widths": (made(lambda: [net(8), net(9)]), ["shape"]),
    "members of other dtypes": (made(lambda: [net(), net().double()]), ["torch.float64"]),
    "members with other names": (made(lambda: [net(), nn.Sequential(nn.Linear(6, 8))]), ["2."]),
    "a member frozen otherwise": (made(lambda: [net(), net().requires_grad_(False)]), ["requires_grad"]),
    "one model twice": (made(lambda: [net()] * 2), ["share the parameter"]),
    "a parameter of two members": (made(lambda: _sharing()), ["share the parameter"]),
    "nothing to train": (made(lambda: [m.requires_grad_(False) for m in members()]), ["nothing to exchange"]),
    "nothing but integers": (made(lambda: [_integers(), _integers()]), ["nothing to exchange"]),
    "an expanded parameter": (made(lambda: [_expanded(), _expanded()]), ["share memory"]),
    "WASH+Opt without optimizers": (made(shuffle_optimizer_state=True), ["needs the members' optimizers"]),
    "an optimizer that lacks parameters": (
        made(optimizers=lambda held: [torch.optim.SGD(held[0].parameters(), 0.1)], shuffle_optimizer_state=True),
        ["optimizer"],
    ),
    "an optimizer that is none": (made(optimizers=lambda held: ["sgd", "sgd"], shuffle_optimizer_state=True), ["optimizer"]),
    "a state that cannot be shuffled": (
        made(optimizers=lambda held: [torch.optim.Adafactor(m.parameters()) for m in held], shuffle_optimizer_state=True),
        ["Adafactor"],
    ),
    "a parameter in two optimizers": (
        made(optimizers=lambda held: [torch.optim.SGD(m.parameters(), 0.1) for m in (held[0], held[0], held[1])]),
        ["two of the optimizers"],
    ),
    "a group without processes": (made(process_group=object()), ["process_group"]),
}  # fmt: skip

IN_THE_LOOP = {
    **{f"a step that is {what}": (mixed(lambda *_, v=value: v if v is not None else "None"), "ValueError", ["step must be"])
       for what, value in STEPS.items()},
    **{f"a weight that is {value}": (mixed(_fill(value)), "ContagionError", ["Member 1", "step 1"])
       for value in (math.nan, math.inf, -math.inf)},
    "weights of two members that are NaN": (
        mixed(_two),
        "ContagionError",
        ["Members 0, 2"],
    ),
    "a parameter of another shape": (mixed(_shape), "ValueError", ["shape"]),
    "a parameter of another dtype": (mixed(_dtype), "ValueError", ["dtype"]),
    "a momentum that is NaN": (
        mixed(lambda held, optimizers: optimizers[1].state[held[1][0].weight]["exp_avg"].fill_(math.nan) is None or None,
              shuffle_optimizer_state=True, step=1),
        "ContagionError",
        ["Member 1"],
    ),
}  # fmt: skip
GOES_ON = {
    "a step twice": mixed(lambda *_: 0),
    "a step backwards": mixed(lambda *_: 1, before=4),
    "steps left out": mixed(lambda *_: 10**12),
    "new memory of a parameter": mixed(
        lambda held, _: setattr(held[1][0].weight, "data", held[1][0].weight.data.clone())
    ),
    "p of 0": mixed(lambda *_: None, probability=0.0),
    "p of 1": mixed(lambda *_: None, probability=1.0),
    "a single member": lambda place: WashMixer([net()], probability=0.5).mix(0) and None,
    "a NaN in what is not shuffled": mixed(lambda held, _: held[1].register_buffer("mask", torch.tensor(math.nan))),
}


def _integers():
    model = nn.Module()
    model.number = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    return model


def _expanded():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1, 3).expand(4, 3))
    return model


def _sharing():
    first, second = members()
    second[0].weight = first[0].weight
    return [first, second]


# Two processes


def loop(disturb=lambda rank, step, model: None, mixer=None, steps=4, seconds=8):
    """A plain loop on each process; what a process does differently is `disturb`'s."""

    def do(place):
        import datetime

        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
        changes = mixer(place.rank) if mixer is not None else {}
        model = changes.pop("model", None) or net(seed=place.rank)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        mixing = WashMixer(model, optimizer, **{"probability": 0.5, **changes})
        for step in range(steps):
            _learn([model], [optimizer])
            other = disturb(place.rank, step, model)
            mixing.mix(step if other is None else other)
        dist.destroy_process_group()

    return do


def second(do):
    """What process 1 does at step 2."""
    return lambda rank, step, model: do(model) if rank == 1 and step == 2 else None


def _nan(model):
    with torch.no_grad():
        model[0].weight.fill_(math.nan)


def _boom(model):
    raise ValueError("no luck today")


DIFFERENT = {
    "another probability": (lambda rank: {"probability": 0.5 + 0.1 * rank}, "probability"),
    "another seed": (lambda rank: {"seed": rank}, "seed"),
    "another schedule": (lambda rank: {"schedule": ("constant", "increasing")[rank]}, "schedule"),
    "another architecture": (lambda rank: {"model": net(8 + rank)}, "shape"),
    "another dtype": (lambda rank: {"model": net().double() if rank else net()}, "torch.float64"),
    "another share that learns": (lambda rank: {"model": net().requires_grad_(not rank)}, ""),
    "WASH+Opt on one only": (lambda rank: {"shuffle_optimizer_state": bool(rank)}, "shuffle_optimizer_state"),
    "a refused probability on one": (lambda rank: {"probability": 0.5 + rank}, "probability"),
    "a refused seed on one": (lambda rank: {"seed": -rank}, "seed"),
}

TWO = {
    "another step": (loop(second(lambda model: 7)), stopped("step", error="PlanMismatchError"), {}),
    "a refused step on one": (loop(second(lambda model: -1)), stopped("", error="Exception"), {}),
    "NaN on one": (loop(second(_nan)), stopped("Member 1", "step 2", error="ContagionError"), {}),
    "an exception on one": (
        loop(second(_boom)), stopped(error="Exception"), {1: stopped("no luck today", error="ValueError")},
    ),
    "a killed process": (loop(second(lambda model: die())), stopped(error="RuntimeError"), {1: KILLED}),
    "a process that leaves": (loop(second(lambda model: os._exit(77))), stopped(error="RuntimeError"), {1: KILLED}),
    "a process that stands still": (
        loop(second(lambda model: time.sleep(5)), seconds=2), stopped(error="RuntimeError"), {1: stopped(error="Exception")},
    ),
    "fewer steps on one": (
        lambda place: loop(steps=4 - place.rank)(place), stopped(error="Exception"), {1: unharmed()},
    ),
}  # fmt: skip

KIND = "mixers in a plain loop"
SITUATIONS = [
    *(Situation(KIND, name, (Act(do, refused(*says)),)) for name, (do, says) in AT_ITS_MAKING.items()),
    *(
        Situation(KIND, name, (Act(do, stopped(*says, error=error)),))
        for name, (do, error, says) in IN_THE_LOOP.items()
        if name != "a step that is None"
    ),
    *(Situation(KIND, name, (Act(do, unharmed()),)) for name, do in GOES_ON.items()),
    *(
        Situation(KIND, f"two processes, {name}", (Act(loop(mixer=mixer), refused(says)),), processes=2)
        for name, (mixer, says) in DIFFERENT.items()
    ),
    *(
        Situation(KIND, f"two processes, {name}", (Act(do, expected, ranks),), processes=2)
        for name, (do, expected, ranks) in TWO.items()
    ),
]
