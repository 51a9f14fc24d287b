"""
Which coordinates move from which member to which: a pure function of (seed, step, shapes, probabilities, N).

A plan is derived by every process for itself and never sent, so it has to be the same everywhere to the bit. All that
is used here are the raw words of the counter-based generator Philox4x64-10, whose stream NumPy keeps fixed, and integer
operations on them. No logarithm, no floating-point random number, no method of `numpy.random.Generator`: these differ
between processors and versions. NumPy's own random state is neither read nor written.

The draw follows from one observation: a selected coordinate whose permutation is the identity is not touched, so that
only the others need to be drawn. A coordinate is *moved* with probability q = p·(1 − 1/N!), and the permutation of a
moved coordinate is uniform over the N! − 1 that are not the identity.
"""

import functools
import hashlib
import itertools
import math
import sys
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, cast

import numpy as np
from numpy.random import Philox


# Part of every digest. Raise it whenever the same arguments would give another plan: a run cannot be resumed then.
PLAN_VERSION = 1

# The second word of Philox's key, so that nobody else who keys a Philox with the same seed draws our words.
_KEY = int.from_bytes(b"hf_wash\0", "little")

# The rest of a Philox's state when it has drawn nothing yet: four words in the buffer, and none of them left.
_FRESH = {
    "bit_generator": "Philox",
    "buffer": np.zeros(4, dtype=np.uint64),
    "buffer_pos": 4,
    "has_uint32": 0,
    "uinteger": 0,
}

_LITTLE_ENDIAN = sys.byteorder == "little"

# From here on one byte per coordinate is cheaper than one word per moved coordinate and the sort that it needs.
_DENSE = 2**64 // 32

# A longer line is cut, so that a position in a line times a word of 33 bits still fits into 64.
_LONGEST_LINE = 2**31

# How many coordinates of a densely selected line are drawn at once: what fits into a processor's cache.
_CHUNK = 2**19

# Up to here permutations are looked up in a table: 8! rows of 8 bytes.
_TABLE_MEMBERS = 8


@dataclass(frozen=True)
class Plan:
    """
    What one shuffle moves.

    Attributes:
        step (`int`):
            The step that the plan was drawn for.
        num_members (`int`):
            The size of the population, N.
        coordinates (`numpy.ndarray`):
            The moved coordinates, of shape `(num_moved,)` and dtype int64: the index into the flattened tensor
            (logical order, so the memory format is of no account), tensor after tensor, ascending within each.
        offsets (`numpy.ndarray`):
            Where each tensor's coordinates start in `coordinates`: int64 of shape `(num_tensors + 1,)`.
        digest (`bytes`):
            8 bytes that differ between different plans, steps, seeds and populations.
    """

    step: int
    num_members: int
    coordinates: np.ndarray
    offsets: np.ndarray
    digest: bytes
    # One permutation for each moved coordinate: an index into the tables of `_permutation_tables` of shape (num_moved,)
    # for a small population, else the sources themselves, of shape (num_members, num_moved).
    _permutations: np.ndarray = field(repr=False)

    def sources(self, member: int) -> np.ndarray:
        """
        From which member the new value of `member` comes, for each moved coordinate: π_i(n).

        Args:
            member (`int`):
                The member that receives, in [0, N).

        Returns:
            `numpy.ndarray`: Member numbers of shape `(num_moved,)`. Where it is `member` itself, the coordinate is a
            fixed point for this member.
        """
        if self._permutations.ndim == 2:
            return self._permutations[member]
        return _permutation_tables(self.num_members)[0][member].take(self._permutations)

    def destinations(self, member: int) -> np.ndarray:
        """
        To which member the old value of `member` goes, for each moved coordinate: the inverse of [`Plan.sources`].

        Args:
            member (`int`):
                The member that gives, in [0, N).

        Returns:
            `numpy.ndarray`: Member numbers of shape `(num_moved,)`.
        """
        if self._permutations.ndim == 2:
            return self._inverse[member]
        return _permutation_tables(self.num_members)[1][member].take(self._permutations)

    @functools.cached_property
    def _inverse(self) -> np.ndarray:
        inverse = np.empty_like(self._permutations)
        columns = np.arange(inverse.shape[1])
        for member, sources in enumerate(self._permutations):
            inverse[sources, columns] = member
        return inverse

    def values_moved(self, picked: np.ndarray | None = None) -> int:
        """
        How many values change owner, over all members.

        Args:
            picked (`numpy.ndarray`, *optional*):
                Which of the moved coordinates to look at, by their place in `coordinates`. `None`: all.

        Returns:
            `int`: The number of values.
        """
        if self.num_members == 2:
            return 2 * (len(self.coordinates) if picked is None else len(picked))
        permutations = self._permutations if picked is None else self._permutations.take(picked, axis=-1)
        if permutations.ndim == 2:
            return int((permutations != np.arange(self.num_members, dtype=permutations.dtype)[:, None]).sum())
        return int(_permutation_tables(self.num_members)[2].take(permutations).sum())


