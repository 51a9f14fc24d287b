"""
[`MixingRun`]: the exchange of one run, after every optimizer step, and what it has moved so far.
"""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..config import ENOUGH_SHUFFLES, LARGEST_FITTED_PROBABILITY, PopulationArguments
from ..hub.traffic import size_of
from ..hub.wording import bytes_text, short
from ..methods import METHODS, OUTER_MOMENTUM, Times
from ..mixing import (
    DilocoMixer,
    PairAverageMixer,
    PapaMixer,
    PeriodicAverageMixer,
    SpartaMixer,
    WashMixer,
)
from ..mixing.agreement import averaged_buffers
from ..mixing.schedule import expected_values_moved
from ..population import Population


logger = logging.get_logger(__name__)


Mixer = WashMixer | DilocoMixer | PairAverageMixer | PapaMixer | PeriodicAverageMixer | SpartaMixer


def make_mixer(
    args: PopulationArguments, wholes: list, optimizer: Any, probability: float, seed: int, times: Times | None
) -> Mixer:
    """
    *Collective.* The mixer that does what `args.mixing` says.

    Args:
        args ([`PopulationArguments`]): The options.
        wholes (`list[nn.Module]`): All that learns of each local member.
        optimizer (`torch.optim.Optimizer`): Of this process's members.
        probability (`float`): The p of the run, for a method that has one.
        seed (`int`): Of what is drawn.
        times ([`Times`], *optional*): When members are averaged, for a method that averages whole models.

    Raises:
        ValueError: for a method that was added and makes something else than a mixer.
    """
    make = METHODS[args.mixing].make
    if make is not None:
        assert times is not None  # `add_method` sees to that
        mixer = make(wholes, args, times)
        missing = [
            name for name in ("mix", "state_dict", "load_state_dict") if not callable(getattr(mixer, name, None))
        ]
        if missing:
            raise ValueError(
                f"What `make` of the method '{args.mixing}' made, a {type(mixer).__name__}, is no mixer: it has no "
                f"{' and no '.join(f'`{name}`' for name in missing)}."
            )
        return mixer
    if args.mixing == "sparta":
        return SpartaMixer(wholes, probability=probability, seed=seed)
    if times is None:
        return WashMixer(
            wholes,
            [optimizer],
            probability=probability if args.mixing == "wash" else 0.0,
            schedule=args.shuffle_schedule,
            seed=seed,
            shuffle_optimizer_state=args.shuffle_optimizer_state,
        )
    rate, buffers = args.used_average_rate, METHODS[args.mixing].buffers
    if args.mixing == "papa":
        assert rate is not None
        return PapaMixer(wholes, [optimizer], rate=1 - rate, interval=times.interval, steps_per_epoch=times.epoch)
    if args.mixing == "diloco":
        assert rate is not None
        return DilocoMixer(wholes, interval=times.interval, learning_rate=rate, momentum=OUTER_MOMENTUM)
    if args.mixing == "papa_2":
        return PairAverageMixer(
            wholes, interval=times.interval, first=times.first, last=times.last, seed=seed, buffers=buffers
        )
    return PeriodicAverageMixer(wholes, interval=times.interval, first=times.first, last=times.last, buffers=buffers)


