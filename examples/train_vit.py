#!/usr/bin/env python
"""
Train a population of image classifiers that shuffle a few of their weights as they learn, and save their average, the
soup: one model, to be used like any other.

    python examples/train_vit.py                                    # a small ViT on 1,797 handwritten digits, on a CPU
    python examples/train_vit.py --data_dir photos/                 # one folder of images for each class
    python examples/train_vit.py --data_dir photos/ --dry_run       # what is wrong, and what it will cost
    python examples/train_vit.py --dataset_name cifar10 --model_name_or_path google/vit-base-patch16-224-in21k
    python examples/train_vit.py --dataset_name glyphs-short        # letters, digits and symbols, drawn from fonts
    python examples/train_vit.py --timm_architecture resnet18       # any timm model, from scratch
    torchrun --nproc-per-node 2 examples/train_vit.py               # two processes, a member or more in each

`--help` lists the flags; every field of `WashConfig` and of `TrainingArguments` is one.
"""

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import timm
import torch
from command_line import (
    CommandLine,
    InsteadOfTraining,
    Run,
    done_instead,
    interruptible,
    name_report,
    refuse,
    trained,
)
from glyph_data import SIDE, is_glyphs
from image_data import DIGITS, DataArguments, EvaluationView, ImageData, TrainingView, load_data
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.utils import logging

from hf_wash import WashConfig, WashTrainer
from hf_wash.metrics import compute_classification_metrics


logger = logging.get_logger("train_vit")


@dataclass
class ModelArguments:
    """Which model to train."""

    _argument_group_name = "model (default: a small ViT from scratch)"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A pretrained image classifier, on the Hub or in a folder. It gets a new head if its classes are "
            "not as many as the data's."
        },
    )
    timm_architecture: str | None = field(
        default=None, metadata={"help": "A timm architecture to train from scratch, such as resnet18."}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side, in pixels, of the images that a model from scratch sees. By default 16 for the digits (32 "
            "with timm), 32 for glyphs, 64 for other data, and for other data with timm what the architecture was made for."
        },
    )

    def __post_init__(self):
        if self.model_name_or_path and self.timm_architecture:
            raise ValueError("--model_name_or_path and --timm_architecture both name a model; give one of them.")
        if self.image_size is not None and self.model_name_or_path:
            raise ValueError("--image_size is for models from scratch; a pretrained model brings its own.")
        if self.image_size is not None and self.image_size < 8:
            raise ValueError(f"--image_size must be at least 8 pixels, found {self.image_size}.")


def default(name: str, value: Any, help: str | None = None) -> Any:
    """A field of `WashConfig` with another default, and the same help unless `help` is given."""
    metadata = dict(WashConfig.__dataclass_fields__[name].metadata)
    if help is not None:
        metadata["help"] = help
    return field(default=value, metadata=metadata)


@dataclass
class TrainVitConfig(InsteadOfTraining, WashConfig):
    """[`WashConfig`] with defaults under which a small model learns a small data set within minutes."""

    output_dir: str = default("output_dir", "outputs/vit")
    num_train_epochs: float = default("num_train_epochs", 20)
    per_device_train_batch_size: int = default("per_device_train_batch_size", 64)
    per_device_eval_batch_size: int = default("per_device_eval_batch_size", 128)
    learning_rate: float = default("learning_rate", 1e-3)
    weight_decay: float = default("weight_decay", 0.05)
    lr_scheduler_type: str = default("lr_scheduler_type", "cosine")
    warmup_steps: float = default("warmup_steps", 0.1)
    logging_steps: float = default("logging_steps", 0.05)
    save_strategy: str = default("save_strategy", "no")
    # The images are opened and augmented when they are needed, and the Trainer would remove their column before that.
    remove_unused_columns: bool = default("remove_unused_columns", False)
    shuffle_stop: float = default("shuffle_stop", 0.75)

    def __post_init__(self):
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("--remove_unused_columns would remove the images before they are opened; leave it off.")


