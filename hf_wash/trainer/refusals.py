"""What a population cannot do, said in one sentence before anything has happened."""

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..config import PopulationArguments


# Trainers that generate or score across all processes, by name: members would answer each other's prompts.
_SHARE_GENERATIONS = (
    "GRPO", "RLOO", "OnlineDPO", "XPO", "NashMD", "PPO", "GKD", "GOLD", "SDFT", "SDPO", "Distillation",
)  # fmt: skip


def refuse_trainer(trainer_class: type) -> None:
    """Refuse a Trainer that generates or scores across all processes."""
    for base in trainer_class.__mro__:
        package = base.__module__.split(".")[0]
        if package == "trl" and any(name in base.__name__ for name in _SHARE_GENERATIONS):
            raise ValueError(
                f"`{base.__name__}` generates or scores across all processes, so members would share their prompts "
                "and rewards: it cannot hold a population."
            )


def refuse_args(args: Any) -> None:
    """Refuse arguments that know nothing of populations."""
    if not isinstance(args, PopulationArguments):
        found = "`TrainingArguments`" if type(args) is TrainingArguments else f"`{type(args).__name__}`"
        raise ValueError(
            f"`args` must be a `WashConfig`, found {found}. For another Trainer's arguments: "
            "`@dataclass class MyConfig(PopulationArguments, TheirConfig): ...`."
        )


def refuse_settings(args: Any, model: Any) -> None:
    """Refuse options that do not go with a population."""
    problem = output_folder_problem(Path(args.output_dir)) if args.should_save else None
    if problem is not None:
        raise ValueError(f"`output_dir` ({args.output_dir}) {problem}.")
    if args.deepspeed:
        raise ValueError("DeepSpeed is not supported yet: remove `deepspeed`.")
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("FSDP is not supported yet: remove `fsdp`, or the FSDP section of the launch configuration.")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError("DeepSpeed is not supported yet: remove it from the launch configuration.")
    if args.parallelism_config is not None or (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            "Tensor, context and sequence parallelism are not supported yet: one device must hold a member."
        )
    if args.auto_find_batch_size and args.world_size > 1:
        raise ValueError(
            "`auto_find_batch_size` works on one process only: each process would settle on a batch size of its own."
        )
    optimizer = str(getattr(args.optim, "value", args.optim)).lower()
    if optimizer in ("lomo", "adalomo") or "layerwise" in optimizer:
        raise ValueError(f"`optim={optimizer}` steps inside the backward pass, where members cannot be told apart.")
    if args.world_size > 1:
        if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
            raise ValueError(
                "`train_sampling_strategy='batch_rebalance'` deals one data set to all processes; members see all of it."
            )
        if args.accelerator_config.split_batches or args.accelerator_config.dispatch_batches:
            raise ValueError(
                "`split_batches` and `dispatch_batches` deal one batch to all processes; each member draws its own "
                "batches."
            )
        if isinstance(model, nn.Module) and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            raise ValueError("`SyncBatchNorm` would mix the statistics of members: use plain BatchNorm layers.")


def refuse_for_several(args: Any, size: int, model: Any, optimizers: tuple) -> None:
    """Refuse what works for one member only."""
    if not args.same_init and model is not None:
        raise ValueError(
            "`same_init=False` needs `model_init`, a function that makes a model: a given `model` is one start only."
        )
    if size == 1:
        return
    if args.neftune_noise_alpha is not None or args.use_liger_kernel:
        raise ValueError(
            f"`neftune_noise_alpha` and `use_liger_kernel` patch one model and cannot serve a population of {size}."
        )
    if any(part is not None for part in optimizers):
        raise ValueError(
            f"`optimizers` cannot serve a population of {size}: it was made before the members. Use `optim` or "
            "`optimizer_cls_and_kwargs`."
        )


def output_folder_problem(folder: Path) -> str | None:
    """Why nothing could be written to a folder, as the rest of a sentence. Makes nothing."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if _is_there(path))
    except (OSError, ValueError) as error:  # too long a name, or NUL in it
        return f"cannot be made: {error}"
    if there.is_symlink() and not os.path.exists(there):
        return f"cannot be made: `{there}` is a link to what is not there"
    if not there.is_dir():
        return "is a file" if there == folder else f"cannot be made: `{there}` is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return "cannot be written to" if there == folder else f"cannot be made: `{there}` cannot be written to"
    return None


def _is_there(path: Path) -> bool:
    """Whether there is anything of this name, a link to nothing included."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
