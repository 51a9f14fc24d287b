"""The data of a comparison: trained on, held out from training, and tested on, with what becomes of an image before."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_data import SPLIT_SEED, DataArguments, EvaluationView, ImageData, TrainingView, load_data
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, default_collate
from torchvision.transforms import v2 as transforms

from hf_wash.files import write_whole

from .setting import Setting


PADDING = 4
EVAL_BATCH_SIZE = 250


class Images(torch.utils.data.Dataset):
    """
    Small images, kept in memory.

    Args:
        pixels (`torch.Tensor` of shape `(num_images, 3, height, width)`): As bytes.
        labels (`torch.Tensor` of shape `(num_images,)`): Classes.
    """

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


class Collator:
    """
    Images in memory as the model's input; what is random comes from torch's global generator, a member's own.

    Args:
        mean, std (`torch.Tensor` of shape `(3,)`): Of the training images' colours, from 0 to 1.
        view (`str`): `crop`, `crop_flip` or `none`.
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, view: str = "none"):
        self.mean, self.std, self.view = mean[:, None, None], std[:, None, None], view

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([example["pixel_values"] for example in examples])
        labels = torch.stack([example["labels"] for example in examples])
        if self.view != "none":
            pixels = self._crop(pixels)
        if self.view == "crop_flip":
            mirrored = torch.rand(len(pixels)) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(-1)
        # Channels last: a fifth of a step's time on a CPU.
        pixels = ((pixels / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return {"pixel_values": pixels, "labels": labels}

    @staticmethod
    def _crop(pixels: torch.Tensor) -> torch.Tensor:
        count, _, height, width = pixels.shape
        padded = functional.pad(pixels, (PADDING,) * 4)
        rows = torch.randint(0, 2 * PADDING + 1, (count, 1)) + torch.arange(height)
        columns = torch.randint(0, 2 * PADDING + 1, (count, 1)) + torch.arange(width)
        which = torch.arange(count)[:, None, None]
        # Advanced indices on both sides of a slice: channels come last.
        return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@dataclass
class Data:
    """
    What a run learns from, what choices go by, and what it is tested on, which nothing is chosen on.

    Args:
        train, held_out, test (data sets): Of examples.
        label_names (`list[str]`): Of the classes.
        collate, collate_plain (`Callable`): Examples to a batch, as in training and as in evaluation.
    """

    train: Any
    held_out: Any
    test: Any
    label_names: list[str]
    collate: Callable
    collate_plain: Callable

    def batches(self, part: Any, batch_size: int = EVAL_BATCH_SIZE) -> Iterator[dict[str, torch.Tensor]]:
        """All of a part, in order, as in evaluation."""
        return iter(DataLoader(part, batch_size=batch_size, collate_fn=self.collate_plain))

    def training_batches(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Training data in random order, as in training, for BatchNorm statistics."""
        return iter(DataLoader(self.train, batch_size, shuffle=True, drop_last=True, collate_fn=self.collate))


def held_out_indices(count: int, part: float) -> tuple[list[int], list[int]]:
    """The indices that are trained on, and those held out: the same in every run of a comparison."""
    num_held_out = max(1, round(part * count))
    if num_held_out >= count:
        raise ValueError(f"There are only {count} images to train on: too few to hold out {part:g} of them.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    return sorted(order[num_held_out:]), sorted(order[:num_held_out])


def _loaded(setting: Setting) -> ImageData:
    arguments = DataArguments(
        data_dir=setting.data_dir,
        dataset_name=setting.dataset_name,
        dataset_config_name=setting.dataset_config_name,
        # CIFAR-100 and ImageNet have columns that could be mistaken: of coarse labels.
        label_column="fine_label" if setting.dataset_name and setting.dataset_name.endswith("cifar100") else None,
        max_train_samples=setting.max_train_samples,
        max_eval_samples=setting.max_eval_samples,
    )
    return load_data(arguments)


def _in_memory(data: ImageData, size: int) -> dict[str, Any]:
    tensors: dict[str, Any] = {"label_names": data.label_names}
    for name, part in (("train", data.train), ("test", data.eval)):
        images = (image.convert("RGB") for image in part[data.image_column])
        resized = (image if image.size == (size, size) else image.resize((size, size)) for image in images)
        pixels = np.stack([np.asarray(image) for image in resized])
        tensors[f"{name}_pixels"] = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        tensors[f"{name}_labels"] = torch.tensor(part[data.label_column][:])
    return tensors


def prepare(setting: Setting, folder: str | Path) -> Data:
    """
    The setting's data. Small images are decoded once and kept in a file of the folder for all runs of a comparison.

    Raises:
        ValueError: in one sentence, for data that cannot be loaded.
    """
    if setting.view == "resized_crop":
        return _opened_when_needed(setting)
    key = [setting.dataset_name, setting.data_dir, setting.dataset_config_name, setting.image_size]
    key += [setting.max_train_samples, setting.max_eval_samples]
    path = Path(folder) / f"data-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.pt"
    if path.exists():
        tensors = torch.load(path, weights_only=True)
    else:
        tensors = _in_memory(_loaded(setting), setting.image_size)
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        write_whole(path, buffer.getvalue())
    chosen, held_out = held_out_indices(len(tensors["train_labels"]), setting.hold_out)
    train = Images(tensors["train_pixels"][chosen], tensors["train_labels"][chosen])
    mean, std = (
        torch.stack([of(channel.float() / 255) for channel in train.pixels.unbind(1)])
        for of in (torch.mean, torch.std)
    )
    return Data(
        train=train,
        held_out=Images(tensors["train_pixels"][held_out], tensors["train_labels"][held_out]),
        test=Images(tensors["test_pixels"], tensors["test_labels"]),
        label_names=tensors["label_names"],
        collate=Collator(mean, std, setting.view),
        collate_plain=Collator(mean, std),
    )


def _opened_when_needed(setting: Setting) -> Data:
    from train_vit import timm_recipe

    data = _loaded(setting)
    processor = timm_recipe("resnet50", data.label_names, setting.image_size, whole_image=False).processor
    seen = EvaluationView(processor, data.image_column, data.label_column)
    trained_on = TrainingView(processor, data.image_column, data.label_column, "crop")
    # As is usual for ImageNet; the examples' own crop is a gentler one.
    size = (setting.image_size, setting.image_size)
    trained_on.change = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()])
    chosen, held_out = held_out_indices(len(data.train), setting.hold_out)
    return Data(
        train=Subset(trained_on.of(data.train), chosen),
        held_out=Subset(seen.of(data.train), held_out),
        test=seen.of(data.eval),
        label_names=data.label_names,
        collate=default_collate,
        collate_plain=default_collate,
    )
