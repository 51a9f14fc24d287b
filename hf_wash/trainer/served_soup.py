"""[`ServedSoup`]: the soup that the Trainer hands out in the place of its members: built, kept, and known by its state."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..population import Population, copy_member, grow_buffers
from ..population.consensus import squared_distance
from ..soup import GreedySoupRecord, greedy_soup, uniform_soup
from .member import Member


class ServedSoup:
    """
    The one owner of the soup: its model, how it came about, and whether it is what the Trainer serves.

    Attributes:
        served (`bool`): Whether it is the Trainer's model at the moment, and stays so.
        greedy ([`GreedySoupRecord`], *optional*): How a greedy soup was chosen.
        consensus_distance (`float`): How far the members were from it.
        is_checked (`bool`): Whether it has been shown to load back from where it was saved.
    """

    def __init__(self) -> None:
        self._member: Member | None = None
        self.served = False
        self.greedy: GreedySoupRecord | None = None
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
        share_frozen: bool,
        make: Callable[[nn.Module], Member],
        finish: Callable[[Member], None],
        score: Callable[[Member], float] | None,
    ) -> Member:
        """
        *Collective.* The soup of the members as they are.

        Args:
            population ([`Population`]): The members.
            key: Of the members' state; a soup that was built for it is not built again. `None`: build it in any case.
            share_frozen (`bool`): Whether all members, and so the soup, have the same frozen parameters.
            make (`Callable`): Puts a copy of all that learns of a member into a member's place.
            finish (`Callable`): What a soup needs once its weights are in place: BatchNorm statistics.
            score (`Callable`, *optional*): For a greedy soup: of a finished soup, higher is better. Uniform without.

        Returns:
            [`Member`]: The soup.
        """
        if key is not None and key == self._key and self._member is not None:
            return self._member
        if self._member is None:
            self._member = make(_copy(population.wholes[0], share_frozen))
        soup = self._member
        whole = soup.whole
        shared = {name for name, p in whole.named_parameters() if not p.requires_grad} if share_frozen else ()

        def load(weights: dict[str, torch.Tensor]) -> None:
            grow_buffers(whole, weights)
            whole.load_state_dict(weights, strict=False)
            finish(soup)

        if score is not None:

            def held_out(weights: dict[str, torch.Tensor]) -> float:
                load(weights)
                return score(soup)

            members = [population.weights_of(index, shared) for index in range(population.size)]
            weights, self.greedy = greedy_soup(members, held_out)
        else:
            weights = uniform_soup(population.state_dicts(exclude=shared))
        load(weights)
        distances = population.gather([squared_distance(member, whole) for member in population.wholes])
        self.consensus_distance = math.sqrt(sum(distances) / len(distances))
        self._key, self.is_checked = key, False
        return soup


def _copy(whole: nn.Module, share_frozen: bool) -> nn.Module:
    made = copy_member(whole, share=share_frozen)
    for module in made.modules():
        own = vars(module)
        # The copy brings along the autocast that was wrapped around the member's forward (accelerate 1.15), which may
        # still call the member; not what a Trainer has put in the place of the class's forward.
        original = own.pop("_original_forward", None)
        own.pop("_is_accelerate_prepared", None)
        if original is not None:
            own.pop("forward", None)
            if getattr(original, "__func__", original) is not type(module).forward:
                module.forward = original
    return made
