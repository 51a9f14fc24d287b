"""
[`MixingRun`]: the exchange of one run, after every optimizer step, and what it has moved so far.
"""

import math
import time
from typing import Any

from transformers.utils import logging

from ..config import ENOUGH_SHUFFLES, LARGEST_FITTED_PROBABILITY
from ..mixing import WashMixer
from ..population import Population


logger = logging.get_logger(__name__)


class MixingRun:
    """
    What the members of a run exchange, and when.

    Args:
        args ([`PopulationArguments`]): The options.
        population ([`Population`]): The members.
        optimizer (`torch.optim.Optimizer`): Of this process's members.
        total_steps (`int`): Optimizer steps in the whole run.
        probability (`float`): The paper's p of this run.
    """

    def __init__(self, args: Any, population: Population, optimizer: Any, total_steps: int, probability: float):
        self._args, self._total_steps = args, total_steps
        self.probability = probability
        # Of all members since the run began; the seconds are this process's, those spent in the collective beside.
        self.values_moved = self.bytes_exchanged = 0
        self.seconds = self.wait_seconds = 0.0
        # Of the steps since the last log line: how many, values, bytes.
        self.window = [0, 0, 0]
        self.mixer: WashMixer | None = None
        if population.size > 1:
            self.mixer = WashMixer(
                population.wholes,
                [optimizer],
                probability=probability if args.mixing == "wash" else 0.0,
                schedule=args.shuffle_schedule,
                seed=args.seed,
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
        if self.mixer is None:
            return
        began = time.perf_counter()
        stats = self.mixer.mix(step, shuffle=self._args.shuffles(step, self._total_steps))
        self.seconds += time.perf_counter() - began
        self.wait_seconds += stats.wait_seconds
        self.values_moved += stats.population_values_moved
        self.bytes_exchanged += stats.population_bytes_exchanged
        self.window[0] += 1
        self.window[1] += stats.population_values_moved
        self.window[2] += stats.population_bytes_exchanged

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

    def synchronize(self) -> None:
        """On a GPU a shuffle's verdict is read one call later, which may never come: read it now."""
        if self.mixer is not None:
            self.mixer.synchronize()
