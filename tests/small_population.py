"""A population small enough to train in a second, with everything that makes runs differ: augmentation and dropout."""

import hashlib
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_wash import WashConfig, WashTrainer


_DIGITS = load_digits()
IMAGES = torch.tensor(_DIGITS.images, dtype=torch.float32)[:, None] / 16
LABELS = torch.tensor(_DIGITS.target)

TIMES = ("runtime", "per_second", "total_flos", "preparation_time")


class Digits(torch.utils.data.Dataset):
    """Digits `start` to `stop`, with noise drawn from torch's global generator when `noisy`."""

    def __init__(self, start, stop, noisy=False):
        self.start, self.stop, self.noisy = start, stop, noisy

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, index):
        image = IMAGES[self.start + index]
        if self.noisy:
            image = image + 0.1 * torch.randn_like(image)
        return {"pixel_values": image, "labels": LABELS[self.start + index]}


class DigitStream(torch.utils.data.IterableDataset):
    """The same without a length; each epoch ends after `count` examples."""

    def __init__(self, count, noisy=True):
        self.digits, self.noisy = Digits(0, count, noisy), noisy

    def __iter__(self):
        return (self.digits[index] for index in range(len(self.digits)))


TRAIN, TEST = Digits(0, 330, noisy=True), Digits(1000, 1037)


def vit(**overrides):
    """A ViT with dropout: 8,500 parameters."""
    config = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "num_labels": 10,
        "hidden_dropout_prob": 0.1,
        **overrides,
    }
    return ViTForImageClassification(ViTConfig(**config))


def resnet():
    """A ResNet with BatchNorm: 10,000 parameters."""
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=10,
        )
    )


def started(make=vit, seed=0):
    """A model with the weights that `seed` gives."""
    set_seed(seed)
    return make()


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def options(output_dir, **overrides):
    """Arguments for a plain Trainer and for ours."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "max_steps": 12,
        "learning_rate": 3e-3,
        "logging_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        **overrides,
    }


def population(output_dir, model=None, *, size=4, trainer=None, **overrides):
    """A [`WashTrainer`] over the digits; `trainer` holds further arguments of it."""
    args = WashConfig(
        **options(output_dir, population_size=size, **{"shuffle_probability": 0.3, "report": False, **overrides})
    )
    given = {"train_dataset": TRAIN, "eval_dataset": TEST, "compute_metrics": accuracy, **(trainer or {})}
    if "model_init" not in given:
        given["model"] = model if model is not None else started()
    return WashTrainer(args=args, **given)


def digest(model):
    """A short digest of all weights and buffers."""
    whole = b"".join(value.detach().float().numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(whole).hexdigest()[:16]


def history(trainer):
    """The log without what depends on the clock."""
    untimed = [
        {k: v for k, v in entry.items() if not k.endswith(TIMES) and k != "train_loss"}
        for entry in trainer.state.log_history
    ]
    return json.loads(json.dumps(untimed))


def outcome(trainer):
    """*Collective.* What must be the same on every layout."""
    return {
        "members": trainer.population.gather([digest(member) for member in trainer.population.members]),
        "soup": digest(trainer.model),
        "history": history(trainer),
    }


class StopAt(TrainerCallback):
    """End the training loop after a step, as an interruption would, without a trace of it in the schedule."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def write_json(path, value):
    Path(path).write_text(json.dumps(value))
