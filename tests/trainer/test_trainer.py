"""The soup, the members and the metrics of a run in one process."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_population import TEST, Digits, accuracy, digest, population, resnet, started, vit
from transformers import AutoModelForImageClassification

from hf_wash import MemberOverrides
from hf_wash.population.overrides import papa_recipes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = population(tmp_path_factory.mktemp("trained"), size=3)
    trainer.train()
    return trainer


def test_the_soup_is_the_mean_of_the_members(trained):
    for name, value in trained.model.state_dict().items():
        mean = torch.stack([m.state_dict()[name].double() for m in trained.population.members]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)


def test_metrics_have_the_promised_keys(trained):
    metrics = trained.evaluate()
    for name in ("loss", "accuracy"):
        expected = {f"eval_{name}", f"eval_ensemble_{name}", *(f"eval_member_{i}_{name}" for i in range(3))}
        expected |= {f"eval_members_{name}_{what}" for what in ("mean", "min", "max")}
        assert expected <= set(metrics)
    members = [metrics[f"eval_member_{i}_loss"] for i in range(3)]
    assert metrics["eval_members_loss_mean"] == pytest.approx(sum(members) / 3)
    assert metrics["eval_members_loss_min"], metrics["eval_members_loss_max"] == (min(members), max(members))
    json.dumps(metrics)


def test_log_lines_say_what_was_exchanged_and_how_far_members_are_apart(trained):
    lines = [line for line in trained.state.log_history if "loss" in line and "values_moved" in line]
    assert lines
    for line in lines:
        assert line["values_moved"] > 0 and line["bytes_exchanged"] == 4 * line["values_moved"]
        assert line["loss"] == pytest.approx(sum(line[f"member_{i}_loss"] for i in range(3)) / 3)
    exact = [line for line in trained.state.log_history if "eval_consensus_distance" in line][-1]
    assert lines[-1]["consensus_distance"] == pytest.approx(exact["eval_consensus_distance"], rel=0.1)


def test_the_ensemble_is_the_mean_of_probabilities(trained):
    images = torch.stack([TEST[i]["pixel_values"] for i in range(len(TEST))])
    labels = torch.stack([TEST[i]["labels"] for i in range(len(TEST))])
    with torch.no_grad():
        mean = torch.stack([m.eval()(images).logits.softmax(-1) for m in trained.population.members]).mean(0)
    metrics = trained.evaluate()
    assert metrics["eval_ensemble_accuracy"] == pytest.approx((mean.argmax(-1) == labels).double().mean().item())
    loss = torch.nn.functional.nll_loss(mean.log(), labels).item()
    assert metrics["eval_ensemble_loss"] == pytest.approx(loss, rel=1e-5)


def test_evaluation_leaves_members_and_their_randomness_alone(trained):
    population = trained.population
    streams = [population.streams.state(index)["cpu"] for index in population.indices]
    before = [digest(member) for member in population.members]
    trained.evaluate()
    assert [digest(member) for member in population.members] == before
    for index, state in zip(population.indices, streams, strict=True):
        assert torch.equal(population.streams.state(index)["cpu"], state)


def test_saved_soup_and_members_load_by_themselves(trained, tmp_path):
    trained.save_model(str(tmp_path))
    trained.save_members(str(tmp_path))
    soup = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert digest(soup) == digest(trained.model)
    for index, member in enumerate(trained.population.members):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "_members" / f"member_{index}")
        assert digest(loaded) == digest(member)


def test_members_of_an_earlier_and_larger_run_do_not_stay_among_those_of_this_one(trained, tmp_path):
    stale = tmp_path / "_members" / f"member_{trained.population.size}"
    other = tmp_path / "_members" / "notes"
    for folder in (stale, other):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    trained.save_members(str(tmp_path))
    assert not stale.exists() and other.exists()
    assert len(list((tmp_path / "_members").glob("member_*"))) == trained.population.size


def test_a_soup_saved_while_training_is_a_soup(tmp_path):
    trainer = population(tmp_path, size=2, save_strategy="steps", save_steps=6)
    trainer.train()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-6").state_dict()
    members = [load_file(tmp_path / "checkpoint-6" / f"member_{i}" / "model.safetensors") for i in range(2)]
    for name, value in saved.items():
        torch.testing.assert_close(value, (members[0][name] + members[1][name]) / 2)
    assert digest(AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-6")) != digest(trainer.model)


def test_members_share_what_is_frozen_and_only_the_rest_is_shuffled(tmp_path):
    model = started()
    for parameter in model.vit.parameters():
        parameter.requires_grad = False
    frozen = digest(model.vit)
    trainer = population(tmp_path, model, size=3, shuffle_schedule="constant", save_strategy="steps", save_steps=6)
    trainer.train()
    first, second, _ = trainer.population.members
    assert all(a is b for a, b in zip(first.vit.parameters(), second.vit.parameters(), strict=True))
    assert digest(trainer.model.vit) == frozen
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    kept = load_file(tmp_path / "checkpoint-6" / "member_1" / "model.safetensors")
    assert set(kept) == {"classifier.weight", "classifier.bias"}
    soup = digest(trainer.model)

    again = population(tmp_path / "again", size=3, shuffle_schedule="constant", model=_frozen_vit())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert digest(again.model) == soup


def _frozen_vit():
    model = started(seed=5)  # another backbone: the checkpoint brings its own
    for parameter in model.vit.parameters():
        parameter.requires_grad = False
    return model


def test_recalibration_makes_the_soup_of_a_batch_norm_model(tmp_path):
    results = {}
    for how in ("recalibrate", "average"):
        trainer = population(tmp_path / how, started(resnet), size=2, soup_batch_norm=how, max_steps=20)
        trainer.train()
        results[how] = trainer
    members = [digest(m) for m in results["average"].population.members]
    assert members == [digest(m) for m in results["recalibrate"].population.members]
    statistics = {how: dict(t.model.named_buffers()) for how, t in results.items()}
    for name, averaged in statistics["average"].items():
        if name.endswith("running_mean"):
            mean = torch.stack([dict(m.named_buffers())[name] for m in results["average"].population.members]).mean(0)
            torch.testing.assert_close(averaged, mean)
            assert not torch.equal(averaged, statistics["recalibrate"][name])


def test_the_greedy_soup_leaves_out_a_member_that_learned_nothing(tmp_path):
    members = [MemberOverrides(learning_rate=rate) for rate in (0.01, 1e-7, 0.01)]
    trainer = population(
        tmp_path, size=3, mixing="independent", soup="greedy", soup_holdout=0.2, max_steps=60, eval_steps=60,
        trainer={"members": members},
    )  # fmt: skip
    trainer.train()
    assert 1 not in trainer.greedy_record.indices
    assert trainer.greedy_record.score >= max(trainer.greedy_record.member_scores)
    assert trainer._batches.loaders[0].dataloader.dataset is not None
    assert len(trainer._batches.loaders[0].dataloader.dataset) == 330 - 66


def test_papas_recipes_train(tmp_path):
    recipes = papa_recipes(4, num_labels=10, seed=3)
    assert [r.describe() for r in recipes] == [r.describe() for r in papa_recipes(4, num_labels=10, seed=3)]
    assert len({str(r.describe()) for r in recipes}) > 1
    trainer = population(tmp_path, trainer={"members": recipes}, max_steps=25)
    trainer.train()
    assert trainer.model.config.problem_type != "multi_label_classification"
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_batchwise_metrics_are_those_of_the_whole_set(tmp_path):
    class Streaming:
        def __init__(self):
            self.right = self.count = 0

        def __call__(self, prediction, compute_result):
            self.right += (prediction.predictions.argmax(-1) == prediction.label_ids).sum().item()
            self.count += len(prediction.label_ids)
            if compute_result:
                result = {"accuracy": self.right / self.count}
                self.right = self.count = 0
                return result
            return None

    whole = population(tmp_path / "whole", size=2)
    batches = population(
        tmp_path / "batches", size=2, batch_eval_metrics=True, trainer={"compute_metrics": Streaming()}
    )
    keys = ("eval_accuracy", "eval_member_1_accuracy", "eval_ensemble_accuracy", "eval_loss")
    a, b = whole.evaluate(), batches.evaluate()
    assert [a[key] for key in keys] == [b[key] for key in keys]


def test_inputs_and_losses_reach_the_metrics_that_ask_for_them(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append((prediction.inputs.shape, prediction.losses.shape))
        return accuracy(prediction)

    population(
        tmp_path, size=2, include_for_metrics=["inputs", "loss"], trainer={"compute_metrics": metrics}
    ).evaluate()
    assert seen[0] == ((37, 1, 8, 8), (37,))


def test_without_metrics_there_are_losses_of_members_and_ensemble(tmp_path):
    metrics = population(tmp_path, size=2, trainer={"compute_metrics": None}).evaluate()
    assert {"eval_loss", "eval_member_1_loss", "eval_ensemble_loss"} <= set(metrics)


def test_members_need_not_be_evaluated(tmp_path):
    metrics = population(tmp_path, size=2, evaluate_members=False).evaluate()
    assert "eval_loss" in metrics and not any("member" in key or "ensemble" in key for key in metrics)


def test_each_member_is_clipped_by_itself(tmp_path):
    trainer = population(tmp_path, size=2, mixing="independent", max_grad_norm=1e-3, max_steps=1, eval_strategy="no")
    norms = []
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for member in trainer.population.members:
                norms.append(torch.stack([p.grad.norm() for p in member.parameters()]).norm().item())

    trainer.add_callback(Look)
    trainer.train()
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_training_steps_count_flops_of_all_members(tmp_path):
    one, two = population(tmp_path / "1", size=1, max_steps=2), population(tmp_path / "2", size=2, max_steps=2)
    one.train()
    two.train()
    assert two.state.total_flos == 2 * one.state.total_flos > 0


def test_tensorboard_gets_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    trainer = population(tmp_path / "run", vit(), size=2, report_to=["tensorboard"], max_steps=4, eval_steps=2)
    trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = tmp_path.rglob("events.out*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    assert {"eval/loss", "eval/member_0_loss", "train/values_moved"} <= set(events.Tags()["scalars"])


def test_trackio_gets_the_log(tmp_path):
    """In a process of its own: trackio reads where to write when it is imported."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from small_population import population
