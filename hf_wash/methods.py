"""
What the members of a population can exchange, as one table: [`METHODS`], by the names that `mixing` takes. What each
does to the members is in `mixing/`; how its mixer is made, in `trainer/mixing_run.py`. Knows no library. [`add_method`]
makes a method of one's own one of them.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


# The options that not every method takes.
SHUFFLE_OPTIONS = (
    "shuffle_probability",
    "shuffle_schedule",
    "shuffle_optimizer_state",
    "shuffle_interval",
    "shuffle_start",
    "shuffle_stop",
)
OPTIONS = (*SHUFFLE_OPTIONS, "average_interval", "average_rate")
_SOME = ("shuffle_probability", "shuffle_interval", "shuffle_start", "shuffle_stop")


@dataclass(frozen=True)
class Source:
    """Where a method is described: what a model card cites. `eprint` is the number on arXiv, if there is one."""

    title: str
    authors: str
    year: int
    url: str
    key: str
    eprint: str | None = None

    @property
    def bibtex(self) -> str:
        """An entry for BibTeX, in which acronyms stay as they are."""
        where = (
            {"eprint": self.eprint, "archivePrefix": "arXiv"}
            if self.eprint
            else {"howpublished": f"\\url{{{self.url}}}"}
        )
        fields = {
            "title": re.sub(r"\w+[A-Z]\w*", r"{\g<0>}", self.title),
            "author": self.authors,
            "year": self.year,
            **where,
        }
        lines = ",\n".join(f"  {name:<13} = {{{value}}}" for name, value in fields.items())
        return f"@misc{{{self.key},\n{lines}\n}}"


def _on_arxiv(eprint: str, key: str, year: int, title: str, authors: str) -> Source:
    return Source(title, authors, year, f"https://arxiv.org/abs/{eprint}", key, eprint)


WASH = _on_arxiv(
    "2405.17517", "fournier2024wash", 2024,
    "WASH: Train your Ensemble with Communication-Efficient Weight Shuffling, then Average",
    "Louis Fournier and Adel Nabli and Masih Aminbeidokhti and Marco Pedersoli and Eugene Belilovsky and Edouard Oyallon",
)  # fmt: skip
PAPA = _on_arxiv(
    "2304.03094", "jolicoeurmartineau2023papa", 2023, "PopulAtion Parameter Averaging (PAPA)",
    "Alexia Jolicoeur-Martineau and Emy Gervais and Kilian Fatras and Yan Zhang and Simon Lacoste-Julien",
)  # fmt: skip
REPAIR = _on_arxiv(
    "2211.08403", "jordan2022repair", 2022, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair",
    "Keller Jordan and Hanie Sedghi and Olga Saukh and Rahim Entezari and Behnam Neyshabur",
)  # fmt: skip
DART = _on_arxiv(
    "2302.14685", "jain2023dart", 2023,
    "DART: Diversify-Aggregate-Repeat Training Improves Generalization of Neural Networks",
    "Samyak Jain and Sravanti Addepalli and Pawan Kumar Sahu and Priyam Dey and R. Venkatesh Babu",
)  # fmt: skip
FEDAVG = _on_arxiv(
    "1602.05629", "mcmahan2017communication", 2017,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    "H. Brendan McMahan and Eider Moore and Daniel Ramage and Seth Hampson and Blaise Ag{\\\"u}era y Arcas",
)  # fmt: skip
DILOCO = _on_arxiv(
    "2311.08105", "douillard2023diloco", 2023, "DiLoCo: Distributed Low-Communication Training of Language Models",
    "Arthur Douillard and Qixuan Feng and Andrei A. Rusu and Rachita Chhaparia and Yani Donchev and Adhiguna Kuncoro and "
    "Marc'Aurelio Ranzato and Arthur Szlam and Jiajun Shen",
)  # fmt: skip
SPARTA = Source("EXO Gym", "{Exo Labs}", 2025, "https://github.com/exo-explore/gym", "exo2025gym")


@dataclass(frozen=True)
class Method:
    """
    A way of exchanging weights.

    Args:
        title (`str`): As its authors call it.
        does (`str`): What the members do, as the end of a sentence that begins with "they".
        did (`str`): What they did while training, for a stranger, as the end of such a sentence.
        options (`Sequence[str]`): Those of `OPTIONS` that it takes.
        sources (`Sequence[Source]`, *optional*): Where it is described.
        probability (`float`, *optional*): The published `shuffle_probability`, if there is one for all runs.
        rate (`float`, *optional*): The published `average_rate`.
        rate_is (`str`, *optional*): What `average_rate` is.
        buffers (`bool`, *optional*, defaults to `False`): Whether buffers are exchanged, too.
        repaired (`bool`, *optional*, defaults to `False`): Whether activations are rescaled after an averaging.
        averages (`bool`, *optional*, defaults to `True`): Whether it averages. Such a method exchanges after the
            scheduler's step; the shuffle, as a part of the optimizer's.
        interval (`int`, *optional*): Of a method that is added: the `average_interval` where none is given.
        make (`Callable`, *optional*): Of a method that is added: what makes its mixer, on every process, of the list of local
            members (modules), the arguments ([`PopulationArguments`]) and the run's [`Times`].
    """

    title: str
    does: str
    did: str
    options: Sequence[str]
    sources: Sequence[Source] = ()
    probability: float | None = None
    rate: float | None = None
    rate_is: str = ""
    buffers: bool = False
    repaired: bool = False
    averages: bool = True
    interval: int | None = None
    make: Callable[[Sequence[Any], Any, "Times"], Any] | None = None


METHODS = {
    "wash": Method(
        "WASH", "swap a few weights",
        "kept swapping a small, randomly chosen part of their weights with one another (a method called WASH). A weight stays "
        "in its place and only changes its owner, which is meant to keep the models close enough to each other to be "
        "averaged, and different enough for that to be worth it",
        SHUFFLE_OPTIONS, [WASH], averages=False,
    ),
    "papa": Method(
        "PAPA", "are pulled towards their mean",
        "were pulled a little towards their average every few steps (a method called PAPA)",
        ("average_interval", "average_rate"), [PAPA], rate=0.99, rate_is="α, the part of itself that a member keeps",
        buffers=True,
    ),
    "papa_all": Method(
        "PAPA-all", "all become their mean",
        "were all replaced by their average now and then, whose activations were then rescaled to theirs (a method called "
        "PAPA-all, with REPAIR)",
        ("average_interval",), [PAPA, REPAIR], buffers=True, repaired=True,
    ),
    "papa_2": Method(
        "PAPA-2", "each become the mean of a random pair",
        "were each replaced by the average of a random pair of them now and then, whose activations were then rescaled to "
        "theirs (a method called PAPA-2, with REPAIR)",
        ("average_interval",), [PAPA, REPAIR], buffers=True, repaired=True,
    ),
    "dart": Method(
        "DART", "all become their mean, a few times in the run",
        "were all replaced by their average several times, as a method called DART has it for models that differ by their "
        "augmentations",
        ("average_interval",), [DART],
    ),
    "sparta": Method(
        "SPARTA", "average a few weights",
        "replaced a small, randomly chosen part of their weights by its average, another one each time (a method called "
        "SPARTA)",
        _SOME, [SPARTA], probability=0.005,
    ),
    "local_sgd": Method(
        "local SGD", "all become their mean",
        "were all replaced by their average every so many steps (a method called local SGD, or federated averaging)",
        ("average_interval",), [FEDAVG],
    ),
    "diloco": Method(
        "DiLoCo", "all go on from an outer step towards their mean",
        "met every so many steps, and all went on from where an outer optimizer stepped to, towards their average (a method "
        "called DiLoCo)",
        ("average_interval", "average_rate"), [DILOCO], rate=0.7, rate_is="outer learning rate",
    ),
    # Takes what a shuffle takes, so that a run can be made again with the exchange alone switched off.
    "independent": Method("no exchange", "exchange nothing", "exchanged nothing", SHUFFLE_OPTIONS, averages=False),
}  # fmt: skip
# Of DiLoCo's outer optimizer.
OUTER_MOMENTUM = 0.9


def add_method(name: str, method: Method) -> None:
    """
    Make a method of one's own a value of `mixing`, in this process: to be called on every process, before arguments are
    made. Options, checkpoints, records and cards then know it as they know those that are here.

    Args:
        name (`str`): The value of `mixing`.
        method ([`Method`]): What it does, with `make`.

    Raises:
        ValueError: for a name that is taken or is none, and for a method that the Trainer cannot run.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"A method's name is of small letters, digits and underscores, and {name!r} is not.")
    if name in METHODS and METHODS[name] != method:
        raise ValueError(f"There is a method '{name}' already ({METHODS[name].title}): choose another name.")
    if not callable(method.make):
        raise ValueError(f"The method '{name}' has no `make`, which makes its mixer.")
    foreign = [option for option in method.options if option not in ("average_interval", "average_rate")]
    if foreign or "average_interval" not in method.options:
        raise ValueError(
            f"The `options` of the method '{name}' must be `average_interval`, with or without `average_rate`, and are "
            f"{list(method.options)}."
        )
    if method.repaired:
        raise ValueError(
            f"The method '{name}' cannot be `repaired`: REPAIR is for the averages of this library alone."
        )
    METHODS[name] = method


