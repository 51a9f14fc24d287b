"""
What a classifier is measured by, through the `evaluate` library and without a download: accuracy, top-5 accuracy and
expected calibration error. How the soup, the members and the ensemble come to their predictions is left to
`hf_wash.trainer.evaluation`.
"""

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import EvalPrediction


IGNORED_LABEL = -100
"""The label that PyTorch's cross-entropy skips, and which the Trainer pads with."""

_DESCRIPTION = """
Accuracy, top-5 accuracy (for more than five classes) and expected calibration error of a classifier, from its logits.
Logarithms of probabilities are logits too.
"""

_INPUTS = """
Args:
    predictions (list of lists of `float`, of shape `(num_samples, num_classes)`):
        Logits.
    references (list of `int`, of shape `(num_samples,)`):
        The true classes. Samples labelled -100 are left out.
    num_bins (`int`, *optional*, defaults to 15):
        The number of bins of equal width into which confidences are sorted for the calibration error.

Returns:
    `accuracy` (`float`): the fraction of samples whose highest logit is that of the true class.
    `top5_accuracy` (`float`): the fraction whose true class is among the five highest. Only for more than five classes.
    `ece` (`float`): the expected calibration error, between 0 and 1.
"""

_CITATION = """
@inproceedings{guo2017calibration,
    title = {On Calibration of Modern Neural Networks},
    author = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
    booktitle = {International Conference on Machine Learning},
    year = {2017},
    url = {https://huggingface.co/papers/1706.04599}
}
"""


def top_k_accuracy(logits: NDArray, labels: NDArray, k: int = 1) -> float:
    """
    Fraction of samples whose true class is among the `k` highest logits.

    Among equal logits the lower class comes first, as in `argmax`. A sample with a NaN among its logits counts as
    wrong.

    Args:
        logits (`np.ndarray` of shape `(num_samples, num_classes)`):
            Logits, or anything that orders the classes alike.
        labels (`np.ndarray` of shape `(num_samples,)`):
            The true classes.
        k (`int`, *optional*, defaults to 1):
            How many guesses a sample has.

    Returns:
        `float`: Between 0 and 1.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    ahead = logits > own
    ahead |= (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])
    hit = (ahead.sum(axis=1) < k) & ~np.isnan(logits).any(axis=1)
    return float(hit.mean())


def expected_calibration_error(logits: NDArray, labels: NDArray, num_bins: int = 15) -> float:
    r"""
    Expected calibration error: how far confidence and accuracy lie apart, on average over the samples
    (equation 3 of [Guo et al., 2017](https://huggingface.co/papers/1706.04599)).

    A sample's confidence is the highest softmax probability. Confidences are sorted into `num_bins` bins
    \\((m - 1) / M < p \le m / M\\); the error is the mean over bins of |accuracy − mean confidence|, each bin weighted
    by the number of its samples.

    Args:
        logits (`np.ndarray` of shape `(num_samples, num_classes)`):
            Logits.
        labels (`np.ndarray` of shape `(num_samples,)`):
            The true classes.
        num_bins (`int`, *optional*, defaults to 15):
            The paper's choice is 15.

    Returns:
        `float`: Between 0 and 1; NaN where a logit is.
    """
    # float64: the bins' edges are sharp, and half precision would move samples across them.
    logits = logits.astype(np.float64)
    if np.isnan(logits).any():
        return float("nan")
    shifted = logits - logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(shifted).sum(axis=1)
    correct = logits.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    # Σ over the bins of (samples / all samples) · |accuracy − confidence|, in which the number of samples cancels.
    gap = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gap).sum() / len(labels))


class ClassificationMetrics(evaluate.Metric):
    """
    Accuracy, top-5 accuracy and expected calibration error, as a metric of the `evaluate` library that is not
    downloaded and needs no network.

    Any number of processes can use it at once: each keeps what it was given in memory, where `evaluate` would by
    default write files and wait for each other's locks.

    Example:

    ```python
    >>> from hf_wash.metrics import ClassificationMetrics

    >>> metric = ClassificationMetrics()
    >>> metric.compute(predictions=[[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]], references=[0, 1, 1])["accuracy"]
    0.6666666666666666
    ```
    """

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
            reference_urls=["https://huggingface.co/papers/1706.04599"],
        )

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict[str, float] | None:
        """
        Computes the metrics of what is given here, and of what was given to `add` and `add_batch` before.

        """
        if predictions is not None and references is not None and len(self) == 0 and self.num_process == 1:
            # evaluate 0.4.6 would turn every logit into a Python object on the way to an Arrow table: minutes, and
            # gigabytes, for the 50 million of ImageNet's validation set.
            return self._compute(predictions=predictions, references=references, **kwargs)
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, *, predictions: ArrayLike, references: ArrayLike, num_bins: int = 15) -> dict[str, float]:
        logits, labels = np.asarray(predictions), np.asarray(references)
        if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels):
            raise ValueError(
                "Expected logits of shape (num_samples, num_classes) and labels of shape (num_samples,), "
                f"found {logits.shape} and {labels.shape}."
            )
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"Expected one integer label for each sample, found labels of type {labels.dtype}.")
        known = labels != IGNORED_LABEL
        if not known.all():
            logits, labels = logits[known], labels[known]
        num_classes = logits.shape[1]
        if len(labels) == 0:
            raise ValueError("There is no labelled sample to compute metrics of.")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"Labels must be between 0 and {num_classes - 1}, the last of the {num_classes} classes that the "
                f"logits are for; found {labels.min()} to {labels.max()}."
            )
        metrics = {"accuracy": top_k_accuracy(logits, labels)}
        if num_classes > 5:
            metrics["top5_accuracy"] = top_k_accuracy(logits, labels, k=5)
        metrics["ece"] = expected_calibration_error(logits, labels, num_bins)
        return metrics


def compute_classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    [`ClassificationMetrics`] in the form the Trainer's `compute_metrics` takes.

    Args:
        prediction (`EvalPrediction`):
            Logits of shape `(num_samples, num_classes)`, alone or first in a tuple (models that also return hidden
            states), and integer labels of shape `(num_samples,)`.

    Returns:
        `dict[str, float]`: `accuracy`, `top5_accuracy` for more than five classes, and `ece`.
    """
    logits = prediction.predictions
    if isinstance(logits, tuple | list):
        logits = logits[0]
    metrics = ClassificationMetrics().compute(predictions=logits, references=prediction.label_ids)
    assert metrics is not None  # evaluate returns None on all but the first of the processes that share a metric
    return metrics
