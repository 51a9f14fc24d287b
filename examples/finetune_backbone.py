#!/usr/bin/env python
"""
Fine-tune a pretrained backbone as a population: members start from the same backbone with a new head, shuffle a few of
their weights as they learn the task, and their average, the soup, is the model to ship.

    python examples/finetune_backbone.py                                # pretrains on digits 0-4, fine-tunes on 5-9
    python examples/finetune_backbone.py --lora_rank 8 --merge          # adapters over one frozen backbone
    python examples/finetune_backbone.py --model_name_or_path google/vit-base-patch16-224-in21k --data_dir photos/
    python examples/finetune_backbone.py --model_name_or_path timm/resnet50.a1_in1k --dataset_name cifar10
    torchrun --nproc-per-node 2 examples/finetune_backbone.py           # two processes, a member or more in each

`--help` lists the flags; every field of `WashConfig` and of `TrainingArguments` is one. docs/finetuning.md says more.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from command_line import CommandLine, Run, done_instead, interruptible, name_report, refuse, trained
from datasets import ClassLabel, Dataset
from image_data import (
    DIGITS,
    DataArguments,
    EvaluationView,
    ImageData,
    TrainingView,
    at_most,
    hold_out,
    load_data,
    load_digits,
)
from safetensors.torch import load_file
from torch import nn
from train_vit import (
    Recipe,
    TrainVitConfig,
    default,
    pretrained_recipe,
    results_table,
    small_vit_recipe,
)
from transformers import (
    PreTrainedModel,
    TimmWrapperForImageClassification,
    set_seed,
)
from transformers.utils import logging

from hf_wash import WashTrainer
from hf_wash.hub import export_model
from hf_wash.metrics import compute_classification_metrics
from hf_wash.population import copy_member
from hf_wash.soup import has_batch_norm


logger = logging.get_logger("finetune_backbone")

# What the script's own backbone learns first, and what is left for the fine-tuning.
PRETRAINED_ON, FINETUNED_ON = range(5), range(5, 10)
PRETRAINING_EPOCHS = 15

LEARNING_RATE, LORA_LEARNING_RATE = 1e-3, 5e-3


@dataclass
class BackboneArguments:
    """What to fine-tune, and how much of it."""

    _argument_group_name = "backbone (default: a small ViT, first pretrained here on the digits 0 to 4)"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A pretrained model of transformers or timm, on the Hub or in a folder. Its head is replaced by a "
            "new one for the classes of the data. By default a small ViT that the script pretrains itself, saves in "
            "backbone/ of the output folder, and uses again if it is there."
        },
    )
    layer_decay: float = field(
        default=0.9,
        metadata={
            "help": "Layer-wise decay of the learning rate, in (0, 1]: each block has this times the rate of the block "
            "after it, and the head has the full one. Blocks are what the model numbers: layers of a transformer, "
            "stages of a hierarchical network. 1: the same rate everywhere."
        },
    )
    head_only: float = field(
        default=0.1,
        metadata={
            "help": "Part of the run, in [0, 1), in which only the new head learns and nothing is shuffled: it starts "
            "from noise, and would send that into the backbone."
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train LoRA adapters of this rank (and the head) over one frozen backbone. Needs peft."},
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "LoRA's scale: an adapter adds alpha / rank * B A. By default twice the rank."}
    )
    merge: bool = field(
        default=False,
        metadata={"help": "With --lora_rank: save the backbone with the soup merged into it, too, in merged/."},
    )

    def __post_init__(self):
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"--layer_decay must be above 0 and at most 1, found {self.layer_decay}.")
        if not 0.0 <= self.head_only < 1.0:
            raise ValueError(f"--head_only must be a part of the run, in [0, 1), found {self.head_only}.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"--lora_rank must be at least 1, found {self.lora_rank}.")
        if self.lora_rank is None and (self.merge or self.lora_alpha is not None):
            raise ValueError(f"--{'merge' if self.merge else 'lora_alpha'} goes with --lora_rank, which is missing.")


@dataclass
class FinetuneConfig(TrainVitConfig):
    """[`WashConfig`] with defaults under which a small backbone learns a small task within minutes."""

    output_dir: str = default("output_dir", "outputs/finetune")
    num_train_epochs: float = default("num_train_epochs", 15)
    per_device_train_batch_size: int = default("per_device_train_batch_size", 32)
    learning_rate: float | None = default(  # type: ignore[assignment] # `None` until it is known what is trained
        "learning_rate",
        None,
        help=f"The learning rate of the head. By default {LEARNING_RATE:g}, and {LORA_LEARNING_RATE:g} with --lora_rank.",
    )


# ---- The backbone and its head ----------------------------------------------------------------------------------


def head_names(model: PreTrainedModel) -> list[str]:
    """
    The modules that make a classifier of a backbone, by name.

    Raises:
        ValueError: if there is no telling them from the backbone.
    """
    if isinstance(model, TimmWrapperForImageClassification):
        found = model.timm_model.get_classifier()
        heads = found if isinstance(found, (tuple, list)) else [found]
        names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    else:
        children = model.named_children() if model.base_model is not model else ()
        names = [name for name, child in children if child is not model.base_model and list(child.parameters())]
    if not names:
        raise ValueError(f"There is no telling the head of a {type(model).__name__} from its backbone.")
    return names


@torch.no_grad()
def redraw(modules: Iterable[nn.Module]) -> None:
    """A new start for a head: small random weights, no bias."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)


