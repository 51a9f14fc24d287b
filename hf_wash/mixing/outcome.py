"""What an exchange comes to: [`MixStats`], or an error that is raised on every process alike."""

from collections.abc import Sequence
from dataclasses import dataclass


class ContagionError(RuntimeError):
    """
    A member would have handed NaN or infinite values to others, or a mean would have become so. Raised on every process, at the same step.

    Attributes:
        members (`tuple[int, ...]`):
            The members whose values were not finite; all of them where finite values are too large for a mean.
        step (`int`):
            The step of the exchange that was refused.
    """

    def __init__(self, members: Sequence[int], step: int, reason: str | None = None):
        self.members = tuple(members)
        self.step = step
        who = f"Member {members[0]} holds" if len(members) == 1 else f"Members {', '.join(map(str, members))} hold"
        reason = reason or (
            f"{who} NaN or infinite values among those to be exchanged at step {step}. The exchange of this step was "
            f"not carried out, so no other member has got any of them."
        )
        super().__init__(
            f"{reason} Go on from a checkpoint before this step with gradients clipped more tightly (in the Trainer "
            f"`max_grad_norm`; there a lower `learning_rate` takes effect in a new run only)."
        )


class PlanMismatchError(RuntimeError):
    """
    Processes came to an exchange with different plans, of different steps for example. Raised on every process.

    Nothing was written into any member.
    """


@dataclass(frozen=True)
class MixStats:
    """
    What an exchange moved. Values are counted once for each member that received one from another member; those of the
    optimizer's state are among them where it is shuffled.

    Attributes:
        values_moved (`int`):
            Values that members of this process received from other members.
        bytes_exchanged (`int`):
            Their bytes, whether they came from another process or not.
        bytes_sent (`int`):
            Bytes that this process put on the wire, headers included. 0 with one process.
        averaged (`bool`):
            Whether whole models were averaged, so that BatchNorm statistics need to be re-estimated.
        stop_requested (`bool`):
            Whether any process asked for a stop. The same on every process.
        population_values_moved (`int`), population_bytes_exchanged (`int`):
            `values_moved` and `bytes_exchanged` over all members, whatever the layout. The same on every process.
        wait_seconds (`float`):
            How long this process waited in the collective, in seconds.
    """

    values_moved: int = 0
    bytes_exchanged: int = 0
    bytes_sent: int = 0
    averaged: bool = False
    stop_requested: bool = False
    population_values_moved: int = 0
    population_bytes_exchanged: int = 0
    wait_seconds: float = 0.0
