"""How much a population sends in a run, beside what others would send to train the same: for the card, and before a run."""

from collections.abc import Iterable

import torch


PAPA_INTERVAL = 10
SPARTA_PROBABILITY = 0.005


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of these tensors, each once."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values()
    )


def others_send(members: int, steps: int, model_bytes: int) -> dict[str, int]:
    """
    Bytes that SPARTA, PAPA and data-parallel training (DDP) would send in a run, on average for SPARTA: a part of
    `SPARTA_PROBABILITY` of the model for each member and step, one model for each member every `PAPA_INTERVAL` steps, and
    one gradient of the model for each member and step.

    Args:
        members (`int`): How many there are.
        steps (`int`): Optimizer steps of one member.
        model_bytes (`int`): Bytes of what is trained of one member.
    """
    return {
        "SPARTA": round(members * steps * SPARTA_PROBABILITY * model_bytes),
        "PAPA": members * (steps // PAPA_INTERVAL) * model_bytes,
        "DDP": members * steps * model_bytes,
    }
