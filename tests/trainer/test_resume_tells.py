"""Resuming says from what, and which changed options take effect; a run that is finished stays so."""

import json
import logging
import shutil

import pytest
from small_population import Digits, DigitStream, digest, population, started, vit

from hf_wash import MemberOverrides
from hf_wash.mixing import ContagionError
from hf_wash.trainer.options import recorded


SETTINGS = {
    "size": 2, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "no", "shuffle_optimizer_state": False,
    "weight_decay": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = population(folder, **SETTINGS)
    trainer.train()
    (folder / "soup.txt").write_text(digest(trainer.model))
    return folder


@pytest.fixture
def say(caplog):
    """What a user sees: warnings of ours."""

    def said():
        ours = [record for record in caplog.records if record.name.startswith("hf_wash")]
        return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]

    return said


def resumed(run_folder, output_dir, **settings):
    trainer = population(output_dir, **{**SETTINGS, "save_strategy": "no", **settings})
    trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-8"))
    return trainer


# ---- From what -----------------------------------------------------------------------------------------------------


def test_the_checkpoint_that_auto_took_stands_on_the_screen(run_folder, tmp_path, say):
    shutil.copytree(run_folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoint-12")
    population(tmp_path / "copy", **SETTINGS).train(resume_from_checkpoint="auto")
    run = json.loads((run_folder / "checkpoint-8" / "population.json").read_text())["run"]
    assert f"Resuming from `{tmp_path / 'copy' / 'checkpoint-8'}` (step 8 of run {run[:8]})." in say()


def test_that_there_was_none_stands_on_the_screen(tmp_path, say):
    population(tmp_path / "new", **SETTINGS).train(resume_from_checkpoint="auto")
    assert f"There is no complete checkpoint in `{tmp_path / 'new'}`: a new run begins." in say()


def test_a_run_that_asks_for_nothing_is_told_nothing(tmp_path, say):
    population(tmp_path / "new", **{**SETTINGS, "max_steps": 1}).train()
    assert not [text for text in say() if "esum" in text or "checkpoint" in text]


# ---- Options -------------------------------------------------------------------------------------------------------

WITHOUT_EFFECT = {
    "learning_rate": 1e-4, "weight_decay": 0.9, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.1,
    "optim": "adamw_torch", "logging_steps": 3, "eval_steps": 3, "save_steps": 3, "num_train_epochs": 9.0,
    "shuffle_probability": None,
}  # fmt: skip
EFFECTIVE = {
    "max_steps": 11, "warmup_steps": 11, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2, "max_grad_norm": 0.01, "label_smoothing_factor": 0.5, "bf16": True,
    "mixing": "independent", "shuffle_probability": 0.9, "shuffle_schedule": "constant", "shuffle_interval": 3,
    "shuffle_start": 0.9, "shuffle_stop": 0.7, "shuffle_optimizer_state": True, "member_data": "shard",
    "dataloader_num_workers": 1,
}  # fmt: skip


def test_the_same_options_are_not_told(run_folder, tmp_path, say):
    trainer = resumed(run_folder, tmp_path)
    assert digest(trainer.model) == (run_folder / "soup.txt").read_text()
    assert not [text for text in say() if "options" in text]


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_changed_and_takes_no_effect_is_told_and_takes_none(run_folder, tmp_path, say, name):
    trainer = resumed(run_folder, tmp_path, **{name: WITHOUT_EFFECT[name]})
    assert digest(trainer.model) == (run_folder / "soup.txt").read_text()
    (told,) = [text for text in say() if "other options" in text]
    before, after = told.partition("Without effect, since the checkpoint brings what it was: ")[::2]
    assert f"{name} was " in after and f"and is {WITHOUT_EFFECT[name]!r}" in after and f"{name} was" not in before


@pytest.mark.parametrize("name", EFFECTIVE)
def test_what_changed_and_takes_effect_is_told_and_takes_it(run_folder, tmp_path, say, name):
    trainer = resumed(run_folder, tmp_path, **{name: EFFECTIVE[name]})
    assert digest(trainer.model) != (run_folder / "soup.txt").read_text()
    (told,) = [text for text in say() if "other options" in text]
    before = told.partition("Without effect")[0]
    assert f"Taking effect from here on: {name} was " in before and f"and is {EFFECTIVE[name]!r}" in before


def test_what_is_advised_after_a_divergence_is_what_takes_effect():
    advice = str(ContagionError([1], 3))
    assert "`max_grad_norm`" in advice and "max_grad_norm" in EFFECTIVE
    assert "lower `learning_rate` takes effect in a new run only" in advice and "learning_rate" in WITHOUT_EFFECT


def test_members_own_settings_are_compared(run_folder, tmp_path, say):
    members = [MemberOverrides(), MemberOverrides(learning_rate=0.5, label_smoothing_factor=0.1)]
    resumed(run_folder, tmp_path, trainer={"members": members})
    (told,) = [text for text in say() if "other options" in text]
    before, after = told.split("Without effect")
    assert "label_smoothing_factor of member 1 was None and is 0.1" in before
    assert "learning_rate of member 1 was None and is 0.5" in after


def test_what_cannot_change_a_result_is_not_compared(run_folder, tmp_path, say):
    resumed(
        run_folder, tmp_path, run_name="another", report_to="none", hub_token="hf_secret", save_total_limit=2,
        dataloader_pin_memory=False, push_members=True,
    )  # fmt: skip
    assert not [text for text in say() if "other options" in text]


def test_an_option_that_only_the_checkpoint_has_is_told(run_folder, tmp_path, say):
    from test_manifest import reseal

    shutil.copytree(run_folder, tmp_path / "copy")
    reseal(tmp_path / "copy" / "checkpoint-8", lambda content: content["arguments"].update(packing=True))
    resumed(tmp_path / "copy", tmp_path / "out")
    assert any("packing was True and is no option here" in text for text in say())


def test_all_options_are_kept_and_no_secret(run_folder):
    trainer = population("unused", **SETTINGS, hub_token="hf_secret")
    content = json.loads((run_folder / "checkpoint-8" / "population.json").read_text())
    assert {**content["options"], **content["arguments"]}.keys() >= set(WITHOUT_EFFECT) | set(EFFECTIVE)
    assert "hf_secret" not in json.dumps(recorded(trainer.args))


def test_frozen_weights_of_members_own_are_not_shared_by_resuming(tmp_path):
    def half_frozen():
        model = vit()
        model.vit.embeddings.requires_grad_(False)
        return model

    first = population(tmp_path, **SETTINGS, same_init=False, trainer={"model_init": half_frozen})
    first.train()
    again = population(tmp_path, **{**SETTINGS, "max_steps": 16}, model=started(half_frozen))
    with pytest.raises(ValueError, match=r"written with `same_init=False`.*frozen"):
        again.train(resume_from_checkpoint=True)


def test_a_schedule_that_cannot_take_the_state_is_refused(run_folder, tmp_path):
    with pytest.raises(ValueError, match="written with `lr_scheduler_type='linear'`"):
        resumed(run_folder, tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=4)


# ---- A finished run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["auto", True, "checkpoint-12"])
def test_a_finished_run_trains_nothing_more(run_folder, tmp_path, say, asked):
    shutil.copytree(run_folder, tmp_path / "copy")
    trainer = population(tmp_path / "copy", **SETTINGS)
    result = trainer.train(
        resume_from_checkpoint=str(tmp_path / "copy" / asked) if asked == "checkpoint-12" else asked
    )
    assert result.global_step == trainer.state.global_step == 12
    assert digest(trainer.model) == (run_folder / "soup.txt").read_text()
    assert trainer.values_moved > 0
    assert any("is finished (12 of 12 steps): nothing is left to train." in text for text in say())
    assert sorted(path.name for path in (tmp_path / "copy").glob("checkpoint-*")) == [
        "checkpoint-12", "checkpoint-4", "checkpoint-8",
    ]  # fmt: skip


def test_a_run_of_whole_epochs_is_finished_at_their_end(tmp_path, say):
    settings = {
        **SETTINGS, "max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch",
        "trainer": {"train_dataset": Digits(0, 64, noisy=True)},
    }  # fmt: skip
    first = population(tmp_path, **settings)
    came_to = first.train()
    first.save_metrics("train", came_to.metrics)
    first.save_state()
    again = population(tmp_path, **settings)
    result = again.train(resume_from_checkpoint="auto")
    assert result.global_step == first.state.global_step == 8
    # What was measured then stays, wherever it is looked for: there is nothing to measure now.
    figures = {name: value for name, value in came_to.metrics.items() if name != "epoch"}
    assert figures["train_loss"] > 0 and figures.items() <= result.metrics.items()
    assert result.training_loss == came_to.training_loss
    assert figures.items() <= again.state.log_history[-1].items()
    assert digest(again.model) == digest(first.model) and again.values_moved == first.values_moved
    assert any("(8 of 8 steps): nothing is left to train, and the figures" in text for text in say())
    # Those of another run are not its.
    (tmp_path / "wash_run.json").write_text(json.dumps({"run": "another"}))
    assert population(tmp_path, **settings).train(resume_from_checkpoint="auto").training_loss == 0
    # There is more to do with more epochs.
    more = population(tmp_path, **{**settings, "num_train_epochs": 3})
    assert more.train(resume_from_checkpoint="auto").global_step == 12


def test_a_finished_run_of_a_stream_trains_nothing_more(tmp_path):
    settings = {**SETTINGS, "max_steps": 4, "trainer": {"train_dataset": DigitStream(320)}}
    first = population(tmp_path, **settings)
    first.train()
    again = population(tmp_path, **settings)
    assert again.train(resume_from_checkpoint="auto").global_step == 4
    assert digest(again.model) == digest(first.model)


def test_fewer_steps_than_have_been_taken_train_nothing(run_folder, tmp_path):
    trainer = resumed(run_folder, tmp_path, max_steps=6)
    assert trainer.state.global_step == 8


def test_a_finished_run_serves_its_best_population(tmp_path):
    settings = {
        **SETTINGS, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "learning_rate": 0.05,
    }  # fmt: skip
    first = population(tmp_path, **settings)
    first.train()
    again = population(tmp_path, **settings)
    again.train(resume_from_checkpoint="auto")
    assert digest(again.model) == digest(first.model)
    assert again.state.best_model_checkpoint == first.state.best_model_checkpoint


# ---- A run that is refused ------------------------------------------------------------------------------------------


def test_a_run_that_is_refused_leaves_no_empty_folder(tmp_path):
    (tmp_path / "there").mkdir()
    for place in (tmp_path / "there", tmp_path / "new" / "run"):
        with pytest.raises(ValueError, match="No complete checkpoint"):
            population(place, **SETTINGS).train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="needs a `train_dataset`"):
            population(place, **SETTINGS, trainer={"train_dataset": None}).check()
        with pytest.raises(ValueError, match="needs a `train_dataset`"):
            population(place, **SETTINGS, trainer={"train_dataset": None}).train()
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
