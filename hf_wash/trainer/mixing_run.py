"""
[`MixingRun`]: the exchange of one run, after every optimizer step; what it has moved so far; and SIGTERM, which travels
with it so that all processes stop at one step.
"""

import math
import signal
import threading
import time
from typing import Any

from transformers.utils import logging

from ..config import ENOUGH_SHUFFLES, LARGEST_FITTED_PROBABILITY, PopulationArguments
from ..mixing import WashMixer
from ..population import Population


logger = logging.get_logger(__name__)


class StopSignal:
    """
    SIGTERM as a request to stop at the next step. Trainer's own just-in-time checkpointing (5.23) saves wherever the
    signal finds each process, at different steps; here the request travels with the exchange, and all processes save
    at the step they agree on.
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


class MixingRun:
    """
    What the members of a run exchange, and when.

    Args:
        args ([`PopulationArguments`]): The options.
        population ([`Population`]): The members.
        wholes (`list[nn.Module]`): All that learns of each local member.
        optimizer (`torch.optim.Optimizer`): Of this process's members.
        total_steps (`int`): Optimizer steps in the whole run.
        probability (`float`): The paper's p of this run.
        seed (`int`): Of the plans.
    """

    def __init__(
        self,
        args: PopulationArguments,
        population: Population,
        wholes: list,
        optimizer,
        total_steps: int,
        probability: float,
        seed: int,
    ):
        self._args, self._total_steps = args, total_steps
        self.probability = probability
        # Of all members since the run began; the seconds are this process's, those spent in the collective beside.
        self.values_moved = self.bytes_exchanged = 0
        self.seconds = self.wait_seconds = 0.0
        # Of the steps since the last log line: how many, values, bytes.
        self.window = [0, 0, 0]
        self.stop_signal: StopSignal | None = None
        self.stop_agreed = False
        self.mixer: WashMixer | None = None
        if population.size > 1:
            self.mixer = WashMixer(
                wholes,
                [optimizer],
                probability=probability if args.mixing == "wash" else 0.0,
                schedule=args.shuffle_schedule,
                seed=seed,
                shuffle_optimizer_state=args.shuffle_optimizer_state,
            )

    def say_what_is_shuffled(self) -> None:
        """Log the probability, and warn where the run is too short for it."""
        if self._args.mixing != "wash" or self.mixer is None:
            return
        logger.info(f"Shuffling with p = {self.probability:g}.")
        mixing_steps = self._args.mixing_steps(self._total_steps)
        expected = self.probability * mixing_steps
        if not self.probability or expected >= ENOUGH_SHUFFLES:
            return
        needed = ENOUGH_SHUFFLES / mixing_steps if mixing_steps else math.inf
        advice = (
            f"`shuffle_probability={needed:.2g}` would reach it"
            if needed <= LARGEST_FITTED_PROBABILITY
            else f"this run is too short for it, even at {LARGEST_FITTED_PROBABILITY}; train longer"
        )
        logger.warning(
            f"A first-layer weight will be shuffled about {expected:.1f} times in this run of {self._total_steps} "
            f"steps (p = {self.probability:g}). Below about {ENOUGH_SHUFFLES} the members are disturbed without being "
            f"brought together: {advice}."
        )

    def mix(self, step: int) -> None:
        """*Collective.* The exchange after optimizer step `step`, counted from 1."""
        stop = self.stop_signal is not None and self.stop_signal.requested
        if self.mixer is None:
            self.stop_agreed = self.stop_agreed or stop
            return
        began = time.perf_counter()
        stats = self.mixer.mix(step, shuffle=self._args.shuffles(step, self._total_steps), stop_requested=stop)
        self.seconds += time.perf_counter() - began
        self.wait_seconds += stats.wait_seconds
        self.values_moved += stats.population_values_moved
        self.bytes_exchanged += stats.population_bytes_exchanged
        self.window[0] += 1
        self.window[1] += stats.population_values_moved
        self.window[2] += stats.population_bytes_exchanged
        self.stop_agreed = self.stop_agreed or stats.stop_requested

    def log(self) -> dict[str, float]:
        """`values_moved` and `bytes_exchanged` of a step, on average since the last call."""
        steps, values, exchanged = self.window
        self.window = [0, 0, 0]
        return {
            "values_moved": values / steps if steps else 0,
            "bytes_exchanged": exchanged / steps if steps else 0,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"values_moved": self.values_moved, "bytes_exchanged": self.bytes_exchanged, "moved": self.window}

    def resume(self, values_moved: int, bytes_exchanged: int, window: list[int]) -> None:
        """Count on from a checkpoint."""
        self.values_moved, self.bytes_exchanged, self.window = values_moved, bytes_exchanged, list(window)

    def listen(self) -> None:
        """Take SIGTERM for a request to stop."""
        self.stop_signal = StopSignal()

    def release(self) -> None:
        """Give the signal back, if it was taken."""
        if self.stop_signal is not None:
            self.stop_signal.release()
            self.stop_signal = None

    def synchronize(self) -> None:
        """On a GPU a shuffle's verdict is read one call later, which may never come: read it now."""
        if self.mixer is not None:
            self.mixer.synchronize()
