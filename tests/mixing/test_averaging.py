"""The mixers that average, against what their papers' formulas give by hand."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from hf_wash.mixing import (
    ContagionError,
    DilocoMixer,
    PairAverageMixer,
    PapaMixer,
    PeriodicAverageMixer,
    SpartaMixer,
    averaging,
)


def population(size, dtype=torch.float32):
    members = []
    for seed in range(size):
        torch.manual_seed(seed)
        member = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).to(dtype)
        member[1].running_mean.normal_()
        members.append(member)
    return members


def states(members):
    return [{name: value.clone() for name, value in member.state_dict().items()} for member in members]


def parameters(members):
    return [{name: p.detach().clone() for name, p in member.named_parameters()} for member in members]


def mean(columns, name):
    return sum(column[name].double() for column in columns) / len(columns)


def close(value, expected, tolerance=1e-6):
    return torch.allclose(value.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("buffers", [False, True])
def test_members_become_their_mean_at_each_interval_and_keep_their_buffers_unless_asked(buffers):
    members = population(3)
    mixer = PeriodicAverageMixer(members, interval=4, buffers=buffers)
    before = states(members)
    for step in range(1, 4):
        stats = mixer.mix(step)
        assert (stats.values_moved, stats.averaged) == (0, False)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(states(members), before, strict=True) for n in a)
    stats = mixer.mix(4)
    assert stats.averaged
    names = {name for name, _ in members[0].named_parameters()}
    for index, after in enumerate(states(members)):
        for name, value in after.items():
            averaged = name in names or (buffers and "running" in name)
            assert close(value, mean(before, name) if averaged else before[index][name]), name
    size = sum(p.numel() for p in members[0].parameters()) + 8 * buffers
    assert stats.values_moved == stats.population_values_moved == 3 * size
    assert stats.bytes_exchanged == 12 * size and stats.bytes_sent == 0


@pytest.mark.parametrize("make", ["local SGD with buffers", "pairs", "PAPA"])
def test_buffers_that_are_not_saved_are_not_averaged_since_a_mask_may_be_infinite(make):
    members = population(2)
    for number, member in enumerate(members):
        member[3].register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1) + number, persistent=False)
        member[3].register_buffer("seen", torch.full((2,), float(number)))
    before = states(members)
    stats = MIXERS[make](members).mix(1)
    size = sum(value.numel() for value in before[0].values() if value.is_floating_point())
    assert stats.values_moved == 2 * size
    for number, member in enumerate(members):
        assert torch.equal(member[3].mask, torch.full((3, 3), float("-inf")).triu(1) + number)
        assert not torch.equal(member[3].seen, before[number]["3.seen"])


@pytest.mark.parametrize("make", ["local SGD", "pairs", "PAPA", "DiLoCo"])
def test_in_how_many_blocks_a_bucket_is_filled_changes_nothing(make, monkeypatch):
    whole, parted = population(3), population(3)
    MIXERS[make](whole).mix(1)
    monkeypatch.setattr(averaging, "_BLOCK", 1)
    MIXERS[make](parted).mix(1)
    for one, other in zip(states(whole), states(parted), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    parted[1][3].bias.data[1] = float("nan")
    with pytest.raises(ContagionError, match="Member 1 holds"):
        MIXERS[make](parted).mix(1)


@pytest.mark.parametrize("make", ["local SGD", "pairs", "PAPA", "SPARTA", "DiLoCo"])
def test_empty_parameters_are_in_nobodys_way(make):
    members = population(2)
    for member in members:
        member.register_parameter("first", nn.Parameter(torch.empty(0)))
        member[3].register_parameter("last", nn.Parameter(torch.empty(3, 0)))
    before = states(members)
    MIXERS[make](members).mix(1)
    assert not torch.equal(states(members)[0]["3.weight"], before[0]["3.weight"])


@pytest.mark.parametrize("make", ["local SGD with buffers", "pairs", "PAPA"])
def test_a_buffer_that_a_module_has_assigned_anew_is_averaged(make):
    members = population(2)
    mixer = MIXERS[make](members)
    for number, member in enumerate(members):
        member[1].running_mean = torch.full((4,), float(2 * number))
    mixer.mix(1)
    assert all(torch.equal(member[1].running_mean, torch.ones(4)) for member in members) == (make != "PAPA")
    assert torch.equal(members[0][1].running_mean, torch.full((4,), 0.5 if make == "PAPA" else 1.0))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        *itertools.product(["local SGD with buffers", "pairs", "PAPA", "DiLoCo"], ["shape", "dtype"]),
        *itertools.product(["local SGD with buffers", "pairs", "PAPA"], ["buffer"]),
    ],
)
def test_a_tensor_that_is_no_longer_what_it_was_is_refused_before_anything_is_written(make, change):
    members = population(3)
    mixer = MIXERS[make](members)
    if change == "buffer":
        members[2][1].running_var = torch.ones(5)
    else:
        members[2][3].weight.data = torch.ones(3, 3) if change == "shape" else members[2][3].weight.data.double()
    before = states(members)
    name = "1.running_var" if change == "buffer" else "3.weight"
    with pytest.raises(ValueError, match=f"'{name}' of member 2 is no longer of the shape, dtype and device"):
        mixer.mix(1)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(states(members), before, strict=True) for n in a)


def test_buffers_that_differ_are_refused_at_the_beginning():
    members = population(2)
    members[1][1].running_var = torch.ones(5)
    PeriodicAverageMixer(members, interval=1)
    with pytest.raises(ValueError, match=r"'1.running_var' has shape"):
        PeriodicAverageMixer(members, interval=1, buffers=True)


def test_first_and_last_say_when_averaging_begins_and_ends():
    mixer = PeriodicAverageMixer(population(2), interval=10, first=2, last=25)
    assert [step for step in range(1, 60) if mixer.is_due(step)] == [2, 12, 22]
    mixer = PeriodicAverageMixer(population(2), interval=10)
    assert [step for step in range(1, 31) if mixer.is_due(step)] == [10, 20, 30]


def test_papa_pulls_every_tenth_batch_of_an_epoch_counted_from_its_first():
    members = population(2)
    optimizers = [torch.optim.SGD(member.parameters(), lr=0.1) for member in members]
    mixer = PapaMixer(members, optimizers, steps_per_epoch=25)
    assert [step for step in range(1, 51) if mixer.is_due(step)] == [1, 11, 21, 26, 36, 46]
    mixer = PapaMixer(members, optimizers)
    assert [step for step in range(1, 51) if mixer.is_due(step)] == [1, 11, 21, 31, 41]


def test_papas_pull_falls_with_the_learning_rate_read_after_the_schedulers_step():
    members = population(3)
    optimizers = [torch.optim.SGD(member.parameters(), lr=0.4) for member in members]
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=4) for o in optimizers]
    mixer = PapaMixer(members, optimizers, rate=0.2, interval=1)
    for step in range(1, 4):
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        before = states(members)
        stats = mixer.mix(step)
        assert not stats.averaged
        rate = 0.2 * (1 - step / 4)
        for old, new in zip(before, states(members), strict=True):
            for name in ("0.weight", "3.bias", "1.running_mean"):
                assert close(new[name], (1 - rate) * old[name].double() + rate * mean(before, name)), (step, name)
            assert torch.equal(new["1.num_batches_tracked"], old["1.num_batches_tracked"])


def test_papa_goes_by_the_learning_rate_it_is_told_to_begin_with():
    members = population(2)
    optimizer = torch.optim.SGD([p for member in members for p in member.parameters()], lr=0.1)
    before = states(members)
    PapaMixer(members, optimizer, rate=0.5, base_learning_rate=0.2).mix(1)
    name = "3.weight"
    assert close(states(members)[0][name], 0.75 * before[0][name].double() + 0.25 * mean(before, name))


def test_papa_reads_the_learning_rate_of_an_optimizer_that_has_loaded_its_state():
    members = population(2)
    optimizers = [torch.optim.SGD(member.parameters(), lr=0.1) for member in members]
    mixer = PapaMixer(members, optimizers, rate=1.0, interval=1)
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["lr"] = 0.0
    before = states(members)
    mixer.mix(1)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(states(members), before, strict=True) for n in a)


@pytest.mark.parametrize("processes", [1, 2, 256, 257, 1000, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_over_many_processes_that_agree_are_exact(processes, dtype):
    modulus = averaging.remainder_of(dtype, processes)
    assert 1 < modulus <= averaging._REMAINDERS[dtype]
    check = torch.tensor([modulus - 1], dtype=dtype)
    sums = torch.stack([check, check * check]).expand(2, processes).cumsum(1, dtype=dtype)[:, -1].tolist()
    assert sums == [(modulus - 1) * processes, (modulus - 1) ** 2 * processes]


def test_each_child_is_the_mean_of_a_pair_and_all_pairs_are_drawn_alike():
    members = population(4)
    mixer = PairAverageMixer(members, interval=1, seed=3)
    before = states(members)
    stats = mixer.mix(1)
    assert stats.averaged
    for (one, other), after in zip(mixer.pairs(1), states(members), strict=True):
        assert one != other
        for name in ("0.weight", "1.running_var", "3.bias"):
            assert close(after[name], (before[one][name].double() + before[other][name].double()) / 2)
    drawn = [pair for step in range(3000) for pair in mixer.pairs(step)]
    expected = len(drawn) / 6
    # Six pairs, so 5 degrees of freedom: chi-squared beyond 20.5 has a probability of 0.1 %.
    counts = [drawn.count(pair) for pair in itertools.combinations(range(4), 2)]
    assert sum((count - expected) ** 2 / expected for count in counts) < 20.5


def test_sparta_averages_what_it_selects_and_nothing_else():
    members = population(3)
    before = parameters(members)
    mixer = SpartaMixer(members, probability=0.3, seed=5)
    stats = mixer.mix(1)
    after = parameters(members)
    changed = 0
    for name in before[0]:
        expected = mean(before, name)
        for old, new in zip(before, after, strict=True):
            same = new[name] == old[name]
            selected = ~same
            assert close(new[name][selected], expected[selected])
        changed += int((after[0][name] != before[0][name]).sum())
    total = sum(p.numel() for p in members[0].parameters())
    # Zeros of the BatchNorm bias and ones of its weight are the same in all members: selected or not, nothing shows.
    assert changed <= stats.values_moved // 3 < total
    assert stats.bytes_exchanged == 4 * stats.values_moved
    counts = [mixer.mix(step).values_moved / 3 for step in range(2, 400)]
    deviation = math.sqrt(0.3 * 0.7 / total / len(counts))
    assert abs(sum(counts) / len(counts) / total - 0.3) < 5 * deviation


def test_sparta_selects_the_same_on_every_process_and_other_weights_in_each_step():
    chosen = []
    for step in (1, 2, 1, 2):
        members = population(2)
        before = [p.detach().clone() for p in members[0].parameters()]
        SpartaMixer(members, probability=0.2, seed=7).mix(step)
        after = members[0].parameters()
        chosen.append([(old != new).nonzero().tolist() for old, new in zip(before, after, strict=True)])
    assert chosen[:2] == chosen[2:] and chosen[0] != chosen[1]


def test_what_sparta_averages_does_not_depend_on_what_was_drawn_ahead():
    """Steps in a row, of which the next is foreseen; and in leaps, where another one is asked for than was foreseen."""
    straight, leaping = population(3), population(3)
    mixer = SpartaMixer(straight, probability=0.2)
    for step in (1, 2, 3, 7, 5):
        mixer.mix(step)
    for step in (1, 2, 3, 7, 5):
        SpartaMixer(leaping, probability=0.2).mix(step)
    for one, other in zip(states(straight), states(leaping), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_sparta_follows_members_that_got_other_memory_and_refuses_those_that_are_no_longer_what_they_were():
    members = population(2)
    mixer = SpartaMixer(members, probability=1.0)
    mixer.mix(1)
    for member in members:
        member[3].weight.data = torch.randn(member[3].weight.shape)
    expected = (members[0][3].weight + members[1][3].weight) / 2
    mixer.mix(2)
    assert close(members[1][3].weight, expected) and close(members[0][3].weight, expected)
    members[1][3].weight.data = torch.randn(members[1][3].weight.shape).double()
    before = states(members)
    with pytest.raises(ValueError, match=r"The parameter '3.weight' of member 1 is no longer of the shape, dtype"):
        mixer.mix(3)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(states(members), before, strict=True) for n in a)


@pytest.mark.parametrize("shape", [(1, 1), (40, 40)])
def test_sparta_never_looks_beyond_parameters_that_have_got_another_shape(shape):
    members = population(2)
    mixer = SpartaMixer(members, probability=1.0)
    for member in members:
        member[3].weight.data = torch.randn(shape)
    before = states(members)
    with pytest.raises(ValueError, match=r"The parameter '3.weight' of member 0 is no longer of the shape, dtype"):
        mixer.mix(1)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(states(members), before, strict=True) for n in a)


def test_finite_members_whose_sum_would_be_infinite_stay_what_they_are():
    members = population(2)
    with torch.no_grad():
        for member in members:
            member[3].weight.fill_(3e38)
    before = states(members)
    with pytest.raises(ContagionError, match=r"^The members' values are finite at step 1, and some are too large"):
        PeriodicAverageMixer(members, interval=1).mix(1)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(states(members), before, strict=True) for n in a)


def outer_by_hand(start, locals_, momentum_buffer, rate=0.7, momentum=0.9):
    """Nesterov's step as torch documents it: b ← μ·b + g, θ ← θ − lr·(g + μ·b)."""
    gradient = start - sum(locals_) / len(locals_)
    momentum_buffer = gradient if momentum_buffer is None else momentum * momentum_buffer + gradient
    return start - rate * (gradient + momentum * momentum_buffer), momentum_buffer


