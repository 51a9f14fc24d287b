"""
What all processes must agree on before the first step, compared so that a difference is an error with a name instead
of a hang or a silently wrong population.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..architecture import describe_architecture, unlike
from ..sentences import shortened
from .failures import known_to_all
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
            raise known_to_all(ValueError(said))


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
    _compare(population.gather_processes(facts))


def _compare(everyone: list[dict[str, Any]]) -> None:
    for rank, theirs in enumerate(everyone[1:], start=1):
        different = [name for name in everyone[0] if theirs.get(name) != everyone[0][name]]
        different += [name for name in theirs if name not in everyone[0]]
        if different:
            told = "; ".join(
                f"{name}: {shortened(everyone[0].get(name))} against {shortened(theirs.get(name))}"
                for name in different
            )
            told = f"Processes 0 and {rank} do not agree, so the run would hang or go wrong. {told}."
            raise known_to_all(ValueError(told))


def check_together(population: Population, look: Callable[[], dict[str, Any]]) -> None:
    """
    *Collective.* Look at what may be wrong on one process alone, and compare what was found over all.

    Args:
        population ([`Population`]): The members.
        look (`Callable`): Raises what is wrong here; returns facts that all processes must agree on.

    Raises:
        ValueError: as [`check_agreement`].
        Exception: on a process where `look` raised, its error; on the others a `ValueError`, or a `RuntimeError` where
            it was none, with that process's reason.
    """
    outcomes, error = population.try_together(
        look, lambda error: (isinstance(error, ValueError), f"{type(error).__name__}: {error}")
    )
    if error is not None:
        raise known_to_all(error)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise known_to_all((ValueError if failure[0] else RuntimeError)(f"Process {rank}: {failure[1]}"))
    _compare([facts for facts, _ in outcomes])
