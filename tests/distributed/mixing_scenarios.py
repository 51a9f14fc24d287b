"""
What `test_mixing_processes.py` runs in several processes: `torchrun mixing_scenarios.py '[["SCENARIO", …], …]'`.

Every process prints one JSON line: its rank and the scenarios' answers. What they promise is checked by the tests.
With `torch` or `kernels` as a second argument it all goes as on other devices: with torch from tensor to tensor, or with
the fused kernels, which Triton interprets where there is no GPU (`TRITON_INTERPRET=1`).
"""

import contextlib
import copy
import datetime
import gc
import hashlib
import json
import os
import sys
import time
import weakref

import torch
import torch.distributed as dist
from torch import nn

from hf_wash.mixing import ContagionError, PlanMismatchError, WashMixer, exchange, wash
from hf_wash.mixing.exchange import DeviceShipment


def model(member, width=40):
    torch.manual_seed(member)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Linear(9, width), nn.Linear(width, width).to(torch.bfloat16), nn.Linear(width, 5)
    )
    made.scale = nn.Parameter(torch.randn(()))
    return made.to(memory_format=torch.channels_last) if member == 1 else made


def fingerprint(member, optimizer):
    digest = hashlib.sha256()
    for parameter in member.parameters():
        for tensor in (parameter, *(v for _, v in sorted(optimizer.state[parameter].items()))):
            digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(members, numbers, with_state, steps=5):
    """Steps with gradients that depend on the member's number alone. Member 1 gets none for a weight at first."""
    optimizers = [torch.optim.AdamW(member.parameters(), lr=0.01) for member in members]
    mixer = WashMixer(members, optimizers, probability=0.3, seed=9, shuffle_optimizer_state=with_state)
    stats = []
    for step in range(steps):
        for number, member, optimizer in zip(numbers, members, optimizers, strict=True):
            generator = torch.Generator().manual_seed(1000 * number + step)
            for index, parameter in enumerate(member.parameters()):
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if number == 1 and index == 2 and step < 2:
                    parameter.grad = None
            optimizer.step()
        stats.append(mixer.mix(step, shuffle=step != 3))
    return [fingerprint(m, o) for m, o in zip(members, optimizers, strict=True)], stats


def layout(num_members, with_state):
    num_local = int(num_members) // dist.get_world_size()
    numbers = range(dist.get_rank() * num_local, (dist.get_rank() + 1) * num_local)
    prints, stats = train([model(number) for number in numbers], numbers, with_state == "state")
    return {
        "members": prints,
        "population": [(s.population_values_moved, s.population_bytes_exchanged) for s in stats],
        "own": [s.values_moved for s in stats],
    }


def reference(num_members, with_state):
    """What one process gives. Called by the test itself."""
    prints, stats = train([model(n) for n in range(num_members)], range(num_members), with_state)
    return prints, [(s.population_values_moved, s.population_bytes_exchanged) for s in stats]


def count_bytes(steps):
    sent = []
    original = dist.all_to_all_single

    def counted(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        sent.append(input.numel() * input.element_size())
        assert sent[-1] == sum(input_split_sizes)
        return original(output, input, output_split_sizes, input_split_sizes, **kwargs)

    dist.all_to_all_single = counted
    torch.manual_seed(dist.get_rank())
    member = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 10))
    mixer = WashMixer(member, probability=0.05)
    stats = [mixer.mix(step) for step in range(int(steps))]
    dist.all_to_all_single = original
    return {"sent": sent, "reported": [s.bytes_sent for s in stats], "moved": [s.values_moved for s in stats]}


def headers_only():
    mixer = WashMixer(model(dist.get_rank()), probability=0.0)
    stats = [mixer.mix(step, stop_requested=step == 2 and dist.get_rank() == 1) for step in range(4)]
    stats += [mixer.mix(step, shuffle=False) for step in range(4, 6)]
    return {"sent": [s.bytes_sent for s in stats], "stop": [s.stop_requested for s in stats]}


def caught(expected, call):
    try:
        call()
    except expected as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def contagion(num_members, kind):
    num_local = int(num_members) // dist.get_world_size()
    first = dist.get_rank() * num_local
    members = [model(first + local) for local in range(num_local)]
    optimizers = [torch.optim.SGD(member.parameters(), lr=0.1, momentum=0.9) for member in members]
    for member, optimizer in zip(members, optimizers, strict=True):
        for parameter in member.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    mixer = WashMixer(members, optimizers, probability=0.5, shuffle_optimizer_state=kind == "state")
    mixer.mix(0)
    for local, (member, optimizer) in enumerate(zip(members, optimizers, strict=True)):
        if first + local == 1:
            weight = member[1].weight
            (optimizer.state[weight]["momentum_buffer"] if kind == "state" else weight.data).fill_(float("inf"))
    before = copy.deepcopy([list(member.parameters()) for member in members])
    error = caught(ContagionError, lambda: mixer.mix(1))
    same = all(
        torch.equal(p, q)
        for m, old in zip(members, before, strict=True)
        for p, q in zip(m.parameters(), old, strict=True)
    )
    return {"error": error, "untouched": same}


def disagreement(kind):
    rank = dist.get_rank()
    member = model(rank)
    before = copy.deepcopy(member.state_dict())
    mixer = WashMixer(member, probability=0.5)
    arguments = {
        "step": {"step": 5 + (rank == 1)},
        "shuffle": {"step": 5, "shuffle": rank != 1},
    }[kind]
    error = caught(PlanMismatchError, lambda: mixer.mix(**arguments))
    same = all(torch.equal(value, before[name]) for name, value in member.state_dict().items())
    # The group is still usable: nothing of the larger message is left in it.
    total = torch.ones(1)
    dist.all_reduce(total)
    return {"error": error, "untouched": same, "total": total.item()}


