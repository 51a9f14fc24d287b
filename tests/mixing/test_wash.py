"""The shuffle in one process: what it preserves, what real models bring, and what it refuses."""

import copy
import itertools
import tracemalloc

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_members import linears, population, snapshot, step_all
from torch import nn

from hf_wash.mixing import ContagionError, MixStats, WashMixer, expected_values_moved
from hf_wash.mixing import wash as wash_module
from hf_wash.mixing.exchange import DeviceShipment


dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
shapes = st.lists(
    st.tuples(st.lists(st.integers(1, 6), max_size=4).map(tuple), dtypes, st.booleans()), min_size=1, max_size=5
)


def random_model(tensors):
    model = nn.Module()
    for number, (shape, dtype, permuted) in enumerate(tensors):
        tensor = torch.randn(shape).to(dtype)
        if permuted:
            backwards = tuple(reversed(range(len(shape))))
            tensor = tensor.permute(backwards).contiguous().permute(backwards)
        layer = nn.Module()
        layer.weight = nn.Parameter(tensor)
        model.add_module(f"layer_{number}", layer)
    return model


@settings(max_examples=120, deadline=None)
@given(
    tensors=shapes,
    num_members=st.integers(1, 6),
    probability=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    schedule=st.sampled_from(["decreasing", "constant", "increasing"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_shuffle_preserves_what_it_must(tensors, num_members, probability, schedule, seed):
    members = population(lambda: random_model(tensors), num_members)
    mixer = WashMixer(members, probability=probability, schedule=schedule, seed=seed)
    for step in range(3):
        before = snapshot(members)
        stats = mixer.mix(step)
        after = snapshot(members)
        assert torch.equal(before.sort(dim=0).values, after.sort(dim=0).values), "a multiset of values changed"
        soup = before.mean(dim=0)
        torch.testing.assert_close(after.mean(dim=0), soup, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            (after - after.mean(dim=0)).square().sum(), (before - soup).square().sum(), rtol=1e-10, atol=1e-10
        )
        if probability == 0 or num_members == 1:
            assert torch.equal(before, after)
            assert stats.values_moved == stats.bytes_exchanged == 0
        # Random values may repeat in 16 bits, so the count is an upper bound of what can be seen.
        assert (before != after).sum() <= stats.values_moved == stats.population_values_moved


def test_counts_are_those_of_values_with_another_owner():
    members = linears(5, 40, 30, 20)
    before = snapshot(members)
    stats = WashMixer(members, probability=0.4).mix(0)
    moved = int((snapshot(members) != before).sum())
    assert moved > 0
    assert stats == MixStats(moved, 4 * moved, 0, False, False, moved, 4 * moved, 0.0)


def test_the_average_count_is_the_expected_one():
    members = linears(3, 100, 100, 100)
    mixer = WashMixer(members, probability=0.2)
    mean = np.mean([mixer.mix(step).values_moved for step in range(100)])
    expected = 3 * expected_values_moved(members[0], 3, 0.2)
    assert mean == pytest.approx(expected, rel=0.02)


def test_the_expected_value_is_a_pull_towards_the_average():
    # E[θ'] = (1 − p)·θ + p·θ̄ for each coordinate: the mean over many steps from the same start.
    probability = 0.5
    members = linears(3, 8, 8)
    start = snapshot(members)
    mixer = WashMixer(members, probability=probability, schedule="constant")
    total, steps = torch.zeros_like(start), 4000
    for step in range(steps):
        for member, values in zip(members, start, strict=True):
            nn.utils.vector_to_parameters(values.float(), member.parameters())
        mixer.mix(step)
        total += snapshot(members)
    expected = (1 - probability) * start + probability * start.mean(dim=0)
    deviation = (total / steps - expected).abs() / (start.std(dim=0) / steps**0.5)
    assert deviation.max() < 5


def test_the_first_layer_moves_and_the_last_one_does_not():
    members = linears(2, 30, 30, 30)
    before = [[p.detach().clone() for p in member.parameters()] for member in members]
    WashMixer(members, probability=0.5).mix(0)
    changed = [not torch.equal(p, old) for p, old in zip(members[0].parameters(), before[0], strict=True)]
    assert changed == [True, True, False, False]


def test_steps_may_be_skipped_or_repeated_and_only_their_number_counts():
    def run(steps):
        members = linears(3, 30, 30)
        mixer = WashMixer(members, probability=0.1, seed=3)
        results = {}
        for step in steps:
            start = snapshot(linears(3, 30, 30))
            for member, values in zip(members, start, strict=True):
                nn.utils.vector_to_parameters(values.float(), member.parameters())
            mixer.mix(step)
            results[step] = snapshot(members)
        return results

    forward, other = run(range(12)), run([11, 2, 4, 6, 8, 8, 0])
    assert all(torch.equal(forward[step], values) for step, values in other.items())
    assert not torch.equal(forward[2], forward[4])


def test_without_a_shuffle_nothing_moves():
    members = linears(2, 30, 30)
    before = snapshot(members)
    mixer = WashMixer(members, probability=1.0)
    assert mixer.mix(0, shuffle=False) == MixStats(0, 0, 0, False, False, 0, 0, 0.0)
    assert mixer.mix(1, shuffle=False, stop_requested=True).stop_requested
    assert torch.equal(before, snapshot(members))


# --- what real models bring


def test_frozen_parameters_and_buffers_stay():
    def make():
        model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 20))
        model[0].requires_grad_(False)
        model(torch.randn(8, 20))
        return model

    members = population(make, 3)
    before = [copy.deepcopy(member.state_dict()) for member in members]
    WashMixer(members, probability=1.0, schedule="constant").mix(0)
    for member, old in zip(members, before, strict=True):
        for name, value in member.state_dict().items():
            stays = name.startswith("0.") or "running" in name or "num_batches" in name
            # The scale of a fresh BatchNorm is 1 in all members, so only the last layer shows that it moved.
            if stays:
                assert torch.equal(value, old[name]), name
        assert not torch.equal(member.state_dict()["2.weight"], old["2.weight"])


def test_members_may_share_a_frozen_backbone():
    backbone = nn.Linear(4, 4).requires_grad_(False)
    members = [nn.Sequential(backbone, nn.Linear(4, 50)) for _ in range(2)]
    assert WashMixer(members, probability=0.5).mix(0).values_moved > 0


def test_a_tied_weight_is_shuffled_once():
    def make():
        model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
        model[1].weight = model[0].weight
        return model

    members = population(make, 2)
    before = snapshot(members)
    stats = WashMixer(members, probability=1.0).mix(0)
    assert all(member[0].weight is member[1].weight for member in members)
    # Applied twice, a swap would have been undone.
    assert stats.values_moved == int((snapshot(members) != before).sum()) > 0


def test_the_memory_format_is_of_no_account():
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))

    plain, mixed = population(make, 3), population(make, 3)
    mixed[1].to(memory_format=torch.channels_last)
    mixers = [WashMixer(members, probability=0.3, schedule="constant") for members in (plain, mixed)]
    for step in range(4):
        if step == 2:
            # Members may also change it between two steps, when the plan has been drawn already.
            mixed[0].to(memory_format=torch.channels_last)
            mixed[1].to(memory_format=torch.contiguous_format)
        for mixer in mixers:
            mixer.mix(step)
        assert torch.equal(snapshot(plain), snapshot(mixed))


