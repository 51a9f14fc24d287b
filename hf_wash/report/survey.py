"""
What is measured of a population for its report, on a fixed number of examples: the straight lines between members and
through the soup, the plane through three, how often members disagree, how well they are calibrated, how far apart they
are layer by layer.

How a model answers, and where its BatchNorm statistics come from, is passed in; the mathematics is in `measures`.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..population import Population
from ..sentences import first_line
from ..soup.ensemble import mean_prediction
from .measures import LayerSample, barrier_height, calibration, disagreement, weights_between
from .plane import survey_plane


FORMAT = 1
EXAMPLES = 256
LINES = 3
BETWEEN = tuple(number / 8 for number in range(9))
THROUGH = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SAMPLED_AT_THE_END = 16_384
SOUP = "soup"
PLANE_OF = 3


@dataclass
class Answers:
    """
    What one model answers to the examples.

    Args:
        loss (`float`): Its mean loss.
        logits (`torch.Tensor` of shape `(examples, classes)`, *optional*): On the CPU; of a classifier.
        labels (`torch.Tensor` of shape `(examples,)`, *optional*): The true classes.
    """

    loss: float
    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    @property
    def accuracy(self) -> float | None:
        """The fraction of examples whose class is predicted; `None` where there are no classes."""
        if self.logits is None or self.labels is None:
            return None
        return float((self.logits.argmax(-1) == self.labels).double().mean())


def choose_examples(count: int, wanted: int = EXAMPLES) -> list[int]:
    """Indices of `wanted` of `count` examples (all, if there are fewer), evenly spaced: folders come class by class."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def lines_of(size: int, most: int = LINES) -> list[tuple[int, int | None]]:
    """
    Which lines are looked at in a population of `size`: at most `most` between two members, `(i, j)`, and as many from a
    member through the soup, `(i, None)`.
    """
    if size < 2:
        return []
    pairs = [(index, index + 1) for index in range(size - 1)]
    if size == 3:
        pairs.append((0, 2))
    return [*pairs[:most], *((index, None) for index in range(min(size, most)))]


class _Attempts:
    """Local work that may fail, so that no process leaves the others waiting: after a failure there is no more of it."""

    def __init__(self) -> None:
        self.failure: str | None = None

    def __call__(self, work: Callable[[], Any]) -> Any:
        if self.failure is not None:
            return None
        try:
            return work()
        except Exception as error:  # whatever a model or a data set stumbles over
            self.failure = first_line(error)
            return None