def late(kind):
    """What is wrong is read one call later, as on a GPU, and yet nothing of it has been written."""

    class Event:
        def synchronize(self):
            pass

    WashMixer._read_later = lambda self, headers, step, digest: setattr(
        self, "_unread", (headers, Event(), step, digest)
    )
    rank = dist.get_rank()
    member = model(rank)
    mixer = WashMixer(member, probability=0.5)
    mixer._late = True
    mixer.mix(0)
    if kind == "contagion" and rank == 1:
        member[1].weight.data.fill_(float("nan"))
    before = copy.deepcopy(member.state_dict())
    mixer.mix(1 if kind == "contagion" else 1 + rank)
    same = all(
        torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in member.state_dict().items()
    )
    return {"error": caught((ContagionError, PlanMismatchError), lambda: mixer.mix(3)), "untouched": same}


def bad_input(kind):
    odd = dist.get_rank() == dist.get_world_size() - 1
    member, arguments = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {}
    if kind == "shape" and odd:
        member = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    if kind == "dtype" and odd:
        member = member.double()
    if kind in ("probability", "seed"):
        arguments = {kind: {"probability": 0.2, "seed": 3}[kind] if odd else {"probability": 0.1, "seed": 2}[kind]}
    if kind == "schedule":
        arguments = {kind: "constant" if odd else "increasing"}
    if kind == "range" and odd:
        arguments = {"probability": 2.0}
    members = [member] * 1 if not (kind == "number" and odd) else [member, copy.deepcopy(member)]
    if kind == "optimizer":
        other = member if not odd else nn.Linear(2, 2)
        arguments = {"optimizers": torch.optim.SGD(other.parameters(), lr=0.1)}
    return {"error": caught(ValueError, lambda: WashMixer(members, **arguments))}


def late_refusal():
    """One process's optimizer gets a state that cannot be moved: all are told before anything moves."""
    member = model(dist.get_rank())
    before = copy.deepcopy(member.state_dict())
    optimizer = torch.optim.SGD(member.parameters(), lr=0.1)
    mixer = WashMixer(member, optimizer, probability=0.5, shuffle_optimizer_state=True)
    if dist.get_rank() == 1:
        optimizer.state[member[0].weight]["history"] = torch.zeros(2, 7)
    error = caught(ValueError, lambda: mixer.mix(0))
    same = all(torch.equal(value, before[name]) for name, value in member.state_dict().items())
    return {"error": error, "untouched": same}


def changed(kind):
    """Between two steps something of one process's member becomes another tensor."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    member = nn.Linear(30, 30)
    optimizer = torch.optim.SGD(member.parameters(), lr=0.1, momentum=0.9)
    mixer = WashMixer(member, optimizer, probability=0.5, schedule="constant", shuffle_optimizer_state=True)
    for step in range(3):
        member(torch.randn(4, 30)).square().sum().backward()
        optimizer.step()
        if step < 2:
            mixer.mix(step)
    momenta = [optimizer.state[parameter] for parameter in member.parameters()]
    if rank == 1:
        if kind == "weight":
            member.weight.data = torch.ones(2, 2)
        elif kind == "cleared":
            optimizer.state.clear()
        else:
            for state in momenta:
                state["momentum_buffer"] = state["momentum_buffer"].to(torch.bfloat16)
    tensors = [*member.parameters(), *(state["momentum_buffer"] for state in momenta)]
    before = [tensor.detach().clone() for tensor in tensors]
    moved = []
    error = caught(ValueError, lambda: moved.append(mixer.mix(2).population_values_moved))
    same = [torch.equal(old, new) for old, new in zip(before, tensors, strict=True)]
    return {"error": error, "moved": moved, "weights_same": all(same[:2]), "state_same": all(same[2:])}


def subgroup():
    """Two populations of two processes each, and a process that asks to be in one that it is not in."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    member = model(rank % 2)
    mixer = WashMixer(member, probability=0.3, seed=rank // 2, process_group=groups[rank // 2])
    for step in range(3):
        mixer.mix(step)
    outside = caught(ValueError, lambda: WashMixer(member, process_group=groups[1 - rank // 2]))
    prints = hashlib.sha256(b"".join(p.detach().float().contiguous().numpy().tobytes() for p in member.parameters()))
    return {"member": prints.hexdigest(), "outside": outside}


def death():
    rank = dist.get_rank()
    mixer = WashMixer(model(rank), probability=0.1)
    mixer.mix(0)
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    error = caught(RuntimeError, lambda: [mixer.mix(step) for step in range(1, 4)])
    return {"error": error, "seconds": time.monotonic() - start}


def destroyed():
    member = model(dist.get_rank())
    # The first optimizer imports parts of torch that would keep the group alive, had they not been imported before.
    mixer = WashMixer(member, torch.optim.SGD(member.parameters(), lr=0.1), probability=0.1)
    mixer.mix(0)
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    return {"outlives": group() is not None, "error": caught(RuntimeError, lambda: mixer.mix(1))}


def go_as_on(path):
    wash.HostShipment = DeviceShipment
    if path == "kernels":
        assert os.environ["TRITON_INTERPRET"] == "1"
        from hf_wash.mixing import fused

        fused._on = contextlib.nullcontext
        exchange.kernels = lambda device: fused


if __name__ == "__main__":
    if len(sys.argv) > 2:
        go_as_on(sys.argv[2])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    answers = [globals()[name](*arguments) for name, *arguments in json.loads(sys.argv[1])]
    # One write, so that the lines of two processes do not mix.
    os.write(1, f"{json.dumps([int(os.environ['RANK']), answers])}\n".encode())
    if dist.is_initialized():  # else gloo may abort the process at the interpreter's end
        dist.destroy_process_group()
