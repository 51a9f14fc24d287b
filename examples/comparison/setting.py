"""What all methods of a comparison share: data, model, recipe and length of the run. The presets were fixed beforehand."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from glyph_data import PRESETS as GLYPHS


MODELS = ("small", "resnet18", "vgg16", "resnet50")
VIEWS = ("crop", "crop_flip", "resized_crop", "none")
RECIPES = ("homogeneous", "heterogeneous")


@dataclass(frozen=True)
class Setting:
    """
    Data, model and recipe, the same for every method and seed.

    Args:
        name (`str`):
            Of the preset.
        dataset_name, data_dir (`str`, *optional*):
            As in the other examples: a data set on the Hub (or `glyphs-short`, `glyphs-long`), or a folder.
        model (`str`):
            `small` (the ResNet of the glyphs), `resnet18` and `vgg16` (as for CIFAR), `resnet50` (as for ImageNet).
        width (`int`):
            Channels of the first stage of `resnet18`; 64 is the usual one.
        epochs, steps (`int`, *optional*):
            Length of one member's run: one of the two.
        view (`str`):
            `crop`: 4 pixels of padding, then a random crop; `crop_flip`: mirrored half of the time, too;
            `resized_crop`: a random part at the model's size, mirrored half of the time; `none`.
        hold_out (`float`):
            Part of the training data that is not trained on: greedy soups and choices go by it.
        recipes (`str`):
            `homogeneous`, or `heterogeneous`: a recipe for each member, drawn from PAPA's grid.
        population_size (`int`):
            N.
        checkpoints (`int`):
            How often a run is saved before its end.
        batch_norm_batches (`int`):
            Training batches with which the BatchNorm of a soup is estimated anew.
        evaluate_on (`str`):
            `test`, or `held_out`: the tuning script never looks at the test set.
        wash_probability (`float`):
            The p that the paper has for such data.
        max_train_samples, max_eval_samples (`int`, *optional*):
            Fewer images.
    """

    name: str
    dataset_name: str | None = None
    data_dir: str | None = None
    dataset_config_name: str | None = None
    model: str = "resnet18"
    width: int = 64
    image_size: int = 32
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 64
    learning_rate: float = 0.1
    min_learning_rate: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    view: str = "crop_flip"
    hold_out: float = 0.02
    recipes: str = "homogeneous"
    population_size: int = 3
    checkpoints: int = 3
    batch_norm_batches: int = 40
    evaluate_on: str = "test"
    wash_probability: float = 0.001
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    def __post_init__(self):
        def require(fine: bool, name: str, must: str) -> None:
            if not fine:
                raise ValueError(f"--{name} must be {must}, found {getattr(self, name)!r}.")

        require(self.model in MODELS, "model", f"one of {', '.join(MODELS)}")
        require(self.view in VIEWS, "view", f"one of {', '.join(VIEWS)}")
        require(self.recipes in RECIPES, "recipes", f"one of {', '.join(RECIPES)}")
        require(0 < self.hold_out < 1, "hold_out", "a part of the training data between 0 and 1")
        for name in ("width", "batch_size", "population_size"):
            require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("steps", "epochs", "max_train_samples", "max_eval_samples"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("A setting has epochs or steps, one of the two.")

    def length(self, steps_per_epoch: int) -> int:
        """Optimizer steps of one member."""
        return self.steps if self.steps is not None else int(self.epochs or 0) * steps_per_epoch

    def but(self, **changes: Any) -> "Setting":
        """The same with other values where they are not `None`."""
        changes = {name: value for name, value in changes.items() if value is not None}
        if "steps" in changes:
            changes["epochs"] = None
        if "data_dir" in changes:
            changes["dataset_name"] = None
        return dataclasses.replace(self, **changes)


CIFAR: dict[str, Any] = {"epochs": 300, "checkpoints": 30}

PRESETS = {
    "cifar10": Setting("cifar10", dataset_name="cifar10", **CIFAR),
    "cifar10-vgg16": Setting("cifar10-vgg16", dataset_name="cifar10", model="vgg16", **CIFAR),
    "cifar100": Setting("cifar100", dataset_name="cifar100", **CIFAR),
    "cifar100-vgg16": Setting("cifar100-vgg16", dataset_name="cifar100", model="vgg16", **CIFAR),
    "imagenet": Setting(
        "imagenet",
        dataset_name="ILSVRC/imagenet-1k",
        model="resnet50",
        image_size=224,
        view="resized_crop",
        epochs=90,
        batch_size=256,
        checkpoints=90,
        wash_probability=0.05,
    ),
    **{
        name: Setting(
            name,
            dataset_name=name,
            model="small",
            min_learning_rate=0.0,
            view="crop",
            **{
                option: getattr(preset.recipe, option)
                for option in (
                    "steps",
                    "batch_size",
                    "learning_rate",
                    "momentum",
                    "nesterov",
                    "weight_decay",
                    "warmup_steps",
                )
            },
        )
        for name, preset in GLYPHS.items()
    },
}