def survey(
    population: Population,
    *,
    step: int,
    soup_weights: Mapping[str, torch.Tensor] | None,
    answer_at: Callable[[Mapping[str, torch.Tensor]], Answers] | None,
    as_they_are: Sequence[Callable[[], Answers]],
    soup_as_it_is: Callable[[], Answers] | None,
    exclude: Collection[str] = (),
    left_out: Collection[int] = (),
    about: Mapping[str, Any] | None = None,
    plane: bool = False,
) -> dict[str, Any]:
    """
    *Collective.* Measure a population.

    Each line is looked at by the process that hosts the member in which it begins; the other end is sent there once. The
    points of the plane are dealt to all processes.

    Args:
        population ([`Population`]): The members.
        step (`int`): Optimizer steps that they have taken.
        soup_weights (`Mapping[str, torch.Tensor]`, *optional*): The soup's, on every process.
        answer_at (`Callable`, *optional*): From weights to what a model with them answers. Without it there are only
            distances.
        as_they_are (`Sequence[Callable]`): What each local member answers, with statistics of its own.
        soup_as_it_is (`Callable`, *optional*): And what the soup does.
        exclude (`Collection[str]`, *optional*): Names of weights that all members share.
        left_out (`Collection[int]`, *optional*): Members that are not finite.
        about (`Mapping`, *optional*): What is to be said of the examples and of BatchNorm.
        plane (`bool`, *optional*, defaults to `False`): Whether the plane through the first three members is looked at.

    Returns:
        `dict`: plain values of JSON, the same on every process.

    Raises:
        RuntimeError: on every process, if a model could not answer on any.
    """
    attempt = _Attempts()
    members = [index for index in range(population.size) if index not in left_out]
    found: dict[str, Any] = {"format": FORMAT, "step": step, **(about or {}), "layers": _layers(population, members)}
    if answer_at is None:
        return found
    lines: list[dict[str, Any] | None] = []
    received: tuple[int, dict[str, torch.Tensor]] | None = None
    for start, end in lines_of(len(members)):
        first, second = members[start], None if end is None else members[end]
        if second is not None and (received is None or received[0] != second):
            # A copy: what one step of the iterator yields belongs to it.
            weights = next(population.state_dicts(exclude, [second]))
            received = (second, {name: value.detach().clone() for name, value in weights.items()})
        line = None
        if first in population.indices:
            own = population.wholes[first - population.indices[0]].state_dict()
            own = {name: value for name, value in own.items() if name not in exclude}
            other = received[1] if second is not None and received is not None else soup_weights
            line = attempt(functools.partial(_along, own, other, second is None, answer_at))
            if line is not None:
                line = {"from": f"member {first}", "to": SOUP if second is None else f"member {second}", **line}
        lines.append(line)
    told_plane = None
    if plane and len(members) >= PLANE_OF:
        told_plane = survey_plane(population, members[:PLANE_OF], soup_weights, answer_at, attempt, exclude)
    answers = [attempt(each) for each in as_they_are]
    soup = attempt(soup_as_it_is) if soup_as_it_is is not None else None
    told = population.gather_processes((attempt.failure, lines))
    failures = [f"process {rank}: {failure}" for rank, (failure, _) in enumerate(told) if failure is not None]
    if failures:
        raise RuntimeError("; ".join(failures))
    if told_plane is not None:
        found["plane"] = told_plane()
    found["lines"] = [
        next(line for line in same if line is not None) for same in zip(*(own for _, own in told), strict=True)
    ]
    barriers = [line["barrier"] for line in found["lines"] if line["to"] != SOUP]
    found["barrier"] = max(barriers) if barriers and None not in barriers else None
    everyone = population.gather([(a.loss, a.logits, a.labels) if a is not None else None for a in answers])
    together = {f"member {index}": Answers(*everyone[index]) for index in members}
    return found | _answered(together, soup)


def _along(
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor] | None,
    through_soup: bool,
    answer_at: Callable[[Mapping[str, torch.Tensor]], Answers],
) -> dict[str, Any]:
    assert second is not None
    fractions = THROUGH if through_soup else BETWEEN
    answers = [answer_at(weights_between(first, second, fraction)) for fraction in fractions]
    accuracies = [each.accuracy for each in answers]
    return {
        "fractions": list(fractions),
        "loss": [number(each.loss) for each in answers],
        "accuracy": None if None in accuracies else accuracies,
        "barrier": number(barrier_height(fractions, [each.loss for each in answers])),
    }


def _layers(population: Population, members: Sequence[int]) -> dict[str, Any]:
    sample = LayerSample(population.wholes[0], SAMPLED_AT_THE_END)
    values = population.gather_tensors(torch.stack([sample.values(whole) for whole in population.wholes]))
    return {
        "names": sample.names,
        "weights": sample.sizes,
        "spread": [number(value) for value in sample.spread(values[list(members)])],
    }


def _answered(members: dict[str, Answers], soup: Answers | None) -> dict[str, Any]:
    everyone = {**members, **({SOUP: soup} if soup is not None else {})}
    logits = {name: each.logits.double() for name, each in everyone.items() if each.logits is not None}
    labels = next((each.labels for each in everyone.values() if each.labels is not None), None)
    found: dict[str, Any] = {"disagreement": None, "calibration": None}
    if labels is not None and len(logits) == len(everyone):
        known = labels >= 0
        if len(members) > 1:
            ensemble = mean_prediction([logits[name] for name in members])
            logits["ensemble"] = ensemble
            loss = float(torch.nn.functional.cross_entropy(ensemble[known], labels[known]))
            everyone["ensemble"] = Answers(loss, ensemble, labels)
            found["disagreement"] = disagreement(torch.stack([logits[name].argmax(-1) for name in members])).tolist()
        if all(value.isfinite().all() for value in logits.values()) and known.any():
            found["calibration"] = {
                name: calibration(value[known].softmax(-1), labels[known]) for name, value in logits.items()
            }
    found["answers"] = {name: {"loss": number(a.loss), "accuracy": a.accuracy} for name, a in everyone.items()}
    return found


def number(value: float) -> float | None:
    """A number as JSON knows it; what is not finite is none."""
    return value if math.isfinite(value) else None