@functools.cache
def _permutation_tables(num_members: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    All permutations of a small population, in lexicographic order, so that number 0 is the identity.

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]`: For each member (row) and permutation (column), the source
        and the destination, both of shape `(num_members, num_members!)`; and how many members each permutation moves.
    """
    sources = np.array(list(itertools.permutations(range(num_members))), dtype=np.uint8).T
    destinations = np.argsort(sources, axis=0).astype(np.uint8)
    moved = (sources != np.arange(num_members, dtype=np.uint8)[:, None]).sum(axis=0)
    return np.ascontiguousarray(sources), np.ascontiguousarray(destinations), moved


def _count_thresholds(size: int, rate: int) -> tuple[int, array]:
    """
    The distribution of the number of moved coordinates in a line: Binomial(size, rate/2^64), for drawing with one word.

    The probabilities follow from the most likely count by the ratio of neighbours, in fixed point with 192 bits. Counts
    less likely than 2^-80 of it are left out, and the cumulative probabilities are rounded to 2^-64: that is the only
    place where the plan's distribution is not exact, and nothing of either size can be seen in any number of draws
    that a machine can make.

    Args:
        size (`int`):
            The number of coordinates.
        rate (`int`):
            The probability of each, as a multiple of 2^-64.

    Returns:
        `tuple[int, array]`: The smallest count, and thresholds such that a uniform word u stands for the smallest count
        plus the number of thresholds that are at most u.
    """
    one = 1 << 64
    rest = one - rate
    mode = min(size, (size + 1) * rate >> 64)
    most, least = 1 << 192, 1 << (192 - 80)
    up, weight, count = [], most, mode
    while count < size:
        weight = weight * (size - count) * rate // ((count + 1) * rest)
        if weight < least:
            break
        up.append(weight)
        count += 1
    down, weight, count = [], most, mode
    while count > 0:
        weight = weight * count * rest // ((size - count + 1) * rate)
        if weight < least:
            break
        down.append(weight)
        count -= 1
    weights = [*reversed(down), most, *up]
    total = sum(weights)
    # The last count needs no threshold: it takes all words that are left.
    thresholds = ((cumulative << 64) // total for cumulative in itertools.accumulate(weights[:-1]))
    return count, array("Q", (min(threshold, one - 1) for threshold in thresholds))


@dataclass(frozen=True)
class _Line:
    """A run of coordinates, over one or more whole or cut tensors, that are all moved at the same rate."""

    start: int
    size: int
    rate: int


class Planner:
    """
    Draws the plan of any step of a run.

    What depends on the shapes and the probabilities alone is prepared once; [`Planner.draw`] then costs O(Σ p_l·d_l)
    time and memory. The planner has no state that a draw would change: steps may be drawn in any order, and from
    several threads.

    How a plan is drawn, for each line (tensors next to each other with equal probability):

    - *q < 1/32*: the number of moved coordinates from its exact binomial distribution, by one word and a table of
      thresholds; then this many distinct positions, each uniform by multiplication, shift and rejection of the words
      that would favour some. Positions drawn twice are replaced until there are enough, which leaves every subset of
      this size equally likely.
    - *q ≥ 1/32*: one byte for each coordinate, compared with the first byte of q; where they are equal, 56 bits more.

    q is rounded down to a multiple of 2^-64.

    Args:
        seed (`int`):
            The seed, in [0, 2^64).
        sizes (`Sequence[int]`):
            The number of coordinates of each tensor, in the order in which all processes list them.
        probabilities (`Sequence[float]`):
            The probability p_l of each tensor, in [0, 1].
        num_members (`int`):
            The size of the population, N. With 0 there is nobody to move anything, and [`Planner.select`] alone serves.

    Raises:
        ValueError: for a seed outside [0, 2^64).
    """

    def __init__(self, seed: int, sizes: Sequence[int], probabilities: Sequence[float], num_members: int):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, and is {seed!r}.")
        self.seed = seed
        self.num_members = num_members
        self._tensor_starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._salt = hashlib.blake2b(
            repr((PLAN_VERSION, seed, num_members, list(sizes), [float(p).hex() for p in probabilities])).encode(),
            digest_size=16,
        ).digest()
        # As an array, since NumPy 2.4 makes floats of a list with an integer from 2^63 on.
        self._key = np.array([seed, _KEY], dtype=np.uint64)
        self._generators: list[Philox] = []
        lines = self._lines(sizes, probabilities)
        self._dense = [line for line in lines if line.rate >= _DENSE]
        sparse = [line for line in lines if 0 < line.rate < _DENSE]
        self._counts = [_count_thresholds(line.size, line.rate) for line in sparse]
        self._line_bits = np.uint64(len(sparse).bit_length())
        self._line_keys = np.arange(len(sparse), dtype=np.uint64) << (np.uint64(64) - self._line_bits)
        pieces = [
            (np.frombuffer(thresholds, dtype=np.uint64) >> self._line_bits) + key
            for (_, thresholds), key in zip(self._counts, self._line_keys, strict=True)
            if len(thresholds)
        ]
        # The last one is above every word's, and there so that something can always be looked up.
        self._threshold_keys = np.concatenate([*pieces, np.array([2**64 - 1], dtype=np.uint64)])
        before = np.cumsum([0, *(len(thresholds) for _, thresholds in self._counts)])[:-1]
        self._first_counts = np.array([fewest for fewest, _ in self._counts], dtype=np.int64) - before
        self._sparse_starts = np.array([line.start for line in sparse], dtype=np.int64)
        self._sparse_ends = np.array([line.start + line.size for line in sparse], dtype=np.int64)
        self._sparse_sizes = np.array([line.size for line in sparse], dtype=np.uint64)
        # As many bits of a word as can be multiplied by the longest line without overflow.
        self._bits = 64 - max((line.size for line in sparse), default=1).bit_length()
        self._reject_below = np.array([2**self._bits % line.size for line in sparse], dtype=np.uint64)
        self._reject_none_from = int(self._reject_below.max(initial=0))

    def _lines(self, sizes: Sequence[int], probabilities: Sequence[float]) -> list[_Line]:
        identities = Fraction(1, math.factorial(self.num_members)) if self.num_members else Fraction(0)
        lines: list[_Line] = []
        start = 0
        for probability, run in itertools.groupby(zip(probabilities, sizes, strict=True), key=lambda item: item[0]):
            rate = int(Fraction(probability) * (1 - identities) * 2**64)
            size = sum(tensor_size for _, tensor_size in run)
            for cut in range(0, size, _LONGEST_LINE):
                lines.append(_Line(start + cut, min(_LONGEST_LINE, size - cut), rate))
            start += size
        return lines

    def draw(self, step: int) -> Plan:
        """
        Draws the plan of a step.

        Args:
            step (`int`):
                The step, in [0, 2^64).

        Returns:
            [`Plan`]: The plan, the same for the same arguments on every process, layout and machine.
        """
        words = self._words(step)
        moved = self._draw_moved(words)
        permutations = _draw_permutations(words, self.num_members, len(moved))
        self._generators.append(words)
        # What was drawn follows from the salt and the step, so the rest is to find a machine at fault: 32 bits each do.
        drawn = (moved,) if self.num_members == 2 else (moved, permutations)
        checks = (
            zlib.crc32((part if _LITTLE_ENDIAN else part.byteswap()).data).to_bytes(4, "little") for part in drawn
        )
        digest = hashlib.blake2b(b"".join((self._salt, step.to_bytes(8, "little"), *checks)), digest_size=8)
        offsets = np.searchsorted(moved, self._tensor_starts)
        moved -= np.repeat(self._tensor_starts[:-1], offsets[1:] - offsets[:-1])
        return Plan(step, self.num_members, moved, offsets, digest.digest(), permutations)

    def select(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Draws which coordinates a step selects, without saying where they go.

        Args:
            step (`int`):
                The step, in [0, 2^64).

        Returns:
            `tuple[numpy.ndarray, numpy.ndarray]`: As `coordinates` and `offsets` of a [`Plan`].
        """
        words = self._words(step)
        selected = self._draw_moved(words)
        self._generators.append(words)
        offsets = np.searchsorted(selected, self._tensor_starts)
        selected -= np.repeat(self._tensor_starts[:-1], offsets[1:] - offsets[:-1])
        return selected, offsets

    def _draw_moved(self, words: Philox) -> np.ndarray:
        """Draws the moved coordinates of all tensors, ascending."""
        moved = self._draw_sparse(words)
        if self._dense:
            pieces, done = [], 0
            for line in self._dense:
                # Lines do not overlap, so sorted pieces in the order of the lines are sorted as a whole.
                until = int(np.searchsorted(moved, line.start))
                pieces += [moved[done:until], *_draw_dense(words, line)]
                done = until
            moved = np.concatenate([*pieces, moved[done:]])
        return moved

    def _words(self, step: int) -> Philox:
        """The generator of a step's words, which have not been drawn from yet."""
        # To make a generator costs a tenth of a small plan, so they are kept: one for each thread that draws.
        try:
            words = self._generators.pop()
        except IndexError:
            words = Philox(key=self._key)
        # The step is the third word of the counter, so each step has 2^128 blocks of words of its own.
        counter = np.zeros(4, dtype=np.uint64)
        counter[2] = step
        words.state = cast(Any, {**_FRESH, "state": {"counter": counter, "key": self._key}})
        return words

    def _draw_sparse(self, words: Philox) -> np.ndarray:
        counts = self._draw_counts(words)
        total = int(np.add.reduce(counts))
        taken = self._draw_positions(words, counts)
        taken.sort()
        taken = _without_repeats(taken)
        while len(taken) < total:
            # Between the lines nothing is taken, so each one's share ends where the next one's begins.
            have = np.searchsorted(taken, self._sparse_ends)
            have[1:] -= have[:-1]
            taken = np.concatenate([taken, self._draw_positions(words, counts - have)])
            # This sort takes advantage of what is in order already.
            taken.sort(kind="stable")
            taken = _without_repeats(taken)
        return taken

    def _draw_counts(self, words: Philox) -> np.ndarray:
        """Draws how many coordinates of each line are moved, int64 of shape `(num_lines,)`."""
        drawn = words.random_raw(len(self._counts))
        # One search in the thresholds of all lines, by their upper bits below the number of the line.
        keys = (drawn >> self._line_bits) + self._line_keys
        up_to = np.searchsorted(self._threshold_keys, keys, side="right")
        counts = up_to + self._first_counts
        for line in np.flatnonzero(self._threshold_keys.take(up_to - 1, mode="clip") == keys).tolist():
            # The upper bits are those of a threshold, so that the lower ones decide.
            fewest, thresholds = self._counts[line]
            counts[line] = fewest + bisect_right(thresholds, int(drawn[line]))
        return counts

    def _draw_positions(self, words: Philox, counts: np.ndarray) -> np.ndarray:
        """Draws `counts[line]` positions in each line, with repeats, and leaves out those that were rejected."""
        products = words.random_raw(int(counts.sum()))
        products >>= np.uint64(64 - self._bits)
        products *= np.repeat(self._sparse_sizes, counts)
        positions = (products >> np.uint64(self._bits)).view(np.int64)
        positions += np.repeat(self._sparse_starts, counts)
        if len(products):
            # Lemire's test. It fails so rarely that the limit of each line is looked up only after a coarse one failed.
            products &= np.uint64(2**self._bits - 1)
            if int(np.minimum.reduce(products)) < self._reject_none_from:
                positions = positions[products >= np.repeat(self._reject_below, counts)]
        return positions


def _without_repeats(values: np.ndarray) -> np.ndarray:
    """Leaves out what is repeated, of values in ascending order."""
    new = np.empty(len(values), dtype=bool)
    new[:1] = True
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return values if np.count_nonzero(new) == len(values) else values[new]


def _draw_dense(words: Philox, line: _Line) -> list[np.ndarray]:
    """Draws a line coordinate by coordinate. Returns the moved positions, ascending, in pieces."""
    first, rest = line.rate >> 56, line.rate & (2**56 - 1)
    pieces = []
    for start in range(0, line.size, _CHUNK):
        size = min(_CHUNK, line.size - start)
        # Little-endian by name, so that a byte has the same place in its word on every machine.
        draws = words.random_raw(-(-size // 8)).astype("<u8", copy=False).view(np.uint8)[:size]
        moved = draws < first
        open_ = np.flatnonzero(draws == first)
        moved[open_] = words.random_raw(len(open_)) >> np.uint64(8) < rest
        pieces.append(np.flatnonzero(moved) + (line.start + start))
    return pieces


def _draw_permutations(words: Philox, num_members: int, count: int) -> np.ndarray:
    """Draws a permutation other than the identity for each of `count` coordinates, as `Plan._permutations` holds it."""
    if num_members <= _TABLE_MEMBERS:
        others = math.factorial(num_members) - 1
        if others <= 1:
            return np.ones(count, dtype=np.uint8)
        drawn = _draw_below(words, others, count) + np.uint64(1)
        return drawn.astype(np.uint8 if others < 256 else np.uint16)
    dtype = np.uint8 if num_members <= 256 else np.uint16
    permutations = np.empty((num_members, count), dtype=dtype)
    identity = np.arange(num_members, dtype=dtype)[:, None]
    missing = np.arange(count)
    while len(missing):
        permutations[:, missing] = drawn = _shuffle_columns(words, num_members, len(missing), dtype)
        missing = missing[(drawn == identity).all(axis=0)]
    return permutations


def _draw_below(words: Philox, bound: int, count: int) -> np.ndarray:
    """Draws integers uniform over [0, bound), as uint64 of shape `(count,)`."""
    # Words from the last, incomplete multiple of the bound on would favour small remainders.
    last = 2**64 // bound * bound - 1
    drawn = words.random_raw(count)
    while len(bad := np.flatnonzero(drawn > last)):
        drawn[bad] = words.random_raw(len(bad))
    return drawn % np.uint64(bound)


def _shuffle_columns(words: Philox, num_members: int, count: int, dtype: type) -> np.ndarray:
    """Draws permutations uniform over S_N by Fisher and Yates, of shape `(num_members, count)`."""
    permutations: np.ndarray = np.repeat(np.arange(num_members, dtype=dtype)[:, None], count, axis=1)
    columns = np.arange(count)
    place = 0
    while place < num_members - 1:
        # As many of the choices as fit below 2^32 come out of one word.
        choices: list[int] = []
        bound = 1
        while place + len(choices) < num_members - 1 and bound * (num_members - place - len(choices)) < 2**32:
            choices.append(num_members - place - len(choices))
            bound *= choices[-1]
        drawn = _draw_below(words, bound, count)
        for choice in choices:
            other = (drawn % np.uint64(choice)).astype(np.int64) + place
            drawn //= np.uint64(choice)
            kept = permutations[place].copy()
            permutations[place] = permutations[other, columns]
            permutations[other, columns] = kept
            place += 1
    return permutations