population({str(tmp_path / "run")!r}, size=2, report_to=["trackio"], project="wash", max_steps=4, eval_steps=2).train()
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (database,) = (tmp_path / "trackio").rglob("*.db")
    rows = sqlite3.connect(database).execute("select metrics from metrics").fetchall()
    logged = {key for (row,) in rows for key in json.loads(row)}
    assert {"eval/loss", "eval/member_0_loss", "train/values_moved"} <= logged


def test_a_second_run_of_a_model_init_starts_anew(tmp_path):
    trainer = population(tmp_path, size=2, max_steps=4, eval_strategy="no", trainer={"model_init": lambda: vit()})
    trainer.train()
    first = digest(trainer.model)
    trainer.train()
    assert digest(trainer.model) == first


def test_members_train_on_disjoint_parts_of_equal_size(tmp_path):
    trainer = population(tmp_path, size=4, member_data="shard", trainer={"train_dataset": Digits(0, 331)})
    parts = [set(member.train_dataset.indices) for member in trainer.members]
    assert [len(part) for part in parts] == [82] * 4 and len(set.union(*parts)) == 328


def test_compiled_members_train_as_they_would_uncompiled(tmp_path):
    plain = population(tmp_path / "plain", vit(hidden_dropout_prob=0.0), size=2, max_steps=6, eval_steps=3)
    start = {name: value.clone() for name, value in plain.model.state_dict().items()}
    plain.train()
    model = vit(hidden_dropout_prob=0.0)
    model.load_state_dict(start)
    # The eager backend goes the way of a compiled model without waiting for a compiler.
    compiled = population(
        tmp_path / "compiled",
        model,
        size=2,
        max_steps=6,
        eval_steps=3,
        torch_compile=True,
        torch_compile_backend="eager",
    )
    compiled.train()
    assert all(
        "_orig_mod" in type(m).__name__ or hasattr(m, "_orig_mod")
        for m in (member.prepared for member in compiled.members)
    )
    for a, b in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    compiled.save_model(str(tmp_path))
    assert digest(AutoModelForImageClassification.from_pretrained(tmp_path)) == digest(compiled.model)


def test_different_heads_on_one_frozen_backbone_share_it(tmp_path):
    def make():
        model = vit()
        model.vit.load_state_dict(started(seed=3).vit.state_dict())
        for parameter in model.vit.parameters():
            parameter.requires_grad = False
        return model

    trainer = population(tmp_path, size=2, same_init=False, max_steps=4, trainer={"model_init": make})
    first, second = trainer.population.members
    assert all(a is b for a, b in zip(first.vit.parameters(), second.vit.parameters(), strict=True))
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    trainer.train()
    assert digest(trainer.model.vit) == digest(started(seed=3).vit)
