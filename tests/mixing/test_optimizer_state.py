"""WASH+Opt: the optimizer's state moves with the weights that it belongs to, or is refused."""

import copy
import itertools

import pytest
import torch
from small_members import linears, snapshot, step_all
from torch import nn

from hf_wash.mixing import WashMixer


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_moves_with_its_weight(name):
    members = linears(3, 12, 12)
    for member in members:
        member.scale = nn.Parameter(torch.randn(()))
    optimizers = [OPTIMIZERS[name](member.parameters()) for member in members]
    mixer = WashMixer(members, optimizers, probability=1.0, schedule="constant", shuffle_optimizer_state=True)
    for step in range(3):
        step_all(members, optimizers, step)
        # Each weight is marked with its owner, its state alike: after the shuffle the marks have to agree.
        before = [
            {
                (number, key): value.clone()
                for number, p in enumerate(member.parameters())
                for key, value in optimizer.state[p].items()
            }
            for member, optimizer in zip(members, optimizers, strict=True)
        ]
        weights = [[p.detach().clone() for p in member.parameters()] for member in members]
        mixer.mix(step)
        slots = 0
        for number in range(3):
            old = torch.stack([w[number] for w in weights])
            new = torch.stack([list(m.parameters())[number].detach() for m in members])
            source = (new[:, None] == old[None]).int().argmax(dim=1)
            for key in optimizers[0].state[next(iter(members[0].parameters()))]:
                states = [o.state[list(m.parameters())[number]][key] for m, o in zip(members, optimizers, strict=True)]
                olds = torch.stack([state[number, key] for state in before])
                if key in ("step", "mu_product"):
                    assert torch.equal(torch.stack(states), olds), "a counter moved"
                else:
                    slots += 1
                    assert torch.equal(torch.stack(states), olds.gather(0, source)), (key, number)
        assert slots >= 3


def test_one_optimizer_may_hold_all_members():
    def run(single):
        members = linears(3, 20, 20)
        if single:
            groups = [{"params": list(m.parameters()), "lr": 0.01 * (1 + k)} for k, m in enumerate(members)]
            optimizer = torch.optim.AdamW(groups)
            optimizers, step = optimizer, optimizer.step
        else:
            optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01 * (1 + k)) for k, m in enumerate(members)]

            def step():
                for optimizer in optimizers:
                    optimizer.step()

        mixer = WashMixer(members, optimizers, probability=0.3, shuffle_optimizer_state=True)
        generator = torch.Generator().manual_seed(0)
        for number in range(4):
            for parameter in itertools.chain(*(m.parameters() for m in members)):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            step()
            stats = mixer.mix(number)
        return snapshot(members), stats

    (one, one_stats), (several, several_stats) = run(True), run(False)
    assert torch.equal(one, several)
    assert one_stats == several_stats


def test_the_state_doubles_or_triples_what_moves():
    counts = {}
    for name in ("none", "sgd", "adamw"):
        members = linears(2, 50, 50)
        optimizers = [OPTIMIZERS[name if name != "none" else "sgd"](m.parameters()) for m in members]
        mixer = WashMixer(members, optimizers, probability=0.2, shuffle_optimizer_state=name != "none")
        step_all(members, optimizers, 0)
        counts[name] = mixer.mix(0).bytes_exchanged
    assert counts["sgd"] == 2 * counts["none"] > 0
    assert counts["adamw"] == 3 * counts["none"]


