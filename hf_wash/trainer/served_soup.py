"""
[`ServedSoup`]: the soup that the Trainer hands out in the place of its members: built of those that are finite, kept,
and known by its state.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from ..population import Population, copy_member, grow_buffers
from ..population.consensus import squared_distance
from ..soup import GreedySoupRecord, greedy_soup, uniform_soup
from ..soup.weights import open_member
from .member import Member


class NonFiniteMemberError(RuntimeError):
    """
    Members hold NaN or infinite values where only finite ones can go on. Raised on every process, at the same step.

    Args:
        found (`Mapping[int, str]`): By the members' index, a tensor of each.
        step (`int`): The optimizer step after which they were looked at.
        consequence (`str`): How the sentence goes on.

    Attributes:
        members (`tuple[int, ...]`): The members.
        step (`int`): The step.
    """

    def __init__(self, found: Mapping[int, str], step: int, consequence: str):
        self.members, self.step = tuple(found), step
        super().__init__(f"{_who_is_not_finite(found, step)}, {consequence}")


def what_becomes_of(found: Mapping[int, str], step: int, what: str) -> str:
    """A sentence on members that are not finite: "..., and are left out of the soup"."""
    return f"{_who_is_not_finite(found, step)}, and {'is' if len(found) == 1 else 'are'} {what}"


def _who_is_not_finite(found: Mapping[int, str], step: int) -> str:
    who = ", ".join(f"member {index} (`{name}`)" for index, name in found.items())
    return f"{who[0].upper()}{who[1:]} hold{'s' if len(found) == 1 else ''} NaN or infinite values at step {step}"


class ServedSoup:
    """
    The one owner of the soup: its model, how it came about, and whether it is what the Trainer serves.

    Attributes:
        served (`bool`): Whether it is the Trainer's model at the moment, and stays so.
        greedy ([`GreedySoupRecord`], *optional*): How a greedy soup was chosen.
        left_out (`dict[int, str]`): The members that are not in it because they are not finite, and a tensor of each.
        consensus_distance (`float`): How far the members that are not left out were from it.
        is_checked (`bool`): Whether it has been shown to load back from where it was saved.
    """

    def __init__(self) -> None:
        self._member: Member | None = None
        self.served = False
        self.greedy: GreedySoupRecord | None = None
        self.left_out: dict[int, str] = {}
        self.consensus_distance = math.nan
        self.is_checked = False
        self._key: Any = None

    @property
    def is_built(self) -> bool:
        """Whether there is one."""
        return self._member is not None

    @property
    def member(self) -> Member:
        """The soup in a member's place. `RuntimeError` before it has been built."""
        if self._member is None:
            raise RuntimeError("The soup has not been built yet.")
        return self._member

    def forget(self) -> None:
        """The members have changed: build it anew when it is next asked for."""
        self._key = None

    def build(
        self,
        population: Population,
        key: Any,
        *,
        step: int,
        share_frozen: bool,
        make: Callable[[nn.Module], Member],
        finish: Callable[[Member], None],
        score: Callable[[Member], float] | None,
    ) -> Member:
        """
        *Collective.* The soup of the members as they are. Those that hold NaN or infinite values are left out.

        Args:
            population ([`Population`]): The members.
            key: Of the members' state; a soup that was built for it is not built again. `None`: build it in any case.
            step (`int`): Optimizer steps that the members have taken.
            share_frozen (`bool`): Whether all members, and so the soup, have the same frozen parameters.
            make (`Callable`): Puts a copy of all that learns of a member into a member's place.
            finish (`Callable`): What a soup needs once its weights are in place: BatchNorm statistics.
            score (`Callable`, *optional*): For a greedy soup: of a finished soup, higher is better. Uniform without.

        Returns:
            [`Member`]: The soup.

        Raises:
            NonFiniteMemberError: on every process, if no member is finite.
        """
        if key is not None and key == self._key and self._member is not None:
            return self._member
        if self._member is None:
            self._member = make(copy_unprepared(population.wholes[0], share_frozen))
        soup = self._member
        whole = soup.whole
        shared = {name for name, p in whole.named_parameters() if not p.requires_grad} if share_frozen else set()
        self.left_out = not_finite(population, shared)
        kept = [index for index in range(population.size) if index not in self.left_out]
        if not kept:
            raise NonFiniteMemberError(
                self.left_out,
                step,
                "so there is no soup: none is left. Go on from a checkpoint before it with a smaller `max_grad_norm`, or "
                "train anew with a lower `learning_rate`.",
            )

        def load(weights: dict[str, torch.Tensor]) -> None:
            grow_buffers(whole, weights)
            whole.load_state_dict(weights, strict=False)
            finish(soup)

        if score is not None:

            def held_out(weights: dict[str, torch.Tensor]) -> float:
                load(weights)
                return score(soup)

            weights, record = greedy_soup([population.weights_of(index, shared) for index in kept], held_out)
            self.greedy = _of_the_population(record, kept, population.size)
        else:
            members = population.state_dicts(exclude=shared, indices=kept)
            # Where all live here nothing is overwritten by the next one, and a list is averaged block by block.
            weights = uniform_soup(list(members) if population.world_size == 1 else members)
        load(weights)
        distances = population.gather([squared_distance(member, whole) for member in population.wholes])
        self.consensus_distance = math.sqrt(sum(distances[index] for index in kept) / len(kept))
        self._key, self.is_checked = key, False
        return soup


def not_finite(population: Population, shared: Collection[str] = ()) -> dict[int, str]:
    """
    *Collective.* The members whose weights or floating-point buffers are not finite, and a tensor of each. What all
    members share, by name, is looked at once.
    """

    def first_of(whole: nn.Module, is_shared: bool) -> str | None:
        tensors = {name: value for name, value in whole.state_dict().items() if (name in shared) == is_shared}
        return open_member(tensors, 0).first_not_finite()

    of_all = first_of(population.wholes[0], True)
    found = [of_all or first_of(whole, False) for whole in population.wholes]
    return {index: name for index, name in enumerate(population.gather(found)) if name is not None}


def _of_the_population(record: GreedySoupRecord, kept: list[int], size: int) -> GreedySoupRecord:
    """The record of a soup of some members, with those that were left out as ones whose score is not a number."""
    scores = dict(zip(kept, record.member_scores, strict=True))
    others = tuple(index for index in range(size) if index not in scores)
    return dataclasses.replace(
        record,
        indices=tuple(kept[index] for index in record.indices),
        member_scores=tuple(scores.get(index, math.nan) for index in range(size)),
        order=(*(kept[index] for index in record.order), *others),
        tried_scores=(*record.tried_scores, *(math.nan for _ in others)),
    )


def copy_unprepared(whole: nn.Module, share_frozen: bool) -> nn.Module:
    """A copy of all that learns of a member, without what accelerate has wrapped around its forward."""
    made = copy_member(whole, share=share_frozen)
    for module in made.modules():
        own = vars(module)
        # A member's noise ends with its training, by a handle that knows the member alone.
        for key in [key for key, hook in module._forward_hooks.items() if hook is neftune_post_forward_hook]:
            del module._forward_hooks[key]
        # The copy brings along the autocast that was wrapped around the member's forward (accelerate 1.15), which may
        # still call the member; not what a Trainer has put in the place of the class's forward.
        original = own.pop("_original_forward", None)
        own.pop("_is_accelerate_prepared", None)
        if original is not None:
            own.pop("forward", None)
            if getattr(original, "__func__", original) is not type(module).forward:
                module.forward = original
    return made