def blocks_to_head(names: Iterable[str], heads: list[str]) -> dict[str, int]:
    """
    How many blocks lie between each parameter and the output: 0 for the head, 1 for what comes right before it.

    A block is what the model's first number counts (`encoder.layer.3`, `stages.1`, `blocks.7`), or all that stands
    between two such lists (embeddings, a last normalization).

    Args:
        names (`Iterable[str]`):
            The parameters' names in definition order, with PEFT's or without.
        heads (`list[str]`):
            The head's modules, as [`head_names`] gives them.
    """
    blocks: dict[str, str | None] = {}
    numbered: list[str] = []
    for name in names:
        plain = name.removeprefix("base_model.model.")
        if any(plain.startswith(f"{head}.") for head in heads):
            blocks[name] = None
            continue
        number = re.match(r"(?:.*?\.)??\w+\.\d+(?=\.)", plain)
        if number is None:
            blocks[name] = f"after {len(numbered)} blocks"
        else:
            blocks[name] = block = number.group()
            if block not in numbered:
                numbered.append(block)
    order = list(dict.fromkeys(block for block in blocks.values() if block is not None))
    return {name: 0 if at is None else len(order) - order.index(at) for name, at in blocks.items()}


def digits_of(classes: Iterable[int]) -> Dataset:
    """Some classes of the digits, numbered from 0 and named as they are read."""
    classes = list(classes)
    digits = load_digits()
    labels = digits["label"][:]
    digits = digits.select([index for index, label in enumerate(labels) if label in classes])
    numbers = [classes.index(label) for label in digits["label"][:]]
    names = ClassLabel(names=[str(digit) for digit in classes])
    return digits.remove_columns("label").add_column("label", numbers).cast_column("label", names)


def pretrain_backbone(folder: Path, seed: int = 0, epochs: int = PRETRAINING_EPOCHS) -> None:
    """
    What a download would give: a small ViT that knows the digits 0 to 4, in a folder.

    Args:
        folder (`Path`):
            Where to save it. It appears when it is complete.
        seed (`int`, *optional*, defaults to 0):
            Of the weights, the order of the images and their changes.
        epochs (`int`, *optional*, defaults to 15):
            Passes over the 901 images.
    """
    set_seed(seed)
    data = digits_of(PRETRAINED_ON)
    recipe = small_vit_recipe(data.features["label"].names, 16)
    model = recipe.model_init().train()
    view = TrainingView(recipe.processor, "image", "label", "shift")
    loader = torch.utils.data.DataLoader(
        data.with_transform(lambda batch: dict(zip(("pixel_values", "labels"), view(batch).values(), strict=True))),
        batch_size=64,
        shuffle=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
        export_model(model, Path(staging) / "backbone", processing_class=recipe.processor)
        (Path(staging) / "backbone").rename(folder)


def add_adapter(model: PreTrainedModel, heads: list[str], rank: int, alpha: float | None) -> nn.Module:
    """The model with LoRA on all linear layers of its backbone (where it has none: on its convolutions)."""
    from peft import LoraConfig, get_peft_model

    def named(kind: type[nn.Module]) -> list[str]:
        in_backbone = (
            (name, module)
            for name, module in model.named_modules()
            if not any(name == head or name.startswith(f"{head}.") for head in heads)
        )
        return [name for name, module in in_backbone if type(module) is kind]

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,  # type: ignore[arg-type] # it is divided by the rank
        target_modules=named(nn.Linear) or named(nn.Conv2d),
        modules_to_save=heads,
    )
    return get_peft_model(model, config)