@dataclass
class Recipe:
    """How to build the model, again and again, and how images become its input."""

    model_init: Callable[[], PreTrainedModel]
    processor: Any
    finetuned_from: str | None = None


def label_maps(names: list[str]) -> dict[str, Any]:
    """What a configuration says about classes."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        # Else the first forward pass would write it into the configuration.
        "problem_type": "single_label_classification",
    }


def pretrained_recipe(name_or_path: str, label_names: list[str], hub: dict[str, Any]) -> Recipe:
    """A pretrained classifier with a head for these labels."""
    try:
        config = AutoConfig.from_pretrained(name_or_path, **hub)
        processor = AutoImageProcessor.from_pretrained(name_or_path, **hub)
        # Set, not passed: from_pretrained (transformers 5.23) compares a passed number with the classes of old.
        config.update(label_maps(label_names))
        if isinstance(config, TimmWrapperConfig):
            config.label_names = label_names

        def model_init() -> PreTrainedModel:
            return AutoModelForImageClassification.from_pretrained(
                name_or_path, config=config, ignore_mismatched_sizes=True, **hub
            )

        model_init()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(f"Could not load an image classifier from {name_or_path!r}: {reason[0]}") from error
    return Recipe(model_init, processor, finetuned_from=name_or_path)


def timm_recipe(architecture: str, label_names: list[str], image_size: int | None, whole_image: bool) -> Recipe:
    """A timm model from scratch, in the wrapper that the Trainer and the Hub's tools understand."""
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(
            f"--timm_architecture {architecture}: timm {timm.__version__} has no such model."
            + (f" Did you mean {' or '.join(close)}?" if close else "")
        )
    published = timm.get_pretrained_cfg(architecture, allow_unregistered=True).to_dict()  # type: ignore[union-attr] # of a known model
    # What describes the architecture's input; the rest (where weights come from) is not true of a model from scratch.
    kept = ("interpolation", "mean", "std", "crop_pct", "crop_mode", "fixed_input_size", "first_conv", "classifier")
    pretrained_cfg = {name: published[name] for name in kept if published.get(name) is not None}
    size = image_size or published["input_size"][-1]
    pretrained_cfg["input_size"] = [3, size, size]
    if whole_image:
        pretrained_cfg["crop_pct"] = 1.0
    resized = published.get("fixed_input_size") and size != published["input_size"][-1]
    config = TimmWrapperConfig(
        architecture=architecture,
        model_args={"img_size": size} if resized else {},
        pretrained_cfg=pretrained_cfg,
        **label_maps(label_names),
    )

    def model_init() -> PreTrainedModel:
        model = TimmWrapperForImageClassification(config)
        # The wrapper (transformers 5.23) redraws all weights from one normal distribution, which suits a new head but
        # not a network from scratch: take timm's own.
        model.timm_model = timm.create_model(
            architecture, pretrained=False, num_classes=len(label_names), **config.model_args
        )
        return model

    try:
        with torch.no_grad():
            model_init().eval()(torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever the architecture stumbles over
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"timm's {architecture} does not work with images of {size}×{size} pixels: {reason[0]}"
        ) from error
    return Recipe(model_init, TimmWrapperImageProcessor(pretrained_cfg, architecture=architecture))


def small_vit_recipe(label_names: list[str], image_size: int) -> Recipe:
    """A vision transformer of 0.3 million parameters, from scratch."""
    patch_size = max(4, image_size // 8)
    if image_size % patch_size:
        raise ValueError(f"--image_size must be a multiple of the patches' {patch_size} pixels, found {image_size}.")
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=192,
        **label_maps(label_names),
    )
    processor = ViTImageProcessor(size={"height": image_size, "width": image_size})
    return Recipe(lambda: ViTForImageClassification(config), processor)


