"""
[`check_same_examples`]: whether all processes train on the same data, found out by a few examples of it; and
[`appearance`]: what a checkpoint keeps, so that other data can be told.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from .failures import known_to_all
from .population import Population


# An example that is augmented by a generator of the data set's own may come out alike by chance on one process, and
# otherwise on another. Drawn so many times on each, with one chance of two each time, it does so once in 8 million cases.
DRAWS = 12
_SEED = 1_000_081
# What decoders and instruction sets may differ in, as a part of an array's root mean square.
_TOLERANCE = 1e-3


def check_same_examples(population: Population, dataset: Any) -> None:
    """
    *Collective.* Compare the first, the middle and the last example of a data set over all processes.

    Left out are streams, examples that cannot be fetched or described, and those that differ by themselves from one time
    to the next. Nothing is drawn from the members' random streams.

    Args:
        population ([`Population`]): The members.
        dataset (`torch.utils.data.Dataset`, *optional*): Which all processes should have.

    Raises:
        ValueError: on every process, naming the first example that differs and the processes.
    """
    if population.world_size == 1:
        return
    length = _length(dataset)
    indices = sorted({0, length // 2, length - 1}) if length else []
    before = population.streams.capture()
    try:
        found = {index: _fetch(dataset, index) for index in indices}
        everyone = population.gather_processes((length, found))
        # The length itself is not for this to judge.
        if any(theirs != length for theirs, _ in everyone):
            return
        doubtful = [i for i in indices if not all(_alike(everyone[0][1][i], theirs[i]) for _, theirs in everyone)]
        if not doubtful:
            return
        constant = {i: _fetch(dataset, i) for i in doubtful}
        for index in doubtful:
            for _ in range(DRAWS - 1):
                if not _alike(constant[index], _fetch(dataset, index)):
                    constant[index] = None
        sure = population.gather_processes(constant)
    finally:
        population.streams.restore(before)
    for index in doubtful:
        for rank, theirs in enumerate(sure):
            if not _alike(sure[0][index], theirs[index]):
                raise known_to_all(
                    ValueError(
                        f"Processes 0 and {rank} do not have the same training data: example {index} of {length} differs."
                    )
                )


def appearance(dataset: Any) -> dict[str, Any] | None:
    """
    What a data set can be told from another by: the number of its examples and, of a [`datasets.Dataset`], what the first,
    the middle and the last one look like as they are stored, without transforms. Reading these changes nothing; others,
    which may remember what was read, are not read from.

    Args:
        dataset (`torch.utils.data.Dataset`, *optional*): As the Trainer has it.

    Returns:
        `dict` or `None`: `count`, and `digests` of examples by index, as text; nothing is known of a stream.
    """
    length = _length(dataset)
    if not length:
        return None
    digests = {}
    if hasattr(dataset, "with_format") and hasattr(dataset, "features"):
        stored = dataset.with_format(None)
        for index in sorted({0, length // 2, length - 1}):
            try:
                look = repr(list(_describe("", stored[index])))
            except Exception:  # nothing can be said of it
                continue
            digests[str(index)] = hashlib.sha256(look.encode()).hexdigest()
    return {"count": length, "digests": digests}


def difference_of_appearance(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How a data set differs from what it was, both as from [`appearance`]; `None` if it is not known to."""
    if before["count"] != now["count"]:
        return f"they had {before['count']} examples and have {now['count']}"
    for index, digest in before["digests"].items():
        if now["digests"].get(index, digest) != digest:
            return f"example {index} of {now['count']} is another"
    return None


def _length(dataset: Any) -> int:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return 0
    try:
        return len(dataset)
    except Exception:
        return 0


def _fetch(dataset: Any, index: int) -> list[tuple] | None:
    """What an example looks like, the random numbers that it draws from the libraries being the same for all."""
    random.seed(_SEED)
    np.random.seed(_SEED % 2**32)
    torch.manual_seed(_SEED)
    try:
        return list(_describe("", dataset[index]))
    except Exception:  # It fails where it is trained on, with a message of its own, or never.
        return None


def _describe(name: str, value: Any) -> Iterator[tuple]:
    """Name, kind, mean and root mean square of each array; name, kind and digest of each text."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _describe(f"{name}.{key}", value[key])
    elif isinstance(value, (str, bytes)):
        raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        yield name, type(value).__name__, hashlib.sha256(raw).hexdigest()
    elif value is None:
        yield name, "None", ""
    elif isinstance(value, Sequence) and not all(isinstance(item, (int, float)) for item in value):
        for number, item in enumerate(value):
            yield from _describe(f"{name}.{number}", item)
    else:
        tensor = value.detach().cpu().to_dense() if isinstance(value, torch.Tensor) else None
        array = tensor.double().numpy() if tensor is not None else np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"nothing can be said of {type(value).__name__}")
        numbers = array.astype(np.float64).ravel()
        # Weighted by place, so that the same numbers in another order make a difference.
        weighted = float((numbers * np.linspace(1.0, 2.0, num=len(numbers))).mean()) if len(numbers) else 0.0
        size = float(np.sqrt(np.square(numbers).mean())) if len(numbers) else 0.0
        yield name, str(array.shape), weighted, size


def _alike(ours: list[tuple] | None, theirs: list[tuple] | None) -> bool:
    """Whether two descriptions may be of one example; `None` is not known."""
    if ours is None or theirs is None:
        return True
    if len(ours) != len(theirs):
        return False
    for (name, kind, *mine), (other_name, other_kind, *others) in zip(ours, theirs, strict=True):
        if name != other_name or kind != other_kind:
            return False
        if len(mine) == 1:
            if mine != others:
                return False
        elif any(abs(a - b) > _TOLERANCE * max(mine[1], others[1]) for a, b in zip(mine, others, strict=True)):
            return False
    return True
