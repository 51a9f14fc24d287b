"""
Variants of WASH that its paper does not have, to see whether one is worth being an option: methods of one's own
(`add_method`), made of the library's parts, for members that live in one process on a CPU.

All take the p of the run's length that the documentation advises, and shuffle as many weights as WASH does with it until
three quarters of the run.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_wash.methods import WASH, add_method
from hf_wash.methods import Method as Exchange
from hf_wash.mixing import MixStats, PeriodicAverageMixer, WashMixer, layer_probabilities, shuffled_layers
from hf_wash.mixing.plan import Planner

from .methods import METHODS, Method


STOP = 0.75
# How often p falls, and how often members are averaged after the last shuffle, at most.
STAGES, AVERAGINGS = 10, 7

VARIANTS = {
    "wash_falling": Method("WASH, p falling to 0 at the end", {"mixing": "wash_falling"}, kinds=()),
    "wash_then_mean": Method(f"WASH, then {AVERAGINGS} averagings", {"mixing": "wash_then_mean"}, kinds=()),
    "wash_rows": Method("WASH of whole rows", {"mixing": "wash_rows"}, kinds=()),
    "wash_ema": Method("WASH, EMA of the averaged model", {"mixing": "wash"}, kinds=()),
}
ALL = {**METHODS, **VARIANTS}


def advised(steps: int) -> dict[str, Any]:
    """What the documentation advises: about 140 shuffles of a first-layer weight, until three quarters of the run."""
    return {"shuffle_probability": round(min(0.5, 140 / steps), 6), "shuffle_stop": STOP}


class InTurn:
    """
    One mixer after the other.

    Args:
        mixers (`Sequence`): They keep nothing beside the members.
        which (`Callable[[int], int]`): From a step, counted from 1, to the number of the mixer whose turn it is.
    """

    def __init__(self, mixers: Sequence[Any], which: Callable[[int], int]):
        self._mixers, self._which = mixers, which

    def mix(self, step: int, *, shuffle: bool = True, stop_requested: bool = False) -> MixStats:
        """Let the mixer of this step exchange."""
        return self._mixers[self._which(step)].mix(step, shuffle=shuffle, stop_requested=stop_requested)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class RowMixer:
    """
    Shuffles whole rows (of a convolution its filters, of a bias its values) in place of single weights: each row of a
    layer is selected with the layer's probability, and its owners are permuted at random.

    Args:
        members (`Sequence[nn.Module]`): All members of the population.
        probability (`float`): p.
        steps (`int`): After how many it stops.
        seed (`int`): Of the plans.
    """

    def __init__(self, members: Sequence[nn.Module], probability: float, steps: int, seed: int):
        self._parameters = [
            [p for owned in shuffled_layers(member).values() for p in owned.values()] for member in members
        ]
        by_layer = layer_probabilities(members[0], probability)
        each = [by_layer[layer] for layer, owned in shuffled_layers(members[0]).items() for _ in owned]
        self._planner = Planner(seed, [len(p) for p in self._parameters[0]], each, len(members))
        self._steps = steps

    @torch.no_grad()
    def mix(self, step: int, *, shuffle: bool = True, stop_requested: bool = False) -> MixStats:
        """Shuffle after a step, counted from 1."""
        if not shuffle or step > self._steps:
            return MixStats(stop_requested=stop_requested)
        plan, moved, size = self._planner.draw(step), 0, len(self._parameters)
        sources = np.stack([plan.sources(member) for member in range(size)])
        for number, own in enumerate(zip(*self._parameters, strict=True)):
            part = slice(*plan.offsets[number : number + 2])
            if part.start == part.stop:
                continue
            rows, givers = torch.from_numpy(plan.coordinates[part]), torch.from_numpy(sources[:, part]).long()
            before = torch.stack([parameter[rows] for parameter in own])
            for member, parameter in enumerate(own):
                parameter[rows] = before[givers[member], torch.arange(len(rows))]
            moved += int((givers != torch.arange(size)[:, None]).sum()) * own[0][0].numel()
        nbytes = moved * self._parameters[0][0].element_size()
        return MixStats(moved, nbytes, 0, False, stop_requested, moved, nbytes)

    state_dict, load_state_dict = InTurn.state_dict, InTurn.load_state_dict


def _falling(members: Sequence[nn.Module], args: Any, times: Any) -> InTurn:
    steps = args.max_steps
    mean = advised(steps)["shuffle_probability"] * STOP
    mixers = [
        WashMixer(list(members), probability=min(1.0, 2 * mean * (1 - (stage + 0.5) / STAGES)), seed=args.seed)
        for stage in range(STAGES)
    ]
    return InTurn(mixers, lambda step: min(STAGES - 1, (step - 1) * STAGES // steps))


def _then_mean(members: Sequence[nn.Module], args: Any, times: Any) -> InTurn:
    steps, last = args.max_steps, int(STOP * args.max_steps)
    interval = math.ceil((steps - last) / AVERAGINGS)
    shuffles = WashMixer(list(members), probability=advised(steps)["shuffle_probability"], seed=args.seed)
    # The last step is one.
    first = last + 1 + (steps - last - 1) % interval
    averages = PeriodicAverageMixer(list(members), interval=interval, first=first)
    return InTurn([shuffles, averages], lambda step: int(step > last))


def _rows(members: Sequence[nn.Module], args: Any, times: Any) -> RowMixer:
    steps = args.max_steps
    return RowMixer(members, advised(steps)["shuffle_probability"], int(STOP * steps), args.seed)


_MAKE = {"wash_falling": _falling, "wash_then_mean": _then_mean, "wash_rows": _rows}


def make_known(mixing: str) -> None:
    """Make a variant a value of `mixing` in this process, if it is one that is not the library's."""
    if mixing in _MAKE:
        title = VARIANTS[mixing].title
        make = _MAKE[mixing]
        sentences = "swap weights", "kept swapping weights with one another"
        options = ["average_interval"]
        add_method(mixing, Exchange(title, *sentences, options, [WASH], averages=False, interval=1, make=make))
