"""Members of a few numbers each, for the tests of mixing."""

import itertools

import torch
from torch import nn


def population(make, num_members):
    members = []
    for member in range(num_members):
        torch.manual_seed(member)
        members.append(make())
    return members


def linears(num_members, *sizes):
    return population(lambda: nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))), num_members)


def snapshot(members):
    """Every parameter of every member, of shape `(num_members, numel)`, in logical order."""
    return torch.stack([torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in members])


def step_all(members, optimizers, seed):
    generator = torch.Generator().manual_seed(seed)
    for member, optimizer in zip(members, optimizers, strict=True):
        for parameter in member.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
