"""`greedy_soup` against a brute-force reading of its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from hf_wash.soup import GreedySoupRecord, greedy_soup, uniform_soup


def by_the_book(vectors, score):
    """Recipe 1 of the paper, word for word, over plain lists."""
    ranked = []
    remaining = list(range(len(vectors)))
    while remaining:  # highest first, the earlier one where equal
        best = remaining[0]
        for index in remaining[1:]:
            if score(vectors[index]) > score(vectors[best]):
                best = index
        remaining.remove(best)
        ranked.append(best)

    def mean(indices):
        total = torch.zeros_like(vectors[0], dtype=torch.float64)
        for index in sorted(indices):
            total = total + vectors[index].double()
        return (total / len(indices)).float()

    ingredients = [ranked[0]]
    for index in ranked[1:]:
        if score(mean([*ingredients, index])) > score(mean(ingredients)):
            ingredients.append(index)
    return ingredients, mean(ingredients), ranked


@given(
    vectors=st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=7),
    target=st.lists(st.integers(-3, 3), min_size=2, max_size=2),
    coarse=st.sampled_from([0.0, 1.0, 4.0]),
)
@settings(max_examples=400, deadline=None)
def test_greedy_soup_is_what_its_definition_says(vectors, target, coarse):
    vectors = [torch.tensor(vector, dtype=torch.float32) for vector in vectors]
    target = torch.tensor(target, dtype=torch.float32)

    def score(vector):
        # Few possible values, as accuracies on few examples have: ties among members and among means are common.
        distance = float((vector - target).square().sum())
        return -math.floor(distance / coarse) if coarse else -distance

    expected, weights, ranked = by_the_book(vectors, score)
    soup, record = greedy_soup([{"w": vector} for vector in vectors], lambda state: score(state["w"]))
    assert list(record.indices) == expected
    assert list(record.order) == ranked
    assert torch.equal(soup["w"], weights)
    assert list(record.member_scores) == [score(vector) for vector in vectors]
    assert record.score == score(weights) == max(record.score, *record.member_scores)


def state(value):
    return {"w": torch.tensor([float(value)])}


def test_a_member_that_leaves_the_score_as_it_is_does_not_join():
    soup, record = greedy_soup([state(1), state(2), state(3)], lambda _: 0.5)
    assert record.indices == (0,) and soup["w"] == 1.0


def test_each_member_is_tried_once_in_the_order_of_the_scores():
    seen = []

    def evaluate(candidate):
        seen.append(float(candidate["w"]))
        return {3.0: 0.9, 5.0: 0.8, 1.0: 0.7}.get(seen[-1], 0.0)

    _, record = greedy_soup([state(1), state(3), state(5)], evaluate)
    assert seen == [1.0, 3.0, 5.0, 4.0, 2.0]
    assert record == GreedySoupRecord((1,), (0.7, 0.9, 0.8), 0.9, (1, 2, 0), (0.9, 0.0, 0.0))


def test_a_greedy_soup_of_all_members_is_their_uniform_soup_bit_for_bit():
    torch.manual_seed(0)
    # float64 members of very different size: every other order of the sum gives other bits.
    models = [nn.Linear(20, 20).double() for _ in range(5)]
    for power, model in enumerate(models):
        model.weight.data *= 1000.0**power
    calls = iter([3.0, 1.0, 5.0, 2.0, 4.0, 6.0, 7.0, 8.0, 9.0])
    soup, record = greedy_soup(models, lambda _: next(calls))
    assert record.indices == (2, 4, 0, 3, 1)
    expected = uniform_soup(models)
    assert all(torch.equal(soup[name], expected[name]) for name in expected)


def test_a_member_whose_score_is_not_a_number_ranks_last_and_never_joins():
    def evaluate(candidate):
        return math.nan if candidate["w"] == 7 else float(candidate["w"])

    soup, record = greedy_soup([state(7), state(1), state(3)], evaluate)
    assert record.indices == (2,) and soup["w"] == 3.0 and record.order == (2, 1, 0)
    assert math.isnan(record.tried_scores[2])
    with pytest.raises(ValueError, match="score of every member is not a number"):
        greedy_soup([state(7)], evaluate)


def test_a_soup_of_one_is_that_member():
    soup, record = greedy_soup([state(4)], lambda _: 0.1)
    assert record.indices == (0,) and soup["w"] == 4.0


def test_members_on_disk_and_in_memory_give_the_same_soup(tmp_path):
    members = [state(value) for value in (1, 5, 2)]
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for member, path in zip(members, paths, strict=True):
        save_file(member, path)

    def evaluate(candidate):
        return -abs(float(candidate["w"]) - 3)

    in_memory, on_disk = greedy_soup(members, evaluate), greedy_soup(paths, evaluate)
    assert in_memory[1] == on_disk[1] and torch.equal(in_memory[0]["w"], on_disk[0]["w"])
    assert len(in_memory[1].indices) > 1


def test_bad_members_are_refused_before_the_first_evaluation():
    def evaluate(_):
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match="at least one member"):
        greedy_soup([], evaluate)
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\) in member 1"):
        greedy_soup([state(1), {"w": torch.zeros(2)}], evaluate)
    with pytest.raises(ValueError, match="pass a list of them"):
        greedy_soup(state(1), evaluate)
