"""
Metrics of the soup, of each member and of the ensemble, the same on every process and on every layout.

Batches are dealt whole and combined in their order, so what several processes report is what one would. How a model
predicts a batch and what the losses are is passed in.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer, find_batch_size, nested_numpify
from transformers.trainer_utils import denumpify_detensorize


@dataclass
class Predictions:
    """
    What one model predicted on an evaluation set, by the index of the batch.

    Attributes:
        batches (`dict[int, dict]`): For each batch its `size`, and as NumPy arrays or nests of them its `loss`
            (a scalar), `logits`, `labels` and `inputs`; `None` where there are none.
    """

    batches: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, index: int, size: int, loss=None, logits=None, labels=None, inputs=None) -> None:
        """Store a batch, on the CPU."""
        values = {"loss": loss, "logits": logits, "labels": labels, "inputs": inputs}
        stored = {name: nested_numpify(value) if value is not None else None for name, value in values.items()}
        self.batches[index] = {"size": size, **stored}

    @staticmethod
    def merge(parts: Iterable["Predictions"]) -> "Predictions":
        """The batches of several processes, in the order of the data."""
        batches = {index: batch for part in parts for index, batch in part.batches.items()}
        return Predictions({index: batches[index] for index in sorted(batches)})

    @property
    def num_samples(self) -> int:
        """Examples in all batches."""
        return sum(batch["size"] for batch in self.batches.values())

    def arrays(self, name: str, concatenate: bool = True):
        """All batches' `name`, concatenated (padded with -100 where needed) or as a list; `None` if there is none."""
        values = [batch[name] for batch in self.batches.values() if batch[name] is not None]
        plain = bool(values) and all(isinstance(value, np.ndarray) for value in values)
        if concatenate and plain and len({value.shape[1:] for value in values}) == 1:
            return np.concatenate(values)
        container = EvalLoopContainer(concatenate, padding_index=-100)
        for value in values:
            container.add(value)
        # Arrays were concatenated as they came; `get_arrays` would look for tensors.
        return container.tensors

    def losses(self) -> np.ndarray | None:
        """Each example's loss, the mean of its batch, of shape `(examples,)` as the Trainer counts it."""
        known = [(batch["loss"], batch["size"]) for batch in self.batches.values() if batch["loss"] is not None]
        if not known:
            return None
        values, sizes = zip(*known, strict=True)
        return np.repeat(np.asarray(values).reshape(len(known)), sizes)


def summarize(
    predictions: Predictions,
    compute_metrics: Callable[..., dict] | None,
    prefix: str,
    *,
    include: Sequence[str] = (),
    by_batch: bool = False,
    concatenate: bool = True,
    skip_non_finite_losses: bool = True,
) -> dict[str, float]:
    """
    A model's metrics, without the prefix.

    Args:
        predictions ([`Predictions`]): Of the whole evaluation set.
        compute_metrics (`Callable`, *optional*): The user's, from [`~transformers.EvalPrediction`] to a dictionary.
        prefix (`str`): Stripped from keys that already have it.
        include (`Sequence[str]`, *optional*): `"loss"` and `"inputs"`, where `compute_metrics` wants them.
        by_batch (`bool`, *optional*, defaults to `False`): `batch_eval_metrics`: call `compute_metrics` for each
            batch, the last time with `compute_result=True`.
        concatenate (`bool`, *optional*, defaults to `True`): `eval_do_concat_batches`.
        skip_non_finite_losses (`bool`, *optional*, defaults to `True`): `logging_nan_inf_filter`.

    Returns:
        `dict[str, float]`: The user's metrics and `loss`.
    """
    losses = predictions.losses()
    metrics: dict = {}
    if compute_metrics is not None and by_batch:
        batches = list(predictions.batches.values())
        for number, batch in enumerate(batches, start=1):
            if batch["logits"] is None or batch["labels"] is None:
                continue
            extra = {
                "losses": np.repeat(batch["loss"], batch["size"]) if "loss" in include else None,
                "inputs": batch["inputs"] if "inputs" in include else None,
            }
            # Tensors, as the Trainer hands over in this mode.
            logits, labels = _as_tensors(batch["logits"]), _as_tensors(batch["labels"])
            metrics = compute_metrics(
                EvalPrediction(predictions=logits, label_ids=labels, **extra), compute_result=number == len(batches)
            )
    elif compute_metrics is not None:
        logits, labels = predictions.arrays("logits", concatenate), predictions.arrays("labels", concatenate)
        if logits is not None and labels is not None:
            extra = {
                "losses": losses if "loss" in include else None,
                "inputs": predictions.arrays("inputs", concatenate) if "inputs" in include else None,
            }
            metrics = compute_metrics(EvalPrediction(predictions=logits, label_ids=labels, **extra))
    metrics = {key.removeprefix(f"{prefix}_"): value for key, value in denumpify_detensorize(metrics or {}).items()}
    if losses is not None:
        finite = np.isfinite(losses)
        if skip_non_finite_losses and finite.any():
            losses = losses[finite]
        metrics["loss"] = losses.mean().item()
    return metrics


