#!/usr/bin/env python
"""
Train a population of image classifiers that shuffle a few of their weights as they learn, and save their average, the
soup: one model, to be used like any other.

    python examples/train_vit.py                                    # a small ViT on 1,797 handwritten digits, on a CPU
    python examples/train_vit.py --data_dir photos/                 # one folder of images for each class
    python examples/train_vit.py --dataset_name cifar10 --model_name_or_path google/vit-base-patch16-224-in21k
    python examples/train_vit.py --timm_architecture resnet18       # any timm model, from scratch
    torchrun --nproc-per-node 2 examples/train_vit.py               # two processes, a member or more in each

`--help` lists the flags; every field of `WashConfig` and of `TrainingArguments` is one.
"""

import argparse
import copy
import dataclasses
import difflib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import datasets
import numpy as np
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PilImage
from torchvision.transforms import v2 as transforms
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.utils import logging

from hf_wash import WashConfig, WashTrainer
from hf_wash.metrics import compute_classification_metrics


logger = logging.get_logger("train_vit")

DIGITS = "scikit-learn digits"

# One split for every run, whatever its seed, so that runs can be compared.
SPLIT_SEED = 0
HELD_OUT = 0.2


@dataclass
class DataArguments:
    """What to train on."""

    _argument_group_name = "data (default: the digits that scikit-learn ships)"

    data_dir: str | None = field(
        default=None,
        metadata={"help": "A folder with one folder of images for each class, or train/ and test/ with such folders."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "The split to evaluate on. By default validation or test, whichever is there and labelled first, "
            "else a fifth of the training split, the same in every run."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: the only column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Default: the only column of class labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many samples at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many samples at most."})
    augmentation: str | None = field(
        default=None,
        metadata={
            "help": "What training images undergo. crop: a random part, resized, and mirrored half of the time; shift: "
            "small shifts, turns and zooms; none. By default shift for the digits, crop for the rest.",
            "choices": ["crop", "shift", "none"],
        },
    )

    def __post_init__(self):
        if self.data_dir and self.dataset_name:
            raise ValueError("--data_dir and --dataset_name both name training data; give one of them.")
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError("--dataset_config_name goes with --dataset_name, which is missing.")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, found {value}.")


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
            "with timm), 64 for other data, and for other data with timm what the architecture was made for."
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
class TrainVitConfig(WashConfig):
    """[`WashConfig`] with defaults under which a small model learns a small data set within minutes."""

    _argument_group_name = "training, of each member (TrainingArguments)"

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
        if self.device.type == "cpu":
            # Pinning is for copies to an accelerator; without one torch warns at every loader.
            self.dataloader_pin_memory = False


@dataclass
class ImageData:
    """A labelled training set and a labelled evaluation set, and which of their columns are what."""

    name: str
    hub_id: str | None
    train: Dataset
    eval: Dataset
    image_column: str
    label_column: str

    @property
    def label_names(self) -> list[str]:
        """The classes' names, in the order of their numbers."""
        return self.train.features[self.label_column].names


def load_digits() -> Dataset:
    """The 1,797 handwritten digits of 8×8 pixels that scikit-learn ships: nothing is downloaded."""
    try:
        from sklearn.datasets import load_digits as load_arrays
    except ImportError as error:
        raise ValueError("The digits come with scikit-learn: pip install scikit-learn.") from error

    digits = load_arrays()
    # 17 levels of grey, 0 to 16.
    images = [PilImage.fromarray(np.round(image * 255 / 16).astype(np.uint8)) for image in digits.images]
    return Dataset.from_dict(
        {"image": images, "label": digits.target.tolist()},
        features=Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])}),
    )


