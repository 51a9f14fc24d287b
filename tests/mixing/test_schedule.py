"""The probability of each layer."""

import pytest
import torch
from torch import nn

from hf_wash.mixing import expected_values_moved, layer_probabilities, schedule_probabilities, shuffled_layers


def small_model():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("decreasing", [0.2, 0.1, 0.0]), ("increasing", [0.0, 0.1, 0.2]), ("constant", [0.2, 0.2, 0.2])],
)
def test_probability_follows_the_depth(schedule, expected):
    assert schedule_probabilities(3, 0.2, schedule) == expected
    assert list(layer_probabilities(small_model(), 0.2, schedule).values()) == expected


@pytest.mark.parametrize("schedule", ["decreasing", "constant", "increasing"])
def test_a_single_layer_gets_the_base_probability(schedule):
    assert schedule_probabilities(1, 0.3, schedule) == [0.3]


def test_a_layer_is_a_module_with_parameters_to_shuffle():
    model = small_model()
    layers = shuffled_layers(model)
    assert {layer: list(owned) for layer, owned in layers.items()} == {
        "0": ["0.weight", "0.bias"],
        "2": ["2.weight", "2.bias"],
        "3": ["3.weight", "3.bias"],
    }


def test_a_frozen_backbone_leaves_the_head_as_the_first_layer():
    model = small_model()
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    assert layer_probabilities(model, 0.1) == {"3": 0.1}


def test_a_tied_weight_belongs_to_its_first_owner():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    assert list(shuffled_layers(model)) == ["0"]


def test_a_compiled_model_has_the_layers_of_the_original():
    model = small_model()
    assert layer_probabilities(torch.compile(model), 0.1) == layer_probabilities(model, 0.1)
    partly = small_model()
    partly[0] = torch.compile(partly[0])
    assert layer_probabilities(partly, 0.1) == layer_probabilities(model, 0.1)


def test_a_mapping_gives_probabilities_by_the_innermost_module():
    model = nn.ModuleDict({"body": small_model(), "head": nn.Linear(2, 2)})
    assert layer_probabilities(model, 0.1, {"body": 0.2, "body.2": 0.5}) == {
        "body.0": 0.2,
        "body.2": 0.5,
        "body.3": 0.2,
        "head": 0.1,
    }
    assert set(layer_probabilities(model, 0.1, {"": 0.0}).values()) == {0.0}


def test_expected_values_moved_is_the_floor_of_the_communication():
    # 15 weights at 0.2, 6 at 0.1, 8 at 0.0; of the selected ones two thirds move among three members.
    assert expected_values_moved(small_model(), 3, 0.2) == pytest.approx((15 * 0.2 + 6 * 0.1) * 2 / 3)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan"), "0.1", None, True])
def test_a_probability_outside_0_and_1_is_refused(probability):
    with pytest.raises(ValueError, match="between 0 and 1"):
        layer_probabilities(small_model(), probability)
    with pytest.raises(ValueError, match="between 0 and 1"):
        layer_probabilities(small_model(), 0.1, {"0": probability})


def test_an_unknown_schedule_or_module_is_refused_by_name():
    with pytest.raises(ValueError, match="'sideways'"):
        layer_probabilities(small_model(), 0.1, "sideways")
    with pytest.raises(ValueError, match=r"'layer\.9'"):
        layer_probabilities(small_model(), 0.1, {"layer.9": 0.1})