def test_a_storage_that_is_larger_than_its_parameter_is_left_alone_around_it():
    storages = [torch.randn(20, 40) for _ in range(2)]
    members = [nn.Module() for _ in storages]
    for member, storage in zip(members, storages, strict=True):
        member.weight = nn.Parameter(storage[::2, 3:30:3])
    outside = [storage.clone() for storage in storages]
    WashMixer(members, probability=1.0).mix(0)
    for storage, old in zip(storages, outside, strict=True):
        assert not torch.equal(storage, old)
        storage[::2, 3:30:3] = old[::2, 3:30:3]
        assert torch.equal(storage, old)


def test_scalars_and_several_dtypes_travel_together():
    tensors = [
        ((), torch.float32, False),
        ((7, 3), torch.bfloat16, True),
        ((5,), torch.float16, False),
        ((4, 4), torch.float64, True),
    ]
    members = population(lambda: random_model(tensors), 4)
    before = snapshot(members)
    mixer = WashMixer(members, probability=1.0, schedule="constant")
    for step in range(5):
        mixer.mix(step)
    after = snapshot(members)
    assert torch.equal(before.sort(dim=0).values, after.sort(dim=0).values)
    assert (before != after).any(dim=0)[0], "the scalar never moved in five steps"


def test_a_compiled_member_is_shuffled_as_the_model_inside():
    plain, compiled = linears(2, 20, 20), linears(2, 20, 20)
    # The backend does not matter here; "eager" needs no C++ compiler.
    wrapped = [torch.compile(member, backend="eager") for member in compiled]
    inputs = torch.randn(3, 20)
    first = wrapped[0](inputs)
    WashMixer(plain, probability=0.5).mix(0)
    WashMixer([wrapped[0], compiled[1]], probability=0.5).mix(0)
    assert torch.equal(snapshot(plain), snapshot(compiled))
    assert not torch.equal(wrapped[0](inputs), first)
    assert torch.equal(wrapped[0](inputs), plain[0](inputs))


