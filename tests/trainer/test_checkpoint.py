"""A checkpoint is whole or it is not there; what is damaged is named and skipped."""

import json
import os
import pickle
import shutil

import pytest
import torch
from small_population import digest, history, population, started, vit

from hf_wash.trainer import checkpoint, manifest


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = population(folder, size=2, save_strategy="steps", save_steps=4)
    trainer.train()
    (folder / "soup.txt").write_text(digest(trainer.model))
    return folder


@pytest.fixture
def copied(run_folder, tmp_path):
    """The run without its last checkpoint, to be damaged."""
    target = tmp_path / "copy"
    shutil.copytree(run_folder, target)
    shutil.rmtree(target / "checkpoint-12")
    return target


def resume(folder, from_where="auto", **settings):
    trainer = population(folder, size=2, save_strategy="steps", save_steps=4, **settings)
    trainer.train(resume_from_checkpoint=from_where)
    return trainer


def test_a_checkpoint_holds_what_was_promised(run_folder):
    folder = run_folder / "checkpoint-4"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "trainer_state.json", "population.json"} <= names
    assert {
        f"member_{i}/{name}" for i in (0, 1) for name in ("model.safetensors", "optimizer.pt", "streams.json")
    } <= names
    content = json.loads((folder / "population.json").read_text())
    assert set(content["files"]) == names - {"population.json"}
    assert content["step"] == 4 and content["population_size"] == 2 and content["members"] == [0, 1]
    assert not list(run_folder.glob("_*"))


def truncate(folder):
    path = folder / "member_1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder):
    path = folder / "member_0" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


def reseal(folder, change):
    """Change a manifest as somebody would who knows how its digest is made."""
    path = folder / "population.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(manifest.seal(content)))


def lie(folder):
    reseal(folder, lambda content: content["files"]["model.safetensors"].update(sha256="0" * 64))


def garble(folder):
    (folder / "population.json").write_text("{")


def point_outside(folder):
    record = {"size": 1, "sha256": "0" * 64}
    reseal(folder, lambda content: content["files"].update({"../checkpoint-4/model.safetensors": record}))


DAMAGES = {
    "a truncated weight file": (truncate, r"member_1/model.safetensors.* bytes instead of"),
    "a flipped bit": (flip, r"member_0/model.safetensors.* SHA-256 differs"),
    "a manifest that lies": (lie, r"`.*model.safetensors` is not what was written"),
    "no manifest": (lambda folder: (folder / "population.json").unlink(), "has no population.json"),
    "a manifest that is no JSON": (garble, "cannot be read"),
    "a missing file": (lambda folder: (folder / "member_0" / "streams.json").unlink(), "streams.json` is missing"),
    "a file outside": (point_outside, "outside of it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_skipped_for_the_checkpoint_before(copied, damage):
    harm, said = DAMAGES[damage]
    harm(copied / "checkpoint-8")
    with pytest.raises(checkpoint.InvalidCheckpoint, match=said):
        checkpoint.verify(copied / "checkpoint-8")
    found, skipped = checkpoint.newest_complete(copied)
    assert found.name == "checkpoint-4"
    ((path, _reason),) = skipped
    assert path.name == "checkpoint-8"
    with pytest.raises(ValueError, match="Cannot resume"):
        resume(copied, str(copied / "checkpoint-8"))


def test_a_damaged_checkpoint_does_not_change_the_result(copied, run_folder, monkeypatch):
    said = []
    monkeypatch.setattr("hf_wash.trainer.checkpoint.logger.warning", said.append)
    truncate(copied / "checkpoint-8")
    trainer = resume(copied)
    assert any("checkpoint-8" in text and "skipped" in text for text in said)
    assert digest(trainer.model) == (run_folder / "soup.txt").read_text()


def test_a_command_line_may_say_true(copied, run_folder):
    trainer = resume(copied, "True")
    assert digest(trainer.model) == (run_folder / "soup.txt").read_text()


def test_a_folder_that_is_not_there_is_named_as_such(tmp_path):
    with pytest.raises(ValueError, match=r"Cannot resume: there is no folder `.*nowhere`"):
        resume(tmp_path, str(tmp_path / "nowhere"))


def test_auto_starts_afresh_where_there_is_nothing(tmp_path):
    trainer = resume(tmp_path / "new", eval_strategy="no")
    assert trainer.state.global_step == 12


def test_a_resumed_run_is_the_undisturbed_one_with_its_log(copied, run_folder):
    trainer = resume(copied, True)
    assert digest(trainer.model) == (run_folder / "soup.txt").read_text()
    state = json.loads((run_folder / "checkpoint-12" / "trainer_state.json").read_text())
    kept = [{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in state["log_history"]]
    assert history(trainer)[: len(kept)] == kept


@pytest.mark.parametrize("settings", [{"dataloader_num_workers": 1}, {"gradient_accumulation_steps": 2}])
def test_resuming_in_the_middle_of_an_epoch(tmp_path, settings):
    whole = population(tmp_path, size=2, save_strategy="steps", save_steps=5, max_steps=8, **settings)
    whole.train()
    again = population(tmp_path / "again", size=2, save_strategy="no", max_steps=8, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert digest(again.model) == digest(whole.model)


def test_the_checkpoints_population_size_is_taken_over(run_folder, tmp_path):
    trainer = population(tmp_path, size=None, save_strategy="no")
    assert trainer.population.size == 4
    trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-8"))
    assert trainer.population.size == 2
    assert digest(trainer.model) == (run_folder / "soup.txt").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 4}, "holds a population of 2, this run's is 4"),
        ({"seed": 8}, "shuffled with seed 7, this run's is 8"),
        ({"model": "wide"}, "another architecture.*has shape"),
    ],
)
def test_another_run_is_refused_with_the_difference(run_folder, tmp_path, settings, said):
    settings = {"size": 2, **settings}
    if settings.get("model"):
        settings["model"] = vit(hidden_size=32)
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    trainer = population(tmp_path, **settings)
    with pytest.raises(ValueError, match=said):
        trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-8"))
    assert before == {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}