def make_member(recipe: Recipe, arguments: BackboneArguments) -> tuple[Callable[[], nn.Module], list[str]]:
    """
    The `model_init` of the population and the names of the head's modules.

    Args:
        recipe ([`Recipe`]):
            The backbone, with a head of the right size.
        arguments ([`BackboneArguments`]):
            What to train of it.

    Raises:
        ValueError: for a backbone that cannot be trained as asked.
    """
    backbone: Any = recipe.model_init()
    heads = head_names(backbone)
    rank = arguments.lora_rank
    if rank is None:

        def with_new_head() -> nn.Module:
            member: Any = copy_member(backbone)
            redraw(member.get_submodule(head) for head in heads)
            return member

        return with_new_head, heads

    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError('--lora_rank needs peft: pip install "hf-wash[peft]".') from error
    if has_batch_norm(backbone):
        raise ValueError(
            f"--lora_rank does not go with a {type(backbone).__name__} that has BatchNorm: its statistics would change "
            "as it trains, and are no part of an adapter."
        )
    # Frozen, so every copy shares its weights: N adapters, one backbone, whether they start equal or not.
    backbone.requires_grad_(False)

    def with_adapter() -> nn.Module:
        member: Any = add_adapter(copy_member(backbone), heads, rank, arguments.lora_alpha)
        # PEFT trains a copy of the head, the one that is saved with the adapter.
        redraw(member.get_base_model().get_submodule(head).modules_to_save["default"] for head in heads)
        return member

    return with_adapter, heads


# ---- Training ---------------------------------------------------------------------------------------------------


