"""How a run was made, as a program can read it: the content of `wash_run.json`."""

import functools
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import has_length

from .. import __version__
from ..methods import METHODS, OPTIONS, Times
from ..population import MemberOverrides, Population
from ..soup import GreedySoupRecord, has_batch_norm
from .record import dataset_repositories, inherited_license
from .traffic import size_of


_TRAINING = (
    "seed",
    "data_seed",
    "gradient_accumulation_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "label_smoothing_factor",
    "max_grad_norm",
)

# Asked for at every save; the Hub need not be asked each time.
_license_of = functools.cache(inherited_license)


def describe_run(
    *,
    run: str | None,
    args: Any,
    state: TrainerState,
    model: nn.Module,
    population: Population,
    overrides: Sequence[MemberOverrides],
    exchanged: tuple[int, int],
    greedy: GreedySoupRecord | None,
    left_out: Sequence[int],
    probability: float | None,
    times: Times | None,
    ask_hub: bool,
    batch_size: int,
    datasets: tuple[Any, Any],
    card: Mapping[str, Any],
    replay: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Puts together what is to be known about a run. No process waits for another.

    Args:
        run (`str`, *optional*):
            The run's identity, as its checkpoints have it; `None` before training.
        args ([`WashConfig`]), state (`TrainerState`):
            The options, and how far the run has come.
        model (`torch.nn.Module`):
            The model that is served: one member, or the soup.
        population ([`Population`]), overrides (`Sequence[MemberOverrides]`):
            The members, and what each has of its own.
        exchanged (`tuple[int, int]`):
            The values and bytes that members got from each other so far.
        probability (`float`, *optional*):
            The p of this run.
        times ([`Times`], *optional*):
            When its members are averaged, if they are.
        ask_hub (`bool`):
            Whether the Hub may be asked, for the license of the model this one was made from.
        greedy ([`GreedySoupRecord`], *optional*):
            How the greedy soup was chosen, if there is one.
        left_out (`Sequence[int]`):
            The members that are not in the soup because they are not finite.
        batch_size (`int`):
            The number of samples that a member sees for one optimizer step.
        datasets (`tuple`):
            The data sets for training and evaluation, or `None`.
        card (`Mapping[str, Any]`):
            What was given for the model card.
        replay (`Mapping[str, Any]`, *optional*):
            How a checkpoint of the run is verified, where it has kept one and its script is known.

    Returns:
        `dict[str, Any]`: The content of `wash_run.json`.
    """
    member = population.members[0]
    trained = [p for p in member.parameters() if p.requires_grad]
    train_samples, eval_samples = (len(dataset) if has_length(dataset) else None for dataset in datasets)
    soup: dict[str, Any] = {"method": args.soup}
    if has_batch_norm(model):
        soup["batch_norm"] = args.soup_batch_norm
    if greedy is not None:
        soup |= {"chosen": list(greedy.indices), "scores": list(greedy.member_scores)}
    if left_out:
        soup["left_out"] = list(left_out)
    libraries = ("torch", "transformers", "accelerate", "timm")
    return {
        "run": run,
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": sum(p.numel() for p in trained),
            "trainable_bytes": size_of(trained),
        },
        "population": {
            "size": population.size,
            "same_init": args.same_init,
            "member_data": args.member_data,
            "overrides": [each.describe() for each in overrides],
        },
        "mixing": _mixing(args, probability, times),
        "exchange": dict(zip(("values_moved", "bytes_exchanged"), exchanged, strict=True)),
        "soup": soup,
        "training": {
            "steps": state.global_step,
            "epochs": round(state.epoch, 4) if state.epoch else None,
            "batch_size": batch_size,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "precision": _precision(args, trained),
            **{name: getattr(args, name) for name in _TRAINING},
        },
        "data": {"train_samples": train_samples, "eval_samples": eval_samples},
        "hardware": _hardware(args.device, population.world_size),
        "versions": {
            "hf_wash": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in libraries},
        },
        "card": {**card, **_origin(model, datasets, card, ask_hub)},
        **({"replay": dict(replay)} if replay else {}),
    }


def _mixing(args: Any, probability: float | None, times: Times | None) -> dict[str, Any]:
    """What the method is, with what is its own: what it takes of the options, and what these came to in this run."""
    own = METHODS[args.mixing].options
    told = {"method": args.mixing, **{name: getattr(args, name) for name in OPTIONS if name in own}}
    if "shuffle_probability" in own:
        told["shuffle_probability"] = probability
    if "average_rate" in own:
        told["average_rate"] = args.used_average_rate
    if times is not None:
        told |= {"average_interval": times.interval, "average_first": times.first, "average_last": times.last}
        told["average_epoch"] = times.epoch
    return told


def _precision(args: Any, trained: Sequence[torch.Tensor]) -> str | None:
    if args.fp16 or args.bf16:
        return f"{'float16' if args.fp16 else 'bfloat16'}, mixed"
    return str(trained[0].dtype).removeprefix("torch.") if trained else None


def _hardware(device: torch.device, processes: int) -> dict[str, Any]:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    threads = torch.get_num_threads()
    each = f", {threads} thread{'s' if threads > 1 else ''} each" if device.type == "cpu" else ""
    text = f"{processes} process{'es' if processes > 1 else ''} on {where}{each}"
    return {"device": where, "processes": processes, "text": text}


def _origin(model: Any, datasets: Sequence[Any], card: Mapping[str, Any], ask_hub: bool) -> dict[str, Any]:
    """Where the model and the data come from: as far as they tell themselves, and without paths of this machine."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = card.get("finetuned_from") or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    found = {
        "finetuned_from": Path(base).name if base and os.path.isdir(base) else base,
        "license": card.get("license") or (_license_of(base) if base and (ask_hub or os.path.isdir(base)) else None),
        "dataset_tags": card.get("dataset_tags") or dataset_repositories(*datasets),
    }
    return {name: value for name, value in found.items() if value}
