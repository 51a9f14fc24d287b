"""
Runs of a small population, each under a name, with what came out of it: the same on every layout, say the tests.

As a script: `scenarios.py FOLDER NAME [NAME ...]` runs them in the processes it was launched in, and process 0 writes
`FOLDER/NAME-on-<processes>.json`.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from small_population import (
    TEST,
    Digits,
    DigitStream,
    outcome,
    population,
    resnet,
    started,
    vit,
    write_json,
)
from transformers import EarlyStoppingCallback, set_seed

from hf_wash import MemberOverrides


def wash(folder):
    """The ordinary case: evaluation, accumulation, augmentation and dropout."""
    trainer = population(folder, gradient_accumulation_steps=2, max_grad_norm=0.5)
    trainer.train()
    return {**outcome(trainer), "predictions": trainer.predict(TEST).predictions.tolist()}


def wash_opt(folder):
    """The optimizer's state moves too; interval, start and stop of the shuffle."""
    trainer = population(
        folder,
        optim="adamw_torch",
        shuffle_optimizer_state=True,
        shuffle_interval=2,
        shuffle_start=0.1,
        shuffle_stop=0.8,
    )
    trainer.train()
    return outcome(trainer)


def batch_norm(folder):
    """BatchNorm, recalibrated, from different starts."""
    trainer = population(
        folder, same_init=False, optim="sgd", optim_args="momentum=0.9", trainer={"model_init": resnet},
        soup_batch_norm_batches=5,
    )  # fmt: skip
    trainer.train()
    return {**outcome(trainer), "evaluation": trainer.evaluate()["eval_loss"]}


def unequal_starts(folder):
    """Each process comes with a model of its own; all members start from process 0's."""
    set_seed(100 + int(os.environ.get("RANK", "0")))
    model = vit()
    set_seed(100)
    first = vit()
    if int(os.environ.get("RANK", "0")) == 0:
        model = first
    trainer = population(folder, model)
    trainer.train()
    return outcome(trainer)


def mix_labels(features):
    batch = torch.utils.data.default_collate(features)
    mixed = torch.nn.functional.one_hot(batch["labels"], 10).float()
    return {"pixel_values": batch["pixel_values"], "labels": 0.7 * mixed + 0.3 * mixed.roll(1, 0)}


mix_labels.soft_labels = True


def overrides(folder):
    """Members that differ in data, collator, rate, decay and smoothing."""
    members = [
        MemberOverrides(learning_rate=1e-3),
        MemberOverrides(weight_decay=0.1, label_smoothing_factor=0.1),
        MemberOverrides(data_collator=mix_labels, label_smoothing_factor=0.05),
        MemberOverrides(train_dataset=Digits(330, 660, noisy=True)),
    ]
    trainer = population(folder, label_smoothing_factor=0.02, trainer={"members": members})
    trainer.train()
    assert trainer.model.config.problem_type is None
    return outcome(trainer)


def stream(folder):
    """No length, several passes, workers for none."""
    trainer = population(folder, trainer={"train_dataset": DigitStream(100)})
    trainer.train()
    return outcome(trainer)


def shard(folder):
    trainer = population(folder, member_data="shard", num_train_epochs=2, max_steps=-1, eval_strategy="epoch")
    trainer.train()
    return outcome(trainer)


def workers(folder):
    trainer = population(folder, dataloader_num_workers=1, max_steps=6)
    trainer.train()
    return outcome(trainer)


def bf16(folder):
    trainer = population(folder, bf16=True, max_steps=6)
    trainer.train()
    return outcome(trainer)


def recomputed(folder):
    """Activation checkpointing, under whichever name this transformers has."""
    trainer = population(folder, gradient_checkpointing=True, max_steps=6)
    trainer.train()
    return outcome(trainer)


def best(folder):
    """Early stopping and the best soup; the loss of a function of the user's."""
    trainer = population(
        folder,
        learning_rate=0.03,
        max_steps=24,
        save_strategy="steps",
        save_steps=6,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        trainer={
            "callbacks": [EarlyStoppingCallback(1)],
            "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: torch.nn.functional.cross_entropy(
                outputs["logits"], labels, label_smoothing=0.1
            ),
        },
    )
    trainer.train()
    kept = sorted(path.name for path in Path(folder).glob("checkpoint-*"))
    return {**outcome(trainer), "best": Path(trainer.state.best_model_checkpoint).name, "kept": kept}


def two_evaluation_sets(folder):
    trainer = population(
        folder,
        max_steps=6,
        trainer={"eval_dataset": {"a": TEST, "b": Digits(1100, 1150)}},
    )
    trainer.train()
    return {**outcome(trainer), "metrics": sorted(trainer.evaluate())}


def greedy(folder):
    """The greedy soup of members that are not equally good, with BatchNorm."""
    members = [MemberOverrides(learning_rate=rate) for rate in (1e-2, 1e-5, 1e-2, 3e-2)]
    trainer = population(
        folder, started(resnet), soup="greedy", soup_holdout=0.2, soup_batch_norm_batches=5, max_steps=16,
        eval_steps=8, trainer={"members": members},
    )  # fmt: skip
    trainer.train()
    return {
        **outcome(trainer),
        "chosen": list(trainer.greedy_record.indices),
        "scores": list(trainer.greedy_record.member_scores),
    }


def checkpointed(folder):
    """A whole run that leaves checkpoints behind."""
    trainer = population(folder, save_strategy="steps", save_steps=5, shuffle_optimizer_state=True)
    trainer.train()
    return outcome(trainer)


def resumed(folder):
    """The same run from its checkpoint of step 5, in a folder of its own."""
    trainer = population(Path(folder), save_strategy="steps", save_steps=5, shuffle_optimizer_state=True)
    trainer.train(resume_from_checkpoint=str(Path(folder).parent / "checkpointed-on-1" / "checkpoint-5"))
    return outcome(trainer)


SCENARIOS = [
    wash, wash_opt, batch_norm, unequal_starts, overrides, stream, shard, workers, bf16, recomputed, best,
    two_evaluation_sets, greedy, checkpointed, resumed,
]  # fmt: skip
# Where each takes a few: one that stands still is to say where.
SECONDS_A_SCENARIO = 150
BY_NAME = {scenario.__name__: scenario for scenario in SCENARIOS}


def run(folder, name):
    """Run a scenario in the present processes; process 0 writes the outcome."""
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    result = BY_NAME[name](Path(folder) / f"{name}-on-{processes}")
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(Path(folder) / f"{name}-on-{processes}.json", result)


def stand_still():
    """Say where every thread of this process is, and of its loaders' workers, and end."""
    for child in psutil.Process().children(recursive=True):
        child.send_signal(signal.SIGUSR1)
    time.sleep(5)
    faulthandler.dump_traceback()
    os._exit(1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    faulthandler.register(signal.SIGUSR1)
    for scenario_name in sys.argv[2:]:
        watch = threading.Timer(SECONDS_A_SCENARIO, stand_still)
        watch.daemon = True
        watch.start()
        run(sys.argv[1], scenario_name)
        watch.cancel()
