"""BatchNorm statistics of a soup, re-estimated on training data."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_norm(model: nn.Module) -> bool:
    """
    Whether a model keeps running statistics of BatchNorm layers, which a soup has to re-estimate.

    Args:
        model (`torch.nn.Module`):
            Any model.

    Returns:
        `bool`: Whether there is a layer with `running_mean` and `running_var`, each of shape `(channels,)`.
    """
    return bool(_tracking_layers(model))


def recalibrate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
) -> int:
    """
    Re-estimates a model's BatchNorm statistics on training data, in place.

    The running mean and variance of averaged weights are not the average of the members' running means and variances,
    and a soup that works can look broken until they are measured again. The statistics, of shape `(channels,)`, become
    the plain average over K batches, μ = (1/K) Σ_k μ_k and σ² = (1/K) Σ_k σ²_k with each batch's own mean and unbiased
    variance (every batch counts the same). Only BatchNorm layers that keep statistics are put in training mode, so
    nothing is drawn from any random generator (dropout and stochastic depth stay off) and no weight changes. Modes and
    momenta are as before afterwards; so are the statistics of a layer that no batch passed through, and all of them if
    a batch fails.

    Args:
        model (`torch.nn.Module`):
            The soup.
        batches (iterable):
            Training batches: dictionaries as Trainer's data loaders give (passed by name, without their labels, since
            no loss is needed, unless the model does not answer without), tuples or lists whose first element is the input, or tensors. The tensors are moved to
            the model's device. Larger batches estimate better; a hundred are plenty.
        forward (`Callable[[torch.nn.Module, Any], Any]`, *optional*):
            Called as `forward(model, batch)` instead, with the batch as it came, where the model wants it otherwise.
        max_batches (`int`, *optional*):
            The number of batches to stop at. No more than these are drawn. All of them if not given.

    Returns:
        `int`: the number of batches used; 0 for a model without such layers, for which none is drawn.

    Raises:
        ValueError: if there is no batch to draw, or `max_batches` is below one.

    Source: the reset of REPAIR ([paper](https://hf.co/papers/2211.08403)) as PAPA and SWA use it for averaged weights;
    `torch.optim.swa_utils.update_bn` does the same for tuples, with every module in training mode.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}; recalibrating BatchNorm takes at least one batch.")
    layers = _tracking_layers(model)
    if not layers:
        return 0
    forward = forward_batch if forward is None else forward
    used = 0
    with _measuring(model, layers), torch.no_grad():
        for batch in islice(batches, max_batches):
            forward(model, batch)
            used += 1
        if used == 0:
            raise ValueError("There is no batch to recalibrate BatchNorm on: the iterable of batches is empty.")
    return used


def _tracking_layers(model: nn.Module) -> list[_BatchNorm]:
    # timm's BatchNormAct2d and torch's SyncBatchNorm are subclasses; frozen variants, which have nothing to estimate,
    # are not.
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    ]


def _statistics(layer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return layer.running_mean, layer.running_var, layer.num_batches_tracked


@contextmanager
def _measuring(model: nn.Module, layers: list[_BatchNorm]):
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    before = [[buffer.clone() for buffer in _statistics(layer)] for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # to torch: a cumulative average instead of an exponential one
        # Not `layer.train()`: timm's BatchNormAct2d holds a dropout inside.
        layer.training = True
    finished = False
    try:
        yield
        finished = True
    finally:
        for module, training in modes:
            module.training = training
        for layer, momentum, buffers in zip(layers, momenta, before, strict=True):
            layer.momentum = momentum
            if not finished or layer.num_batches_tracked == 0:
                for buffer, old in zip(_statistics(layer), buffers, strict=True):
                    buffer.copy_(old)


def forward_without_labels(
    model: nn.Module, inputs: Mapping[str, Any], labels: Collection[str] = ("labels",), call: Callable | None = None
) -> None:
    """
    Run a model by name without its labels, whose loss is of no use here: soft ones (mixup) are more than some losses
    take. With them, if it does not answer without.

    Args:
        model (`nn.Module`): The model, whose BatchNorm statistics see the batch once.
        inputs (`Mapping`): A batch.
        labels (`Collection[str]`, *optional*, defaults to `("labels",)`): Names of labels.
        call (`Callable`, *optional*): Called in the model's place: what is wrapped around it.
    """
    call = model if call is None else call
    others = {name: value for name, value in inputs.items() if name not in labels}
    buffers = [buffer for layer in _tracking_layers(model) for buffer in _statistics(layer)]
    before = [buffer.clone() for buffer in buffers]
    try:
        call(**others)
    except Exception:  # whatever a model raises that misses its labels; with them, it raises what is really wrong
        if len(others) == len(inputs):
            raise
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        call(**inputs)


def forward_batch(model: nn.Module, batch: Any) -> None:
    """Run a model on a batch as data loaders give it, without its labels."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    if isinstance(batch, Mapping):
        forward_without_labels(model, {name: _to(value, device) for name, value in batch.items()})
    elif isinstance(batch, (tuple, list)):
        model(_to(batch[0], device))
    else:
        model(_to(batch, device))


def _to(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
