"""
What all processes must agree on before the first step, compared so that a difference is an error with a name instead
of a hang or a silently wrong population.
"""

import hashlib
from typing import Any

import torch
from torch import nn

from ..architecture import describe_architecture, unlike
from .population import Population


def check_same_architecture(population: Population) -> None:
    """
    *Collective.* Check that all members have the same tensors.

    Raises:
        ValueError: on every process, naming the first difference and the member that has it.
    """
    architectures = population.gather([describe_architecture(member) for member in population.members])
    for index, other in enumerate(architectures[1:], start=1):
        if said := unlike(architectures[0], other, 0, index):
            raise ValueError(said)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_agreement(population: Population, facts: dict[str, Any]) -> None:
    """
    *Collective.* Compare a dictionary of facts over all processes.

    Raises:
        ValueError: on every process, naming each fact that differs and what process 0 and the other one say.
    """
    everyone = population.gather_processes(facts)
    for rank, theirs in enumerate(everyone[1:], start=1):
        different = [name for name in everyone[0] if theirs.get(name) != everyone[0][name]]
        different += [name for name in theirs if name not in everyone[0]]
        if different:
            told = "; ".join(
                f"{name}: {_short(everyone[0].get(name))} against {_short(theirs.get(name))}" for name in different
            )
            raise ValueError(f"Processes 0 and {rank} do not agree, so the run would hang or go wrong. {told}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
