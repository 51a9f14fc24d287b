"""What may differ between members: [`MemberOverrides`], and PAPA's grid of recipes."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch.utils.data import default_collate


@dataclass
class MemberOverrides:
    """
    What one member does differently from the [`WashConfig`] and the [`WashTrainer`]'s arguments. `None` keeps theirs.

    Args:
        train_dataset (`torch.utils.data.Dataset`, *optional*):
            This member's training set (another augmentation, say). It must give as many steps an epoch as the others.
        data_collator (`Callable`, *optional*):
            This member's collator. One that returns soft labels of shape `(batch, num_labels)`, as timm's Mixup and
            CutMix do, says so by an attribute `soft_labels = True`; the loss is then the soft cross-entropy.
        learning_rate (`float`, *optional*): This member's peak learning rate; the schedule's shape is shared.
        weight_decay (`float`, *optional*): This member's weight decay.
        label_smoothing_factor (`float`, *optional*):
            This member's label smoothing while training, in [0, 1). Evaluation uses the configuration's for all.

    Raises:
        ValueError: for what is no number, a rate or decay that is negative or infinite, or smoothing outside [0, 1).
    """

    train_dataset: Any | None = None
    data_collator: Callable | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    label_smoothing_factor: float | None = None

    def __post_init__(self):
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value < math.inf):
                raise ValueError(f"`{name}` of a member must be a number of at least 0, found {value!r}.")
        smoothing = self.label_smoothing_factor
        if smoothing is not None and not (_is_number(smoothing) and 0 <= smoothing < 1):
            raise ValueError(f"`label_smoothing_factor` of a member must be a number in [0, 1), found {smoothing!r}.")

    def describe(self) -> dict[str, Any]:
        """The overrides as plain values, for comparing processes, manifests and model cards."""
        return {
            "train_dataset": self.train_dataset is not None,
            "data_collator": _describe_collator(self.data_collator),
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "label_smoothing_factor": self.label_smoothing_factor,
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _describe_collator(collator: Callable | None) -> Any:
    if isinstance(collator, RecipeCollator):
        names = ("mixup", "cutmix", "random_erasing")
        return {name: getattr(collator, name) for name in names}
    return None if collator is None else getattr(collator, "__name__", type(collator).__name__)


# The heterogeneous setting of PAPA (https://hf.co/papers/2304.03094), which WASH follows.
PAPA_MIXUP = (0.0, 0.5, 1.0)
PAPA_LABEL_SMOOTHING = (0.0, 0.05, 0.10)
PAPA_CUTMIX = (0.0, 0.5, 1.0)
PAPA_RANDOM_ERASING = (0.0, 0.15, 0.35)


class RecipeCollator:
    """
    Collates a batch, erases random rectangles, and mixes images and labels with timm's Mixup and CutMix.

    Args:
        num_labels (`int`): Number of classes.
        mixup (`float`, *optional*, defaults to 0): Mixup's alpha; 0 turns it off.
        cutmix (`float`, *optional*, defaults to 0): CutMix's alpha; 0 turns it off.
        random_erasing (`float`, *optional*, defaults to 0): Probability that an image has a rectangle erased.
        collate (`Callable`, *optional*): Makes a batch with `pixel_values` and integer `labels` from examples.

    Returns:
        `dict`: The batch: `pixel_values` of shape `(batch, channels, height, width)` and `labels`, integers of shape
        `(batch,)` or, where labels are mixed, probabilities of shape `(batch, num_labels)`.
    """

    def __init__(
        self,
        num_labels: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        random_erasing: float = 0.0,
        collate: Callable = default_collate,
    ):
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        self.num_labels, self.mixup, self.cutmix, self.random_erasing = num_labels, mixup, cutmix, random_erasing
        # What a trainer asks a collator, since labels do not say by themselves what they mean.
        self.soft_labels = bool(mixup or cutmix)
        self._collate = collate
        # timm's default device is CUDA, and a collator works on the CPU.
        self._erase = RandomErasing(random_erasing, mode="pixel", device="cpu") if random_erasing else None
        self._mix = (
            Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=num_labels)
            if mixup or cutmix
            else None
        )

    def __call__(self, features: list) -> dict[str, torch.Tensor]:
        batch = dict(self._collate(features))
        images, labels = batch["pixel_values"], batch["labels"]
        if self._erase is not None:
            images = self._erase(images.clone())
        if self._mix is not None:
            # timm (1.0.31) pairs the images of a batch and refuses an odd one: the last image then stays as it is.
            even = len(images) - len(images) % 2
            soft = torch.nn.functional.one_hot(labels, self.num_labels).to(images.dtype)
            if even:
                mixed, mixed_labels = self._mix(images[:even].clone(), labels[:even])
                images = torch.cat([mixed, images[even:]])
                labels = torch.cat([mixed_labels.to(soft.dtype), soft[even:]])
            else:
                labels = soft
        return {**batch, "pixel_values": images, "labels": labels}


def papa_recipes(
    population_size: int, num_labels: int, seed: int = 0, collate: Callable = default_collate
) -> list[MemberOverrides]:
    """
    A recipe for each member, drawn from PAPA's grid: Mixup {0, 0.5, 1} × label smoothing {0, 0.05, 0.10} × CutMix
    {0, 0.5, 1} × random erasing {0, 0.15, 0.35}. A member keeps its recipe for the whole run.

    Args:
        population_size (`int`): Number of members N.
        num_labels (`int`): Number of classes.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same recipes on every process.
        collate (`Callable`, *optional*): Makes a batch with `pixel_values` and integer `labels` from examples.

    Returns:
        `list[MemberOverrides]`: For [`WashTrainer`]'s `members`.

    Raises:
        ValueError: for fewer than two classes, or no member.
    """
    if population_size < 1 or num_labels < 2:
        raise ValueError(
            f"Recipes need at least one member and two classes, found {population_size} and {num_labels}."
        )
    draw = random.Random(seed)
    recipes = []
    for _ in range(population_size):
        mixup, smoothing = draw.choice(PAPA_MIXUP), draw.choice(PAPA_LABEL_SMOOTHING)
        cutmix, erasing = draw.choice(PAPA_CUTMIX), draw.choice(PAPA_RANDOM_ERASING)
        collator = RecipeCollator(num_labels, mixup, cutmix, erasing, collate)
        recipes.append(MemberOverrides(data_collator=collator, label_smoothing_factor=smoothing))
    return recipes