def foreign_option(mixing: str, name: str) -> str:
    """What is wrong with an option of `OPTIONS` that a method does not take, in a sentence."""
    whose = [f"'{other}'" for other, method in METHODS.items() if name in method.options and other != "independent"]
    takes = [f"`{option}`" for option in METHODS[mixing].options]
    return (
        f"`{name}` is an option of `mixing` {_listed(whose)}, and `mixing` is '{mixing}', which takes "
        f"{_listed(takes, 'and')}: leave it out."
    )


def _listed(names: Sequence[str], word: str = "or") -> str:
    return " ".join(filter(None, [", ".join(names[:-1]), word if len(names) > 1 else "", names[-1]]))


@dataclass(frozen=True)
class Times:
    """
    After which optimizer steps, counted from 1, the members of a run exchange.

    Args:
        interval (`int`): Steps between two exchanges.
        first (`int`): The first.
        last (`int`, *optional*): The last that may be.
        epoch (`int`, *optional*): The steps after which the count begins anew.
    """

    interval: int
    first: int
    last: int | None = None
    epoch: int | None = None

    def count(self, total_steps: int) -> int:
        """How many exchanges a run of `total_steps` has."""
        until = total_steps if self.last is None else min(total_steps, self.last)
        whole, rest = divmod(until, self.epoch) if self.epoch is not None else (0, until)
        return whole * self._up_to(self.epoch or 0) + self._up_to(rest)

    def _up_to(self, step: int) -> int:
        return max(0, (step - self.first) // self.interval + 1)


def _a_tenth_of(steps: int) -> int:
    """About a tenth of a run, so that its last step is an exchange, if there is such a number near."""
    tenth = max(1, steps // 10)
    return next((interval for interval in range(tenth, tenth // 2, -1) if steps % interval == 0), tenth)


def times_of(mixing: str, interval: int | None, total_steps: int, steps_per_epoch: int) -> Times:
    """
    When the members of a run exchange by a method that takes `average_interval`.

    Args:
        mixing (`str`): Its name.
        interval (`int`, *optional*): `average_interval`. `None`: as published for the method.
        total_steps (`int`), steps_per_epoch (`int`): Optimizer steps of a member in the run and in an epoch.

    Raises:
        ValueError: if the interval is longer than the run, or there would be no exchange in it.
    """
    if interval is not None and interval > total_steps:
        raise ValueError(
            f"`average_interval` ({interval} steps) is longer than the run, which has {total_steps} steps."
        )
    if mixing == "papa":
        # At the first batch of each epoch, too.
        return Times(interval or 10, first=1, epoch=steps_per_epoch)
    if mixing in ("papa_all", "papa_2"):
        given = Times(interval or 5 * steps_per_epoch, first=interval or steps_per_epoch, last=total_steps - 1)
        if not given.count(total_steps):
            when = f"every {interval} steps" if interval else "after epochs 0, 5, 10, ..."
            raise ValueError(
                f"`mixing='{mixing}'` averages {when} and not after the last step, so never in this run of {total_steps} "
                f"steps, {steps_per_epoch} an epoch: set `average_interval`, in steps, to less than that."
            )
        return given
    if interval is None:
        # DART's schedule outside of domain generalisation is not released, where it is a tenth of the run: ours.
        # Local SGD: one epoch (E = 1), or the run if that is shorter.
        tenth = math.ceil(total_steps / 10)
        ours = {"dart": tenth, "local_sgd": min(steps_per_epoch, total_steps), "diloco": 500}
        interval = ours.get(mixing, METHODS[mixing].interval)
    if interval is None:
        raise ValueError(f"`mixing='{mixing}'` has no interval of its own: set `average_interval`, in steps.")
    if interval > total_steps:
        raise ValueError(
            f"`mixing='{mixing}'` averages every {interval} steps unless `average_interval` is set, which is longer than "
            f"the run of {total_steps} steps: set it, to {_a_tenth_of(total_steps)} for instance."
        )
    return Times(interval, first=interval)
