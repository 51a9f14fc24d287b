"""The greedy soup: members join the mean only while that raises a held-out score."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .uniform import mean_of_sources
from .weights import check_alike, check_finite, check_is_a_collection, open_member


@dataclass(frozen=True)
class GreedySoupRecord:
    """
    How a greedy soup came about.

    Args:
        indices (`tuple[int, ...]`):
            The members in the soup, in the order in which they joined; the best one first.
        member_scores (`tuple[float, ...]`):
            The held-out score of each member, in the order given.
        score (`float`):
            The held-out score of the soup; never below the best member's.
        order (`tuple[int, ...]`):
            All members in the order in which they were tried.
        tried_scores (`tuple[float, ...]`):
            The score of the mean at each try, in `order`; the first is the best member's own.
    """

    indices: tuple[int, ...]
    member_scores: tuple[float, ...]
    score: float
    order: tuple[int, ...]
    tried_scores: tuple[float, ...]


def greedy_soup(
    members: Iterable[nn.Module | Mapping[str, torch.Tensor] | str | Path],
    evaluate: Callable[[dict[str, torch.Tensor]], float],
) -> tuple[dict[str, torch.Tensor], GreedySoupRecord]:
    """
    Averages those members whose presence raises the score on held-out data, chosen in one pass.

    The members are sorted by their own score, highest first, equal ones in the order given. The soup starts as the
    best one; each of the others is tried once, in that order, and stays if the mean of the soup and it scores
    *strictly* higher than the soup. A member whose score is not a number ranks below every other and never joins.

    Args:
        members (iterable of `torch.nn.Module`, `Mapping[str, torch.Tensor]`, `str` or `Path`):
            As for [`uniform_soup`]. Members on disk are read again for each try, and at most one of them or one mean
            is in memory at a time, beside the model that `evaluate` loads the weights into.
        evaluate (`Callable[[dict[str, torch.Tensor]], float]`):
            Takes a state dict (to be read, not changed) and returns its score on held-out data, higher is better.
            Called once for each member, in the order given, then once for each try. Models with BatchNorm want their
            statistics recalibrated in it, since those of a mean are not the mean of those.

    Returns:
        `tuple[dict[str, torch.Tensor], GreedySoupRecord]`: the soup's state dict, and how it came about. The chosen
        members are summed in the order given, so that a greedy soup of all of them is their uniform soup, bit for bit.

    Raises:
        ValueError: as for [`uniform_soup`], and when no score is a number.

    Source: "greedy soup", Recipe 1 of [Model soups](https://hf.co/papers/2203.05482).

    Example:

    ```python
    >>> soup, record = greedy_soup(members, lambda state_dict: accuracy(model, state_dict))
    >>> record.indices
    (2, 0)
    ```
    """
    check_is_a_collection(members)
    sources = [open_member(member, index) for index, member in enumerate(members)]
    if not sources:
        raise ValueError("A soup needs at least one member, and the list of members is empty.")
    for other in sources[1:]:
        check_alike(sources[0], other)
    check_finite(sources)  # before the first evaluation, which may take long

    scores = [float(evaluate(source.read_all())) for source in sources]
    if all(math.isnan(score) for score in scores):
        raise ValueError("The greedy soup has nothing to go by: the score of every member is not a number.")
    order = sorted(range(len(sources)), key=lambda index: _rank(scores[index]), reverse=True)

    chosen, best = [order[0]], scores[order[0]]
    tried = [best]
    for candidate in order[1:]:
        if math.isnan(scores[candidate]):
            tried.append(math.nan)
            continue
        score = float(evaluate(_mean(sources, [*chosen, candidate])))
        tried.append(score)
        if score > best:
            chosen, best = [*chosen, candidate], score
    record = GreedySoupRecord(tuple(chosen), tuple(scores), best, tuple(order), tuple(tried))
    return _mean(sources, chosen), record


def _rank(score: float) -> tuple[bool, float]:
    # Every comparison with NaN is false, which would leave a sorted list in no order at all. `sorted` is stable also
    # with `reverse`, so that equal scores keep the order given.
    return (False, 0.0) if math.isnan(score) else (True, score)


def _mean(sources: list, chosen: list[int]) -> dict[str, torch.Tensor]:
    return mean_of_sources([sources[index] for index in sorted(chosen)])
