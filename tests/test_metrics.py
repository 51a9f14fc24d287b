"""The metric against sums done by hand, through both of its doors, and in several processes at once."""

import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from hf_wash.metrics import (
    ClassificationMetrics,
    compute_classification_metrics,
    expected_calibration_error,
    top_k_accuracy,
)


@pytest.fixture
def scored():
    generator = np.random.default_rng(0)
    return generator.normal(size=(200, 12)).astype(np.float32) * 3, generator.integers(0, 12, size=200)


def brute_force(logits, labels, num_bins=15):
    top1 = top5 = 0
    bins = [[] for _ in range(num_bins)]
    for row, label in zip(logits.astype(float), labels, strict=True):
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))
        top1 += order[0] == label
        top5 += label in order[:5]
        probabilities = [np.exp(value - row.max()) for value in row]
        confidence = max(probabilities) / sum(probabilities)
        for index in range(num_bins):
            if index / num_bins < confidence <= (index + 1) / num_bins:
                bins[index].append((confidence, order[0] == label))
    error = 0.0
    for members in filter(None, bins):
        confidences, hits = zip(*members, strict=True)
        error += len(members) / len(labels) * abs(sum(hits) / len(hits) - sum(confidences) / len(confidences))
    return {"accuracy": top1 / len(labels), "top5_accuracy": top5 / len(labels), "ece": error}


def test_metric_equals_brute_force(scored):
    logits, labels = scored
    assert ClassificationMetrics().compute(predictions=logits, references=labels) == pytest.approx(
        brute_force(logits, labels)
    )


def test_adding_batches_equals_giving_all_at_once(scored):
    logits, labels = scored
    metric = ClassificationMetrics()
    metric.add_batch(predictions=logits[:150], references=labels[:150])
    metric.add_batch(predictions=logits[150:199], references=labels[150:199])
    in_parts = metric.compute(predictions=logits[199:], references=labels[199:])
    assert in_parts == pytest.approx(metric.compute(predictions=logits, references=labels))


def test_it_is_a_metric_of_evaluate_that_combines_with_others(scored):
    logits, labels = scored
    assert isinstance(ClassificationMetrics(), evaluate.Metric)
    combined = evaluate.combine([ClassificationMetrics(), ClassificationMetrics()])
    assert any(key.endswith("accuracy") for key in combined.compute(predictions=logits, references=labels))


def test_log_probabilities_count_as_logits(scored):
    logits, labels = scored
    log_probabilities = logits - np.log(np.exp(logits.astype(float)).sum(axis=1, keepdims=True))
    log_probabilities[0, (labels[0] + 1) % 12] = -np.inf
    reference = logits.astype(float)
    reference[0, (labels[0] + 1) % 12] = -np.inf
    assert compute_classification_metrics(EvalPrediction(log_probabilities, labels)) == pytest.approx(
        compute_classification_metrics(EvalPrediction(reference, labels))
    )


def test_top5_is_reported_only_for_more_than_five_classes(scored):
    logits, labels = scored
    metrics = compute_classification_metrics(EvalPrediction(logits[:, :5], labels % 5))
    assert set(metrics) == {"accuracy", "ece"}
    metrics = compute_classification_metrics(EvalPrediction(logits[:, :6], labels % 6))
    assert set(metrics) == {"accuracy", "top5_accuracy", "ece"}


def test_the_trainers_padding_label_is_left_out(scored):
    logits, labels = scored
    padded = labels.copy()
    padded[100:] = -100
    assert compute_classification_metrics(EvalPrediction(logits, padded)) == pytest.approx(
        brute_force(logits[:100], labels[:100])
    )


def test_logits_are_found_in_a_tuple_with_hidden_states(scored):
    logits, labels = scored
    alone = compute_classification_metrics(EvalPrediction(logits, labels))
    assert compute_classification_metrics(EvalPrediction((logits, np.zeros((200, 3))), labels)) == alone


def test_ties_are_broken_as_argmax_breaks_them():
    logits, labels = np.zeros((12, 12)), np.arange(12)
    assert top_k_accuracy(logits, labels) == pytest.approx(1 / 12)
    assert top_k_accuracy(logits, labels, k=5) == pytest.approx(5 / 12)


def test_calibration_error_at_its_extremes():
    sure = np.array([[1e4, 0.0], [0.0, 1e4]])
    assert expected_calibration_error(sure, np.array([0, 1])) == 0
    assert expected_calibration_error(sure, np.array([1, 0])) == 1


def test_a_model_that_returns_nan_is_wrong_and_uncalibrated():
    logits = np.array([[np.nan, 0.0], [1.0, 0.0]])
    metrics = compute_classification_metrics(EvalPrediction(logits, np.array([0, 0])))
    assert metrics["accuracy"] == 0.5
    assert np.isnan(metrics["ece"])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((4, 3)), np.zeros((4, 3)), "found \\(4, 3\\) and \\(4, 3\\)"),
        (np.zeros((4, 3)), np.zeros(4), "float64"),
        (np.zeros((4, 3)), np.array([0, 1, 2, 3]), "found 0 to 3"),
        (np.zeros((4, 3)), np.full(4, -100), "no labelled sample"),
        (np.zeros((4, 3)), np.zeros(3, dtype=int), "found \\(4, 3\\) and \\(3,\\)"),
    ],
)
def test_what_is_no_classification_is_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        compute_classification_metrics(EvalPrediction(logits, labels))


def test_processes_do_not_wait_for_each_other(tmp_path):
    # Half of each process's samples are stored at the same time, in one shared cache folder.
    program = """
import sys, numpy as np
from hf_wash.metrics import ClassificationMetrics
metric = ClassificationMetrics()
metric.add_batch(predictions=np.eye(8), references=np.arange(8))
print("stored", flush=True)
sys.stdin.readline()
print(metric.compute()["accuracy"])
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HOME": str(tmp_path)},
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "stored\n"
        for process in processes:
            assert process.communicate("go\n", timeout=60)[0] == "1.0\n"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