def test_other_options_are_told(run_folder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_wash.trainer.checkpointing.logger.warning", said.append)
    trainer = population(tmp_path, size=2, shuffle_probability=0.2, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-8"))
    assert any("shuffle_probability was 0.3 and is 0.2" in text for text in said)


def test_a_part_of_the_run_is_no_other_option_than_the_steps_it_makes(tmp_path, monkeypatch):
    from transformers import trainer_utils

    said = []
    monkeypatch.setattr(trainer_utils.logger, "warning_once", lambda text, *_: said.append(text), raising=False)
    parts = {"logging_steps": 0.05, "eval_steps": 0.5, "save_steps": 0.25, "save_strategy": "steps"}
    population(tmp_path, **parts).train()
    shutil.rmtree(tmp_path / "checkpoint-12")
    resumed = population(tmp_path, **parts)
    resumed.train(resume_from_checkpoint=True)
    assert said == []
    assert (resumed.args.logging_steps, resumed.state.logging_steps) == (0.05, 1)
    population(tmp_path, **{**parts, "logging_steps": 0.5}).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-9")
    )
    assert len(said) == 1 and "logging_steps: 6 (from args) != 1" in said[0]


def test_weights_alone_cannot_be_resumed_from(tmp_path):
    settings = {"size": 2, "save_strategy": "steps", "save_steps": 4, "max_steps": 4, "eval_strategy": "no"}
    population(tmp_path, save_only_model=True, **settings).train()
    with pytest.raises(ValueError, match="weights only"):
        population(tmp_path, **{**settings, "max_steps": 8}).train(resume_from_checkpoint=True)


def test_loading_runs_no_code(copied):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(copied / "exploded"),)

    path = copied / "checkpoint-8" / "member_0" / "optimizer.pt"
    torch.save({"groups": Bomb()}, path)
    record = manifest.file_record(path)
    reseal(copied / "checkpoint-8", lambda content: content["files"].update({"member_0/optimizer.pt": record}))
    with pytest.raises(ValueError, match=r"optimizer.pt` holds what is no tensor") as caught:
        resume(copied)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and not isinstance(caught.value.__context__, pickle.UnpicklingError)
    assert not (copied / "exploded").exists()


def test_the_best_population_is_loaded_at_the_end(tmp_path):
    trainer = population(
        tmp_path, started(), size=2, learning_rate=0.05, max_steps=24, eval_steps=4, save_strategy="best",
        load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    (folder,) = tmp_path.glob("checkpoint-*")
    assert str(folder) == trainer.state.best_model_checkpoint
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    fresh = population(tmp_path / "fresh", size=2)
    for member, best in zip(fresh.population.members, trainer.population.members, strict=True):
        index = fresh.population.members.index(member)
        checkpoint.read_weights(member, folder / f"member_{index}" / "model.safetensors")
        assert digest(member) == digest(best)
