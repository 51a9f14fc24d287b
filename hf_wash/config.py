"""
Every option of a population run, with its help text: [`PopulationArguments`] for any Trainer's arguments, [`WashConfig`]
for the Trainer's own. What the options do lives elsewhere.
"""

import contextlib
import copy
import math
import multiprocessing.context
import os
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.utils import logging

from .methods import METHODS, OPTIONS, Times, foreign_option, times_of
from .population import failures
from .secret_options import without_secrets


logger = logging.get_logger(__name__)

SCHEDULES = ("decreasing", "constant", "increasing")
MEMBER_DATA = ("full", "shard")
SOUPS = ("uniform", "greedy")
SOUP_BATCH_NORMS = ("recalibrate", "average")

# How often a first-layer weight should be shuffled in a run (docs/choosing_p.md says what was measured). From the first
# on, the soup came close to its ensemble (at 10 it fell behind a single model); the second served at all lengths tried,
# with a probability of at most the third.
ENOUGH_SHUFFLES = 35
FITTING_SHUFFLES = 140
LARGEST_FITTED_PROBABILITY = 0.5


@dataclass(repr=False)
class PopulationArguments:
    r"""
    What a population adds to the arguments of any Trainer. It stands in front of the class that it adds them to, whose
    options (batch size, learning rate, epochs, ...) are then those of **one member**:

    ```python
    >>> from dataclasses import dataclass
    >>> from transformers import Seq2SeqTrainingArguments


    >>> @dataclass
    ... class WashSeq2SeqConfig(PopulationArguments, Seq2SeqTrainingArguments): ...


    >>> args = WashSeq2SeqConfig("my-soup", population_size=4, predict_with_generate=True)
    ```

    > Parameters that control the population

    Args:
        population_size (`int`, *optional*):
            Number of members N. Defaults to the checkpoint's when resuming, else to the number of processes if there
            are several, else to 4. It must divide evenly among the processes.
        same_init (`bool`, *optional*, defaults to `True`):
            Whether all members start from member 0's weights. `False` needs a `model_init`, which is then called once
            for each member with the seed `seed + k`.
        member_data (`str`, *optional*, defaults to `"full"`):
            `"full"`: every member sees the whole training set, in its own order. `"shard"`: a disjoint part each.

    > Parameters that control the exchange

        mixing (`str`, *optional*, defaults to `"wash"`):
            What the members exchange after an optimizer step: `"wash"` (shuffled weights), `"independent"` (nothing), or
            what one of the peers does: `"papa"`, `"papa_all"`, `"papa_2"`, `"dart"`, `"sparta"`, `"local_sgd"`,
            `"diloco"`. An option that the method does not take is refused. (`"independent"` takes those of the shuffle,
            so that a run can be made again with the exchange alone switched off.)
        average_interval (`int`, *optional*):
            Optimizer steps between two exchanges, for the methods that average whole models. Defaults to what is
            published: PAPA 10, counted anew in each epoch, whose first step pulls; PAPA-all and PAPA-2 after epoch 0, 5,
            10, ...; DiLoCo 500; local SGD one epoch. DART: a tenth of the run (ours).
        average_rate (`float`, *optional*):
            In [0, 1]. With `"papa"` α, the part of itself that a member keeps at the full learning rate, 0.99 as published;
            with `"diloco"` the outer learning rate, 0.7 as published.
        shuffle_probability (`float`, *optional*):
            The paper's p, the probability with which a weight of the first layer is shuffled in a step. What counts
            is p times the number of steps: 35 served in our small studies, and 10 or fewer gave worse models than no exchange.
            Defaults to what gives a first-layer weight about 140 shuffles in the run, at most 0.5 ([`probability_for`]
            has the rule). With `"sparta"`, of a weight at any depth to be averaged; 0.005 as published.
        shuffle_schedule (`str`, *optional*, defaults to `"decreasing"`):
            How the probability depends on depth: `"decreasing"` (p at the first layer, 0 at the last; the paper's),
            `"constant"` or `"increasing"`.
        shuffle_optimizer_state (`bool`, *optional*, defaults to `False`):
            WASH+Opt: move the optimizer's state of the shuffled weights with them.
        shuffle_interval (`int`, *optional*, defaults to 1):
            Optimizer steps between two shuffles.
        shuffle_start (`float`, *optional*, defaults to 0.0):
            Fraction of the run, in [0, 1], before which nothing is shuffled.
        shuffle_stop (`float`, *optional*, defaults to 1.0):
            Fraction of the run, in [0, 1], after which nothing is shuffled.

    > Parameters that control the soup

        soup (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"`: the mean of all members. `"greedy"`: of those that improve it on held-out training data.
        soup_holdout (`float`, *optional*, defaults to 0.02):
            The part of the training set, in (0, 1), held out for the greedy soup. Never the evaluation set.
        soup_batch_norm (`str`, *optional*, defaults to `"recalibrate"`):
            What becomes of the soup's BatchNorm statistics: `"recalibrate"` estimates them anew on training batches,
            `"average"` takes the mean of the members'.
        soup_batch_norm_batches (`int`, *optional*, defaults to 100):
            Training batches used to recalibrate, drawn from a stream of their own.
        evaluate_members (`bool`, *optional*, defaults to `True`):
            Whether `evaluate` also reports each member and their ensemble.
        push_members (`bool`, *optional*, defaults to `False`):
            Whether pushing to the Hub uploads the members too, under `members/member_<i>/`.
        report (`bool`, *optional*, defaults to `True`):
            Whether a report of the run is written to `report/index.html` at the end of training. It needs matplotlib
            (`pip install "hf-wash[report]"`) and measures members and soup on 256 evaluation examples.

    Raises:
        ValueError: for a value of another type or outside its range, in one sentence that names the option, what it
            must be and the value. NumPy's numbers are taken, and become Python's.
    """

    population_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of members. Defaults to the checkpoint's when resuming, else to the number of processes if "
            "there are several, else to 4."
        },
    )
    mixing: str = field(
        default="wash",
        metadata={
            "help": "What happens to members after an optimizer step. They "
            + "; ".join(f"{method.does} ({name})" for name, method in METHODS.items())
            + ".",
            "choices": METHODS,  # as it is when a command line is read: a script may add to it
        },
    )
    average_interval: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between two averagings. Defaults to what is published: papa 10, papa_all and papa_2 "
            "after epoch 0, 5, 10, ..., diloco 500, local_sgd one epoch; dart a tenth of the run (ours)."
        },
    )
    average_rate: float | None = field(
        default=None,
        metadata={
            "help": "In [0, 1]. papa: alpha, the part of itself that a member keeps (0.99 as published); diloco: the outer "
            "learning rate (0.7 as published)."
        },
    )
    shuffle_probability: float | None = field(
        default=None,
        metadata={
            "help": "The paper's p: probability, in [0, 1], that a first-layer weight is shuffled in a step. Defaults to "
            f"what gives it about {FITTING_SHUFFLES} shuffles in the run, at most {LARGEST_FITTED_PROBABILITY}. With "
            "sparta: that any weight is averaged, 0.005 as published."
        },
    )
    shuffle_schedule: str = field(
        default="decreasing",
        metadata={"help": "How the probability depends on depth.", "choices": list(SCHEDULES)},
    )
    shuffle_optimizer_state: bool = field(
        default=False, metadata={"help": "WASH+Opt: move the optimizer's state of the shuffled weights with them."}
    )
    shuffle_interval: int = field(default=1, metadata={"help": "Optimizer steps between two shuffles."})
    shuffle_start: float = field(
        default=0.0, metadata={"help": "Fraction of the run, in [0, 1], before which nothing is shuffled."}
    )
    shuffle_stop: float = field(
        default=1.0, metadata={"help": "Fraction of the run, in [0, 1], after which nothing is shuffled."}
    )
    same_init: bool = field(
        default=True,
        metadata={"help": "All members start from member 0's weights. False needs a model_init."},
    )
    member_data: str = field(
        default="full",
        metadata={
            "help": "full: every member sees the whole training set, in its own order; shard: a disjoint part each.",
            "choices": list(MEMBER_DATA),
        },
    )
    soup: str = field(
        default="uniform",
        metadata={
            "help": "uniform: the mean of all members; greedy: of those that improve it on held-out training data.",
            "choices": list(SOUPS),
        },
    )
    soup_holdout: float = field(
        default=0.02,
        metadata={"help": "Part of the training set, in (0, 1), held out for the greedy soup."},
    )
    soup_batch_norm: str = field(
        default="recalibrate",
        metadata={
            "help": "The soup's BatchNorm statistics: recalibrate on training batches, or average the members'.",
            "choices": list(SOUP_BATCH_NORMS),
        },
    )
    soup_batch_norm_batches: int = field(
        default=100, metadata={"help": "Training batches used to recalibrate the soup's BatchNorm statistics."}
    )
    evaluate_members: bool = field(
        default=True, metadata={"help": "Report each member and the ensemble beside the soup."}
    )
    push_members: bool = field(
        default=False, metadata={"help": "Upload the members too, under members/member_<i>/ of the repository."}
    )
    report: bool = field(
        default=True,
        metadata={"help": "Write a report of the run, report/index.html, at the end of training. Needs matplotlib."},
    )

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            # A dataclass would make one that tells the Hub's token.
            cls.__repr__ = cls.__str__  # type: ignore[assignment,method-assign]
        order = cls.__mro__
        if TrainingArguments in order and order.index(TrainingArguments) < order.index(PopulationArguments):
            # Nothing would be checked, and losses be scaled by the number of processes.
            raise ValueError(
                f"`PopulationArguments` must be the first base of `{cls.__name__}`, found it behind "
                f"`{cls.__bases__[0].__name__}`."
            )

    def __post_init__(self):
        try:
            # First, so that a wrong value is refused before devices and process groups are set up.
            self._check_population_options()
            self._make_process_group()
            self._complete_trainer_arguments()
        except Exception as error:
            self._tell_the_others(error)
            raise

    def _make_process_group(self) -> None:
        """As the Trainer's arguments (5.23) would later, but with `ddp_timeout` on a CPU, too."""
        if not _launched_in_several():
            return
        if not torch.accelerator.is_available():
            # Started by `torchrun` without an accelerator, a process takes itself for the only one unless it is told
            # that the CPU is meant (accelerate 1.15).
            self.use_cpu = True
        theirs: Any = self
        timeout = timedelta(seconds=theirs.ddp_timeout)
        if not dist.is_initialized():
            if self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"):
                PartialState(cpu=True, backend=theirs.ddp_backend, timeout=timeout)
        elif theirs.ddp_timeout != TrainingArguments.ddp_timeout:
            # Made by somebody else, who may have had reasons for another timeout, unless one was asked for here.
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # torch 2.14
            set_timeout(timeout)

    def _tell_the_others(self, error: Exception) -> None:
        """These have made, or will make, arguments that are fine, and would then wait."""
        if not _launched_in_several():
            return
        with contextlib.suppress(Exception):
            PartialState(cpu=not torch.accelerator.is_available() or bool(self.use_cpu))
        failures.tell(error)

    def _complete_trainer_arguments(self) -> None:
        drop_last = self.dataloader_drop_last  # type: ignore[has-type] # of the arguments behind this class
        super().__post_init__()  # type: ignore[misc] # theirs, too
        # On several processes sentence-transformers (6.2) drops the last batch, lest their numbers of batches differ. A
        # member's batches are those of a run of its own, however many processes there are.
        self.dataloader_drop_last = drop_last

    # What is written of a run's options: the Trainer pickles its arguments beside each model that it saves, in a file
    # that an upload takes along, and callbacks write `to_dict`.

    # The class by whose name a pickle finds it, where that is not the object's own.
    _pickled_as = None

    def __reduce__(self):
        # A process that is being started needs what this one has; what is written to a disk holds no secret.
        starting = multiprocessing.context.get_spawning_popen() is not None
        options = dict(vars(self)) if starting else dict(without_secrets(vars(self)))
        return _restored, (self._pickled_as or type(self), options)

    def __copy__(self):
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __deepcopy__(self, memo):
        made = memo[id(self)] = object.__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for logs and reports; secrets are left out, those inside of options, too."""
        return without_secrets(super().to_dict())  # type: ignore[misc]

    def __str__(self) -> str:
        shown = copy.copy(self)
        vars(shown).update(without_secrets(vars(self)))
        return super(PopulationArguments, shown).__str__()

    __repr__ = __str__

    def _check_population_options(self) -> None:
        def require(condition: bool, name: str, must: str) -> None:
            if not condition:
                raise ValueError(f"`{name}` must be {must}, found {getattr(self, name)!r}.")

        def one_of(name: str, choices: tuple[str, ...]) -> None:
            value = getattr(self, name)
            require(isinstance(value, str) and value in choices, name, f"one of {', '.join(map(repr, choices))}")

        def yes_or_no(name: str) -> None:
            require(isinstance(getattr(self, name), bool), name, "True or False")

        def whole(name: str, what: str) -> None:
            value = getattr(self, name)
            # `True` is an `int`, and no number.
            require(isinstance(value, int) and not isinstance(value, bool) and value >= 1, name, what)

        def number(name: str, what: str, above_0_below_1: bool = False) -> None:
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            # NaN is in no range.
            require(is_number and (0.0 < value < 1.0 if above_0_below_1 else 0.0 <= value <= 1.0), name, what)
            setattr(self, name, float(value))

        for name in PopulationArguments.__dataclass_fields__:
            setattr(self, name, _plain(getattr(self, name)))

        if self.population_size is not None:
            whole("population_size", "a whole number of at least 1")
        one_of("mixing", tuple(METHODS))
        if self.shuffle_probability is not None:
            number("shuffle_probability", "a probability between 0 and 1")
        one_of("shuffle_schedule", SCHEDULES)
        yes_or_no("shuffle_optimizer_state")
        whole("shuffle_interval", "a whole number of steps of at least 1")
        number("shuffle_start", "a fraction of the run between 0 and 1")
        number("shuffle_stop", "a fraction of the run between 0 and 1")
        require(
            self.shuffle_start <= self.shuffle_stop,
            "shuffle_start",
            f"at most `shuffle_stop` ({self.shuffle_stop!r})",
        )
        if self.average_interval is not None:
            whole("average_interval", "a whole number of steps of at least 1")
        if self.average_rate is not None:
            number("average_rate", "a number between 0 and 1")
        self._check_options_of_the_method()
        yes_or_no("same_init")
        one_of("member_data", MEMBER_DATA)
        one_of("soup", SOUPS)
        number("soup_holdout", "a part of the training set between 0 and 1", above_0_below_1=True)
        one_of("soup_batch_norm", SOUP_BATCH_NORMS)
        whole("soup_batch_norm_batches", "a whole number of batches of at least 1")
        yes_or_no("evaluate_members")
        yes_or_no("push_members")
        yes_or_no("report")

    def _check_options_of_the_method(self) -> None:
        for name in OPTIONS:
            # A class of arguments may have other defaults.
            given = getattr(self, name) != type(self).__dataclass_fields__[name].default
            if given and name not in METHODS[self.mixing].options:
                raise ValueError(foreign_option(self.mixing, name))
        if self.mixing == "diloco" and self.average_rate == 0:
            raise ValueError("`average_rate` must be above 0 with `mixing='diloco'`, whose outer learning rate it is.")
        max_steps = getattr(self, "max_steps", None)
        if self.average_interval is not None and isinstance(max_steps, int) and 0 < max_steps < self.average_interval:
            raise ValueError(
                f"`average_interval` ({self.average_interval} steps) is longer than the run, which has {max_steps} steps."
            )

    @property
    def n_gpu(self) -> int:
        """
        Number of GPUs this process uses: 0 or 1. With several visible GPUs and one process, [`~transformers.Trainer`]
        would switch to `nn.DataParallel`, which would average the members' gradients.
        """
        visible = super().n_gpu  # type: ignore[misc] # of the arguments behind this class
        if visible > 1:
            self._n_gpu = 1
            warnings.warn(
                f"{visible} GPUs are visible but this is one process, so only the first is used. "
                f"To use all of them: `accelerate launch --multi_gpu --num_processes {visible} your_script.py`.",
                stacklevel=2,
            )
        return min(visible, 1)

    def shuffles(self, step: int, total_steps: int) -> bool:
        """
        Whether the population shuffles (with `mixing="sparta"`: averages a few weights) after optimizer step `step`.

        Args:
            step (`int`): The step just taken, from 1 to `total_steps`.
            total_steps (`int`): Optimizer steps in the whole run.
        """
        if self.mixing not in ("wash", "sparta") or step % self.shuffle_interval:
            return False
        return self.shuffle_start * total_steps < step <= self.shuffle_stop * total_steps

    def mixing_steps(self, total_steps: int) -> int:
        """The number of steps, of `total_steps` in the run, after which the population [`shuffles`]."""
        if self.mixing not in ("wash", "sparta"):
            return 0
        # A whole step is above (at most) a number just when it is above (at most) that number rounded down.
        before, until = (math.floor(part * total_steps) for part in (self.shuffle_start, self.shuffle_stop))
        return until // self.shuffle_interval - before // self.shuffle_interval

    def average_times(self, total_steps: int, steps_per_epoch: int) -> Times | None:
        """
        After which steps the members are averaged; `None` for a method that does not average whole models.

        Args:
            total_steps (`int`), steps_per_epoch (`int`): Optimizer steps of a member in the whole run and in an epoch.

        Raises:
            ValueError: if the interval is longer than the run, or they would never be.
        """
        if "average_interval" not in METHODS[self.mixing].options:
            return None
        return times_of(self.mixing, self.average_interval, total_steps, steps_per_epoch)

    @property
    def used_average_rate(self) -> float | None:
        """`average_rate` where it is set, else what is published; `None` for a method without."""
        return METHODS[self.mixing].rate if self.average_rate is None else self.average_rate

    def probability_for(self, total_steps: int) -> float:
        """
        The p of a run: `shuffle_probability` where it is set, else what fits the length of the run.

        What fits is `min(0.5, 140 / (total_steps // shuffle_interval))`, and 0 if the population never shuffles. A later
        start or an earlier stop leaves p as it is: stopped at 75 % of the run, which is how it was measured, it makes
        105 shuffles, not 140. With `mixing="sparta"` it is what is published, whatever the length.

        Args:
            total_steps (`int`): Optimizer steps in the whole run.
        """
        if self.shuffle_probability is not None:
            return self.shuffle_probability
        if not self.mixing_steps(total_steps):
            return 0.0
        published = METHODS[self.mixing].probability
        if published is not None:
            return published
        return min(LARGEST_FITTED_PROBABILITY, FITTING_SHUFFLES / (total_steps // self.shuffle_interval))

    def expected_shuffles(self, total_steps: int) -> float:
        """How often a first-layer weight is shuffled in a run of `total_steps`, on average."""
        return self.probability_for(total_steps) * self.mixing_steps(total_steps)


@dataclass
class WashConfig(PopulationArguments, TrainingArguments):
    """
    Options of a [`WashTrainer`]: those of [`PopulationArguments`], and those of [`~transformers.TrainingArguments`] for
    one member.

    Example:

    ```python
    >>> from hf_wash import WashConfig

    >>> args = WashConfig("my-soup", population_size=4, num_train_epochs=20)
    ```
    """

    if TYPE_CHECKING:
        # The Trainer's arguments have one after their `__post_init__`, whatever was given.
        output_dir: str = "trainer_output"


def _launched_in_several() -> bool:
    return dist.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _restored(arguments_class: type, options: dict[str, Any]) -> Any:
    made = object.__new__(arguments_class)
    vars(made).update(options)
    return made


def _plain(value: Any) -> Any:
    """NumPy's number, truth value or text as Python's: checkpoints and cards write options as JSON."""
    return value.item() if isinstance(value, np.generic) else value