def test_gradients_flow_through_shuffled_parameters():
    members = linears(2, 10, 10)
    WashMixer(members, probability=1.0).mix(0)
    for member in members:
        member(torch.randn(4, 10)).sum().backward()
        assert all(p.is_leaf and p.requires_grad and p.grad is not None for p in member.parameters())


def test_values_travel_bit_for_bit():
    members = linears(2, 64, 64)
    with torch.no_grad():
        members[0][0].weight.copy_(torch.arange(4096).float().view(64, 64))
        members[1][0].weight.copy_(-torch.arange(4096).float().view(64, 64))  # negative zero among them
    WashMixer(members, probability=1.0).mix(0)
    signs = torch.stack([torch.signbit(member[0].weight) for member in members]).sum(dim=0)
    assert (signs == 1).all()


# --- the firewall


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_value_that_is_not_finite_goes_nowhere(value, dtype):
    members = [member.to(dtype) for member in linears(4, 30, 30)]
    mixer = WashMixer(members, probability=0.5, schedule="constant")
    mixer.mix(6)
    with torch.no_grad():
        members[2][0].weight.fill_(value)
    before = snapshot(members)
    with pytest.raises(ContagionError, match=r"Member 2 .* step 7") as caught:
        mixer.mix(7)
    assert (caught.value.members, caught.value.step) == ((2,), 7)
    assert torch.equal(snapshot(members).nan_to_num(), before.nan_to_num())


def test_the_right_member_is_named_where_members_lie_between_one_another():
    memory = torch.randn(50, 50, 3)
    members = [nn.Module() for _ in range(3)]
    for number, member in enumerate(members):
        member.weight = nn.Parameter(memory[..., number])
    mixer = WashMixer(members, probability=0.5)
    members[0].weight.data.fill_(float("nan"))
    with pytest.raises(ContagionError) as caught:
        mixer.mix(0)
    assert caught.value.members == (0,)


def test_finite_values_whose_sum_overflows_are_fine():
    members = linears(2, 30, 30)
    with torch.no_grad():
        for member in members:
            member[0].weight.fill_(torch.finfo(torch.float32).max)
    assert WashMixer(members, probability=1.0).mix(0).values_moved > 0


def test_a_state_that_is_not_finite_goes_nowhere_either():
    members = linears(3, 30, 30)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in members]
    step_all(members, optimizers, 0)
    mixer = WashMixer(members, optimizers, probability=0.5, shuffle_optimizer_state=True)
    optimizers[1].state[members[1][0].weight]["momentum_buffer"].fill_(float("nan"))
    before = snapshot(members)
    with pytest.raises(ContagionError, match="Member 1"):
        mixer.mix(0)
    assert torch.equal(before, snapshot(members))


# --- what it takes


def test_a_whole_shuffle_of_a_large_model_takes_little_memory():
    with torch.device("meta"):
        # Two, and not copies of one: what is in question is what the shuffle needs beside them.
        members = [timm.create_model("vit_base_patch16_224") for _ in range(2)]
    for member in members:
        member.to_empty(device="cpu")
        for parameter in member.parameters():
            parameter.data.zero_()
    size = sum(parameter.nbytes for parameter in members[0].parameters())
    tracemalloc.start()
    try:
        mixer = WashMixer(members, probability=0.001)
        for step in range(5):
            moved = mixer.mix(step).values_moved
            mixer.prepare(step + 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert moved > 40_000
    # It sees NumPy's arrays and Python's objects, which is all that a shuffle on a CPU makes.
    assert 100_000 < peak < 0.02 * size


# --- other devices: the same algorithm with torch alone, run here on a CPU


def test_the_path_for_other_devices_gives_the_same_members(monkeypatch):
    def run():
        def make():
            model = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.Linear(9, 30), nn.Linear(30, 4).to(torch.bfloat16), nn.Linear(3, 3)
            )
            return model.to(memory_format=torch.channels_last)

        members = population(make, 4)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in members]
        mixer = WashMixer(members, optimizers, probability=0.3, shuffle_optimizer_state=True)
        stats = []
        for step in range(4):
            step_all(members, optimizers, step)
            stats.append(mixer.mix(step))
        with torch.no_grad():
            members[3][0].weight.fill_(float("inf"))
        with pytest.raises(ContagionError, match="Member 3"):
            mixer.mix(4)
        return snapshot(members), stats

    expected, expected_stats = run()
    monkeypatch.setattr(wash_module, "HostShipment", DeviceShipment)
    found, stats = run()
    assert torch.equal(found, expected)
    assert stats == expected_stats


