"""A member that has diverged spoils every mean it is in: soups refuse it and say which one it is."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_wash.soup import greedy_soup, uniform_soup
from hf_wash.soup.weights import open_member


def state(value=0.0, **tensors):
    return {"a": torch.arange(4.0), "w": torch.full((600, 600), 1.0), "b": torch.tensor([1.0, value]), **tensors}


BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("handed_over", ["list", "generator", "files", "modules"])
def test_a_uniform_soup_names_the_member_and_the_tensor(tmp_path, handed_over, value):
    states = [state(), state(), state(value)]
    members = states
    if handed_over == "generator":
        members = iter(states)
    elif handed_over == "files":
        members = [tmp_path / f"{index}.safetensors" for index in range(3)]
        for path, tensors in zip(members, states, strict=True):
            save_file(tensors, path)
    elif handed_over == "modules":
        members = [nn.ParameterDict({name: nn.Parameter(value) for name, value in each.items()}) for each in states]
    with pytest.raises(ValueError, match=r"Member 2.* holds NaN or infinite values in 'b'"):
        uniform_soup(members)


def test_all_members_that_are_not_finite_are_named():
    members = [state(math.nan), state(), state(math.inf), state(0, w=torch.full((600, 600), -math.inf))]
    with pytest.raises(ValueError, match=r"^Member 0 .*'b', member 2 .*'b', member 3 .*'w'.*leave"):
        uniform_soup(members)


def test_infinities_that_cancel_or_opposite_ones_are_found():
    with pytest.raises(ValueError, match=r"Member 0 .*member 1"):
        uniform_soup([state(math.inf), state(-math.inf)])


def test_a_greedy_soup_refuses_before_the_first_evaluation():
    calls = []
    with pytest.raises(ValueError, match="Member 1 holds NaN or infinite values in 'b'"):
        greedy_soup([state(), state(math.nan)], calls.append)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e5m2])
def test_every_floating_point_type_is_looked_at(dtype):
    tensors = {"empty": torch.zeros(0, dtype=dtype), "w": torch.ones(5).to(dtype)}
    assert open_member(tensors, 0).first_not_finite() is None
    tensors["v"] = torch.tensor([1.0, math.nan]).to(dtype)
    assert open_member(tensors, 0).first_not_finite() == "v"


def test_the_largest_numbers_are_finite():
    largest = torch.full((100,), torch.finfo(torch.float32).max)
    assert torch.equal(uniform_soup([{"w": largest}, {"w": largest}])["w"], largest)


def test_an_attention_mask_among_the_buffers_is_not_a_divergence():
    """Some models keep a causal mask, 0 and −inf, among their persistent buffers."""
    mask = torch.full((4, 4), -math.inf).triu(1)
    members = [{"mask": mask, "w": torch.tensor([1.0])}, {"mask": mask.clone(), "w": torch.tensor([3.0])}]
    for handed_over in (members, iter(members)):
        soup = uniform_soup(handed_over)
        assert torch.equal(soup["mask"], mask) and soup["w"] == 2.0
    with pytest.raises(ValueError, match=r"Member 1 .*'mask'"):
        uniform_soup([members[0], {**members[1], "mask": mask * math.nan}])


def test_counts_and_flags_are_not_looked_at():
    assert (
        open_member({"steps": torch.tensor(3), "on": torch.tensor([True]), "extra": "text"}, 0).first_not_finite()
        is None
    )
