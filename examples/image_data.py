"""
What the image examples share: which data to train on, whether all of it can be read, and what becomes of an image
before a model sees it. Which model that is, each script says itself.
"""

import io
import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from glyph_data import is_glyphs, load_glyphs, parse_glyphs
from PIL import Image as PilImage
from torchvision.transforms import v2 as transforms
from transformers.utils import logging


logger = logging.get_logger("image_data")


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
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set on the Hub; or glyphs-short, glyphs-long or glyphs, which are drawn from fonts, not "
            "downloaded."
        },
    )
    dataset_config_name: str | None = field(
        default=None,
        metadata={
            "help": "Its configuration, if it has several; of glyphs, what differs, as in train_size=1000,seed=3."
        },
    )
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
    skip_bad_images: bool = field(
        default=False,
        metadata={
            "help": "Leave out images that cannot be opened, and those without a label, with a warning that counts them. "
            "By default a folder with such images is refused. Every image of a folder is opened once before training, "
            "with a progress bar, and not again as long as the folder stays as it is; a data set of the Hub only with "
            "this flag."
        },
    )
    augmentation: str | None = field(
        default=None,
        metadata={
            "help": "What training images undergo. crop: a random part, resized, and mirrored half of the time; shift: "
            "small shifts, turns and zooms; pad: padded by an eighth, and a random part of the size cut out; none. By "
            "default shift for the digits, pad for glyphs, crop for the rest.",
            "choices": ["crop", "shift", "pad", "none"],
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

    @property
    def augmentation(self) -> str:
        """What training images undergo unless `--augmentation` says otherwise; characters are not mirrored."""
        if self.name.startswith(DIGITS):
            return "shift"
        return "pad" if is_glyphs(self.name) else "crop"


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
    if arguments.dataset_name and is_glyphs(arguments.dataset_name):
        return load_glyphs(*parse_glyphs(arguments.dataset_name, arguments.dataset_config_name))
    try:
        if arguments.data_dir:
            loaded = datasets.load_dataset("imagefolder", data_dir=arguments.data_dir)
        else:
            loaded = datasets.load_dataset(arguments.dataset_name, arguments.dataset_config_name, token=token)
    except Exception as error:  # whatever it is (no network, no such data set, no image in the folder): say which data
        raise ValueError(
            f"Could not load {arguments.data_dir or arguments.dataset_name!r}: {type(error).__name__}: "
            f"{first_line(error)}"
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


def undecoded(dataset: Dataset, image_column: str) -> Dataset:
    """The data set with its images as they are stored, `bytes` or a `path`."""
    return dataset.cast_column(image_column, Image(decode=False))


def name_of(dataset: Dataset, image_column: str, index: int) -> str:
    """What a person calls a sample: its file's name, else its place."""
    value = undecoded(dataset, image_column)[index][image_column]
    return (value or {}).get("path") or f"sample {index}"


def unlabelled(dataset: Dataset, column: str) -> list[int]:
    """The samples whose label is missing: -1 on the Hub, by convention, or null, not a number, an empty word."""
    labels = dataset.select_columns([column])[:][column]
    return [
        index
        for index, label in enumerate(labels)
        if label is None or label == -1 or label != label or (isinstance(label, str) and not label.strip())
    ]


def refuse_a_single_class(arguments: DataArguments, splits: DatasetDict, train: Dataset, image_column: str) -> None:
    """
    Say what is wrong with an image folder whose folders make no classes.

    Raises:
        ValueError: for images of one class, in no class's folder, or in folders at different depths.
    """
    has_classes = any(isinstance(feature, ClassLabel) for feature in train.features.values())
    if not has_classes and len(train.features) > 1:
        return  # a table beside the images says more of them
    paths = (value["path"] for value in undecoded(train, image_column)[:][image_column])
    folders = {os.path.dirname(path) for path in paths if path}
    root, wanted = str(arguments.data_dir), "It should have one folder of images for each class."
    if len(folders) == 1:
        folder = folders.pop()
        if os.path.samefile(folder, root) or os.path.basename(folder) in splits:
            where = "" if os.path.samefile(folder, root) else f", but in {folder!r} itself"
            raise ValueError(f"The images of {root!r} lie in no class's folder{where}. {wanted}")
        raise ValueError(
            f"{root!r} has images of a single class to train on, {os.path.basename(folder)!r}: nothing to tell apart. "
            f"{wanted}"
        )
    if not has_classes:
        raise ValueError(
            f"The images of {root!r} lie in folders at different depths, so which of these are classes cannot be told. "
            f"{wanted}"
        )


def as_class_label(dataset: Dataset, column: str, like: ClassLabel | None = None) -> Dataset:
    """The data set with its labels (numbers or strings, say) as class labels, numbered as in `like` where given."""
    if isinstance(dataset.features[column], ClassLabel):
        return dataset
    if like is None:
        return dataset.class_encode_column(column)
    return dataset.cast_column(column, Value("string")).cast_column(column, like)


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


# ---- Images that cannot be opened --------------------------------------------------------------------------------


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


def problem_of(value: dict[str, Any] | None) -> str | None:
    """
    Why an image cannot be opened; `None` if it can.

    All of it is read, since a file that breaks off shows nothing of that at its beginning; a JPEG at an eighth of its
    size, which needs every byte of it, too, and less time.

    Args:
        value (`dict`, *optional*): The image as a data set stores it: `bytes` or a `path`.
    """
    if value is None or (value.get("bytes") is None and not value.get("path")):
        return "there is none"
    try:
        if value.get("bytes") is None and not os.path.exists(value["path"]) and "://" not in value["path"]:
            return "there is no such file"
        if value.get("bytes") is None and "://" in value["path"]:
            Image().decode_example(value)
            return None
        stored = value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"])
        with PilImage.open(stored) as image:
            image.draft(None, (1, 1))
            image.load()
            image.getexif()
    except Exception as error:  # decoders raise what they like
        return first_line(error)
    return None


def problems_of(values: list[dict[str, Any] | None]) -> dict[str, list[str | None]]:
    """[`problem_of`] many images, for `datasets.Dataset.map`. Decoding does not hold Python's lock."""
    with ThreadPoolExecutor() as threads:
        return {"problem": list(threads.map(problem_of, values))}


def unreadable(dataset: Dataset, image_column: str) -> dict[int, str]:
    """The samples whose images cannot be opened, each with the reason."""
    images = undecoded(dataset, image_column)
    # Through `map`, which shows how far it is, and remembers what it found for other processes and the next start.
    checked = images.map(
        problems_of,
        batched=True,
        batch_size=256,
        input_columns=[image_column],
        remove_columns=images.column_names,
        features=Features({"problem": Value("string")}),
        desc="Checking the images",
    )
    found = (index for index, problem in enumerate(checked["problem"][:]) if problem is not None)
    # Asked once more: a mount or a permission may have been mended, which the files' times do not show.
    problems = ((index, problem_of(images[index][image_column])) for index in found)
    return {index: problem for index, problem in problems if problem is not None}


def broken_links(folder: str) -> Iterator[str]:
    """Images of a folder that are links to nothing, which `datasets` passes over without a word."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if Path(name).suffix.lower() in ImageFolder.EXTENSIONS and not os.path.exists(path):
                yield path


def refuse_or_warn(count: int, total: int, what: str, first: str, skip: bool) -> None:
    """
    Count what is bad in the data and name the first.

    Raises:
        ValueError: unless `skip` says that it is to be left out, which is then warned of.
    """
    text = f"{count:,} of the {total:,} {what}; the first is {first}."
    if not skip:
        raise ValueError(f"{text} Mend or remove them, or leave them out with --skip_bad_images.")
    logger.warning(f"{text} They are left out.")


def without(dataset: Dataset, left_out: list[int] | dict[int, str]) -> Dataset:
    """The data set without some of its samples."""
    gone = set(left_out)
    if len(gone) == len(dataset):
        raise ValueError("Nothing is left to train on, or to evaluate on, without the samples that are bad.")
    return dataset.select([index for index in range(len(dataset)) if index not in gone]) if gone else dataset


def readable(parts: list[Dataset], image_column: str, arguments: DataArguments) -> list[Dataset]:
    """
    The parts of the data without the images that cannot be opened.

    Raises:
        ValueError: for such images without `--skip_bad_images`, or if no others are left.
    """
    found = [unreadable(part, image_column) for part in parts]
    missing = list(broken_links(arguments.data_dir)) if arguments.data_dir else []
    named = [
        f"{name_of(part, image_column, index)} ({reason})"
        for part, bad in zip(parts, found, strict=True)
        for index, reason in list(bad.items())[:1]
    ]
    named += [f"{path} (a link to nothing)" for path in missing[:1]]
    count = sum(map(len, found)) + len(missing)
    if count:
        total = sum(map(len, parts)) + len(missing)
        refuse_or_warn(count, total, "images cannot be opened", named[0], arguments.skip_bad_images)
    return [without(part, bad) for part, bad in zip(parts, found, strict=True)]


def load_data(arguments: DataArguments, token: str | None = None) -> ImageData:
    """
    Load what the arguments name, find its columns and splits, and check that there is something to learn.

    Args:
        arguments ([`DataArguments`]):
            What the user asked for.
        token (`str`, *optional*):
            For private data sets on the Hub.

    Raises:
        ValueError: in one sentence, for data that cannot be loaded, is empty, or lacks images or labels, and for images
            that cannot be opened, which are counted.
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
    if arguments.data_dir and not arguments.label_column:
        refuse_a_single_class(arguments, splits, train, image_column)
    label_column = find_column(train, ClassLabel, "label_column", arguments.label_column)
    if not isinstance(train.features[label_column], ClassLabel | Value):
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
            and len(unlabelled(splits[name], label_column)) < len(splits[name])
        )
        eval_split = next(usable, None)
    elif eval_split not in splits:
        raise ValueError(f"--eval_split {eval_split}: there is no such split. There are: {there}.")
    elif len(splits[eval_split]) == 0:
        raise ValueError(f"The split {eval_split!r} is empty.")
    elif label_column not in splits[eval_split].features:
        raise ValueError(f"The split {eval_split!r} has no column {label_column!r}.")

    for name in dict.fromkeys((arguments.train_split, eval_split)):
        missing = unlabelled(splits[name], label_column) if name is not None else []
        if missing:
            what = f"samples of the split {name!r} have no label ({label_column!r} is -1, null or empty)"
            first = name_of(splits[name], image_column, missing[0])
            refuse_or_warn(len(missing), len(splits[name]), what, first, arguments.skip_bad_images)
            splits[name] = without(splits[name], missing)

    train = splits[arguments.train_split]
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
    classes = {train.features[label_column].int2str(label) for label in set(train[label_column][:])}
    if len(classes) < 2:
        raise ValueError(f"There is only one class to train on, {classes.pop()!r}: nothing to tell apart.")
    train, evaluation = at_most(train, arguments.max_train_samples), at_most(evaluation, arguments.max_eval_samples)
    if arguments.data_dir or arguments.skip_bad_images:
        train, evaluation = readable([train, evaluation], image_column, arguments)
    if arguments.data_dir:
        name = os.path.basename(os.path.abspath(arguments.data_dir))
    else:
        name = arguments.dataset_name or DIGITS
    return ImageData(
        name=name,
        hub_id=None
        if not arguments.dataset_name or os.path.exists(arguments.dataset_name) or is_glyphs(arguments.dataset_name)
        else arguments.dataset_name,
        train=train,
        eval=evaluation,
        image_column=image_column,
        label_column=label_column,
    )


class EvaluationView:
    """Images as the processor makes them, for `datasets.Dataset.with_transform`."""

    def __init__(self, processor: Any, image_column: str, label_column: str):
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column
        self.stored = Image()

    def of(self, dataset: Dataset) -> Dataset:
        """The data set as it is seen through this view, which opens the images itself: its errors name the file."""
        self.stored = dataset.features[self.image_column]
        return undecoded(dataset, self.image_column).with_transform(self)

    def open(self, image: Any) -> PilImage.Image:
        """An image that is open already, or as a data set stores it."""
        if isinstance(image, PilImage.Image):
            return image
        try:
            return Image(mode=self.stored.mode).decode_example(image)
        except Exception as error:  # decoders raise what they like
            place = (image or {}).get("path") or "without a file name"
            raise ValueError(f"The image {place} cannot be opened: {first_line(error)}") from error

    def pixels(self, images: list[PilImage.Image]) -> torch.Tensor:
        """The model's input for these images, of shape `(num_images, 3, height, width)`."""
        # RGB because that is what transformers' pipelines make of every image.
        return self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    def __call__(self, examples: dict[str, list]) -> dict[str, Any]:
        return {
            "pixel_values": self.pixels([self.open(image) for image in examples[self.image_column]]),
            "labels": examples[self.label_column],
        }


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
            `"crop"`, `"shift"`, `"pad"` or `"none"`.
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
            "pad": [transforms.Resize(size), transforms.RandomCrop(size, padding=[size[1] // 8, size[0] // 8])],
            "none": [transforms.Resize(size)],
        }[augmentation]
        self.change = transforms.Compose(change)

    def pixels(self, images: list[PilImage.Image]) -> torch.Tensor:
        changed = np.stack([np.asarray(self.change(image.convert("RGB"))) for image in images])
        return torch.einsum("oc,nhwc->nohw", self.colours, torch.from_numpy(changed) / 255) + self.offset