def expected_exchange(
    args: Any,
    whole: nn.Module,
    members: int,
    steps: int,
    steps_per_epoch: int,
    state: tuple[float, float],
    probability: float | None = None,
) -> tuple[float, float]:
    """
    Values, and their bytes, that members get from each other in a run, on average, as the mixers count them.

    Args:
        args ([`PopulationArguments`]): The options.
        whole (`nn.Module`): All that learns of a member.
        members (`int`), steps (`int`): How many, and how many optimizer steps each takes.
        steps_per_epoch (`int`): Optimizer steps in an epoch.
        state (`tuple[float, float]`): Values and bytes of the optimizer's state for each of the weights'.
        probability (`float`, *optional*): The p of the run, if it is not the one that fits.

    Raises:
        ValueError: for an interval that does not fit into the run.
    """
    if args.mixing == "independent" or members == 1:
        return 0.0, 0.0
    trained = [p for p in whole.parameters() if p.requires_grad and p.is_floating_point()]
    times = args.average_times(steps, steps_per_epoch)
    if times is not None:
        buffers = averaged_buffers(whole).values() if METHODS[args.mixing].buffers else ()
        exchanges = members * times.count(steps)
        return exchanges * sum(t.numel() for t in (*trained, *buffers)), exchanges * size_of([*trained, *buffers])
    bytes_each = size_of(trained) / max(1, sum(p.numel() for p in trained))
    probability = args.probability_for(steps) if probability is None else probability
    if args.mixing == "sparta":
        values = probability * sum(p.numel() for p in trained)
    else:
        values = expected_values_moved(whole, members, probability, args.shuffle_schedule)
    values *= members * args.mixing_steps(steps)
    with_state = state if args.shuffle_optimizer_state else (0.0, 0.0)
    return values * (1 + with_state[0]), values * bytes_each * (1 + with_state[1])


def too_few_shuffles(args: Any, steps: int, probability: float) -> str | None:
    """
    A sentence on a run in which weights are shuffled, and too seldom to be of use.

    Args:
        args ([`PopulationArguments`]): The options, `mixing="wash"` among them.
        steps (`int`): Optimizer steps of a member in the whole run.
        probability (`float`): p.
    """
    mixing_steps = args.mixing_steps(steps)
    expected = probability * mixing_steps
    if not probability or expected >= ENOUGH_SHUFFLES:
        return None
    needed = ENOUGH_SHUFFLES / mixing_steps if mixing_steps else math.inf
    advice = (
        f"`shuffle_probability={needed:.2g}`"
        if needed <= LARGEST_FITTED_PROBABILITY
        else f"train longer, since this run is too short for it even at p = {LARGEST_FITTED_PROBABILITY}"
    )
    return (
        f"A first-layer weight will be shuffled about {expected:.1f} times in this run of {steps} steps "
        f"(p = {probability:g}). In our small studies (docs/choosing_p.md) {ENOUGH_SHUFFLES} shuffles served; with 10 or "
        f"fewer the members and the soup were worse than a single model. For {ENOUGH_SHUFFLES}: {advice}."
    )