class FinetuneTrainer(WashTrainer):
    """
    [`WashTrainer`] with a learning rate for each depth, and a phase in which only the head learns.

    The phase is a learning rate of 0, not `requires_grad=False`: members share the parameters that are frozen.

    Args:
        heads (`list[str]`):
            The head's modules, as [`head_names`] gives them.
        layer_decay (`float`, *optional*, defaults to 1.0):
            The learning rate is multiplied by this for each block further from the head.
        head_only (`float`, *optional*, defaults to 0.0):
            The part of the run, in [0, 1), in which only the head learns.
    """

    def __init__(self, *args, heads: list[str], layer_decay: float = 1.0, head_only: float = 0.0, **kwargs):
        self.heads, self.layer_decay, self.head_only = heads, layer_decay, head_only
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The population's optimizer, each member's groups split by depth, the head's first."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        blocks: dict[nn.Parameter, int] = {}
        for _, member in self.population:
            named = {name: parameter for name, parameter in member.named_parameters() if parameter.requires_grad}
            blocks |= {named[name]: depth for name, depth in blocks_to_head(named, self.heads).items()}
        # Nothing is in its state yet, so its groups can be cut further. Each part keeps `member`.
        groups = []
        for group in optimizer.param_groups:
            for depth in sorted({blocks[parameter] for parameter in group["params"]}):
                parameters = [parameter for parameter in group["params"] if blocks[parameter] == depth]
                rate = group["lr"] * self.layer_decay**depth
                groups.append({**group, "params": parameters, "lr": rate, "blocks_to_head": depth})
        optimizer.param_groups = groups
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The schedule that was asked for, and 0 for the backbone as long as only the head learns."""
        if self.lr_scheduler is not None:  # type: ignore[has-type] # set by the Trainer
            return self.lr_scheduler  # type: ignore[has-type] # set by the Trainer
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        head_steps = int(self.head_only * num_training_steps)
        if head_steps == 0:
            return scheduler
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            raise ValueError(f"--head_only does not go with --lr_scheduler_type {self.args.lr_scheduler_type}.")

        def later(factor: Callable[[int], float]) -> Callable[[int], float]:
            return lambda step: factor(step) if step >= head_steps else 0.0

        groups = scheduler.optimizer.param_groups
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            scheduler.optimizer,
            [
                factor if group["blocks_to_head"] == 0 else later(factor)
                for factor, group in zip(scheduler.lr_lambdas, groups, strict=True)
            ],
        )
        return self.lr_scheduler


def averaging_error(folder: str | Path, num_members: int) -> float:
    """
    How far the soup's adapter is from the mean of what the members' adapters do, ‖mean(B)·mean(A) − mean(B·A)‖
    relative to ‖mean(B·A)‖ over all adapted layers: a soup averages A and B each by itself.

    Args:
        folder (`str` or `Path`):
            Where `WashTrainer.save_members` wrote: it holds `_members/member_<i>/`.
        num_members (`int`):
            How many there are.
    """
    adapters = [
        load_file(Path(folder) / "_members" / f"member_{index}" / "adapter_model.safetensors")
        for index in range(num_members)
    ]
    error = size = 0.0
    for name in adapters[0]:
        if "lora_A" not in name:
            continue
        a = torch.stack([adapter[name].double().flatten(1) for adapter in adapters])
        b = torch.stack([adapter[name.replace("lora_A", "lora_B")].double().flatten(1) for adapter in adapters])
        exact = (b @ a).mean(0)
        error += float((b.mean(0) @ a.mean(0) - exact).square().sum())
        size += float(exact.square().sum())
    return (error / size) ** 0.5 if size else 0.0


# ---- The command ------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> tuple[BackboneArguments, DataArguments, FinetuneConfig]:
    """The command line, as three groups of options."""
    parser = CommandLine([BackboneArguments, DataArguments, FinetuneConfig], __doc__)
    backbone, data, config = parser.parse_args_into_dataclasses(args=arguments)
    if (data.data_dir or data.dataset_name) and not backbone.model_name_or_path:
        raise ValueError("Your data needs --model_name_or_path: the script's own backbone has seen digits only.")
    if backbone.head_only > config.shuffle_stop:
        raise ValueError(
            f"--head_only ({backbone.head_only}) must be at most --shuffle_stop ({config.shuffle_stop}): nothing is "
            "shuffled while only the head learns."
        )
    if config.learning_rate is None:
        config.learning_rate = LEARNING_RATE if backbone.lora_rank is None else LORA_LEARNING_RATE
    # Until then the members' backbones are equal, and a shuffle would move equal values.
    config.shuffle_start = max(config.shuffle_start, backbone.head_only)
    return backbone, data, config


def unseen_digits(arguments: DataArguments) -> ImageData:
    """The digits that the script's own backbone has not seen."""
    train, evaluation = hold_out(digits_of(FINETUNED_ON), "label")
    return ImageData(
        name=f"{DIGITS}, {FINETUNED_ON[0]} to {FINETUNED_ON[-1]}",
        hub_id=None,
        train=at_most(train, arguments.max_train_samples),
        eval=at_most(evaluation, arguments.max_eval_samples),
        image_column="image",
        label_column="label",
    )


