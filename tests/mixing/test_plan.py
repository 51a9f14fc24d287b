"""The plan: its distribution, its independence of everything but its arguments, and its cost."""

import itertools
import math
import os
import subprocess
import sys
import time
import tracemalloc
import types
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing.pinned_plans import PINNED, describe

from hf_wash.mixing.plan import Planner, _count_thresholds


def chi_square_is_plausible(observed, expected, freedom=None, sigmas=5.0):
    """
    Whether the statistic is within `sigmas` of its mean (Wilson and Hilferty's normal approximation).

    Counts are drawn with fixed seeds, so a test passes always or never; five deviations leave room for the choice of
    the seed only.
    """
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    assert observed.sum() == pytest.approx(expected.sum())
    assert expected.min() >= 5
    freedom = len(observed) - 1 if freedom is None else freedom
    statistic = ((observed - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return abs((statistic / freedom) ** (1 / 3) - (1 - spread)) < sigmas * math.sqrt(spread)


def all_sources(plan):
    return np.stack([plan.sources(member) for member in range(plan.num_members)])


sizes_and_rates = st.lists(
    st.tuples(st.integers(0, 3000), st.sampled_from([0.0, 1e-9, 0.001, 0.02, 0.04, 0.3, 0.999, 1.0])),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(
    tensors=sizes_and_rates, num_members=st.integers(1, 12), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**63)
)
def test_a_plan_is_a_permutation_of_the_members_at_distinct_coordinates(tensors, num_members, seed, step):
    sizes, rates = zip(*tensors, strict=True)
    plan = Planner(seed, sizes, rates, num_members).draw(step)
    assert len(plan.offsets) == len(sizes) + 1
    for number, size in enumerate(sizes):
        coordinates = plan.coordinates[plan.offsets[number] : plan.offsets[number + 1]]
        assert (np.diff(coordinates) > 0).all()
        assert not len(coordinates) or (coordinates[0] >= 0 and coordinates[-1] < size)
        if rates[number] == 0 or num_members == 1:
            assert not len(coordinates)
    sources = all_sources(plan)
    members = np.arange(num_members)[:, None]
    assert (np.sort(sources, axis=0) == members).all()
    assert (sources != members).any(axis=0).all(), "the identity is no move"
    destinations = np.stack([plan.destinations(member) for member in range(num_members)])
    assert (np.take_along_axis(destinations, sources.astype(int), axis=0) == members).all()
    moved = (sources != members).sum(axis=0)
    assert plan.values_moved() == moved.sum()
    for a, b in itertools.pairwise(plan.offsets):
        assert plan.values_moved(np.arange(a, b)) == moved[a:b].sum()


@pytest.mark.parametrize("num_members", [2, 3, 5])
@pytest.mark.parametrize("probability", [0.001, 0.03, 0.05, 0.5, 1.0])
def test_every_coordinate_is_moved_at_its_rate(probability, num_members):
    size, steps = 2000, 1000
    planner = Planner(7, [size, 11], [probability, 0.0], num_members)
    plans = [planner.draw(step) for step in range(steps)]
    hits = np.bincount(np.concatenate([plan.coordinates for plan in plans]), minlength=size)
    rate = probability * (1 - 1 / math.factorial(num_members))
    groups = hits.reshape(100, -1).sum(axis=1)
    draws = size // 100 * steps
    # A table of two rows, moved or not, whose expectations are known: one degree of freedom for each column.
    assert chi_square_is_plausible(
        [*groups, *(draws - groups)], [draws * rate] * 100 + [draws * (1 - rate)] * 100, freedom=100
    )
    # The number in a step is binomial: mean and variance.
    counts = np.array([len(plan.coordinates) for plan in plans])
    variance = size * rate * (1 - rate)
    assert abs(counts.mean() - size * rate) < 5 * math.sqrt(variance / steps)
    assert abs(counts.var() / variance - 1) < 5 * math.sqrt((2 + 1 / variance) / steps)


def test_layers_have_their_own_rates():
    rates = [0.02, 0.015, 0.01, 0.005]
    planner = Planner(1, [5000] * 4, rates, 2)
    counts = sum(np.diff(planner.draw(step).offsets) for step in range(400))
    draws = 5000 * 400
    expected = [draws * rate / 2 for rate in rates]
    assert chi_square_is_plausible([*counts, 4 * draws - counts.sum()], [*expected, 4 * draws - sum(expected)])


@pytest.mark.parametrize("num_members", [3, 4, 9])
def test_permutations_other_than_the_identity_are_equally_likely(num_members):
    plan = Planner(5, [400_000], [0.5], num_members).draw(0)
    sources = all_sources(plan).astype(np.int64)
    if num_members <= 4:
        codes = sum(sources[n] * num_members**n for n in range(num_members))
        identity = sum(n * num_members**n for n in range(num_members))
        permutations = math.factorial(num_members)
        found = np.unique(codes, return_counts=True)
        assert len(found[0]) == permutations - 1
        assert identity not in found[0]
        assert chi_square_is_plausible(found[1], [len(codes) / (permutations - 1)] * (permutations - 1))
    # Every member gets from each member equally often; pairs of members too.
    for a, b in itertools.combinations(range(num_members), 2):
        pairs = np.bincount(sources[a] * num_members + sources[b], minlength=num_members**2)
        pairs = np.delete(pairs, [n * num_members + n for n in range(num_members)])
        total = math.factorial(num_members) - 1
        same = math.factorial(num_members - 2)
        weights = [(same - (x == a and y == b)) / total for x, y in itertools.permutations(range(num_members), 2)]
        possible = np.array(weights) > 0
        assert not pairs[~possible].any()
        assert chi_square_is_plausible(pairs[possible], np.array(weights)[possible] * len(plan.coordinates))


def test_a_large_population_is_permuted_uniformly():
    plan = Planner(3, [30_000], [1.0], 25).draw(0)
    sources = all_sources(plan)
    assert len(plan.coordinates) == 30_000
    for member in (0, 12, 24):
        counts = np.bincount(sources[member], minlength=25)
        assert chi_square_is_plausible(counts, [30_000 / 25] * 25)


def test_plans_of_different_steps_are_independent():
    size, rate = 4000, 0.05
    planner = Planner(11, [size], [2 * rate], 2)
    masks = np.zeros((500, size), dtype=bool)
    for step in range(500):
        masks[step, planner.draw(step).coordinates] = True
    for lag in (1, 2, 7):
        both = np.bincount((masks[:-lag] * 2 + masks[lag:]).ravel(), minlength=4)
        expected = [(1 - rate) ** 2, rate * (1 - rate), rate * (1 - rate), rate**2]
        assert chi_square_is_plausible(both, np.array(expected) * both.sum())


def test_neighbouring_coordinates_and_seeds_are_independent():
    size, rate = 200_000, 0.02
    one, two = (np.isin(np.arange(size), Planner(s, [size], [2 * rate], 2).draw(0).coordinates) for s in (0, 1))
    expected = np.array([(1 - rate) ** 2, rate * (1 - rate), rate * (1 - rate), rate**2])
    for pair in (one[:-1] * 2 + one[1:], one * 2 + two):
        assert chi_square_is_plausible(np.bincount(pair, minlength=4), expected * len(pair))


@pytest.mark.parametrize(("size", "rate"), [(1, 0.3), (7, 0.01), (50, 0.02), (1000, 0.03), (2000, 1e-6)])
def test_counts_have_the_exact_binomial_distribution(size, rate):
    rate = int(Fraction(rate) * 2**64)
    fewest, thresholds = _count_thresholds(size, rate)
    q, one = Fraction(rate, 2**64), Fraction(1, 2**64)
    cumulative = sum(math.comb(size, k) * q**k * (1 - q) ** (size - k) for k in range(fewest))
    for index, threshold in enumerate(thresholds):
        k = fewest + index
        cumulative += math.comb(size, k) * q**k * (1 - q) ** (size - k)
        assert abs(Fraction(threshold, 2**64) - cumulative) <= 2 * one
    assert 1 - cumulative <= 1 - Fraction(thresholds[-1], 2**64) + 2 * one if len(thresholds) else True


@pytest.mark.parametrize("size", [1, 3, 6, 11, 16])
def test_words_that_would_favour_some_positions_are_rejected(size):
    # With as many bits as the planner keeps, this happens once in millions of draws; with four, all words can be seen.
    class Words:
        def random_raw(self, count):
            assert count == 16
            return np.arange(16, dtype=np.uint64) << np.uint64(60)

    planner = Planner(0, [size], [0.01], 2)
    planner._bits, planner._reject_below = 4, np.array([16 % size], dtype=np.uint64)
    positions = planner._draw_positions(Words(), np.array([16]))
    assert np.bincount(positions, minlength=size).tolist() == [16 // size] * size


def test_any_step_is_drawn_alone_and_nothing_else_is_touched():
    planner = Planner(3, [1000, 500], [0.1, 0.02], 3)
    in_order = [planner.draw(step) for step in range(5)]
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    alone = Planner(3, [1000, 500], [0.1, 0.02], 3).draw(4)
    assert (np.random.get_state()[1] == before).all()
    assert (alone.coordinates == in_order[4].coordinates).all()
    assert (all_sources(alone) == all_sources(in_order[4])).all()
    assert alone.digest == in_order[4].digest
    assert len({plan.digest for plan in in_order}) == 5


def test_digests_tell_plans_apart():
    arguments = (3, [1000], [0.1], 3)
    plans = [Planner(*arguments).draw(0), Planner(*arguments).draw(1)]
    for place, other in enumerate([4, [1001], [0.1000001], 4]):
        changed = list(arguments)
        changed[place] = other
        plans.append(Planner(*changed).draw(0))
    assert len({plan.digest for plan in plans}) == len(plans)


def test_pinned_plans_are_drawn_to_this_day():
    assert {name: describe(*arguments) for name, (arguments, _) in PINNED.items()} == {
        name: expected for name, (_, expected) in PINNED.items()
    }


def test_pinned_plans_do_not_depend_on_vector_units():
    import numpy

    dispatched = numpy._core._multiarray_umath.__cpu_dispatch__
    found = [f for f, on in numpy._core._multiarray_umath.__cpu_features__.items() if on and f in dispatched]
    check = "from mixing.pinned_plans import *; assert all(describe(*a) == e for a, e in PINNED.values())"
    off = f"import numpy; assert not any(numpy._core._multiarray_umath.__cpu_features__[f] for f in {found!r}); "
    subprocess.run(
        [sys.executable, "-c", off + check],
        env={**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(found), "PYTHONPATH": "tests"},
        check=True,
        timeout=120,
    )


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, True, None])
def test_a_seed_outside_its_range_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        Planner(seed, [10], [0.1], 2)


def fastest_draw(planner, repeats):
    times = []
    for step in range(repeats):
        start = time.perf_counter()
        planner.draw(step)
        times.append(time.perf_counter() - start)
    return min(times)


def test_a_hundred_times_the_size_at_a_hundredth_of_the_rate_costs_the_same():
    small = Planner(0, [20_000] * 50, [0.02 - 1e-4 * k for k in range(50)], 2)
    large = Planner(0, [2_000_000] * 50, [(0.02 - 1e-4 * k) / 100 for k in range(50)], 2)
    # The fastest of many: other work on the machine only ever adds.
    ratios = [fastest_draw(large, 60) / fastest_draw(small, 60) for _ in range(3)]
    assert min(ratios) <= 1.3


def test_memory_grows_with_what_moves():
    sizes = [1_000_000] * 86
    tracemalloc.start()
    planner = Planner(0, sizes, [0.001 * (1 - k / 85) for k in range(86)], 2)
    planner.draw(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.02 * 4 * sum(sizes)


def test_a_count_is_the_number_of_thresholds_up_to_the_word():
    planner = Planner(0, [40_000, 9, 500_000, 3], [0.01, 0.02, 0.001, 0.0], 3)
    tables = planner._counts
    assert len(tables) == 3
    words = [[0] * 3, [2**64 - 1] * 3]
    # Around each threshold, where the upper bits of a word do not tell on which side of it the word is.
    for number in range(max(len(thresholds) for _, thresholds in tables)):
        for offset in (-1, 0, 1):
            around = [thresholds[min(number, len(thresholds) - 1)] + offset for _, thresholds in tables]
            words.append([min(max(word, 0), 2**64 - 1) for word in around])
    for drawn in words:
        fake = types.SimpleNamespace(random_raw=lambda count, drawn=drawn: np.array(drawn, dtype=np.uint64))
        expected = [
            fewest + sum(threshold <= word for threshold in thresholds)
            for (fewest, thresholds), word in zip(tables, drawn, strict=True)
        ]
        assert planner._draw_counts(fake).tolist() == expected
