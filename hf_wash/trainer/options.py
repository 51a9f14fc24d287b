"""
The options of a run as its checkpoints keep them, and which of those that were changed take effect in a run that goes on.
"""

import importlib.metadata
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import PopulationArguments
from ..population import MemberOverrides
from ..secret_options import is_secret, without_secrets


# Compared elsewhere, or nothing that a run's result could depend on: where it is written, logged and reported to, and
# how its machine is used.
_NOT_KEPT = {
    "population_size", "seed", "push_members", "report", "output_dir", "logging_dir", "run_name", "project", "report_to",
    "disable_tqdm", "logging_strategy", "logging_first_step", "logging_nan_inf_filter",
    "include_num_input_tokens_seen", "push_to_hub", "do_train", "do_eval", "do_predict", "resume_from_checkpoint",
    "local_rank", "use_cpu", "skip_memory_metrics", "debug", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "torch_empty_cache_steps", "save_strategy", "save_total_limit", "save_on_each_node", "save_only_model",
    "enable_jit_checkpoint", "average_tokens_across_devices", "dry_run", "verify_checkpoint",
}  # fmt: skip
_NOT_KEPT_PREFIXES = ("hub_", "trackio_", "ddp_", "log_")

# What a checkpoint brings along. Rates, betas and the like stand in the parameter groups of the optimizer, and the
# scheduler starts from the rates it was made with; the Trainer takes its intervals from `trainer_state.json` (5.23).
_FROM_CHECKPOINT = {
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "logging_steps",
    "eval_steps", "save_steps", "same_init",
}  # fmt: skip
# Their own state holds what they were made with.
SCHEDULERS_WITH_STATE = ("reduce_lr_on_plateau", "greedy")
# One optimizer in two implementations; the parameter groups say which one computes.
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def recorded(args: PopulationArguments) -> dict[str, dict[str, Any]]:
    """
    What a manifest keeps of the options that a result may depend on, as plain values of JSON, without secrets.

    Returns:
        `dict`: `options`, those of [`PopulationArguments`], and `arguments`, those of the Trainer.
    """
    kept: dict[str, dict[str, Any]] = {"options": {}, "arguments": {}}
    for name, value in args.to_dict().items():
        if name in _NOT_KEPT or name.startswith(_NOT_KEPT_PREFIXES):
            continue
        if name.endswith("_token"):  # hidden by the Trainer's arguments, also where it is none of a person's
            value = getattr(args, name)
            if is_secret(name, value):
                continue
        where = "options" if name in PopulationArguments.__dataclass_fields__ else "arguments"
        kept[where][name] = _plain(value)
    return kept


def _plain(value: Any) -> Any:
    # What JSON does not know is told from another by its representation, as far as that is the same in another process.
    return json.loads(json.dumps(without_secrets(value), default=lambda item: re.sub(r" at 0x\w+", "", repr(item))))


# Compared elsewhere, and so a part of the run all the same.
_OF_THE_RUN = ("population_size", "seed", "use_cpu")


def command_of_replay(arguments: Sequence[str], checkpoint: str) -> str:
    """
    The command line that verifies a checkpoint, for strangers: without secrets, folders of this machine, and what only
    says where a run is written and reported.

    Args:
        arguments (`Sequence[str]`): The script of the run, which takes `--verify_checkpoint`, and its arguments.
        checkpoint (`str`): The checkpoint.
    """
    groups: list[list[str]] = [[]]
    for argument in arguments[1:]:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            groups.append([name, value] if equals else [name])
        else:
            groups[-1].append(argument)
    kept = [arguments[0]]
    for flag, *values in (group for group in groups if group):
        name = flag.lstrip("-").replace("-", "_")
        dropped = name.startswith(_NOT_KEPT_PREFIXES) or (name in _NOT_KEPT and name not in _OF_THE_RUN)
        if not dropped and not any(is_secret(name, value) for value in values):
            kept += [flag, *(Path(value).name if os.path.isabs(value) else value for value in values)]
    return shlex.join(["python", *kept, "--verify_checkpoint", checkpoint])


def made_with(device: torch.device) -> dict[str, Any]:
    """What the bits of a run depend on beside its options: versions, threads and the kind of device."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**versions, "number of threads": torch.get_num_threads(), "device": name}


def compare(
    manifest: Mapping[str, Any], args: PopulationArguments, overrides: Sequence[MemberOverrides]
) -> tuple[list[str], list[str]]:
    """
    The options that differ from those that a checkpoint was written with.

    Returns:
        `tuple[list[str], list[str]]`: Those that take effect from the checkpoint on, and those that do not, each as
        "name was value and is value".
    """
    effective: list[str] = []
    without: list[str] = []
    now = recorded(args)
    own = {**now["options"], **now["arguments"]}
    saved = {**manifest["options"], **manifest.get("arguments", {})}
    for name, before in saved.items():
        if name not in own:
            if before is not None and name not in _NOT_KEPT:
                effective.append(f"{name} was {before!r} and is no option here")
        elif own[name] != before:
            told = f"{name} was {before!r} and is {own[name]!r}"
            (effective if _takes_effect(name, saved, own) else without).append(told)
    for index, (before, here) in enumerate(zip(manifest["overrides"], overrides, strict=False)):
        for name, value in _plain(here.describe()).items():
            if before.get(name) != value:
                told = f"{name} of member {index} was {before.get(name)!r} and is {value!r}"
                (without if name in _FROM_CHECKPOINT else effective).append(told)
    return effective, without


def _takes_effect(name: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    if name == "optim":
        return not (saved[name] in _ADAMW and own[name] in _ADAMW)
    if name == "lr_scheduler_kwargs":
        return own["lr_scheduler_type"] not in SCHEDULERS_WITH_STATE
    if name == "num_train_epochs":
        return own["max_steps"] <= 0
    if name == "per_device_train_batch_size":
        return not own["auto_find_batch_size"]
    if name == "shuffle_probability":
        # A p that was fitted to a run stays that run's.
        return own[name] is not None
    return name not in _FROM_CHECKPOINT
