"""
Metrics of each member and of the ensemble beside the soup's, the same on every process and on every layout.

The soup's are the Trainer's own. How a member predicts a batch, and what its loss is, is passed in.
"""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer, nested_numpify
from transformers.trainer_utils import denumpify_detensorize

from ..population import Population
from ..population.failures import known_to_all
from ..soup.ensemble import mean_prediction


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


def population_metrics(
    members: Sequence[dict[str, float]], ensemble: dict[str, float] | None, left_out: Collection[int] = ()
) -> dict[str, float]:
    """
    Keys for the members and the ensemble, beside the soup's: `ensemble_<metric>`, `member_<i>_<metric>` and
    `members_<metric>_mean`, `_min`, `_max`, which are NaN if a member's is; `member_<i>_left_out`, 1, for those that are
    in none of these three because they are not finite themselves.

    Args:
        members (`Sequence[dict]`): Each member's metrics, in member order.
        ensemble (`dict`, *optional*): The ensemble's.
        left_out (`Collection[int]`, *optional*): The members that are not finite.
    """
    metrics = {f"ensemble_{name}": value for name, value in (ensemble or {}).items()}
    for index, member in enumerate(members):
        metrics |= {f"member_{index}_{name}": value for name, value in member.items()}
    together = [member for index, member in enumerate(members) if index not in left_out]
    for name in together[0]:
        values = [member[name] for member in together if isinstance(member.get(name), (int, float))]
        if len(values) == len(together):
            unknown = any(math.isnan(value) for value in values)
            metrics[f"members_{name}_mean"] = sum(values) / len(values)
            metrics[f"members_{name}_min"] = math.nan if unknown else min(values)
            metrics[f"members_{name}_max"] = math.nan if unknown else max(values)
    return metrics | {f"member_{index}_left_out": 1 for index in sorted(left_out)}


