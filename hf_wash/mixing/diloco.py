"""[`DilocoMixer`]: the members' mean as a step of an outer optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .averaging import AveragingMixer, Block, check_steps


class DilocoMixer(AveragingMixer):
    """
    Every so many steps the members' mean is taken as an outer step from where they last met: DiLoCo (Douillard et al.
    2023, https://huggingface.co/papers/2311.08105, algorithm 1; the defaults are OpenDiLoCo's).

    With g = θ_start − mean(θ_local), SGD with Nesterov momentum moves θ_start, v ← momentum·v + g and θ_start ←
    θ_start − learning_rate·(g + momentum·v), and all members go on from there. θ_start and v are float32 (float64
    where a parameter is) of shape `(numel,)`, one copy of each in every process. Inner optimizer states stay. Members
    are one model after each exchange, so that there is no ensemble.

    Args:
        members (`torch.nn.Module` or `list[torch.nn.Module]`):
            As in [`AveragingMixer`]. They start from the same weights; where they differ, member 0's are the start.
        interval (`int`, *optional*, defaults to 500):
            H, the steps between two exchanges; the first is after step H.
        learning_rate (`float`, *optional*, defaults to 0.7), momentum (`float`, *optional*, defaults to 0.9):
            Of the outer optimizer. With 1 and 0 it is local SGD.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            As in [`AveragingMixer`].

    Raises:
        ValueError: as [`AveragingMixer`], and for a learning rate that is not above 0 or a momentum outside [0, 1).

    Example:

    ```python
    import torch
    from hf_wash.mixing import DilocoMixer

    start = torch.nn.Linear(10, 2).state_dict()
    members = [torch.nn.Linear(10, 2) for _ in range(3)]
    for member in members:
        member.load_state_dict(start)
    mixer = DilocoMixer(members, interval=50)
    for step in range(1, 101):
        ...  # a step of each member's optimizer
        mixer.mix(step)
    ```
    """

    def __init__(
        self,
        members: nn.Module | Sequence[nn.Module],
        *,
        interval: int = 500,
        learning_rate: float = 0.7,
        momentum: float = 0.9,
        process_group: dist.ProcessGroup | None = None,
    ):
        self.interval, self.learning_rate, self.momentum = interval, learning_rate, momentum
        options = {"interval": interval, "learning_rate": learning_rate, "momentum": momentum}
        super().__init__(members, options, process_group=process_group)
        with torch.no_grad():
            self._start = nn.Parameter(torch.cat([t.reshape(-1).to(self._dtype) for t in self._tensors[0]]))
        if self._group is not None:
            dist.broadcast(self._start.data, dist.get_global_rank(self._group, 0), group=self._group)
        # In one pass over the memory, a quarter of the time, where torch has it.
        fused = self._device.type in ("cpu", "cuda")
        self._outer = torch.optim.SGD(
            [self._start], lr=learning_rate, momentum=momentum, nesterov=momentum > 0, fused=fused
        )

    def _check(self) -> None:
        check_steps(self.interval, "interval")
        if not (isinstance(self.learning_rate, int | float) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be a number above 0, and is {self.learning_rate!r}.")
        if not (isinstance(self.momentum, int | float) and 0 <= self.momentum < 1):
            raise ValueError(f"momentum must be a number of at least 0 and below 1, and is {self.momentum!r}.")

    def is_due(self, step: int) -> bool:
        """Whether members exchange after a step, counted from 1."""
        return step % self.interval == 0

    def _apply(self, blocks: Sequence[Block], step: int) -> None:
        # In the bucket itself, where the sums lie one behind the other.
        total = self._room[: self._start.numel()]
        self._start.grad = torch.sub(self._start, total, alpha=1 / self._num_members, out=total)
        self._outer.step()
        self._start.grad = None
        parts = self._start.data.split([tensor.numel() for tensor in self._tensors[0]])
        for own in self._tensors:
            torch._foreach_copy_(own, [part.view_as(tensor) for part, tensor in zip(parts, own, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """
        What a run has to keep beside its members.

        Returns:
            `dict`: `start`, where the members last met, of shape `(numel,)`, their parameters one after the other; and
            `outer`, the state of the outer optimizer.
        """
        return {"start": self._start.detach().clone(), "outer": self._outer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Take up what [`DilocoMixer.state_dict`] gave: where members met, and the momentum. The rates are this mixer's.

        Raises:
            ValueError: for the state of another method or model.
        """
        super().load_state_dict(state)
        if state["start"].shape != self._start.shape:
            raise ValueError(
                f"The state of DilocoMixer is of another model, of {state['start'].numel()} parameters instead of "
                f"{self._start.numel()}."
            )
        with torch.no_grad():
            self._start.copy_(state["start"])
        rates = {name: value for name, value in self._outer.param_groups[0].items() if name != "params"}
        self._outer.load_state_dict(state["outer"])
        self._outer.param_groups[0].update(rates)
