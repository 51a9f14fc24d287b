"""
What `test_averaging_processes.py` runs in several processes: `torchrun averaging_scenarios.py '[["SCENARIO", …], …]'`.

Every process prints one JSON line: its rank and the scenarios' answers.
"""

import datetime
import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from hf_wash.mixing import (
    ContagionError,
    DilocoMixer,
    PairAverageMixer,
    PapaMixer,
    PeriodicAverageMixer,
    PlanMismatchError,
    SpartaMixer,
    averaging,
)


def model(number):
    torch.manual_seed(number)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(9, 30), nn.Linear(30, 5).to(torch.float64))


def mixer_of(method, members, optimizer):
    return {
        "local SGD": lambda: PeriodicAverageMixer(members, interval=3, buffers=True),
        "pairs": lambda: PairAverageMixer(members, interval=3, seed=2),
        "PAPA": lambda: PapaMixer(members, optimizer, rate=0.4, interval=2),
        "SPARTA": lambda: SpartaMixer(members, probability=0.2, seed=4),
        "DiLoCo": lambda: DilocoMixer(members, interval=3),
    }[method]()


def train(method, numbers, steps=7):
    """Steps with gradients that depend on the member's number alone."""
    members = [model(number) for number in numbers]
    optimizer = torch.optim.SGD([p for member in members for p in member.parameters()], lr=0.1, momentum=0.9)
    if method == "DiLoCo":
        for member in members:
            member.load_state_dict(model(0).state_dict())
    mixer = mixer_of(method, members, optimizer)
    stats = []
    for step in range(1, steps + 1):
        for number, member in zip(numbers, members, strict=True):
            generator = torch.Generator().manual_seed(1000 * number + step)
            for parameter in member.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        stats.append(mixer.mix(step))
    values = [torch.cat([t.double().flatten() for t in member.state_dict().values()]).tolist() for member in members]
    return values, [(s.population_values_moved, s.population_bytes_exchanged, s.averaged) for s in stats], stats


def layout(method, num_members):
    local = int(num_members) // dist.get_world_size()
    numbers = range(dist.get_rank() * local, (dist.get_rank() + 1) * local)
    members, population, stats = train(method, numbers)
    return {"members": members, "population": population, "sent": [s.bytes_sent for s in stats]}


def caught(expected, call):
    try:
        call()
    except expected as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def contagion(method):
    member = model(dist.get_rank())
    optimizer = torch.optim.SGD(member.parameters(), lr=0.1)
    mixer = mixer_of(method, [member], optimizer)
    with torch.no_grad():
        if dist.get_rank() == 1:
            for parameter in member.parameters():
                parameter.fill_(float("inf"))
    before = [parameter.clone() for parameter in member.parameters()]
    step = next(step for step in range(1, 10) if mixer.is_due(step))
    error = caught(ContagionError, lambda: mixer.mix(step))
    return {"error": error, "untouched": all(map(torch.equal, before, member.parameters()))}


def disagreement(method):
    member = model(dist.get_rank())
    mixer = mixer_of(method, [member], torch.optim.SGD(member.parameters(), lr=0.1))
    due = [step for step in range(1, 20) if mixer.is_due(step)]
    before = [parameter.clone() for parameter in member.parameters()]
    error = caught(PlanMismatchError, lambda: mixer.mix(due[1] if dist.get_rank() == 1 else due[0]))
    return {"error": error, "untouched": all(map(torch.equal, before, member.parameters()))}


def other_options():
    rank = dist.get_rank()
    return {
        "interval": caught(ValueError, lambda: PeriodicAverageMixer(model(rank), interval=2 + rank)),
        "seed": caught(ValueError, lambda: PairAverageMixer(model(rank), interval=2, seed=rank)),
        "method": caught(
            ValueError,
            lambda: PeriodicAverageMixer(model(rank), interval=2) if rank else SpartaMixer(model(rank)),
        ),
        "one is wrong": caught(ValueError, lambda: SpartaMixer(model(rank), probability=2.0 if rank else 0.1)),
    }


def other_buffers():
    member = model(dist.get_rank())
    if dist.get_rank() == 1:
        member[1].running_mean = torch.zeros(7)
    return {"error": caught(ValueError, lambda: PeriodicAverageMixer(member, interval=1, buffers=True))}


def changed(method):
    member = model(dist.get_rank())
    mixer = mixer_of(method, [member], torch.optim.SGD(member.parameters(), lr=0.1))
    if dist.get_rank() == 1:
        member[2].weight.data = torch.zeros(3, 3)
    before = [parameter.clone() for parameter in member.parameters()]
    step = next(step for step in range(1, 10) if mixer.is_due(step))
    error = caught(ValueError, lambda: mixer.mix(step))
    return {"error": error, "untouched": all(map(torch.equal, before, member.parameters()))}


def stop(method):
    member = model(dist.get_rank())
    mixer = mixer_of(method, [member], torch.optim.SGD(member.parameters(), lr=0.1))
    stats = [mixer.mix(step, stop_requested=step == 1 and dist.get_rank() == 1) for step in range(1, 5)]
    return {"due": [mixer.is_due(step) for step in range(1, 5)], "stop": [s.stop_requested for s in stats]}


def main():
    torch.set_num_threads(1)
    # A bucket of these small members would else be one block, and one section.
    averaging._BLOCK, averaging._SECTION = 20, 150
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    answers = [globals()[name](*arguments) for name, *arguments in json.loads(sys.argv[1])]
    # In one write, or the lines of two processes run into each other.
    os.write(1, f"{json.dumps([dist.get_rank(), answers])}\n".encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
