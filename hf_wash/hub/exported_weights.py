"""The weights that are exported: complete, each in memory of its own, and under the names that loaders expect."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..soup.weights import check_alike, open_member


logger = logging.getLogger(__name__)

WRAPPER_PREFIX = "timm_model."


def complete_weights(model: Any, kind: str, state_dict: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """
    All weights to write: `state_dict` where given, with what it may leave out; else the model's own.

    Raises:
        ValueError: if they are not those of this model; the first difference is named.
    """
    own = _tensors_only(model.state_dict())
    if state_dict is None:
        return own
    weights = _tensors_only(state_dict)
    if kind == "peft":
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        weights = {**{name: value for name, value in own.items() if name not in trainable}, **weights}
    reference, given = open_member(own, 0), open_member(weights, 0)
    reference.description, given.description = "the model", "the state dict"
    check_alike(reference, given, "The weights cannot be written as this model's:")
    return weights


def _tensors_only(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    # A module's extra state can be any object, and safetensors holds tensors.
    others = [name for name, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if others:
        logger.warning(f"Not exported, since safetensors holds tensors only: {', '.join(others)}.")
    return {name: value for name, value in state_dict.items() if name not in others}


def copy_on_cpu(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """A copy of `model` with `weights`, made without a second copy of the weights on the model's own device."""
    memo: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        value = weights.get(name, tensor).detach().to("cpu", copy=True)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    # What older forms of weight normalisation leave on a module is computed from its parameters at each call, and has a
    # history, which a deep copy refuses.
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().to("cpu", copy=True)
    duplicate = copy.deepcopy(model, memo)
    # Mixed precision (accelerate 1.15) replaces `forward` on the instance by a closure over the original model, which
    # a deep copy keeps: the copy would compute with the original's weights, under autocast.
    duplicate.__dict__.pop("forward", None)
    return duplicate


def weights_for_transformers(model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `save_pretrained` takes them: it refuses memory that is shared otherwise than the model declares."""
    declared = set(getattr(model, "all_tied_weights_keys", None) or ())
    apart = _each_by_itself({name: value for name, value in weights.items() if name not in declared})
    return {name: apart.get(name, value) for name, value in weights.items()}


def weights_for_timm(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As timm has them: without the wrapper's prefix, and tied ones each by itself, since timm loads every name."""
    return {name.removeprefix(WRAPPER_PREFIX): value.contiguous() for name, value in _each_by_itself(weights).items()}


def _each_by_itself(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share memory with an earlier one, be it a part of it, get their own."""
    result, seen = {}, set()
    for name, value in weights.items():
        value = value.detach()
        memory = (value.device, value.untyped_storage().data_ptr())
        result[name] = value.clone() if value.numel() and memory in seen else value
        seen.add(memory)
    return result
