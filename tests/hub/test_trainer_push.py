"""What `WashTrainer` pushes while it trains and afterwards, and that a failing Hub costs no training."""

import json
from pathlib import Path

import pytest
import yaml

from hf_wash.trainer import checkpoint


HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def found(hub, fresh_process, place):
    hub.faults["user/quota"] = "quota"
    return fresh_process("train_script.py", place)[1]


def test_every_save_pushes_the_soup_of_that_step_and_the_end_the_members(found, hub):
    repository, files = hub.repositories["user/every-save"], hub.files("user/every-save")
    assert repository.messages == [
        "initial commit", "Training in progress, step 2", "Training in progress, step 4", "End of training",
    ]  # fmt: skip
    soups = {tree["model.safetensors"] for tree in repository.trees.values() if "model.safetensors" in tree}
    assert len(soups) == 2
    assert {path.split("/")[1] for path in files if path.startswith("members/")} == {"member_0", "member_1"}
    # config.json says how images are prepared; a processor's file beside it would be another answer.
    assert "preprocessor_config.json" not in files
    assert not [path for path in files if path.startswith(("_", "checkpoint", "member_")) or "optimizer" in path]


def test_a_repository_has_a_card_while_training_goes_on(found, hub):
    repository = hub.repositories["user/every-save"]
    first = next(tree for oid, tree in repository.trees.items() if "model.safetensors" in tree)
    card = hub.blobs[first["README.md"]].decode()
    assert "library_name: timm" in card and 'hf_hub:user/every-save"' in card


def test_the_last_card_knows_what_push_to_hub_was_told(found, hub):
    card = hub.files("user/every-save")["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "mit" and front["datasets"] == ["user/noise"]
    assert front["model-index"][0]["name"] == "every-save"
    assert 'Ensemble.from_pretrained("user/every-save")' in card


def test_a_whole_checkpoint_is_in_the_repository_whatever_rotation_removes_here(found, hub, tmp_path):
    assert [name for name in found["checkpoint"]["local"] if name.startswith("checkpoint-")] == ["checkpoint-4"]
    assert hub.repositories["user/last-checkpoint-run"].private
    files = hub.files("user/last-checkpoint-run", "dev")
    assert set(hub.files("user/last-checkpoint-run")) == {".gitattributes"}
    for name, content in files.items():
        if name.startswith("last-checkpoint/"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    assert checkpoint.verify(tmp_path / "last-checkpoint")["step"] == 4
    assert "members" not in {path.split("/")[0] for path in files}


def test_all_checkpoints_are_there_if_all_are_asked_for(found, hub):
    folders = {path.split("/")[0] for path in hub.files("user/all") if "/" in path}
    assert {"checkpoint-2", "checkpoint-4"} <= folders
    assert "checkpoint-2/member_1/optimizer.pt" in hub.files("user/all")


def test_uploads_leave_nothing_behind(found):
    for run in ("every save", "checkpoint", "full"):
        assert not [name for name in found[run]["local"] if name.startswith("_pushing")]


def test_a_full_hub_stops_neither_training_nor_what_follows_it(found, place):
    full = found["full"]
    assert full["steps"] == 4
    assert {"model.safetensors", "README.md", "_members", "checkpoint-4"} <= set(full["local"])
    failed = [text for text in full["messages"] if "403" in text]
    assert any("checkpoint-2" in text for text in failed) and any("checkpoint-4" in text for text in failed)
    assert any(text.startswith("ERROR") and "hf-wash push" in text for text in failed)
    assert f"hf-wash push {place / 'full'} user/quota" in full["error"]


def test_a_hub_that_refuses_the_token_is_noticed_before_training(found):
    assert "401" in found["refused"]["error"] and "hf auth login" in found["refused"]["error"]
    assert found["refused"]["seconds"] < 30


@pytest.mark.distributed
def test_no_process_waits_for_another_when_pushing_after_training(launch, hub, tmp_path):
    environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(HERE.parent)}
    completed = launch(HERE / "rank_0_script.py", tmp_path / "two", env=environment, timeout=120)
    assert "process 0 done" in completed.stdout and "process 1 done" in completed.stdout
    files = hub.files("user/two")
    assert {"model.safetensors", "members/member_0/model.safetensors", "members/member_1/config.json"} <= set(files)
    record = json.loads(files["wash_run.json"])
    assert record["hardware"]["processes"] == 2 and record["exchange"]["bytes_exchanged"] > 0