def load_splits(arguments: DataArguments, token: str | None = None) -> DatasetDict:
    """All splits of the data set that the arguments name."""
    if not arguments.data_dir and not arguments.dataset_name:
        return DatasetDict({"train": load_digits()})
    if arguments.data_dir and not os.path.isdir(arguments.data_dir):
        raise ValueError(f"--data_dir must be a folder, and {arguments.data_dir!r} is none.")
    try:
        if arguments.data_dir:
            loaded = datasets.load_dataset("imagefolder", data_dir=arguments.data_dir)
        else:
            loaded = datasets.load_dataset(arguments.dataset_name, arguments.dataset_config_name, token=token)
    except Exception as error:  # whatever it is (no network, no such data set, no image in the folder): say which data
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"Could not load {arguments.data_dir or arguments.dataset_name!r}: {type(error).__name__}: {reason[0]}"
        ) from error
    return loaded


def find_column(dataset: Dataset, feature_type: type, flag: str, named: str | None) -> str:
    """The column that the user named, else the only one of a type of feature."""
    described = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in dataset.features.items())
    if named is not None:
        if named not in dataset.features:
            raise ValueError(f"--{flag} {named}: there is no such column. There are: {described}.")
        return named
    found = [name for name, feature in dataset.features.items() if isinstance(feature, feature_type)]
    if len(found) != 1:
        many = f"{len(found)} columns ({', '.join(found)}) have" if found else "No column has"
        raise ValueError(
            f"{many} the type {feature_type.__name__}; name the one to use with --{flag}. There are: {described}."
        )
    return found[0]


def unlabelled(dataset: Dataset, column: str) -> int:
    """Number of samples whose label is missing: -1 on the Hub, by convention, or null."""
    labels = dataset.select_columns([column])[:][column]
    return sum(label is None or label == -1 for label in labels)


def as_class_label(dataset: Dataset, column: str, like: ClassLabel | None = None) -> Dataset:
    """The data set with its labels (numbers or strings, say) as class labels, numbered as in `like` where given."""
    if isinstance(dataset.features[column], ClassLabel):
        return dataset
    if like is None:
        return dataset.class_encode_column(column)
    return dataset.cast_column(column, datasets.Value("string")).cast_column(column, like)


def hold_out(dataset: Dataset, label_column: str) -> tuple[Dataset, Dataset]:
    """Split off a part to evaluate on, with all classes in proportion where there are samples enough."""
    if len(dataset) < 2:
        raise ValueError("There is no evaluation split, and the training split is too small to hold out a part of it.")
    counts = Counter(dataset.select_columns([label_column])[:][label_column])
    num_held_out = math.ceil(HELD_OUT * len(dataset))
    enough = min(counts.values()) >= 2 and min(num_held_out, len(dataset) - num_held_out) >= len(counts)
    parts = dataset.train_test_split(
        test_size=num_held_out, seed=SPLIT_SEED, stratify_by_column=label_column if enough else None
    )
    return parts["train"], parts["test"]


def at_most(dataset: Dataset, num_samples: int | None) -> Dataset:
    """A fixed random choice of `num_samples`: the first ones of a data set are often all of one class."""
    if num_samples is None or num_samples >= len(dataset):
        return dataset
    return dataset.shuffle(seed=SPLIT_SEED).select(range(num_samples))


