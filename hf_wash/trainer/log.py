"""[`MemberLog`]: what a log line says of each member, the same on every process and every layout."""

import torch

from ..population import Population


class MemberLog:
    """
    Each local member's accumulated loss, gradient norm and learning rate between two log lines. The one owner of the
    loss while a run trains.

    Args:
        population ([`Population`]): The members.
        carried (`list[float]`, *optional*): What a checkpoint says each local member had accumulated.
    """

    def __init__(self, population: Population, carried: list[float] | None = None):
        self._population = population
        count, device = len(population.members), population.device
        self.losses = torch.zeros(count, device=device)
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
        for total in (self.losses, self._since_resume):
            if total is not None:
                average = total / (1 + steps)
                total += torch.where(torch.isfinite(step), step, average) if skip_non_finite else step
        return mean

    def collect(self) -> tuple[list[float], float]:
        """
        *Collective.* End the window: each member's accumulated loss, and the mean of what this call of `train` has
        accumulated, summed in member order.
        """
        losses = self._population.gather_tensors(self.losses).tolist()
        fresh = losses
        if self._since_resume is not None:
            fresh = self._population.gather_tensors(self._since_resume).tolist()
            self._since_resume = None
        self.losses.zero_()
        return losses, sum(fresh) / len(fresh)

    def line(self, steps: int, rates: list[float | None]) -> tuple[dict[str, float], float]:
        """
        *Collective.* A log line, and what is to be added to the sum of this call's losses.

        Args:
            steps (`int`): Optimizer steps since the last line.
            rates (`list`): Each local member's learning rate; `None` where there is none.

        Returns:
            `tuple[dict, float]`: `loss`, `grad_norm` and `learning_rate` (means over members), `member_<i>_loss`, and
            the others for each member where they differ.
        """
        losses, added = self.collect()
        line = {"loss": sum(losses) / len(losses) / steps}
        norms: list = [norm.item() for norm in self.norms] or [None] * len(rates)
        gathered = self._population.gather(list(zip(norms, rates, strict=True)))
        for name, values in zip(("grad_norm", "learning_rate"), zip(*gathered, strict=True), strict=True):
            if None in values:
                continue
            alike = len(set(values)) == 1
            line[name] = values[0] if alike else sum(values) / len(values)
            if not alike:
                line |= {f"member_{index}_{name}": value for index, value in enumerate(values)}
        return line | {f"member_{index}_loss": loss / steps for index, loss in enumerate(losses)}, added
