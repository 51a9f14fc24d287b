"""What a report says in numbers, against values computed by hand."""

import math

import pytest
import torch
from torch import nn

from hf_wash.metrics import expected_calibration_error
from hf_wash.report.measures import (
    LayerSample,
    barrier_height,
    calibration,
    disagreement,
    layer_spread,
    weights_between,
)


def test_a_barrier_is_the_most_by_which_the_loss_lies_above_the_line_between_its_ends():
    # Between 1 and 3 the straight line is at 1.5, 2 and 2.5; above it lie 0.5, 1.5 and −0.5.
    assert barrier_height([0.0, 0.25, 0.5, 0.75, 1.0], [1.0, 2.0, 3.5, 2.0, 3.0]) == 1.5
    # What lies beyond the second end counts for nothing, and nor does a valley.
    assert barrier_height([0.0, 0.5, 1.0, 1.5], [1.0, 0.5, 1.0, 9.0]) == 0.0
    # Of a parabola (t − ½)² turned over, the height is ¼.
    fractions = [number / 8 for number in range(9)]
    assert barrier_height(fractions, [1 - (t - 0.5) ** 2 for t in fractions]) == 0.25


def test_a_barrier_that_is_not_finite_is_not_taken_for_none():
    assert math.isnan(barrier_height([0.0, 0.5, 1.0], [1.0, math.inf, 1.0]))
    assert math.isnan(barrier_height([0.0, 0.5, 1.0], [1.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="0 and 1"):
        barrier_height([0.0, 0.5], [1.0, 1.0])


def test_the_barrier_of_a_loss_of_two_basins_is_its_hill():
    """A model of one weight w whose loss is (w² − 1)²: minima at −1 and 1, and a hill of 1 at 0."""
    minus, plus = {"w": torch.tensor([-1.0])}, {"w": torch.tensor([1.0])}
    fractions = [0.0, 0.25, 0.5, 0.75, 1.0]
    losses = [float((weights_between(minus, plus, t)["w"] ** 2 - 1) ** 2) for t in fractions]
    assert losses == [0.0, 0.5625, 1.0, 0.5625, 0.0]
    assert barrier_height(fractions, losses) == 1.0


def test_a_point_of_a_line_mixes_weights_and_leaves_counters():
    first = {"w": torch.tensor([0.0, 4.0]), "half": torch.tensor([1.0], dtype=torch.bfloat16), "n": torch.tensor(3)}
    second = {"w": torch.tensor([2.0, 0.0]), "half": torch.tensor([2.0], dtype=torch.bfloat16), "n": torch.tensor(9)}
    point = weights_between(first, second, 0.25)
    assert point["w"].tolist() == [0.5, 3.0] and point["n"] == 3
    assert point["half"].dtype == torch.bfloat16 and point["half"].item() == 1.25
    assert weights_between(first, second, 1.5)["w"].tolist() == [3.0, -2.0]


def test_disagreement_is_the_part_of_the_examples_on_which_two_differ():
    found = disagreement(torch.tensor([[0, 1, 2, 2], [0, 1, 2, 0], [1, 0, 2, 0]]))
    assert found.tolist() == [[0.0, 0.25, 0.75], [0.25, 0.0, 0.5], [0.75, 0.5, 0.0]]


def test_calibration_is_that_of_its_bins():
    # Two bins: confidences 0.75 (right) and 0.75 (wrong) and 1.0 (right) in the upper one, 0.5 (wrong) in the lower.
    probabilities = torch.tensor([[0.75, 0.25], [0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    found = calibration(probabilities, torch.tensor([0, 0, 0, 1]), bins=2)
    assert found["count"] == [1, 3]
    assert found["confidence"] == pytest.approx([0.5, 2.5 / 3])
    assert found["accuracy"] == pytest.approx([0.0, 2 / 3])
    assert found["ece"] == pytest.approx(0.25 * 0.5 + 0.75 * (2.5 / 3 - 2 / 3))
    assert found["accuracy_overall"] == 0.5


def test_the_calibration_error_is_the_one_that_evaluation_reports():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (200,), generator=generator)
    expected = expected_calibration_error(logits.numpy(), labels.numpy())
    assert calibration(logits.softmax(-1), labels)["ece"] == pytest.approx(expected, abs=1e-12)


def test_the_spread_of_a_layer_is_the_root_of_the_mean_square_from_the_members_mean():
    # Means 2 and 0; squares of the differences 1, 1 and 9, 9.
    assert layer_spread([[torch.tensor([1.0, -3.0]), torch.tensor([3.0, 3.0])]]) == [pytest.approx(math.sqrt(5))]
    assert layer_spread([[torch.tensor([1.0]), torch.tensor([1.0])]]) == [0.0]


def members_with_one_layer_apart():
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 3)) for _ in range(2)]
    members[1].load_state_dict(members[0].state_dict())
    with torch.no_grad():
        for member, shift in zip(members, (-0.5, 0.5), strict=True):
            member[1].weight += shift
            member[1].bias += shift
    return members


def test_a_sample_of_each_layer_tells_which_layer_members_differ_in():
    members = members_with_one_layer_apart()
    sample = LayerSample(members[0], size=20)
    assert sample.names == ["0", "1"] and sample.sizes == [30 * 40 + 40, 40 * 3 + 3]
    values = torch.stack([sample.values(member) for member in members])
    assert values.shape == (2, 40)
    assert sample.spread(values) == [0.0, pytest.approx(0.5, rel=1e-5)]


def test_a_small_layer_is_taken_whole_and_a_frozen_one_left_out():
    members = members_with_one_layer_apart()
    members[0][0].requires_grad_(False)
    sample = LayerSample(members[0], size=1000)
    assert sample.names == ["1"] and sample.values(members[0]).shape == (123,)