def load_data(arguments: DataArguments, token: str | None = None) -> ImageData:
    """
    Load what the arguments name, find its columns and splits, and check that there is something to learn.

    Args:
        arguments ([`DataArguments`]):
            What the user asked for.
        token (`str`, *optional*):
            For private data sets on the Hub.

    Raises:
        ValueError: in one sentence, for data that cannot be loaded, is empty, or lacks images or labels.
    """
    splits = load_splits(arguments, token)
    there = ", ".join(splits)
    if arguments.train_split not in splits:
        raise ValueError(f"--train_split {arguments.train_split}: there is no such split. There are: {there}.")
    train = splits[arguments.train_split]
    if len(train) == 0:
        raise ValueError(f"The split {arguments.train_split!r} is empty.")
    image_column = find_column(train, Image, "image_column", arguments.image_column)
    if not isinstance(train.features[image_column], Image):
        raise ValueError(
            f"--image_column {image_column}: expected images, found {type(train.features[image_column]).__name__}."
        )
    label_column = find_column(train, ClassLabel, "label_column", arguments.label_column)
    if not isinstance(train.features[label_column], ClassLabel | datasets.Value):
        raise ValueError(
            f"--label_column {label_column}: expected one label for each image, found "
            f"{type(train.features[label_column]).__name__}."
        )

    eval_split = arguments.eval_split
    if eval_split is None:
        candidates = [name for name in ("validation", "test") if name in splits and name != arguments.train_split]
        usable = (
            name
            for name in candidates
            if label_column in splits[name].features
            and len(splits[name]) > 0
            and not unlabelled(splits[name], label_column)
        )
        eval_split = next(usable, None)
    elif eval_split not in splits:
        raise ValueError(f"--eval_split {eval_split}: there is no such split. There are: {there}.")
    elif len(splits[eval_split]) == 0:
        raise ValueError(f"The split {eval_split!r} is empty.")
    elif label_column not in splits[eval_split].features:
        raise ValueError(f"The split {eval_split!r} has no column {label_column!r}.")

    for name in {arguments.train_split, eval_split} - {None}:
        missing = unlabelled(splits[name], label_column)
        if missing:
            raise ValueError(
                f"{missing} of the {len(splits[name])} samples of the split {name!r} have no label "
                f"({label_column!r} is -1 or null)."
            )

    train = as_class_label(train, label_column)
    if eval_split is None:
        train, evaluation = hold_out(train, label_column)
    else:
        like = train.features[label_column]
        try:
            evaluation = as_class_label(splits[eval_split], label_column, like=like)
        except ValueError as error:
            raise ValueError(f"The split {eval_split!r} has labels that the training split lacks: {error}") from error
        if evaluation.features[label_column].names != like.names:
            raise ValueError(
                f"The splits {arguments.train_split!r} and {eval_split!r} name their classes differently."
            )
    if train.features[label_column].num_classes < 2:
        raise ValueError(f"There is only one class, {train.features[label_column].names}: nothing to tell apart.")
    if arguments.data_dir:
        name = os.path.basename(os.path.abspath(arguments.data_dir))
    else:
        name = arguments.dataset_name or DIGITS
    return ImageData(
        name=name,
        hub_id=arguments.dataset_name
        if arguments.dataset_name and not os.path.exists(arguments.dataset_name)
        else None,
        train=at_most(train, arguments.max_train_samples),
        eval=at_most(evaluation, arguments.max_eval_samples),
        image_column=image_column,
        label_column=label_column,
    )


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
    digits = data.name == DIGITS
    if arguments.model_name_or_path:
        return pretrained_recipe(arguments.model_name_or_path, data.label_names, hub or {})
    if arguments.timm_architecture:
        size = arguments.image_size or (32 if digits else None)
        return timm_recipe(arguments.timm_architecture, data.label_names, size, whole_image=digits)
    return small_vit_recipe(data.label_names, arguments.image_size or (16 if digits else 64))


class EvaluationView:
    """Images as the processor makes them, for `datasets.Dataset.with_transform`."""

    def __init__(self, processor: Any, image_column: str, label_column: str):
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column

    def pixels(self, images: list[PilImage.Image]) -> torch.Tensor:
        """The model's input for these images, of shape `(num_images, 3, height, width)`."""
        # RGB because that is what transformers' pipelines make of every image.
        return self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    def __call__(self, examples: dict[str, list]) -> dict[str, Any]:
        return {"pixel_values": self.pixels(examples[self.image_column]), "labels": examples[self.label_column]}