def prepare(arguments: list[str] | None = None) -> tuple[FinetuneTrainer, ImageData, Recipe, BackboneArguments]:
    """Everything before training: what is wrong with the input shows here."""
    backbone_arguments, data_arguments, config = parse(arguments)
    if config.process_index > 0:
        logging.set_verbosity_error()
        datasets.disable_progress_bars()
    hub = {"token": config.hub_token} if config.hub_token else {}
    backbone = backbone_arguments.model_name_or_path
    # One process downloads and prepares what is not there yet, the others read it.
    with config.main_process_first(desc="loading the data"):
        data = load_data(data_arguments, config.hub_token) if backbone else unseen_digits(data_arguments)
    with config.main_process_first(desc="loading the backbone"):
        if not backbone:
            backbone = os.path.join(config.output_dir, "backbone")
            if not os.path.isdir(backbone):
                print(f"Pretraining a backbone on the digits {PRETRAINED_ON[0]} to {PRETRAINED_ON[-1]}.", flush=True)
                pretrain_backbone(Path(backbone))
        recipe = pretrained_recipe(backbone, data.label_names, hub)
    model_init, heads = make_member(recipe, backbone_arguments)
    columns = (data.image_column, data.label_column)
    augmentation = data_arguments.augmentation or data.augmentation
    trainer = FinetuneTrainer(
        model_init=model_init,
        args=config,
        train_dataset=TrainingView(recipe.processor, *columns, augmentation).of(data.train),
        eval_dataset=EvaluationView(recipe.processor, *columns).of(data.eval),
        compute_metrics=compute_classification_metrics,
        processing_class=recipe.processor,
        heads=heads,
        layer_decay=backbone_arguments.layer_decay,
        head_only=backbone_arguments.head_only,
    )
    trainer.replay_command = [
        "examples/finetune_backbone.py",
        *(arguments if arguments is not None else sys.argv[1:]),
    ]
    return trainer, data, recipe, backbone_arguments


def how_to_use(folder: str, backbone: str | None = None) -> str:
    """Lines that load a model, or an adapter and what prepares images for its backbone."""
    if backbone is None:
        return (
            "  from transformers import pipeline\n"
            f'  pipeline("image-classification", model="{folder}")("your_image.png")\n'
        )
    return (
        "  from transformers import pipeline\n"
        "  from hf_wash.hub import load_model\n"
        f'  model = load_model("{folder}").merge_and_unload()  # the backbone with the adapter\n'
        f'  pipeline("image-classification", model=model, image_processor="{backbone}")("your_image.png")\n'
    )


@interruptible
def main(run: Run) -> None:
    try:
        run.trainer, data, recipe, backbone_arguments = prepare()
        trainer = run.trainer
        config = trainer.args
        if done_instead(trainer):
            return
    except ValueError as error:
        refuse(error)
    adapter = backbone_arguments.lora_rank is not None

    outcome = trained(trainer)
    trainer.save_model()
    trainer.save_members()
    metrics = {**outcome.metrics, **trainer.evaluate()}
    if adapter:
        metrics["lora_averaging_error"] = averaging_error(config.output_dir, trainer.population.size)
    trainer.save_metrics("all", metrics)
    trainer.save_state()
    merged = os.path.join(config.output_dir, "merged")
    if backbone_arguments.merge and trainer.is_world_process_zero():
        export_model(trainer.model, merged, processing_class=recipe.processor, merge_adapter=True)
    card: dict[str, Any] = {
        "tasks": "image-classification",
        "dataset": data.name,
        "dataset_tags": data.hub_id,
        "finetuned_from": recipe.finetuned_from,
    }
    trainer.create_model_card(**card)
    if config.push_to_hub:
        trainer.push_to_hub(**card)

    if trainer.is_world_process_zero():
        trained_part = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in trainer.model.parameters())
        print(f"\n{len(data.eval):,} held-out images of {data.name}, mixing: {config.mixing}")
        print(f"{recipe.finetuned_from}: {trained_part:,} of {whole:,} parameters trained\n")
        print(results_table(metrics))
        if adapter:
            print(
                f"\nThe soup averages A and B apart, which is off from the mean of the products by "
                f"{metrics['lora_averaging_error']:.1%} of its norm."
            )
        name_report(config.output_dir)
        use = how_to_use(config.output_dir, recipe.finetuned_from if adapter else None)
        print(f"\nThe soup is saved in {config.output_dir}. To use it:\n\n{use}")
        if backbone_arguments.merge:
            print(f"Merged into the backbone it is in {merged}:\n\n{how_to_use(merged)}")
    # A process group that is left to the interpreter's end may abort the process there (gloo in torch 2.15).
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