def test_diloco_takes_the_mean_for_an_outer_nesterov_step_after_exactly_h_steps():
    members = [copy.deepcopy(population(1)[0]) for _ in range(2)]
    mixer = DilocoMixer(members, interval=3)
    start, buffer = members[0][0].weight.detach().double(), None
    for step in range(1, 10):
        with torch.no_grad():
            for index, member in enumerate(members):
                generator = torch.Generator().manual_seed(10 * step + index)
                member[0].weight += 0.1 * torch.randn(member[0].weight.shape, generator=generator)
        before = [member[0].weight.detach().double() for member in members]
        stats = mixer.mix(step)
        assert stats.averaged == (step % 3 == 0)
        if stats.averaged:
            start, buffer = outer_by_hand(start, before, buffer)
            assert torch.equal(members[0][0].weight, members[1][0].weight)
            assert close(members[0][0].weight, start)


def test_diloco_goes_on_from_its_state_bit_for_bit():
    def run(stop=None, mixer=None, members=None):
        members = members or [copy.deepcopy(population(1)[0]) for _ in range(2)]
        mixer = mixer or DilocoMixer(members, interval=2)
        first = stop + 1 if stop else 1
        for step in range(first, 9):
            for index, member in enumerate(members):
                generator = torch.Generator().manual_seed(10 * step + index)
                with torch.no_grad():
                    member[0].weight += torch.randn(member[0].weight.shape, generator=generator)
            mixer.mix(step)
            if stop is None and step == 5:
                saved = states(members), copy.deepcopy(mixer.state_dict())
        return members, saved if stop is None else None

    straight, (weights, state) = run()
    again = [copy.deepcopy(population(1)[0]) for _ in range(2)]
    for member, own in zip(again, weights, strict=True):
        member.load_state_dict(own)
    mixer = DilocoMixer(again, interval=2)
    mixer.load_state_dict(state)
    resumed, _ = run(5, mixer, again)
    for one, other in zip(straight, resumed, strict=True):
        assert torch.equal(one[0].weight, other[0].weight)


