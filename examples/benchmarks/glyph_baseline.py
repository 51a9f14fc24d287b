"""
What a single model reaches on the glyphs, with a preset's own recipe: what the presets were chosen by.

    OMP_NUM_THREADS=1 python examples/benchmarks/glyph_baseline.py --preset glyphs-short --seeds 0 1 2
    OMP_NUM_THREADS=1 python examples/benchmarks/glyph_baseline.py --preset glyphs-long --seeds 0 1 2

The images are the preset's, the same for every seed; a seed draws weights, batches and crops. Accuracy on the training
set is of images as they are, not cropped.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import get_cosine_schedule_with_warmup


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glyph_data import PRESETS, GlyphRecipe, load_glyphs


EVAL_BATCH_SIZE = 250


def tensors_of(part) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of a split, `(num_images, 3, height, width)` as bytes, and their labels."""
    images = np.stack([np.asarray(image) for image in part["image"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(part["label"][:])


class Normalized:
    """Bytes as the model sees them, with the mean and deviation of each colour in the training images."""

    def __init__(self, images: torch.Tensor):
        self.mean = images.float().mean(dim=(0, 2, 3), keepdim=True)
        self.std = images.float().std(dim=(0, 2, 3), keepdim=True)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


def train(recipe: GlyphRecipe, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, normalized) -> None:
    """Train a model by the recipe; batches that would be short are left out."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    model.train()
    batches: list[torch.Tensor] = []
    for _ in range(recipe.steps):
        if not batches:
            shuffled = torch.randperm(len(labels)).split(recipe.batch_size)
            batches = [batch for batch in shuffled if len(batch) == recipe.batch_size]
        batch = batches.pop()
        model(normalized(recipe.crop(images[batch])), labels=labels[batch]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, normalized) -> float:
    """In percent, of images as they are."""
    model.eval()
    guesses = [model(normalized(batch)).logits.argmax(-1) for batch in images.split(EVAL_BATCH_SIZE)]
    return 100 * (torch.cat(guesses) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--preset", choices=list(PRESETS), default="glyphs-short")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()

    preset = PRESETS[options.preset]
    glyphs = load_glyphs(options.preset)
    (images, labels), test = tensors_of(glyphs["train"]), tensors_of(glyphs["test"])
    normalized = Normalized(images)
    found: dict[str, list[float]] = {"train": [], "test": []}
    for seed in options.seeds:
        torch.manual_seed(seed)
        model = preset.recipe.build_model(preset.options.class_names)
        began = time.process_time()
        train(preset.recipe, model, images, labels, normalized)
        seconds = time.process_time() - began
        found["train"].append(accuracy(model, images, labels, normalized))
        found["test"].append(accuracy(model, *test, normalized))
        print(
            f"{options.preset}, seed {seed}: {found['train'][-1]:.2f} % of the training set, {found['test'][-1]:.2f} % "
            f"of the test set; trained in {seconds:.0f} s of one core",
            flush=True,
        )
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        print(f"{name}: {statistics.mean(values):.2f} ± {spread:.2f} %")


if __name__ == "__main__":
    main()