def _as_tensors(value):
    if isinstance(value, (tuple, list)):
        return type(value)(_as_tensors(item) for item in value)
    return torch.from_numpy(np.asarray(value))


def population_metrics(members: Sequence[dict[str, float]], ensemble: dict[str, float] | None) -> dict[str, float]:
    """
    Keys for the members and the ensemble, beside the soup's: `ensemble_<metric>`, `member_<i>_<metric>` and
    `members_<metric>_mean`, `_min`, `_max`.

    Args:
        members (`Sequence[dict]`): Each member's metrics, in member order.
        ensemble (`dict`, *optional*): The ensemble's.
    """
    metrics = {f"ensemble_{name}": value for name, value in (ensemble or {}).items()}
    for index, member in enumerate(members):
        metrics |= {f"member_{index}_{name}": value for name, value in member.items()}
    for name in members[0]:
        values = [member[name] for member in members if isinstance(member.get(name), (int, float))]
        if len(values) == len(members):
            metrics[f"members_{name}_mean"] = sum(values) / len(values)
            metrics[f"members_{name}_min"] = min(values)
            metrics[f"members_{name}_max"] = max(values)
    return metrics


def ensemble_logits(logits: torch.Tensor, problem_type: str | None = None) -> torch.Tensor:
    """
    The ensemble's prediction: the mean of the members' probabilities, in float64, summed in member order.

    Args:
        logits (`torch.Tensor` of shape `(N, batch, num_labels)`): The members'.
        problem_type (`str`, *optional*): transformers' name of the task. `"multi_label_classification"` averages
            each label's probability, `"regression"` the outputs themselves; everything else is a softmax.

    Returns:
        `torch.Tensor` of shape `(batch, num_labels)`, float32, on the CPU: logits that give the mean probabilities
        (their logarithm, for a softmax).
    """
    logits = logits.detach().cpu().double()
    if problem_type == "regression":
        return _ordered_mean(logits).float()
    if problem_type == "multi_label_classification":
        return torch.logit(_ordered_mean(logits.sigmoid())).float()
    return _ordered_mean(logits.softmax(-1)).log().float()


def _ordered_mean(values: torch.Tensor) -> torch.Tensor:
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total / len(values)


def predict_batches(
    models: Sequence[nn.Module],
    batches: Iterable[tuple[int, Any]],
    step: Callable[[nn.Module, Any], tuple],
    *,
    main_input: str | None = None,
    preprocess_logits: Callable | None = None,
    on_batch: Callable[[], None] = lambda: None,
    together: Callable[[int, int, list, Any, Any], None] | None = None,
) -> list[Predictions]:
    """
    Let each model predict each batch, drawing every batch once.

    Args:
        models (`Sequence[nn.Module]`): In eval mode.
        batches (`Iterable`): Of `(index, batch)`.
        step (`Callable`): From a model and a batch to its `(loss, logits, labels)`.
        main_input (`str`, *optional*): Also keep this entry of each batch.
        preprocess_logits (`Callable`, *optional*): From logits and labels to what is kept of the logits.
        on_batch (`Callable`, *optional*): Called after each batch.
        together (`Callable`, *optional*): Called after each batch with its index, its size, all models' logits, the
            labels and the entry that is kept.

    Returns:
        `list[Predictions]`: One for each model.
    """
    results = [Predictions() for _ in models]
    for index, inputs in batches:
        size = find_batch_size(inputs) or 0
        all_logits, labels = [], None
        kept = inputs[main_input] if main_input is not None else None
        for model, result in zip(models, results, strict=True):
            loss, logits, labels = step(model, inputs)
            all_logits.append(logits)
            if preprocess_logits is not None and logits is not None:
                logits = preprocess_logits(logits, labels)
            result.add(index, size, loss, logits, labels, kept)
        if together is not None:
            together(index, size, all_logits, labels, kept)
        on_batch()
    return results