MIXERS = {
    "local SGD": lambda members: PeriodicAverageMixer(members, interval=1),
    "local SGD with buffers": lambda members: PeriodicAverageMixer(members, interval=1, buffers=True),
    "pairs": lambda members: PairAverageMixer(members, interval=1),
    "PAPA": lambda members: PapaMixer(
        members, [torch.optim.SGD(m.parameters(), lr=0.1) for m in members], rate=0.5, interval=1
    ),
    "SPARTA": lambda members: SpartaMixer(members, probability=0.5),
    "DiLoCo": lambda members: DilocoMixer(members, interval=1),
}


@pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)
def test_nan_stays_where_it_is(make):
    members = population(3)
    mixer = make(members)
    with torch.no_grad():
        members[1][0].weight.fill_(float("nan"))
        members[1][3].weight.fill_(float("nan"))
    before = states(members)
    with pytest.raises(
        ContagionError, match=r"Member 1 holds NaN or infinite values among those to be exchanged at step 1\b"
    ) as raised:
        mixer.mix(1)
    assert raised.value.members == (1,)
    for old, new in zip(before, states(members), strict=True):
        assert all(torch.equal(old[name].nan_to_num(7), new[name].nan_to_num(7)) for name in old)


@pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)
def test_half_precision_members_and_strided_ones_are_averaged_as_any(make):
    for members in (population(2, torch.bfloat16), [m.to(memory_format=torch.channels_last) for m in population(2)]):
        expected = [m.float() for m in copy.deepcopy(members)]
        make(members).mix(1)
        make(expected).mix(1)
        for one, other in zip(members, expected, strict=True):
            for (name, value), reference in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
                # One rounding to bfloat16 at the end, and none before: half a unit in the last of its 8 bits.
                tolerance = 2**-8 if value.dtype == torch.bfloat16 else 1e-6
                assert close(value, reference, tolerance), name


@pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)
def test_one_member_exchanges_nothing_and_shuffle_false_neither(make):
    assert make(population(1)).mix(1).values_moved == 0
    members = population(2)
    before = states(members)
    stats = make(members).mix(1, shuffle=False)
    assert stats.values_moved == 0
    assert all(torch.equal(a[n], b[n]) for a, b in zip(states(members), before, strict=True) for n in a)


@pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)
def test_a_state_of_another_method_is_refused(make):
    mixer = make(population(2))
    with pytest.raises(ValueError, match=f"The state of {type(mixer).__name__} has"):
        mixer.load_state_dict({"something": 1})
    mixer.load_state_dict(mixer.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: PeriodicAverageMixer(m, interval=0), "interval must be a whole number of steps of at least 1"),
        (lambda m: PeriodicAverageMixer(m, interval=2, first=True), "first must be a whole number of steps"),
        (lambda m: PeriodicAverageMixer(m, interval=2.0), "interval must be a whole number of steps"),
        (lambda m: SpartaMixer(m, probability=1.5), "probability must be a number between 0 and 1, and is 1.5"),
        (lambda m: SpartaMixer(m, seed=-1), "seed must be an integer from 0"),
        (lambda m: DilocoMixer(m, learning_rate=0), "learning_rate must be a number above 0, and is 0"),
        (lambda m: DilocoMixer(m, momentum=1.0), "momentum must be a number of at least 0 and below 1"),
        (
            lambda m: PapaMixer(m, torch.optim.SGD(m[0].parameters(), lr=0.1), rate=-0.1),
            "rate must be a number between 0 and 1, and is -0.1",
        ),
        (lambda m: PapaMixer(m, []), "No optimizer holds a member's parameters"),
        (
            lambda m: PapaMixer(m, torch.optim.SGD([p for own in m for p in own.parameters()], lr=0.0)),
            "base_learning_rate must be above 0, and is 0.0",
        ),
        (lambda m: PeriodicAverageMixer([*m, nn.Linear(2, 2)], interval=2), "does not have the architecture of"),
        (lambda m: PeriodicAverageMixer([], interval=2), "This process was given no members"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make(population(2))


@pytest.mark.parametrize("step", [0, -1, True, 1.0, None])
def test_a_step_that_is_none_is_refused(step):
    with pytest.raises(ValueError, match="step must be a whole number of steps of at least 1"):
        PeriodicAverageMixer(population(2), interval=2).mix(step)
