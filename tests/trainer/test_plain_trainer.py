"""A population of one is a plain Trainer run; with mixing off, member k is one with `seed + k`. Bit for bit."""

import json

import pytest
import torch
from small_population import TEST, TRAIN, Digits, DigitStream, accuracy, history, options, population, started, vit
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_wash import MemberOverrides


SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "max_steps": 6},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "warmup_steps": 5, "lr_scheduler_type": "cosine"},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1, "max_grad_norm": 0.1},
    "unclipped": {"max_grad_norm": 0.0},
    "smoothing": {"label_smoothing_factor": 0.1},
    "data seed": {"data_seed": 3},
    "no seedable sampler": {"accelerator_config": {"use_seedable_sampler": False}},
    "workers": {"dataloader_num_workers": 1, "max_steps": 4},
    "bf16": {"bf16": True},
    "drop last": {"dataloader_drop_last": True, "max_steps": 30},
    "each step logged": {"logging_steps": 1, "eval_strategy": "no"},
}


def plain(output_dir, index=0, model=None, trainer=None, **settings):
    settings = options(output_dir, **settings)
    settings["seed"] += index
    if settings.get("data_seed") is not None:
        settings["data_seed"] += index
    given = {"train_dataset": TRAIN, "eval_dataset": TEST, "compute_metrics": accuracy, **(trainer or {})}
    if "model_init" not in given:
        given["model"] = model if model is not None else started()
    result = Trainer(args=TrainingArguments(**settings), **given)
    result.output = result.train()
    return result


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_population_of_one_is_a_plain_run(tmp_path, name):
    expected = plain(tmp_path / "plain", **SETTINGS[name])
    trainer = population(tmp_path / "one", size=1, **SETTINGS[name])
    output = trainer.train()

    assert same_weights(trainer.model, expected.model)
    assert same_weights(trainer.population.members[0], expected.model)
    assert output.training_loss == expected.output.training_loss
    for ours, theirs in zip(history(trainer), history(expected), strict=True):
        assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize("settings", [{}, {"max_steps": -1, "num_train_epochs": 1}], ids=["steps", "epochs"])
def test_the_speed_of_a_run_counts_what_all_members_have_seen(tmp_path, settings):
    expected = plain(tmp_path / "plain", **settings).output.metrics
    for size in (1, 3):
        metrics = population(tmp_path / str(size), size=size, **settings).train().metrics
        seen, of_one = (m["train_samples_per_second"] * m["train_runtime"] for m in (metrics, expected))
        assert seen == pytest.approx(size * of_one, rel=0.01)
        steps, of_one = (m["train_steps_per_second"] * m["train_runtime"] for m in (metrics, expected))
        assert steps == pytest.approx(of_one, rel=0.01)


@pytest.mark.parametrize("name", SETTINGS)
def test_without_mixing_member_k_is_a_plain_run_with_seed_plus_k(tmp_path, name):
    trainer = population(tmp_path / "population", size=3, mixing="independent", **SETTINGS[name])
    trainer.train()
    for index, member in enumerate(trainer.population.members):
        expected = plain(tmp_path / "plain", index, **SETTINGS[name])
        assert same_weights(member, expected.model), f"member {index}"
        for ours, theirs in zip(history(trainer), history(expected), strict=True):
            for key in ("loss", "grad_norm", "learning_rate"):
                if key in theirs:
                    assert ours.get(f"member_{index}_{key}", ours[key]) == theirs[key], (index, key)
            for key in ("eval_loss", "eval_accuracy"):
                if key in theirs:
                    assert ours[key.replace("eval_", f"eval_member_{index}_")] == theirs[key], (index, key)


def test_each_members_own_options_are_those_of_its_plain_run(tmp_path):
    members = [
        MemberOverrides(learning_rate=1e-3, weight_decay=0.2),
        MemberOverrides(train_dataset=Digits(330, 660, noisy=True)),
    ]
    trainer = population(
        tmp_path / "population", size=2, mixing="independent", logging_steps=1, trainer={"members": members}
    )
    trainer.train()
    first = plain(tmp_path / "plain", 0, learning_rate=1e-3, weight_decay=0.2, logging_steps=1)
    second = plain(tmp_path / "plain", 1, trainer={"train_dataset": Digits(330, 660, noisy=True)}, logging_steps=1)
    for index, expected in enumerate((first, second)):
        assert same_weights(trainer.population.members[index], expected.model)
        rates = [entry["learning_rate"] for entry in history(expected) if "loss" in entry]
        ours = [entry[f"member_{index}_learning_rate"] for entry in history(trainer) if "loss" in entry]
        assert ours == rates


def test_starts_from_model_init_are_those_of_plain_runs(tmp_path):
    trainer = population(
        tmp_path / "population", size=2, mixing="independent", same_init=False, trainer={"model_init": lambda: vit()}
    )
    trainer.train()
    for index, member in enumerate(trainer.population.members):
        expected = plain(tmp_path / "plain", index, trainer={"model_init": lambda: vit()})
        assert same_weights(member, expected.model), f"member {index}"


def test_a_stream_is_read_as_a_plain_run_reads_it(tmp_path):
    settings = {"max_steps": 10, "eval_strategy": "no"}
    expected = plain(tmp_path / "plain", trainer={"train_dataset": DigitStream(100)}, **settings)
    trainer = population(tmp_path / "one", size=1, trainer={"train_dataset": DigitStream(100)}, **settings)
    trainer.train()
    assert same_weights(trainer.model, expected.model)


def test_a_loss_of_the_users_is_not_rescaled(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    settings = {"gradient_accumulation_steps": 2, "eval_strategy": "no", "max_steps": 6}
    expected = plain(tmp_path / "plain", trainer={"compute_loss_func": loss}, **settings)
    trainer = population(tmp_path / "one", size=1, trainer={"compute_loss_func": loss}, **settings)
    trainer.train()
    assert same_weights(trainer.model, expected.model)
    assert history(trainer)[0]["loss"] == history(expected)[0]["loss"]


def test_training_goes_on_from_where_it_ended(tmp_path):
    """A second `train()` keeps optimizer state and weights, as the Trainer's does."""
    expected = plain(tmp_path / "plain", eval_strategy="no")
    expected.train()
    trainer = population(tmp_path / "one", size=1, eval_strategy="no")
    trainer.train()
    trainer.train()
    assert same_weights(trainer.model, expected.model)


def test_soft_labels_get_the_soft_cross_entropy_whatever_the_accumulation(tmp_path):
    def soft(features):
        batch = torch.utils.data.default_collate(features)
        return {"pixel_values": batch["pixel_values"], "labels": nn.functional.one_hot(batch["labels"], 10).float()}

    soft.soft_labels = True
    settings = {"gradient_accumulation_steps": 2, "eval_strategy": "no", "max_steps": 6, "logging_steps": 1}
    hard = population(tmp_path / "hard", size=1, **settings)
    hard.train()
    one_hot = population(tmp_path / "soft", size=1, trainer={"data_collator": soft}, **settings)
    one_hot.train()
    assert one_hot.model.config.problem_type is None
    for a, b in zip(hard.model.parameters(), one_hot.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [e["loss"] for e in history(one_hot)[:-1]] == pytest.approx(
        [e["loss"] for e in history(hard)[:-1]], rel=1e-4
    )


def test_the_log_is_json(tmp_path):
    trainer = population(tmp_path, size=2)
    trainer.train()
    trainer.save_state()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 12
