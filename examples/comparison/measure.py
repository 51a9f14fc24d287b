"""What a trained population is worth: accuracies of members, ensemble, soups and averages, on the same batches."""

import base64
import copy
import hashlib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from hf_wash import greedy_soup, recalibrate_batch_norm
from hf_wash.population.consensus import squared_distance
from hf_wash.soup.ensemble import mean_prediction

from .data import Data
from .setting import Setting


TRAIN_SAMPLE = 2000


@torch.no_grad()
def logits_of(models: Iterable[nn.Module], data: Data, part: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Every model's logits on a part of the data, each of shape `(num_images, num_labels)`, and the labels.

    Args:
        models (iterable of `nn.Module`): In evaluation mode afterwards.
        data ([`Data`]), part (a data set): Which images.
    """
    models = [model.eval() for model in models]
    device = next(models[0].parameters()).device
    found: list[list[torch.Tensor]] = [[] for _ in models]
    labels = []
    for batch in data.batches(part):
        pixels = batch["pixel_values"].to(device)
        labels.append(batch["labels"])
        for logits, model in zip(found, models, strict=True):
            logits.append(model(pixels)["logits"].float().cpu())
    return [torch.cat(logits) for logits in found], torch.cat(labels)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The part of the images whose class has the largest logit."""
    return float((logits.argmax(-1) == labels).double().mean())


def hits(logits: torch.Tensor, labels: torch.Tensor) -> str:
    """Which images are right, a bit for each: so that models are compared image by image."""
    return base64.b64encode(np.packbits((logits.argmax(-1) == labels).numpy()).tobytes()).decode()


def right(packed: str, count: int) -> np.ndarray:
    """The inverse of [`hits`]: 1 where an image is right, else 0, of shape `(count,)`."""
    return np.unpackbits(np.frombuffer(base64.b64decode(packed), dtype=np.uint8))[:count].astype(float)


def digest(*models: nn.Module) -> str:
    """Short for all weights and statistics: equal for runs that are equal bit for bit."""
    found = hashlib.sha256()
    for model in models:
        for tensor in model.state_dict().values():
            found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def recalibrate(model: nn.Module, data: Data, setting: Setting, seed: int) -> nn.Module:
    """The model with BatchNorm statistics estimated anew on training batches, the same for the same seed."""
    torch.manual_seed(seed)
    recalibrate_batch_norm(model, data.training_batches(setting.batch_size), max_batches=setting.batch_norm_batches)
    return model


def consensus_distance(members: list[nn.Module], soup: nn.Module) -> float:
    """sqrt(1/N · Σ_n ‖θ_n − θ̄‖²) over the trainable parameters."""
    return math.sqrt(sum(squared_distance(member, soup) for member in members) / len(members))


def measure_population(
    members: list[nn.Module], soup: nn.Module, data: Data, setting: Setting, seed: int, recalibrated: bool
) -> dict[str, Any]:
    """
    Members, ensemble (the mean of probabilities), uniform and greedy soup of one run.

    Args:
        members (`list[nn.Module]`), soup (`nn.Module`): Of the run.
        data ([`Data`]), setting ([`Setting`]), seed (`int`): Of the run.
        recalibrated (`bool`): Whether soups have BatchNorm statistics of their own, or the mean of the members'.
    """
    scratch = copy.deepcopy(soup)

    def held_out_accuracy(weights: dict[str, torch.Tensor]) -> float:
        scratch.load_state_dict(weights)
        if recalibrated:
            recalibrate(scratch, data, setting, seed)
        logits, labels = logits_of([scratch], data, data.held_out)
        return accuracy(logits[0], labels)

    found: dict[str, Any] = {"digest": digest(soup)}
    parts = {"held_out": data.held_out}
    if setting.evaluate_on == "test":
        weights, record = greedy_soup(members, held_out_accuracy)
        scratch.load_state_dict(weights)
        if recalibrated:
            recalibrate(scratch, data, setting, seed)
        found["greedy_members"] = list(record.indices)
        parts["accuracy"] = data.test
    for name, part in parts.items():
        logits, labels = logits_of([*members, soup, scratch], data, part)
        *own, of_soup, of_greedy = logits
        found[name] = {
            "members": [accuracy(each, labels) for each in own],
            "ensemble": accuracy(mean_prediction(own), labels),
            "soup": accuracy(of_soup, labels),
        }
        if name == "accuracy":
            found[name]["greedy"] = accuracy(of_greedy, labels)
            found["hits"] = hits(of_soup, labels)
            found["test_size"] = len(labels)
    found["train_accuracy"] = accuracy_on_training_data(members, data)
    return found


def best_average(averages: dict[float, nn.Module], data: Data, setting: Setting, seed: int) -> tuple[float, nn.Module]:
    """
    The best of some moving averages by held-out data, of equal ones the first, and how far it reaches back; all have
    their BatchNorm estimated anew.

    Args:
        averages (`dict[float, nn.Module]`): By the part of the run that they reach back.
        data ([`Data`]), setting ([`Setting`]), seed (`int`): Of the run.
    """
    for average in averages.values():
        recalibrate(average, data, setting, seed)
    logits, labels = logits_of(averages.values(), data, data.held_out)
    scores = [accuracy(each, labels) for each in logits]
    return list(averages.items())[scores.index(max(scores))]


def measure_plain(
    model: nn.Module, averages: dict[float, nn.Module], data: Data, setting: Setting, seed: int
) -> dict[str, Any]:
    """
    One model, and the best of its moving averages by held-out data.

    Args:
        model (`nn.Module`): As it was trained.
        averages (`dict[float, nn.Module]`): Its moving averages, by the part of the run that they reach back.
        data ([`Data`]), setting ([`Setting`]), seed (`int`): Of the run.
    """
    span, average = best_average(averages, data, setting, seed)
    logits, labels = logits_of([model, average], data, data.held_out)
    own, of_average = (accuracy(each, labels) for each in logits)
    found: dict[str, Any] = {
        "held_out": {"members": [own], "soup": own, "ema": of_average},
        "ema_span": span,
        "digest": digest(model, *averages.values()),
    }
    if setting.evaluate_on == "test":
        logits, labels = logits_of([model, average], data, data.test)
        own, of_average = (accuracy(each, labels) for each in logits)
        found["accuracy"] = {"members": [own], "soup": own, "ema": of_average}
        found |= {"hits": hits(logits[0], labels), "ema_hits": hits(logits[1], labels), "test_size": len(labels)}
    found["train_accuracy"] = accuracy_on_training_data([model], data)
    return found


def accuracy_on_training_data(models: list[nn.Module], data: Data) -> float:
    """The models' mean on at most 2,000 images that they were trained on, each as it is."""
    sample = Subset(data.train, range(min(TRAIN_SAMPLE, len(data.train))))
    logits, labels = logits_of(models, data, sample)
    return sum(accuracy(each, labels) for each in logits) / len(models)
