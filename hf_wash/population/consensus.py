"""How far apart the members are: the consensus distance, exactly and estimated."""

import itertools
import math

import torch
from torch import nn


SAMPLED_COORDINATES = 16_384
# Numbers that are worked on at a time: 2 MiB in float64, which a processor's cache holds; on a device, which computes and
# is waited for in larger portions, 128 MiB.
BLOCK, BLOCK_ON_DEVICE = 2**18, 2**24


class ConsensusSample:
    """
    A fixed random sample of the trainable coordinates, from which the consensus distance is estimated at little cost.
    Every process draws the same sample.

    Args:
        model (`nn.Module`): Any member; only shapes count.
        size (`int`, *optional*, defaults to 16384): Coordinates to sample; all of them if there are fewer.
    """

    def __init__(self, model: nn.Module, size: int = SAMPLED_COORDINATES):
        numels = [p.numel() for p in model.parameters() if p.requires_grad]
        self.total = sum(numels)
        generator = torch.Generator().manual_seed(0)
        # Duplicates are harmless, and rare: sampling without replacement would cost as much as the model is large.
        chosen = (
            torch.arange(self.total)
            if self.total <= size
            else torch.randint(self.total, (size,), generator=generator).sort().values
        )
        bounds = torch.tensor([0, *numels]).cumsum(0)
        self._indices = [chosen[(chosen >= low) & (chosen < high)] - low for low, high in itertools.pairwise(bounds)]
        self.size = len(chosen)

    def values(self, model: nn.Module) -> torch.Tensor:
        """A member's values at the sampled coordinates: float64, of shape `(size,)`, on the CPU."""
        parts = []
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter, indices in zip(parameters, self._indices, strict=True):
            if len(indices):
                parts.append(torch.take(parameter.detach(), indices.to(parameter.device)).double().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def estimate(self, values: torch.Tensor) -> float:
        """
        sqrt(1/N · Σ_n ‖θ_n − θ̄‖²), estimated, of the members that are finite.

        Args:
            values (`torch.Tensor` of shape `(N, size)`): [`values`] of all members.
        """
        if not self.size:
            return 0.0
        finite = values[torch.isfinite(values).all(1)]
        values = finite if len(finite) else values
        mean = values.mean(0, keepdim=True)
        return math.sqrt(float((values - mean).square().sum()) / len(values) * self.total / self.size)


@torch.no_grad()
def squared_distance(model: nn.Module, center: nn.Module) -> float:
    """‖θ − θ̄‖² over the trainable parameters, in float64, summed parameter by parameter, each in blocks."""
    total = 0.0
    centers = dict(center.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = BLOCK if parameter.device.type == "cpu" else BLOCK_ON_DEVICE
            own, theirs = (tensor.detach().reshape(-1).split(block) for tensor in (parameter, centers[name]))
            total += float(sum(_squared_distance(*blocks) for blocks in zip(own, theirs, strict=True)))
    return total


def _squared_distance(own: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return torch.sub(own.double(), theirs).square_().sum()
