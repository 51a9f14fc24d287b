"""
What a report says of a population as numbers: barriers, disagreement, calibration, distances. Pure functions of tensors.

Which weights and which examples they are asked of is `survey`'s business.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..mixing.schedule import shuffled_layers


CALIBRATION_BINS = 15
SAMPLED_OF_A_LAYER = 256


def weights_between(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], fraction: float
) -> dict[str, torch.Tensor]:
    """
    The point (1 − t)·first + t·second of the straight line through two models.

    Args:
        first, second (`Mapping[str, torch.Tensor]`):
            Two state dicts with the same names and shapes.
        fraction (`float`):
            t: 0 is `first`, 1 is `second`, above 1 lies beyond it.

    Returns:
        `dict[str, torch.Tensor]`: floating-point tensors in the first one's dtypes, computed in at least float32; what
        is no floating-point tensor (a counter, say) is the first one's.
    """
    point = {}
    for name, value in first.items():
        other = second[name]
        if value.is_floating_point():
            wide = torch.float64 if value.dtype == torch.float64 else torch.float32
            mixed = torch.lerp(value.to(wide), other.to(device=value.device, dtype=wide), float(fraction))
            point[name] = mixed.to(value.dtype)
        else:
            point[name] = value
    return point


def barrier_height(fractions: Sequence[float], losses: Sequence[float]) -> float:
    """
    The height of the loss barrier on a straight line: the most by which the loss on it lies above the straight line
    between the losses of its ends, max_t L(t) − ((1 − t)·L(0) + t·L(1)) over 0 ≤ t ≤ 1 (Frankle et al., 2020,
    [Linear mode connectivity](https://hf.co/papers/1912.05671), with the mean of the ends as they lie in between).

    Args:
        fractions (`Sequence[float]`): The points t, 0 and 1 among them.
        losses (`Sequence[float]`): The losses there.

    Returns:
        `float`: In units of the loss; 0 where the loss nowhere lies above, NaN where a loss is not finite.

    Raises:
        ValueError: if the losses of the ends are missing.
    """
    by_fraction = dict(zip(fractions, losses, strict=True))
    if 0.0 not in by_fraction or 1.0 not in by_fraction:
        raise ValueError(
            "A barrier is measured against the losses at the fractions 0 and 1, and one of them is missing."
        )
    if not all(math.isfinite(loss) for t, loss in by_fraction.items() if 0 <= t <= 1):
        return math.nan
    start, end = by_fraction[0.0], by_fraction[1.0]
    # At the ends it is 0.
    return max(loss - ((1 - t) * start + t * end) if 0 < t < 1 else 0.0 for t, loss in by_fraction.items())


def disagreement(predictions: torch.Tensor) -> torch.Tensor:
    """
    How often two members predict different classes.

    Args:
        predictions (`torch.Tensor` of shape `(N, examples)`): The class that each member predicts for each example.

    Returns:
        `torch.Tensor` of shape `(N, N)`, float64: the fraction of examples on which each pair differs; its diagonal is 0.
    """
    return (predictions[:, None, :] != predictions[None, :, :]).double().mean(-1)


def calibration(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = CALIBRATION_BINS) -> dict[str, Any]:
    """
    What a reliability diagram shows, and the expected calibration error (equation 3 of
    [Guo et al., 2017](https://hf.co/papers/1706.04599)).

    An example's confidence is its highest probability. Confidences are sorted into bins (m − 1)/M < p ≤ m/M.

    Args:
        probabilities (`torch.Tensor` of shape `(examples, classes)`): Predicted.
        labels (`torch.Tensor` of shape `(examples,)`): The true classes.
        bins (`int`, *optional*, defaults to 15): Their number M.

    Returns:
        `dict`: `ece`, between 0 and 1; and of the bins that hold examples, in lists: `confidence` and `accuracy`, their
        means, and `count`. `accuracy_overall` is the accuracy on all examples.
    """
    confidence, predicted = probabilities.double().max(-1)
    correct = (predicted == labels).double()
    number = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count = torch.bincount(number, minlength=bins)
    confident = torch.bincount(number, weights=confidence, minlength=bins)
    right = torch.bincount(number, weights=correct, minlength=bins)
    held = count > 0
    return {
        "ece": float((right - confident).abs().sum() / len(labels)),
        "accuracy_overall": float(correct.mean()),
        "confidence": (confident[held] / count[held]).tolist(),
        "accuracy": (right[held] / count[held]).tolist(),
        "count": count[held].tolist(),
    }


def layer_spread(layers: Iterable[Sequence[torch.Tensor]]) -> list[float]:
    """
    How far the members' weights lie from their mean, layer by layer: the root of the mean, over members and weights, of
    (θ − θ̄)². Times the root of a layer's number of weights it is the layer's consensus distance.

    Args:
        layers (iterable of `Sequence[torch.Tensor]`): For each layer the values of each member, of one shape.

    Returns:
        `list[float]`: One value for each layer, in units of a weight.
    """
    spreads = []
    for members in layers:
        values = torch.stack([value.detach().double().flatten() for value in members])
        spreads.append(math.sqrt(float((values - values.mean(0)).square().mean())) if values.numel() else 0.0)
    return spreads


class LayerSample:
    """
    A fixed random sample of the trainable weights of each layer, from which [`layer_spread`] is estimated at little
    cost. Every process draws the same sample.

    Args:
        model (`torch.nn.Module`): Any member; only names and shapes count.
        size (`int`, *optional*, defaults to 256): Weights of a layer; all of them where there are fewer.

    Attributes:
        names (`list[str]`): The layers, first layer first, as [`shuffled_layers`] has them.
        sizes (`list[int]`): Weights in each.
    """

    def __init__(self, model: nn.Module, size: int = SAMPLED_OF_A_LAYER):
        generator = torch.Generator().manual_seed(0)
        self.names: list[str] = []
        self.sizes: list[int] = []
        self._lengths: list[int] = []
        self._chosen: dict[str, torch.Tensor] = {}
        for layer, parameters in shuffled_layers(model).items():
            numels = [parameter.numel() for parameter in parameters.values()]
            total = sum(numels)
            chosen = (
                torch.arange(total)
                if total <= size
                else torch.randint(total, (size,), generator=generator).sort().values
            )
            self.names.append(layer or "(root)")
            self.sizes.append(total)
            self._lengths.append(len(chosen))
            bounds = itertools.pairwise([0, *itertools.accumulate(numels)])
            for name, (low, high) in zip(parameters, bounds, strict=True):
                inside = chosen[(chosen >= low) & (chosen < high)] - low
                if len(inside):
                    self._chosen[name] = inside

    def values(self, model: nn.Module) -> torch.Tensor:
        """A member's sampled values, layer after layer: float32, of shape `(sampled weights,)`, where the model is."""
        found = []
        for parameters in shuffled_layers(model).values():
            for name, parameter in parameters.items():
                chosen = self._chosen.get(name)
                if chosen is None:
                    continue
                if chosen.device != parameter.device:
                    chosen = self._chosen[name] = chosen.to(parameter.device)
                found.append(torch.take(parameter.detach(), chosen).float())
        return torch.cat(found) if found else torch.zeros(0)

    def spread(self, values: torch.Tensor) -> list[float]:
        """
        [`layer_spread`] of each layer, estimated.

        Args:
            values (`torch.Tensor` of shape `(N, sampled weights)`): [`values`] of all members.
        """
        return layer_spread(list(part) for part in values.cpu().split(self._lengths, dim=1))