def ensemble_kind(model: Any) -> str | None:
    """
    The task of a model's head, where an ensemble of its kind is defined: transformers' `problem_type`, set or, as its
    own losses take it, regression for one label. `None` for everything that is not one prediction for an example.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(model, "config", None)
    heads = ("ForImageClassification", "ForSequenceClassification", "ForAudioClassification", "ForVideoClassification")
    if config is None or not type(model).__name__.endswith(heads):
        return None
    if config.problem_type is not None:
        return config.problem_type
    return "regression" if config.num_labels == 1 else "single_label_classification"


def held_out_score(
    predictions: Predictions,
    kind: str | None,
    metric: str | None,
    greater_is_better: bool | None,
    compute_metrics: Callable[..., dict] | None,
) -> float:
    """
    What a greedy soup is chosen by, higher is better: `metric_for_best_model` where it is set, else the accuracy of a
    single-label classifier, else minus the loss.

    Args:
        predictions ([`Predictions`]): On the held-out examples.
        kind (`str`, *optional*): [`ensemble_kind`] of the model.
        metric (`str`, *optional*): `metric_for_best_model`.
        greater_is_better (`bool`, *optional*): Whether that is one of which more is better.
        compute_metrics (`Callable`, *optional*): The user's.

    Raises:
        ValueError: for a metric that is not among those computed.
    """
    if metric is None and kind == "single_label_classification":
        right = sum(int((b["logits"].argmax(-1) == b["labels"]).sum()) for b in predictions.batches.values())
        return right / predictions.num_samples
    name = (metric or "loss").removeprefix("eval_")
    metrics = summarize(predictions, compute_metrics if name != "loss" else None, "eval", skip_non_finite_losses=False)
    if name not in metrics:
        raise ValueError(
            f"`soup='greedy'` is to be chosen by `metric_for_best_model={metric!r}`, which is not among the metrics "
            f"of held-out training data: {', '.join(metrics)}."
        )
    return metrics[name] if metric is not None and greater_is_better else -metrics[name]


class BesideTheSoup:
    """
    What the members and their ensemble predict on the batches of the soup's evaluation, batch by batch, so that
    nobody's predictions are kept where only losses count.

    Args:
        population ([`Population`]): The members.
        kind (`str`, *optional*): [`ensemble_kind`] of the members; `None` for no ensemble.
        ensemble_loss (`Callable`): From the ensemble's logits and the labels to its loss, a scalar.
        keep (`bool`): Whether predictions are kept.
        preprocess (`Callable`, *optional*): From logits and labels to what is kept of the logits.
        left_out (`Collection[int]`, *optional*): Members that are not in the ensemble, since they are not finite.
        is_stream (`bool`, *optional*, defaults to `False`): Whether only its end tells how long the data set is.
    """

    def __init__(
        self,
        population: Population,
        kind: str | None,
        ensemble_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        keep: bool,
        preprocess: Callable | None,
        left_out: Collection[int] = (),
        is_stream: bool = False,
    ):
        self._is_stream = is_stream
        self._population, self._kind, self._ensemble_loss = population, kind, ensemble_loss
        self._keep, self._preprocess = keep, preprocess
        self._together = [index for index in range(population.size) if index not in left_out]
        self.members = [Predictions() for _ in population.members]
        self.ensemble = Predictions()
        # For each pair of those together, on how many examples they predict different classes.
        self._differing: dict[tuple[int, int], int] = {}
        self._compared = 0
        self._batches = 0

    @property
    def needs_logits(self) -> bool:
        """Whether members have to say more than their loss."""
        return self._keep or self._kind is not None

    def begin_batch(self, size: int) -> None:
        """
        *Collective for streams.* What each process finds there must be as long.

        Args:
            size (`int`): Examples in the batch; 0 after the last.

        Raises:
            ValueError: on every process, if the streams differ.
        """
        if not self._is_stream:
            return
        sizes = self._population.gather_tensors(torch.tensor([size], device=self._population.device)).tolist()
        if len(set(sizes)) > 1:
            listing = ", ".join(
                f"process {rank} " + (f"has {count} example{'s' * (count > 1)}" if count else "is at its end")
                for rank, count in enumerate(sizes)
            )
            told = f"All processes must evaluate on the same stream: after {self._batches} batches {listing}."
            raise known_to_all(ValueError(told))

    def add(self, results: Sequence[tuple], size: int, inputs: Any = None, labels: Any = None) -> None:
        """
        *Collective.* A batch.

        Args:
            results (`Sequence[tuple]`): Each local member's `(loss, logits, labels)`.
            size (`int`): Examples in the batch.
            inputs (*optional*): What of the batch is kept for the metrics.
            labels (*optional*): The labels, for the ensemble's loss.
        """
        index, self._batches = self._batches, self._batches + 1
        for predictions, (loss, logits, own_labels) in zip(self.members, results, strict=True):
            self._store(predictions, index, size, loss, logits, own_labels, inputs)
        if self._kind is None or any(logits is None for _, logits, _ in results):
            return
        own = torch.stack([logits.detach().contiguous() for _, logits, _ in results])
        everyone = self._population.gather_tensors(own).cpu().double()
        if self._kind == "single_label_classification":
            self._count_differing(everyone.argmax(-1))
        mean = mean_prediction(everyone[self._together], self._kind).float()
        loss = self._ensemble_loss(mean, labels) if isinstance(labels, torch.Tensor) else None
        self._store(self.ensemble, index, size, loss, mean, results[0][2], inputs)

    def _count_differing(self, classes: torch.Tensor) -> None:
        self._compared += classes.shape[1]
        for pair in itertools.combinations(self._together, 2):
            differing = int((classes[pair[0]] != classes[pair[1]]).sum())
            self._differing[pair] = self._differing.get(pair, 0) + differing

    def disagreement(self) -> dict[str, float]:
        """
        `members_disagreement_<i>_<j>`, the fraction of examples for which two members predict different classes, and
        `members_disagreement_mean` over all pairs; empty for what is no classification.
        """
        if not self._differing:
            return {}
        pairs = {f"members_disagreement_{i}_{j}": count / self._compared for (i, j), count in self._differing.items()}
        return {"members_disagreement_mean": sum(pairs.values()) / len(pairs), **pairs}

    def _store(self, predictions: Predictions, index: int, size: int, loss, logits, labels, inputs) -> None:
        if not self._keep:
            predictions.add(index, size, loss)
            return
        if self._preprocess is not None and logits is not None:
            logits = self._preprocess(logits, labels)
        predictions.add(index, size, loss, logits, labels, inputs)