class MixingRun:
    """
    What the members of a run exchange, and when.

    Args:
        args ([`PopulationArguments`]): The options.
        population ([`Population`]): The members.
        optimizer (`torch.optim.Optimizer`): Of this process's members.
        total_steps (`int`), steps_per_epoch (`int`): Optimizer steps in the whole run, and in an epoch.
        probability (`float`): The paper's p of this run.

    Attributes:
        after_schedule (`bool`): Whether members exchange when the learning rates have been set for the next step, not as
            a part of the optimizer's step.
    """

    def __init__(
        self,
        args: Any,
        population: Population,
        optimizer: Any,
        total_steps: int,
        steps_per_epoch: int,
        probability: float,
    ):
        self._args, self._total_steps, self._size = args, total_steps, population.size
        self._world_size = population.world_size
        self.probability = probability
        self._method = METHODS[args.mixing]
        self.after_schedule = self._method.averages
        # Of all members since the run began; the seconds are this process's, those spent in the collective beside.
        self.values_moved = self.bytes_exchanged = 0
        self.seconds = self.wait_seconds = 0.0
        # Of the steps since the last log line: how many, values, bytes.
        self.window = [0, 0, 0]
        self.mixer: Mixer | None = None
        self.times: Times | None = None
        if population.size > 1:
            self.times = args.average_times(total_steps, steps_per_epoch)
            self.mixer = make_mixer(args, population.wholes, optimizer, probability, args.seed, self.times)
        # Of the weights: what state an optimizer has is known after its first step.
        self._expected = expected_exchange(
            args, population.wholes[0], population.size, total_steps, steps_per_epoch, (0.0, 0.0), probability
        )

    def repairs(self, step: int) -> bool:
        """Whether whole models become an average after a step, counted from 1, whose activations are then rescaled."""
        return self._method.repaired and isinstance(self.mixer, PeriodicAverageMixer) and self.mixer.is_due(step)

    def parents(self, step: int, index: int) -> Sequence[int]:
        """Whose average a member becomes after a step at which the population [`repairs`]."""
        if isinstance(self.mixer, PairAverageMixer):
            return self.mixer.pairs(step)[index]
        return range(self._size)

    def forecast(self) -> str:
        """What the run takes, in one line: members × steps, and what they will exchange."""
        processes = f"{self._world_size} process{'es' if self._world_size > 1 else ''}"
        run = f"{self._size} member{'s' if self._size > 1 else ''} × {self._total_steps:,} steps on {processes}"
        values, nbytes = self._expected
        if not values:
            return f"{run}; nothing is exchanged."
        if self.times is not None:
            how = f"{self._method.title}: members {self._method.does}, {self.times.count(self._total_steps)} times"
        elif self._args.mixing == "sparta":
            how = f"SPARTA: a weight is averaged with p = {self.probability:.3g}"
        else:
            shuffles = self.probability * self._args.mixing_steps(self._total_steps)
            how = f"WASH: a first-layer weight is shuffled {shuffles:.3g} times, p = {self.probability:.3g}"
        state = ", and the optimizer's state for them" if self._args.shuffle_optimizer_state else ""
        return f"{run}. {how}; about {short(values)} values, {bytes_text(nbytes)}{state}."

    def say_what_is_exchanged(self) -> None:
        """Say what the run takes, where a progress bar says how far it is, and warn where it is too short for WASH."""
        if self._args.disable_tqdm:
            logger.info(self.forecast())
        else:
            tqdm.write(self.forecast(), file=sys.stderr)
        if self.mixer is not None and self._args.mixing == "wash":
            said = too_few_shuffles(self._args, self._total_steps, self.probability)
            if said is not None:
                logger.warning(said)

    def mix(self, step: int) -> None:
        """*Collective.* The exchange after optimizer step `step`, counted from 1."""
        if self.mixer is None:
            return
        began = time.perf_counter()
        # One that averages whole models knows its own steps.
        due = self.times is not None or self._args.shuffles(step, self._total_steps)
        stats = self.mixer.mix(step, shuffle=due)
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

    def mixer_state(self) -> dict[str, Any]:
        """What the method itself has to keep beside the members; empty for most."""
        return {} if self.mixer is None or isinstance(self.mixer, WashMixer) else self.mixer.state_dict()

    def load(self, state: dict[str, Any] | None) -> None:
        """
        Take up a [`mixer_state`], on the same or another number of processes.

        Raises:
            ValueError: if it is none of this method's, or is missing.
        """
        if not self.mixer_state():
            return
        if state is None:
            raise ValueError(f"the checkpoint does not hold the state of {self._method.title}")
        try:
            self.mixer.load_state_dict(state)  # type: ignore[union-attr] # a method with a state has a mixer
        except Exception as error:  # whatever torch makes of another state
            raise ValueError(
                f"the checkpoint holds another state than one of {self._method.title} ({error})"
            ) from error

    def resume(self, values_moved: int, bytes_exchanged: int, window: list[int]) -> None:
        """Count on from a checkpoint."""
        self.values_moved, self.bytes_exchanged, self.window = values_moved, bytes_exchanged, list(window)

    def synchronize(self) -> None:
        """On a GPU a shuffle's verdict is read one call later, which may never come: read it now."""
        synchronize = getattr(self.mixer, "synchronize", None)
        if synchronize is not None:
            synchronize()