@pytest.mark.gpu
@pytest.mark.parametrize("shuffle_optimizer_state", [False, True])
def test_members_on_a_gpu_get_what_they_would_get_on_a_cpu(shuffle_optimizer_state):
    results = []
    for device in ("cpu", "cuda"):
        members = [m.to(device) for m in linears(3, 40, 40, 8)]
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in members]
        mixer = WashMixer(members, optimizers, probability=0.3, shuffle_optimizer_state=shuffle_optimizer_state)
        for step in range(5):
            for number, parameter in enumerate(itertools.chain(*(m.parameters() for m in members))):
                parameter.grad = torch.full_like(parameter, 0.25 * (number + step))
            for optimizer in optimizers:
                optimizer.step()
            mixer.mix(step)
        mixer.synchronize()
        results.append(snapshot(members).cpu())
    assert torch.equal(*results)


@pytest.mark.gpu
def test_on_a_gpu_the_firewall_speaks_one_call_later_and_holds_at_once():
    members = [m.cuda() for m in linears(3, 40, 40)]
    mixer = WashMixer(members, probability=0.5)
    with torch.no_grad():
        members[1][0].weight.fill_(float("nan"))
    before = snapshot(members)
    mixer.mix(0)
    assert torch.equal(before.nan_to_num(), snapshot(members).nan_to_num())
    with pytest.raises(ContagionError, match=r"Member 1 .* step 0"):
        mixer.mix(1)


# --- bad input


def test_a_probability_or_schedule_that_is_none_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        WashMixer(linears(2, 3, 3), probability=1.5)
    with pytest.raises(ValueError, match="'sideways'"):
        WashMixer(linears(2, 3, 3), schedule="sideways")
    with pytest.raises(ValueError, match="seed"):
        WashMixer(linears(2, 3, 3), seed=-1)


def test_members_that_differ_are_refused_by_name():
    reference = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other_shape = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"Member 1 .*'1\.weight' has shape \(4, 3\)"):
        WashMixer([reference, other_shape])
    with pytest.raises(ValueError, match=r"Member 1 .*'0\.weight' has dtype .*float64"):
        WashMixer([reference, copy.deepcopy(reference).double()])
    with pytest.raises(ValueError, match=r"Member 2 .*'1\.weight' is missing in member 2"):
        WashMixer([reference, copy.deepcopy(reference), nn.Sequential(nn.Linear(3, 3))])
    renamed = nn.Sequential()
    renamed.add_module("0", nn.Linear(3, 3))
    renamed.add_module("head", nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match=r"Member 1 .*'head\.weight' of member 1 stands where member 0 has '1\.weight'"
    ):
        WashMixer([reference, renamed])
    frozen = copy.deepcopy(reference)
    frozen[1].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Member 1 .*'1\.bias' has requires_grad False in member 1"):
        WashMixer([reference, frozen])


@pytest.mark.parametrize("kind", ["shape", "dtype", "empty"])
def test_nothing_is_written_beside_a_parameter_that_became_another_tensor(kind):
    members = linears(2, 50, 50, 50)
    mixer = WashMixer(members, probability=0.5, schedule="constant")
    mixer.mix(0)
    arena = torch.full((8000,), 7.0)
    members[1][0].weight.data = {
        "shape": arena[100:104].view(2, 2),
        "dtype": arena.view(torch.bfloat16)[:2500].view(50, 50),
        "empty": torch.empty(0),
    }[kind]
    before = [copy.deepcopy(member.state_dict()) for member in members]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'0.weight' of member 1 is no longer of the shape, dtype and device"):
            mixer.mix(1)
    assert (arena == 7).all()
    for member, old in zip(members, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in member.state_dict().items())


def test_the_same_model_twice_is_refused():
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="Members 0 and 1 share the parameter 'weight'"):
        WashMixer([model, model])


def test_a_model_without_anything_to_shuffle_is_refused():
    with pytest.raises(ValueError, match="no trainable floating-point parameter"):
        WashMixer([nn.Linear(3, 3).requires_grad_(False) for _ in range(2)])
    with pytest.raises(ValueError, match="no members"):
        WashMixer([])


def test_a_parameter_whose_elements_share_memory_is_refused():
    def make():
        model = nn.Module()
        model.scale = nn.Parameter(torch.randn(3, 1).expand(3, 4))
        return model

    with pytest.raises(ValueError, match=r"'scale' of member 0 share memory"):
        WashMixer([make(), make()])


@pytest.mark.parametrize("step", [-1, 0.5, 2**63, None, True])
def test_a_step_that_is_none_is_refused(step):
    with pytest.raises(ValueError, match="step"):
        WashMixer(linears(2, 3, 3)).mix(step)


def test_a_process_group_without_processes_is_refused():
    with pytest.raises(ValueError, match="not initialised"):
        WashMixer(linears(2, 3, 3), process_group=object())
