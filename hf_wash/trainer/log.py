"""[`MemberLog`]: what a log line says of each member, the same on every process and every layout."""

import math
from collections.abc import Sequence

import torch
from transformers.utils import logging

from ..population import Population


logger = logging.get_logger(__name__)


class MemberLog:
    """
    Each local member's accumulated loss, gradient norm and learning rate between two log lines. The one owner of the
    loss while a run trains.

    Args:
        population ([`Population`]): The members.
        carried (`list[float]`, *optional*): What a checkpoint says each local member had accumulated.
        skipped (`list[tuple[int, int]]`, *optional*): And what it says of `skipped`.

    Attributes:
        losses (`torch.Tensor` of shape `(local members,)`): What each has accumulated since the last log line.
        skipped (`list[tuple[int, int]]`): For each local member, how many of its losses since then were not finite and
            have been skipped, and how many optimizer steps there were before the first one.
    """

    def __init__(
        self,
        population: Population,
        carried: list[float] | None = None,
        skipped: Sequence[Sequence[int]] | None = None,
    ):
        self._population = population
        count, device = len(population.members), population.device
        self.losses = torch.zeros(count, device=device)
        self.skipped = [tuple(own) for own in skipped] if skipped is not None else [(0, 0)] * count
        self._told: set[int] = set()
        # The next log line covers steps from before an interruption; the loss of this call's steps does not.
        self._since_resume: torch.Tensor | None = None
        if carried is not None:
            self.losses += torch.tensor(carried, device=device)
            self._since_resume = torch.zeros(count, device=device)
        self.norms: list[torch.Tensor] = []
        # Of all parameter groups, from before the scheduler's step.
        self.rates: list[float] | None = None

    def add(self, losses: list[torch.Tensor], steps: int, skip_non_finite: bool) -> torch.Tensor:
        """
        Add a step's losses.

        Args:
            losses (`list[torch.Tensor]`): A scalar for each local member.
            steps (`int`): Optimizer steps taken since the last log line.
            skip_non_finite (`bool`): `logging_nan_inf_filter`: what is not finite counts as the average so far, as
                the Trainer has it for its one loss.

        Returns:
            `torch.Tensor`: Their mean, a scalar.
        """
        step = torch.stack(losses).detach()
        mean = step.mean()
        step = step.to(self.losses.dtype)
        # The Trainer's loop looks at the loss of each step, too, with this filter: here is no further wait for a GPU.
        finite = torch.isfinite(step)
        skips = skip_non_finite and not finite.all()
        for total in (self.losses, self._since_resume):
            if total is not None:
                total += torch.where(finite, step, total / (1 + steps)) if skips else step
        if skips:
            for slot, is_finite in enumerate(finite.tolist()):
                if not is_finite:
                    count, first = self.skipped[slot]
                    self.skipped[slot] = (count + 1, first if count else steps)
        return mean

    def collect(self, step: int, steps: int) -> tuple[list[float], list[int], float]:
        """
        *Collective.* End the window, and warn once of each member that had a loss which was not finite.

        Args:
            step (`int`): Optimizer steps of the run.
            steps (`int`): Those since the last line.

        Returns:
            `tuple[list[float], list[int], float]`: Each member's accumulated loss; how many of its losses were skipped;
            and the mean of what this call of `train` has accumulated, as [`mean_of`] has it.
        """
        skipped = torch.tensor(self.skipped, dtype=self.losses.dtype, device=self.losses.device)
        gathered = self._population.gather_tensors(torch.cat([self.losses[:, None], skipped], dim=1)).tolist()
        losses, counts, firsts = map(list, zip(*gathered, strict=True))
        fresh = losses
        if self._since_resume is not None:
            fresh = self._population.gather_tensors(self._since_resume).tolist()
            self._since_resume = None
        self.losses.zero_()
        self.skipped = [(0, 0)] * len(self.skipped)
        self._warn(losses, counts, firsts, step, steps)
        return losses, [int(count) for count in counts], mean_of(fresh, counts)

    def _warn(self, losses: list[float], counts: list[float], firsts: list[float], step: int, steps: int) -> None:
        for index, (loss, count, first) in enumerate(zip(losses, counts, firsts, strict=True)):
            if index in self._told or (not count and math.isfinite(loss)):
                continue
            self._told.add(index)
            if self._population.rank:
                continue
            if count:
                logger.warning(
                    f"The loss of member {index} was not finite at step {step - steps + int(first) + 1}, and {count:g} "
                    f"time{'s' if count > 1 else ''} up to step {step}. `logging_nan_inf_filter` takes the average so far "
                    f"for it, 0 if there is none; `member_{index}_skipped_losses` says how often, and `loss` is the mean "
                    "of the members that have none."
                )
            else:
                logger.warning(
                    f"The loss of member {index} was not finite between step {step - steps} and step {step}."
                )

    def line(self, step: int, steps: int, rates: list[float | None]) -> tuple[dict[str, float], float]:
        """
        *Collective.* A log line, and what is to be added to the sum of this call's losses.

        Args:
            step (`int`): Optimizer steps of the run.
            steps (`int`): Those since the last line.
            rates (`list`): Each local member's learning rate; `None` where there is none.

        Returns:
            `tuple[dict, float]`: `loss` (as [`mean_of`] has it), `grad_norm` and `learning_rate` (means over members),
            `member_<i>_loss`, the others for each member where they differ, and `member_<i>_skipped_losses` where there
            are any.
        """
        losses, skipped, added = self.collect(step, steps)
        line: dict[str, float] = {"loss": mean_of(losses, skipped) / steps}
        norms: list = [norm.item() for norm in self.norms] or [None] * len(rates)
        gathered = self._population.gather(list(zip(norms, rates, strict=True)))
        for name, values in zip(("grad_norm", "learning_rate"), zip(*gathered, strict=True), strict=True):
            if None in values:
                continue
            alike = len(set(values)) == 1
            line[name] = values[0] if alike else sum(values) / len(values)
            if not alike:
                line |= {f"member_{index}_{name}": value for index, value in enumerate(values)}
        line |= {f"member_{index}_loss": loss / steps for index, loss in enumerate(losses)}
        line |= {f"member_{index}_skipped_losses": count for index, count in enumerate(skipped) if count}
        return line, added


def mean_of(losses: list[float], skipped: Sequence[float]) -> float:
    """
    The mean of the members' losses, summed in member order: of those of which none was skipped, since what stands for a
    skipped one may be 0; of all, if there is no such member.
    """
    whole = [loss for loss, count in zip(losses, skipped, strict=True) if not count] or losses
    return sum(whole) / len(whole)
