"""
[`Requests`]: what a callback, or SIGTERM, asks of a run. Asked for on one process, all do it, at one and the same step.

Only the flags of a [`~transformers.TrainerControl`] are known here; the Trainer acts on them.
"""

import datetime
import signal
import threading
import weakref
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ..population.failures import known_to_all


logger = logging.get_logger(__name__)

FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")

# The events after which the Trainer (5.23) looks at the flags. All processes come to them, in one order. They come to
# `on_log` too where the Trainer logs a line, but anybody else may log on one process alone: the line's log says so.
EVENTS = ("on_step_end", "on_substep_end", "on_epoch_end", "on_evaluate", "on_save", "on_log")
_BY_THE_LINE = "on_log"


class StopSignal:
    """
    SIGTERM as a request to stop at the next step. Trainer's own just-in-time checkpointing (5.23) saves wherever the
    signal finds each process, at different steps.
    """

    # As Trainer's: a SIGKILL that follows at once leaves no time for a checkpoint, so do not begin one.
    WAIT_SECONDS = 3

    def __init__(self) -> None:
        self.requested = False
        self._before = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number, frame) -> None:
        logger.info(f"SIGTERM received: a checkpoint is written in {self.WAIT_SECONDS} s, and training stops.")
        timer = threading.Timer(self.WAIT_SECONDS, self._request)
        timer.daemon = True
        timer.start()

    def _request(self) -> None:
        self.requested = True

    def release(self) -> None:
        """Give the signal back."""
        signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)


class Requests:
    """
    The requests of one run, from the beginning of the block to its end.

    A collective of a few bytes on the host after each of the events after which the Trainer acts: it cannot travel with
    the exchange, which is over when a step's callbacks are asked, and what they ask for is to happen at that step, as
    it does on one process. *Entering is collective.*

    Args:
        handler (`transformers.trainer_callback.CallbackHandler`): Whose callbacks ask.
        world_size (`int`): The number of processes; with one nothing is sent.
        timeout (`float`): Seconds that a process is waited for.
        stop_on_sigterm (`bool`): Whether SIGTERM asks for a checkpoint and the end of training.
    """

    def __init__(self, handler: TrainerCallback, world_size: int, timeout: float, stop_on_sigterm: bool):
        self._handler, self._world_size, self._timeout = handler, world_size, timeout
        self._stop_on_sigterm = stop_on_sigterm
        self._signal: StopSignal | None = None
        # As `Wire`, it does not keep a group alive that has been destroyed; `None` is the default group.
        self._group: weakref.ref | None = None

    def __enter__(self) -> "Requests":
        if self._world_size > 1 and not _default_group_is_on_the_host():
            # A request lies on the host: over NCCL it would wait for the device.
            group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=self._timeout))
            self._group = weakref.ref(group)
        if self._stop_on_sigterm:
            self._signal = StopSignal()
        own_call = self._handler.call_event

        def call_event(event: str, args, state, control, **kwargs):
            control = own_call(event, args, state, control, **kwargs)
            if event in EVENTS and event != _BY_THE_LINE:
                self.agree(event, state, control)
            return control

        vars(self._handler)["call_event"] = call_event
        return self

    def __exit__(self, kind, *rest: Any) -> None:
        vars(self._handler).pop("call_event", None)
        if self._signal is not None:
            self._signal.release()
            self._signal = None
        group = self._group() if self._group is not None else None
        if group is not None and kind is None:
            dist.destroy_process_group(group)
        self._group = None

    def agree(self, event: str, state: TrainerState, control: TrainerControl) -> None:
        """
        *Collective.* Make a request of any process one of all.

        Args:
            event (`str`): One of `EVENTS`, which has just been handled.
            state (`TrainerState`): Where this process stands.
            control (`TrainerControl`): What is asked for here; afterwards, anywhere.

        Raises:
            RuntimeError: on every process, when they do not stand at one event of one step.
        """
        if self._signal is not None and self._signal.requested and event == "on_step_end":
            control.should_save = control.should_training_stop = True
        if self._world_size == 1:
            return
        asked = [bool(getattr(control, flag)) for flag in FLAGS]
        mine = torch.tensor([state.global_step, EVENTS.index(event), *asked])
        everyone = [torch.empty_like(mine) for _ in range(self._world_size)]
        dist.all_gather(everyone, mine, group=self._group() if self._group is not None else None)
        told = torch.stack(everyone)
        if (told[:, :2] != told[0, :2]).any():
            where = [
                f"process {rank} at `{EVENTS[at]}` of step {step}"
                for rank, (step, at) in enumerate(told[:, :2].tolist())
            ]
            raise known_to_all(RuntimeError(f"Processes do not go through one run: {', '.join(where)}."))
        for flag, value in zip(FLAGS, told[:, 2:].amax(0).tolist(), strict=True):
            setattr(control, flag, bool(value))


def _default_group_is_on_the_host() -> bool:
    return "gloo" in str(dist.get_backend())
