"""
The optimizer's state as something to shuffle: which of its tensors go with a parameter, value for value.

WASH+Opt moves the state of the same coordinates with the same permutation. A *slot* is an entry of the state that has
the parameter's shape: SGD's momentum, both moments of Adam. Counters stay where they are.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


# For each shuffled parameter, the names and dtypes of its slots, by name.
Layout = tuple[tuple[tuple[str, torch.dtype], ...], ...]


class _RefusedError(Exception):
    pass


def optimizer_name(optimizer: Any) -> str:
    """The class name of an optimizer, of the one inside where it is wrapped as `accelerate.AcceleratedOptimizer` does."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def slots(optimizer: Any, name: str, parameter: torch.Tensor, state: dict, counters: set[str]) -> dict:
    """
    The tensors in a parameter's optimizer state that are moved with it.

    Args:
        optimizer (`torch.optim.Optimizer`), name (`str`), parameter (`torch.Tensor`):
            Whose state it is; the first two for the message.
        state (`dict`):
            `optimizer.state[parameter]`.
        counters (`set[str]`):
            Entries that are counters, as known from other parameters: of a scalar parameter the shape does not tell.

    Returns:
        `dict[str, torch.Tensor]`: The slots by name, in alphabetical order.
    """
    found = {}
    for key in sorted(state, key=str):
        value = state[key]
        if value is None or isinstance(value, (bool, int, float, str)) or key in counters:
            continue
        if type(value) in (torch.Tensor, nn.Parameter):
            if value.dim() == 0 and parameter.dim() > 0:
                continue
            if value.shape == parameter.shape and value.is_floating_point():
                found[key] = value
                continue
            what = f"{value.dtype} of shape {tuple(value.shape)}"
        else:
            what = f"a {type(value).__name__}"
        raise _RefusedError(
            f"{optimizer_name(optimizer)} keeps {key!r} for the parameter {name!r} as {what}, where a floating-point "
            f"tensor of the parameter's shape {tuple(parameter.shape)} would be needed: its state cannot be shuffled. "
            f"Leave shuffle_optimizer_state off, or use an optimizer such as SGD or AdamW."
        )
    return found


def find_counters(states: Sequence[tuple[torch.Tensor, dict]]) -> set[str]:
    """The entries that are single numbers for parameters that are not: `step`, and what an optimizer has beside it."""
    counters = {"step"}
    for parameter, state in states:
        if parameter.dim() > 0:
            counters.update(
                key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() == 0
            )
    return counters


def trial_refusal(optimizer: Any) -> str | None:
    """
    Says at once what an optimizer's state would be refused for, by one step of another one on a parameter of its own.

    An optimizer that cannot be built from its defaults says nothing here; its state is judged when there is some.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    parameter = nn.Parameter(torch.zeros(3, 2))
    parameter.grad = torch.zeros(3, 2)
    # An optimizer may draw noise; the user's generators are not ours to advance.
    with torch.random.fork_rng(devices=[]):
        try:
            trial = type(inner)([parameter], **inner.defaults)
            trial.step()
            state = trial.state[parameter]
        except Exception:
            return None
    try:
        slots(optimizer, "weight", parameter, state, find_counters([(parameter, state)]))
    except _RefusedError as refused:
        return str(refused)
    return None


class OptimizerStates:
    """
    The slots of the shuffled parameters of this process's members.

    Slots appear when an optimizer first steps, or, for a parameter that got no gradient so far, later. A slot is
    moved from the step on at which all members have it. Nothing is made up for a member that lacks it: an Adam state
    of zeros would need a step counter, and its next update would divide by a bias correction for a first step.

    Args:
        optimizers (`Sequence`):
            The optimizers; each parameter has to be in exactly one of them.
        parameters (`list[dict[str, torch.nn.Parameter]]`):
            The shuffled parameters of each local member, by name, in the same order for all.

    Raises:
        ValueError: when a parameter is in none of the optimizers or in several.
    """

    def __init__(self, optimizers: Sequence[Any], parameters: list[dict[str, nn.Parameter]], first_member: int):
        self._optimizers = list(optimizers)
        self._names = list(parameters[0])
        self._parameters = [list(member.values()) for member in parameters]
        owners: dict[int, int] = {}
        for index, optimizer in enumerate(self._optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if owners.setdefault(id(parameter), index) != index:
                        raise ValueError("A parameter is held by two of the optimizers; each needs exactly one.")
        for member, members_parameters in enumerate(parameters):
            for name, parameter in members_parameters.items():
                if id(parameter) not in owners:
                    raise ValueError(
                        f"No optimizer holds the parameter {name!r} of member {first_member + member}. Pass the "
                        f"optimizer of every member that this process hosts, after the models were moved and prepared."
                    )
        self._owners = [[owners[id(parameter)] for parameter in member] for member in self._parameters]
        # Raised whenever a slot came, went or became another tensor.
        self.version = 0
        self._layout: tuple[int, Layout] | None = None
        # By member and parameter: the state's dictionary, its length when it was read, and its slots.
        self._known: list[list[tuple[dict | None, int, dict]]] = [[(None, 0, {})] * len(m) for m in self._parameters]

    def refresh(self) -> str | None:
        """Looks for slots that came or went. Returns what is to be refused, if something is."""
        states = [optimizer.state for optimizer in self._optimizers]
        counters: set[str] | None = None
        for member, parameters in enumerate(self._parameters):
            owners, known = self._owners[member], self._known[member]
            for number, parameter in enumerate(parameters):
                # `get`, since the state is a defaultdict and must not be created by looking.
                state = states[owners[number]].get(parameter)
                seen, length, found = known[number]
                unchanged = state is seen and (state is None or len(state) == length)
                if unchanged and all(state[key] is value for key, value in found.items()):
                    continue
                self.version += 1
                if state is None:
                    known[number] = (None, 0, {})
                    continue
                if counters is None:
                    counters = find_counters(
                        [(p, s[p]) for m in self._parameters for p, s in itertools.product(m, states) if p in s]
                    )
                try:
                    found = slots(self._optimizers[owners[number]], self._names[number], parameter, state, counters)
                except _RefusedError as refused:
                    return str(refused)
                known[number] = (state, len(state), found)
        return None

    def tensors(self, slot: str, local: int, numbers: Sequence[int]) -> list[torch.Tensor | None]:
        """A slot's tensors of some of a local member's parameters, `None` where there is none."""
        known = self._known[local]
        return [known[number][2].get(slot) for number in numbers]

    def layout(self) -> Layout:
        """The slots that all local members have."""
        if self._layout is None or self._layout[0] != self.version:
            layouts = [
                tuple(tuple((k, v.dtype) for k, v in found.items()) for _, _, found in known) for known in self._known
            ]
            self._layout = self.version, common_layout(layouts)
        return self._layout[1]


def common_layout(layouts: Sequence[Layout]) -> Layout:
    """The slots that are in all of several layouts."""
    if len(layouts) == 1:
        return layouts[0]
    return tuple(
        tuple(slot for slot in first if all(slot in other for other in others))
        for first, *others in zip(*layouts, strict=True)
    )