def choose_recipe(arguments: ModelArguments, data: ImageData, hub: dict[str, Any] | None = None) -> Recipe:
    """The model that the arguments name, for the labels of the data."""
    # The side of images that are small, and whole as they are.
    small = 16 if data.name == DIGITS else SIDE if is_glyphs(data.name) else None
    if arguments.model_name_or_path:
        return pretrained_recipe(arguments.model_name_or_path, data.label_names, hub or {})
    if arguments.timm_architecture:
        size = arguments.image_size or (32 if small else None)
        return timm_recipe(arguments.timm_architecture, data.label_names, size, whole_image=small is not None)
    return small_vit_recipe(data.label_names, arguments.image_size or small or 64)


def results_table(metrics: dict[str, float]) -> str:
    """
    What `WashTrainer.evaluate` measured, as a table with a row for each member, their mean, the ensemble and the soup.

    Args:
        metrics (`dict[str, float]`):
            With the keys of `WashTrainer.evaluate`; those of members and ensemble may be missing.
    """
    rows = []
    member = 0
    while f"eval_member_{member}_loss" in metrics:
        rows.append((f"member {member}", f"eval_member_{member}_{{}}"))
        member += 1
    if member:
        rows += [("members' mean", "eval_members_{}_mean"), ("ensemble", "eval_ensemble_{}")]
    rows.append(("soup", "eval_{}"))
    lines = [f"{'':<14}{'accuracy':>10}{'loss':>10}{'ECE':>10}"]
    lines += [
        f"{title:<14}"
        f"{metrics[key.format('accuracy')]:>10.2%}{metrics[key.format('loss')]:>10.4f}{metrics[key.format('ece')]:>10.4f}"
        for title, key in rows
    ]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> tuple[DataArguments, ModelArguments, TrainVitConfig]:
    """The command line, as three groups of options."""
    parser = CommandLine([DataArguments, ModelArguments, TrainVitConfig], __doc__)
    return parser.parse_args_into_dataclasses(args=arguments)


def prepare(arguments: list[str] | None = None) -> tuple[WashTrainer, ImageData, Recipe]:
    """Everything before training: what is wrong with the input shows here."""
    data_arguments, model_arguments, config = parse(arguments)
    if config.process_index > 0:
        logging.set_verbosity_error()
        datasets.disable_progress_bars()
    hub = {"token": config.hub_token} if config.hub_token else {}
    # One process downloads and prepares what is not there yet, the others read it.
    with config.main_process_first(desc="loading the data"):
        data = load_data(data_arguments, config.hub_token)
    with config.main_process_first(desc="loading the model"):
        recipe = choose_recipe(model_arguments, data, hub)
    columns = (data.image_column, data.label_column)
    augmentation = data_arguments.augmentation or data.augmentation
    trainer = WashTrainer(
        model_init=recipe.model_init,
        args=config,
        train_dataset=TrainingView(recipe.processor, *columns, augmentation).of(data.train),
        eval_dataset=EvaluationView(recipe.processor, *columns).of(data.eval),
        compute_metrics=compute_classification_metrics,
        processing_class=recipe.processor,
    )
    trainer.replay_command = ["examples/train_vit.py", *(arguments if arguments is not None else sys.argv[1:])]
    return trainer, data, recipe


@interruptible
def main(run: Run) -> None:
    try:
        run.trainer, data, recipe = prepare()
        trainer = run.trainer
        config = trainer.args
        if done_instead(trainer):
            return
    except ValueError as error:
        refuse(error)

    outcome = trained(trainer)
    trainer.save_model()
    trainer.save_members()
    metrics = {**outcome.metrics, **trainer.evaluate()}
    trainer.save_metrics("all", metrics)
    trainer.save_state()
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
        print(f"\n{len(data.eval):,} held-out images of {data.name}, mixing: {config.mixing}\n")
        print(results_table(metrics))
        name_report(config.output_dir)
        print(
            f"\nThe soup is saved in {config.output_dir}. To use it:\n\n"
            "  from transformers import pipeline\n"
            f'  pipeline("image-classification", model="{config.output_dir}")("your_image.png")\n'
        )
    # A process group that is left to the interpreter's end may abort the process there (gloo in torch 2.15).
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
