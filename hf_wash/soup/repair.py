"""REPAIR: a soup's activations rescaled to those of its members, channel by channel."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .batch_norm import forward_batch, has_batch_norm, recalibrate_batch_norm


# For each convolution by name, the mean and the standard deviation of its output, of shape (channels,) each.
ChannelStatistics = dict[str, tuple[torch.Tensor, torch.Tensor]]
# Below this a channel is dead, and cannot be scaled to anything.
_DEAD = 1e-8


def channel_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = 5,
) -> ChannelStatistics:
    """
    The mean and standard deviation of each channel of each convolution's output, in evaluation mode: over the examples
    and places of a batch (the variance with all of them as divisor), and then the mean of means and of variances over
    batches.

    Args:
        model (`torch.nn.Module`):
            A member.
        batches (iterable), forward (`Callable`, *optional*):
            As in [`recalibrate_batch_norm`].
        max_batches (`int`, *optional*, defaults to 5):
            The number of batches to stop at.

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: By the module's name, two tensors of shape `(channels,)`, in units
        of the activations.

    Raises:
        ValueError: if there is no batch to draw.

    Source: as [`repair`].
    """
    with _measured(model) as measured:
        used = _evaluate(model, islice(batches, max_batches), forward)
    if not used:
        raise ValueError("There is no batch to measure activations on: the iterable of batches is empty.")
    return {name: (moments.mean, moments.deviation) for name, moments in measured.items() if moments.count}


def mean_statistics(statistics: Sequence[ChannelStatistics]) -> ChannelStatistics:
    """
    What REPAIR rescales to: the mean over N members of their channels' means and standard deviations, (1/N) Σ_n μ_n
    and (1/N) Σ_n σ_n.

    Args:
        statistics (`Sequence[ChannelStatistics]`):
            Of each member, from [`channel_statistics`].

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: As there.

    Raises:
        ValueError: for members with different convolutions.

    Source: as [`repair`], for more than two models as PAPA has it (https://huggingface.co/papers/2304.03094).
    """
    names = set(statistics[0])
    if any(set(other) != names for other in statistics[1:]):
        raise ValueError("Members have different convolutions, or some were not used by every member.")
    return {
        name: (
            torch.stack([own[name][0] for own in statistics]).mean(0),
            torch.stack([own[name][1] for own in statistics]).mean(0),
        )
        for name in statistics[0]
    }


def repair(
    model: nn.Module,
    target: ChannelStatistics,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = 5,
) -> int:
    """
    Rescale the output of every convolution to a mean and standard deviation for each channel, in place, and re-estimate
    BatchNorm in the same passes.

    The mean of members' weights has activations of a smaller variance than the members (their variance collapses).
    While the batches pass, each convolution's output is set to the target by the batch's own statistics, so that later
    layers see what they will see: x ← (x − mean)·σ/std + μ for a target of μ and σ, with the mean and standard
    deviation that the channel has. Then the change is folded into its weight and bias. A convolution without a bias is
    scaled and not shifted: what normalises after it takes the mean away. Dead channels stay. With BatchNorm after each
    convolution, this is the same as recalibrating alone.

    Args:
        model (`torch.nn.Module`):
            The soup.
        target (`ChannelStatistics`):
            From [`mean_statistics`].
        batches (iterable), forward (`Callable`, *optional*):
            As in [`recalibrate_batch_norm`].
        max_batches (`int`, *optional*, defaults to 5):
            The number of batches to stop at; PAPA's published code takes 5.

    Returns:
        `int`: The number of batches used.

    Raises:
        ValueError: if there is no batch to draw, or the model lacks a convolution of the target.

    Source: Jordan et al. 2022, https://huggingface.co/papers/2211.08403, section 4.
    """
    missing = set(target) - {name for name, _ in _convolutions(model)}
    if missing:
        raise ValueError(f"The model has no convolution {sorted(missing)[0]!r}, which the target names.")
    some = islice(batches, max_batches)
    with _measured(model, target) as measured:
        if has_batch_norm(model):
            used = recalibrate_batch_norm(model, some, forward=forward)
        else:
            used = _evaluate(model, some, forward)
    if not used:
        raise ValueError("There is no batch to repair on: the iterable of batches is empty.")
    with torch.no_grad():
        for name, module in _convolutions(model):
            if name in target and measured[name].count:
                _fold(module, measured[name], *target[name])
    return used


def _fold(module: _ConvNd, found: "_Moments", mean: torch.Tensor, deviation: torch.Tensor) -> None:
    scale = torch.where(found.deviation > _DEAD, deviation / found.deviation.clamp(min=_DEAD), torch.ones_like(mean))
    module.weight.mul_(scale.view(-1, *[1] * (module.weight.dim() - 1)))
    if module.bias is not None:
        alive = found.deviation > _DEAD
        module.bias.copy_(torch.where(alive, (module.bias - found.mean) * scale + mean, module.bias))


def _evaluate(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None) -> int:
    """Run all batches through a model in evaluation mode. Returns how many there were."""
    forward = forward_batch if forward is None else forward
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    used = 0
    try:
        with torch.no_grad():
            for batch in batches:
                forward(model, batch)
                used += 1
    finally:
        for module, training in modes:
            module.training = training
    return used


class _Moments:
    """The mean over batches of a channel's mean and variance."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Any = 0.0
        self._variance: Any = 0.0

    def add(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self._mean, self._variance, self.count = self._mean + mean, self._variance + variance, self.count + 1

    @property
    def mean(self) -> torch.Tensor:
        return self._mean / self.count

    @property
    def deviation(self) -> torch.Tensor:
        return (self._variance / self.count).sqrt()


def _convolutions(model: nn.Module) -> list[tuple[str, _ConvNd]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
    ]


@contextmanager
def _measured(model: nn.Module, target: Mapping[str, tuple] | None = None) -> Iterator[dict[str, _Moments]]:
    """Measure every convolution's output for the length of a block, and with a target set it to that."""
    moments = {name: _Moments() for name, _ in _convolutions(model)}

    def hook_of(name: str) -> Callable:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            channel = output.dim() - module.weight.dim() + 1  # an unbatched input has no first dimension
            others = [dim for dim in range(output.dim()) if dim != channel]
            variance, mean = torch.var_mean(output, others, correction=0, keepdim=True)
            moments[name].add(mean.flatten(), variance.flatten())
            if target is None or name not in target:
                return None
            wanted, deviation = (value.view(mean.shape) for value in target[name])
            alive = variance.sqrt() > _DEAD
            scale = torch.where(alive, deviation / variance.sqrt().clamp(min=_DEAD), torch.ones_like(mean))
            shifted = wanted if module.bias is not None else mean * scale
            return torch.where(alive, (output - mean) * scale + shifted, output)

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in _convolutions(model)]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