@pytest.mark.parametrize("late", [0, 1])
def test_a_parameter_without_gradient_waits_until_all_members_have_its_state(late):
    members = linears(2, 30, 30)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in members]
    mixer = WashMixer(members, optimizers, probability=1.0, shuffle_optimizer_state=True)
    weight, other = members[late][0].weight, 1 - late
    for step, expected in enumerate([1, 3]):
        for index, (member, optimizer) in enumerate(zip(members, optimizers, strict=True)):
            for parameter in member.parameters():
                parameter.grad = torch.randn_like(parameter)
            if step == 0 and index == late:
                weight.grad = None
            optimizer.step()
        moment = optimizers[other].state[members[other][0].weight]["exp_avg"].clone()
        before = snapshot(members)
        stats = mixer.mix(step)
        weights_moved = int((snapshot(members) != before)[:, :900].sum())
        bias_moved = int((snapshot(members) != before)[:, 900:].sum())
        assert stats.values_moved == expected * weights_moved + 3 * bias_moved
        stayed = torch.equal(optimizers[other].state[members[other][0].weight]["exp_avg"], moment)
        assert stayed == (step == 0)
        if step == 0:
            assert weight not in optimizers[late].state, "a state was made up"


def test_a_loaded_state_is_found():
    members = linears(2, 30, 30)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in members]
    mixer = WashMixer(members, optimizers, probability=1.0, shuffle_optimizer_state=True)
    step_all(members, optimizers, 0)
    mixer.mix(0)
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    states = [o.state[m[0].weight]["exp_avg"] for m, o in zip(members, optimizers, strict=True)]
    before = torch.stack(states)
    mixer.mix(1)
    assert not torch.equal(torch.stack(states), before)
    assert torch.equal(torch.stack(states).sort(dim=0).values, before.sort(dim=0).values)


def test_an_optimizer_prepared_by_accelerate_serves():
    accelerate = pytest.importorskip("accelerate")
    members = linears(2, 30, 30)
    optimizers = [
        accelerate.Accelerator(cpu=True).prepare_optimizer(OPTIMIZERS["adamw"](m.parameters())) for m in members
    ]
    mixer = WashMixer(members, optimizers, probability=0.5, shuffle_optimizer_state=True)
    plain = WashMixer(linears(2, 30, 30), probability=0.5)
    step_all(members, optimizers, 0)
    assert mixer.mix(0).values_moved == 3 * plain.mix(0).values_moved


# --- bad input


def test_an_optimizer_of_something_else_is_refused():
    members = linears(2, 3, 3)
    optimizers = [
        torch.optim.SGD(members[0].parameters(), lr=0.1),
        torch.optim.SGD(linears(1, 3, 3)[0].parameters(), lr=0.1),
    ]
    for shuffle_optimizer_state in (False, True):
        with pytest.raises(ValueError, match=r"'0\.weight' of member 1"):
            WashMixer(members, optimizers, shuffle_optimizer_state=shuffle_optimizer_state)
    with pytest.raises(ValueError, match="none were given"):
        WashMixer(members, shuffle_optimizer_state=True)


def test_an_optimizer_whose_state_has_another_shape_is_refused_by_name():
    members = linears(2, 3, 3)
    optimizers = [torch.optim.Adafactor(m.parameters()) for m in members]
    with pytest.raises(ValueError, match="Adafactor keeps"):
        WashMixer(members, optimizers, shuffle_optimizer_state=True)
    WashMixer(members, optimizers)  # without its state it serves


def test_a_state_that_is_only_found_out_later_is_refused_before_anything_moves():
    class Peculiar(torch.optim.SGD):
        def __init__(self, params, lr):
            params = list(params)
            if len(params) < 2:
                raise TypeError("cannot be tried out on a parameter of its own")
            super().__init__(params, lr=lr)

        def step(self):
            super().step()
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["history"] = [0.0]

    members = linears(2, 3, 3)
    optimizers = [Peculiar(m.parameters(), lr=0.1) for m in members]
    mixer = WashMixer(members, optimizers, probability=1.0, shuffle_optimizer_state=True)
    step_all(members, optimizers, 0)
    before = snapshot(members)
    with pytest.raises(ValueError, match=r"Peculiar keeps 'history' for the parameter '0\.weight' as a list"):
        mixer.mix(0)
    assert torch.equal(before, snapshot(members))