class TrainingView(EvaluationView):
    """
    Images randomly changed, and otherwise as the processor makes them.

    What size that is, and what becomes of a colour, is read off four plain images: so it is right for any processor
    (rescaled, normalized, channels exchanged), without knowing its options. The draws come from torch's global
    generator, so each member has its own.

    Args:
        processor:
            The image processor of the model.
        image_column, label_column (`str`):
            The names of the columns.
        augmentation (`str`):
            `"crop"`, `"shift"` or `"none"`.
    """

    def __init__(self, processor: Any, image_column: str, label_column: str, augmentation: str):
        super().__init__(processor, image_column, label_column)
        plain = [PilImage.new("RGB", (64, 64), colour) for colour in ("black", (255, 0, 0), (0, 255, 0), (0, 0, 255))]
        seen = super().pixels(plain)
        size = list(seen.shape[-2:])
        black, *primaries = seen[:, :, size[0] // 2, size[1] // 2]
        self.offset = black[:, None, None]
        self.colours = torch.stack(primaries, dim=1) - black[:, None]
        change = {
            "crop": [transforms.RandomResizedCrop(size, scale=(0.35, 1.0)), transforms.RandomHorizontalFlip()],
            "shift": [
                transforms.Resize(size),
                transforms.RandomAffine(
                    degrees=10,
                    translate=(0.1, 0.1),
                    scale=(0.9, 1.1),
                    interpolation=transforms.InterpolationMode.BILINEAR,
                ),
            ],
            "none": [transforms.Resize(size)],
        }[augmentation]
        self.change = transforms.Compose(change)

    def pixels(self, images: list[PilImage.Image]) -> torch.Tensor:
        changed = np.stack([np.asarray(self.change(image.convert("RGB"))) for image in images])
        return torch.einsum("oc,nhwc->nohw", self.colours, torch.from_numpy(changed) / 255) + self.offset


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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One line for each option: not its spelling with hyphens too, and no default where that is None."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.option_strings and action.dest != "help":
            action = copy.copy(action)
            action.option_strings = action.option_strings[:1]
        return super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser() -> HfArgumentParser:
    """All options; those of the population apart from the hundred and more that every Trainer has."""
    parser = HfArgumentParser(
        [DataArguments, ModelArguments, TrainVitConfig],
        description=__doc__.split("\n\n")[0].strip(),
        usage="%(prog)s [--flag value ...]",
        formatter_class=HelpFormatter,
    )
    inherited = {option.name for option in dataclasses.fields(TrainingArguments)}
    training = parser._action_groups[-1]
    population = parser.add_argument_group("population (what WashConfig adds to TrainingArguments)")
    population._group_actions = [action for action in training._group_actions if action.dest not in inherited]
    training._group_actions = [action for action in training._group_actions if action.dest in inherited]
    parser._action_groups[-2:] = [population, training]
    return parser


def parse(arguments: list[str] | None = None) -> tuple[DataArguments, ModelArguments, TrainVitConfig]:
    """The command line, as three groups of options."""
    return make_parser().parse_args_into_dataclasses(args=arguments)


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
    augmentation = data_arguments.augmentation or ("shift" if data.name == DIGITS else "crop")
    trainer = WashTrainer(
        model_init=recipe.model_init,
        args=config,
        train_dataset=data.train.with_transform(TrainingView(recipe.processor, *columns, augmentation)),
        eval_dataset=data.eval.with_transform(EvaluationView(recipe.processor, *columns)),
        compute_metrics=compute_classification_metrics,
        processing_class=recipe.processor,
    )
    return trainer, data, recipe


def refuse(error: Exception) -> NoReturn:
    """End with one line on stderr and exit code 1."""
    rank = os.environ.get("RANK", "0")
    sys.exit(f"train_vit.py: error{'' if rank == '0' else f' (process {rank})'}: {error}")


def main() -> None:
    try:
        trainer, data, recipe = prepare()
    except ValueError as error:
        refuse(error)
    config = trainer.args

    try:
        trained = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except ValueError as error:
        if trainer.state.global_step > 0:
            raise
        # Before the first step it is still the input that is wrong: no such checkpoint, say.
        refuse(error)
    trainer.save_model()
    trainer.save_members()
    metrics = {**trained.metrics, **trainer.evaluate()}
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
        print(
            f"\nThe soup is saved in {config.output_dir}. To use it:\n\n"
            "  from transformers import pipeline\n"
            f'  pipeline("image-classification", model="{config.output_dir}")("your_image.png")\n'
        )
    # A process group that is left to the interpreter's end may abort the process there (gloo in torch 2.15).
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
