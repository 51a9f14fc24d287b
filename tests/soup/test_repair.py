"""REPAIR: the soup's channels get the mean of the members' means and standard deviations."""

import copy

import pytest
import torch
from torch import nn

from hf_wash.soup import channel_statistics, mean_statistics, recalibrate_batch_norm, repair, uniform_soup


def net(seed, bias=True, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, bias=bias)] + [nn.BatchNorm2d(6)] * norm + [nn.ReLU(), nn.Conv2d(6, 5, 3, bias=bias)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(5)] * norm), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 2))


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 8, 8, generator=generator) * 2 + 1 for _ in range(count)]


def soup_of(members):
    soup = copy.deepcopy(members[0])
    soup.load_state_dict(uniform_soup([member.state_dict() for member in members]))
    return soup


def test_statistics_are_those_of_the_output():
    model, data = net(0), batches(2)
    found = channel_statistics(model, data)
    assert set(found) == {"0", "2"}
    outputs = [model[0](batch) for batch in data]
    mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    deviation = torch.stack([o.var((0, 2, 3), correction=0) for o in outputs]).mean(0).sqrt()
    torch.testing.assert_close(found["0"][0], mean)
    torch.testing.assert_close(found["0"][1], deviation)
    assert model.training


def test_a_repaired_soup_has_the_mean_of_its_members_statistics():
    members, data = [net(seed) for seed in range(3)], batches(1)
    target = mean_statistics([channel_statistics(member, data) for member in members])
    soup = soup_of(members)
    before = channel_statistics(soup, data)
    # The means of independent weights have less variance: that is what there is to repair.
    assert (before["0"][1] < target["0"][1]).all()
    assert repair(soup, target, data) == 1
    after = channel_statistics(soup, data)
    for name in target:
        for found, wanted in zip(after[name], target[name], strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_without_a_bias_a_channel_is_scaled_and_not_shifted():
    members, data = [net(seed, bias=False) for seed in range(2)], batches(1)
    target = mean_statistics([channel_statistics(member, data) for member in members])
    soup = soup_of(members)
    repair(soup, target, data)
    after = channel_statistics(soup, data)
    for name in target:
        torch.testing.assert_close(after[name][1], target[name][1], atol=1e-4, rtol=1e-4)


def test_where_batch_norm_follows_it_comes_to_the_same_as_recalibrating():
    members, data = [net(seed, norm=True) for seed in range(2)], batches(3)
    for member in members:
        recalibrate_batch_norm(member, data)
    target = mean_statistics([channel_statistics(member, data) for member in members])
    repaired, recalibrated = soup_of(members), soup_of(members)
    repair(repaired, target, data)
    recalibrate_batch_norm(recalibrated, data)
    probe = batches(1, seed=9)[0]
    # Equal batches would make it exact; the variance of three different ones is a mean.
    torch.testing.assert_close(repaired.eval()(probe), recalibrated.eval()(probe), atol=2e-2, rtol=2e-2)
    assert not torch.equal(repaired[0].weight, recalibrated[0].weight)


def test_a_dead_channel_stays_and_nothing_becomes_nan():
    members, data = [net(seed) for seed in range(2)], batches(1)
    soup = soup_of(members)
    target = mean_statistics([channel_statistics(member, data) for member in members])
    with torch.no_grad():
        soup[0].weight[2] = 0
        soup[0].bias[2] = 0.25
    repair(soup, target, data)
    assert soup[0].bias[2] == 0.25 and not soup[0].weight[2].any()
    assert all(parameter.isfinite().all() for parameter in soup.parameters())


def test_hooks_and_modes_are_gone_afterwards_even_if_a_batch_fails():
    model = net(0)
    with pytest.raises(RuntimeError):
        channel_statistics(model, [torch.zeros(2, 4, 8, 8)])
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_bad_input_is_refused_in_one_sentence():
    model = net(0)
    with pytest.raises(ValueError, match="There is no batch to measure activations on"):
        channel_statistics(model, [])
    target = channel_statistics(model, batches(1))
    with pytest.raises(ValueError, match="There is no batch to repair on"):
        repair(model, target, [])
    with pytest.raises(ValueError, match="The model has no convolution 'other', which the target names"):
        repair(model, {"other": target["0"]}, batches(1))
    with pytest.raises(ValueError, match="Members have different convolutions"):
        mean_statistics([target, {"0": target["0"]}])
