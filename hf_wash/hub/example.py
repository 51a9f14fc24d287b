"""What is put into a model to compare its export with it: two rows of a batch, or of noise."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .kinds import is_bare_timm, kind_of
from .timm_config import timm_config


# Arguments that hold signals, which a batch may hold as integers.
_SIGNALS = ("pixel_values", "pixel_values_videos", "input_values", "input_features")
# Pixels where the model does not say: convolutional models take any size, and the deepest of them divide it by 32.
_SIZE = 64
_WORDS = 8
_SAMPLES = 8000


class CannotCheck(ValueError):
    """There is no telling whether an export is right. That does not make it wrong."""


def guess_example(model: Any) -> Any:
    """
    Two inputs of noise, from a generator of their own.

    Returns:
        `torch.Tensor` or `dict[str, torch.Tensor]`: the images for a timm model, arguments by name for any other.

    Raises:
        [`CannotCheck`]: if there is no telling what the model takes.
    """
    if kind_of(model) == "peft":
        model = model.get_base_model()
    generator = torch.Generator().manual_seed(0)
    if kind_of(model) == "timm":
        shape = timm_config(model)["pretrained_cfg"]["input_size"]
        return torch.randn(2, *shape, generator=generator)
    cause = None
    try:
        example = _guess_by_name(model, generator)
    except Exception as error:  # configurations lack whatever their model does not need
        example, cause = None, error
    if example is None:
        name = model.main_input_name
        raise CannotCheck(
            f"There is no telling what a {type(model).__name__} takes as '{name}': pass `example`."
        ) from cause
    return example


def _guess_by_name(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor] | None:
    config, name = model.config, model.main_input_name
    if name == "pixel_values" or (name == "inputs" and "ImageClassification" in type(model).__name__):
        return _guess_images(model, generator)
    if name == "input_ids":
        text_config = config.get_text_config()
        words = torch.randint(0, text_config.vocab_size, (2, _WORDS), generator=generator)
        end = getattr(text_config, "eos_token_id", None)
        if isinstance(end, int) and end < text_config.vocab_size:
            # Some classifiers look for the end of the text, of which there has to be one.
            words[words == end] = 0 if end else 1
            words[:, -1] = end
        return {name: words}
    if name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return {name: torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)}
    if name == "input_values":
        spectrogram = hasattr(config, "max_length") and hasattr(config, "num_mel_bins")
        shape = (config.max_length, config.num_mel_bins) if spectrogram else (_SAMPLES,)
        return {name: torch.randn(2, *shape, generator=generator)}
    return None


def _guess_images(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    config, name = model.config, model.main_input_name
    vision = getattr(config, "vision_config", None) or config
    channels = getattr(vision, "num_channels", None) or 3
    if hasattr(vision, "num_patches") and hasattr(vision, "patch_size") and not hasattr(vision, "image_size"):
        # SigLIP 2 takes patches, and how many of them make a column and a row.
        side = math.isqrt(vision.num_patches)
        return {
            name: torch.randn(2, side * side, channels * vision.patch_size**2, generator=generator),
            "pixel_attention_mask": torch.ones(2, side * side, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * 2),
        }
    size = getattr(vision, "image_size", None) or _SIZE
    if name == "inputs" and "Learned" not in type(model).__name__:
        size = 224  # a Perceiver's configuration does not say, but its positions are made for these
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    # A Perceiver of images has a number of frames, too.
    frames = getattr(vision, "num_frames", None) if name == "pixel_values" else None
    shape = (channels, height, width) if frames is None else (frames, channels, height, width)
    return {name: torch.randn(2, *shape, generator=generator)}


def as_inputs(model: Any, example: Any, rows: int) -> Any:
    """
    An example in the form in which the model is called with it: on the CPU, in float32, no more rows than asked for,
    and of a batch without the labels and whatever else the model would not take.

    Args:
        model (`torch.nn.Module`):
            The model.
        example (`torch.Tensor` or `Mapping`):
            Images, or a batch.
        rows (`int`):
            How many samples to keep.

    Returns:
        `torch.Tensor` or `dict`: for a bare timm model always the images.
    """
    if isinstance(example, torch.Tensor):
        return example[:rows].detach().cpu().float()
    if not isinstance(example, Mapping):
        raise CannotCheck(f"An example is a tensor or a mapping by argument names, not a {type(example).__name__}.")
    if kind_of(model) == "peft":
        model = model.get_base_model()
    if is_bare_timm(model):
        if "pixel_values" not in example:
            raise CannotCheck(f"The example has no `pixel_values`, only {', '.join(example)}.")
        return as_inputs(model, example["pixel_values"], rows)
    # The class's: mixed precision replaces the instance's by a closure of other arguments.
    taken = inspect.signature(type(model).forward).parameters
    main = getattr(model, "main_input_name", None)
    batch_size = len(example[main]) if main in example else None
    labels = {name for name in example if "label" in name or name in ("start_positions", "end_positions")}
    inputs = {
        name: _cut(value, batch_size, rows, is_signal=name in _SIGNALS)
        for name, value in example.items()
        if name not in labels and (main not in taken or name in taken)
    }
    if "decoder_input_ids" in taken and not any(name.startswith("decoder_input") for name in inputs):
        inputs |= _decoder_inputs(model, example.get("labels"), inputs, batch_size, rows)
    return inputs


def _cut(value: Any, batch_size: int | None, rows: int, is_signal: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    # Not everything in a batch has a row for each sample.
    if batch_size is None or (value.ndim and len(value) == batch_size):
        value = value[:rows] if value.ndim else value
    return value.float() if value.is_floating_point() or is_signal else value


def _decoder_inputs(model: Any, labels: Any, inputs: dict[str, Any], batch_size: int | None, rows: int) -> dict:
    """What a decoder starts from: what it would while training, else the words that the encoder reads."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if isinstance(labels, torch.Tensor) and labels.ndim == 2 and shift is not None:
        return {"decoder_input_ids": shift(labels=_cut(labels, batch_size, rows, is_signal=False))}
    if isinstance(inputs.get("input_ids"), torch.Tensor):
        return {"decoder_input_ids": inputs["input_ids"]}
    first = next((value for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim), None)
    return {} if first is None else {"decoder_input_ids": torch.zeros(len(first), 4, dtype=torch.long)}


def in_float(model: nn.Module) -> nn.Module:
    """
    The model in float32, where half-precision weights are exact, each of its tensors in memory of its own.

    What a loader reads from a file starts where the file's header ends (transformers 5), so it is not aligned as torch
    aligns its own: another kernel may be taken, and with the same weights to the bit logits differed by up to 4.7e-5.
    """
    model = model.float()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
