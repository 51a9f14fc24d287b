"""
Is a population worth its compute when a backbone is fine-tuned? Its soup against the mean of its members, against
independent members and their soup, and against one plain fine-tune with N times the epochs, which costs the same.

    python examples/benchmarks/finetune_comparison.py                    # 3 seeds of a population of 3
    python examples/benchmarks/finetune_comparison.py --lora_rank 8      # the same with adapters
    python examples/benchmarks/finetune_comparison.py --epochs 30    # shorter: 120 steps

For each seed a backbone is pretrained on the digits 0 to 4 and fine-tuned on a few of the digits 5 to 9; the others of
those are the test set, which nothing is chosen on. All runs of a seed share the backbone, the images, the optimizer
and the schedule (cosine to 0 over each one's own length). Set `OMP_NUM_THREADS=1`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from transformers import PrinterCallback
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune_backbone import (
    FINETUNED_ON,
    LEARNING_RATE,
    LORA_LEARNING_RATE,
    BackboneArguments,
    FinetuneConfig,
    FinetuneTrainer,
    digits_of,
    make_member,
    pretrain_backbone,
)
from image_data import EvaluationView, TrainingView
from train_vit import pretrained_recipe

from hf_wash.metrics import compute_classification_metrics


def split(num_train: int, seed: int):
    """`num_train` images of the digits 5 to 9 to learn from, in proportion, and the others to test on."""
    parts = digits_of(FINETUNED_ON).train_test_split(train_size=num_train, seed=seed, stratify_by_column="label")
    return parts["train"], parts["test"]


def finetune(folder: str, backbone: str, seed: int, options: argparse.Namespace, **chosen) -> tuple[dict, dict]:
    """One run; returns its metrics on the test set, and the seconds it took."""
    train, test = split(options.train_images, seed)
    recipe = pretrained_recipe(backbone, train.features["label"].names, {})
    arguments = BackboneArguments(lora_rank=options.lora_rank, head_only=0.1, layer_decay=0.9)
    model_init, heads = make_member(recipe, arguments)
    config = FinetuneConfig(
        output_dir=folder,
        seed=seed,
        learning_rate=LORA_LEARNING_RATE if options.lora_rank else LEARNING_RATE,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        shuffle_start=arguments.head_only,
        **chosen,
    )
    trainer = FinetuneTrainer(
        model_init=model_init,
        args=config,
        train_dataset=train.with_transform(TrainingView(recipe.processor, "image", "label", "shift")),
        eval_dataset=test.with_transform(EvaluationView(recipe.processor, "image", "label")),
        compute_metrics=compute_classification_metrics,
        heads=heads,
        layer_decay=arguments.layer_decay,
        head_only=arguments.head_only,
    )
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    return trainer.evaluate(), {"training": round(seconds, 1), "mixing": round(trainer.mixing.seconds, 1)}


def compare(seed: int, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Accuracy in % and loss of everything for one seed."""
    size, epochs = options.members, options.epochs
    with tempfile.TemporaryDirectory() as folder:
        backbone = os.path.join(folder, "backbone")
        pretrain_backbone(Path(backbone), seed=seed)
        runs = {
            "WASH": {"population_size": size, "num_train_epochs": epochs},
            "independent": {"population_size": size, "num_train_epochs": epochs, "mixing": "independent"},
            "plain": {"population_size": 1, "num_train_epochs": size * epochs},
        }
        metrics, seconds = {}, {}
        for name, chosen in runs.items():
            metrics[name], seconds[name] = finetune(folder, backbone, seed, options, **chosen)
    found = {}
    for name in ("WASH", "independent"):
        for title, key in (("members", "members_{}_mean"), ("ensemble", "ensemble_{}"), ("soup", "{}")):
            found[f"{name}, {title}"] = key
    results = {}
    for title, key in found.items():
        of = metrics[title.split(",")[0]]
        results[title] = (100 * of[f"eval_{key.format('accuracy')}"], of[f"eval_{key.format('loss')}"])
    results[f"plain, {size} x the epochs"] = (100 * metrics["plain"]["eval_accuracy"], metrics["plain"]["eval_loss"])
    print(
        json.dumps(
            {"seed": seed, "seconds": seconds, **{key: [round(v, 4) for v in pair] for key, pair in results.items()}}
        ),
        flush=True,
    )
    return results


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    """Run all seeds and print the table of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=80, help="of each member")
    parser.add_argument("--train_images", type=int, default=100)
    parser.add_argument("--lora_rank", type=int)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    results = [compare(seed, options) for seed in range(options.seeds)]
    soup = [found["WASH, soup"][0] for found in results]
    print("\n| | accuracy, % | loss | soup of WASH minus this, points |\n|---|---|---|---|")
    for title in results[0]:
        accuracies = [found[title][0] for found in results]
        gaps = spread([ours - other for ours, other in zip(soup, accuracies, strict=True)], 2)
        print(f"| {title} | {spread(accuracies, 2)} | {spread([found[title][1] for found in results], 3)} | {gaps} |")


if __name__ == "__main__":
    main()
