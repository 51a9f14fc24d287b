"""The way to the Hub and back, with the real client, and what is left when it fails."""

import json
import re
import shutil
import threading

import pytest
import torch
import yaml
from hub.load_script import logits_of
from hub.loopback_hub import READER, STRANGER
from transformers import AutoModelForImageClassification

from hf_wash.hub import push
from hf_wash.hub.push import member_files, root_files


FAULTS = {
    "quota": ("403", "storage limit"),
    "too large": ("413", "too large"),
    # Large files go up side by side, so that any of them may be the one that is cut first.
    "cut": (
        r"uploading '(model\.safetensors|training_args\.bin|pictures/\w+\.png)'",
        "isconnect|closed|reset|Broken pipe|ReadError|WriteError",
    ),
}


@pytest.fixture(scope="module")
def outcomes(hub, fresh_process, vit_run, timm_run, tmp_path_factory):
    """All pushes of this file, made by one fresh process."""
    place = tmp_path_factory.mktemp("pushes")
    broken_card = place / "broken-card"
    shutil.copytree(vit_run, broken_card)
    (broken_card / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n", encoding="utf-8")
    pickles = place / "pickles"
    pickles.mkdir()
    torch.save({"weight": torch.zeros(1)}, pickles / "pytorch_model.bin")
    no_members = place / "no-members"
    shutil.copytree(vit_run, no_members, ignore=shutil.ignore_patterns("_members"))
    smaller = place / "smaller"
    shutil.copytree(vit_run, smaller)
    shutil.rmtree(smaller / "_members" / "member_1")
    record = json.loads((smaller / "wash_run.json").read_text())
    record["population"]["size"] = 1
    (smaller / "wash_run.json").write_text(json.dumps(record))
    (vit_run / "checkpoint-3").mkdir(exist_ok=True)
    (vit_run / "checkpoint-3" / "model.safetensors").write_bytes(b"not whole")
    (vit_run / "_incomplete-checkpoint-4").mkdir(exist_ok=True)
    (vit_run / "_incomplete-checkpoint-4" / "model.safetensors").write_bytes(b"not whole")
    for fault in FAULTS:
        hub.faults[f"user/{fault.replace(' ', '-')}"] = fault
    hub.faults["user/cut-once"] = "cut once"
    runs = {
        "vits": (vit_run, "user/vits", {"members": True}),
        "resnets": (timm_run, "resnets", {"members": True, "private": True}),
        "branch": (vit_run, "user/branched", {"revision": "other", "commit_message": "A branch"}),
        "again": (vit_run, "user/vits", {"members": True}),
        "without members": (vit_run, "user/lean", {}),
        "in the background": (vit_run, "user/background", {"blocking": False}),
        "broken card": (broken_card, "user/broken-card", {}),
        "pickles": (pickles, "user/pickles", {}),
        "no members": (no_members, "user/no-members", {"members": True}),
        "larger": (vit_run, "user/smaller", {"members": True}),
        "smaller": (smaller, "user/smaller", {"members": True}),
        "wrong token": (vit_run, "user/wrong", {"token": STRANGER, "members": True, "revision": "a b"}),
        "read token": (vit_run, "user/read", {"token": READER}),
        "someone else's": (vit_run, "someone/else", {}),
        "bad name": (vit_run, "user/what is this", {}),
        "cut once": (vit_run, "user/cut-once", {}),
        **{fault: (vit_run, f"user/{fault.replace(' ', '-')}", {}) for fault in FAULTS},
    }
    plan = place / "plan.json"
    plan.write_text(json.dumps(runs, default=str))
    return fresh_process("push_script.py", plan)[1]


@pytest.fixture(scope="module")
def loaded(outcomes, fresh_process):
    """What a fresh process loads from the Hub afterwards."""
    return fresh_process("load_script.py")[1]


def test_the_soup_is_at_the_root_and_the_members_beside_it_in_one_commit(outcomes, hub, vit_run):
    files = hub.files("user/vits")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "README.md", "wash_run.json"):
        assert files[name] == (vit_run / name).read_bytes()
    for index in range(2):
        name = f"member_{index}/model.safetensors"
        assert files[f"members/{name}"] == (vit_run / "_members" / name).read_bytes()
    assert outcomes["vits"]["untouched"]
    assert hub.repositories["user/vits"].messages == ["initial commit", "Upload with hf-wash"]


def test_checkpoints_and_what_is_unfinished_stay_here(outcomes, hub):
    for name in hub.repositories:
        assert not [path for path in hub.files(name) if path.startswith(("checkpoint-", "_"))]


def test_a_repository_is_private_and_a_branch_made_when_asked_for(outcomes, hub):
    assert hub.repositories["user/resnets"].private
    assert not hub.repositories["user/vits"].private
    assert hub.repositories["user/branched"].messages == ["initial commit", "A branch"]
    assert "model.safetensors" in hub.files("user/branched", "other")
    assert set(hub.files("user/branched")) == {".gitattributes"}


def test_an_unchanged_run_makes_no_second_commit(outcomes, hub):
    assert outcomes["again"]["commit"] == outcomes["vits"]["commit"]


def test_members_stay_here_unless_asked_for(outcomes, hub):
    assert not [path for path in hub.files("user/lean") if "member" in path]


def test_members_of_an_earlier_larger_population_do_not_stay_behind(outcomes, hub):
    members = {path.split("/")[1] for path in hub.files("user/smaller") if path.startswith("members/")}
    assert members == {"member_0"}


def test_a_push_in_the_background_gives_its_commit(outcomes, hub):
    assert outcomes["in the background"]["commit"] == hub.repositories["user/background"].branches["main"]


def test_a_card_that_the_hub_would_refuse_is_left_out_and_reported(outcomes, hub):
    files = hub.files("user/broken-card")
    assert "README.md" not in files and "model.safetensors" in files
    assert outcomes["broken card"]["untouched"]
    assert any(
        "README.md" in text and "not valid YAML in line" in text for text in outcomes["broken card"]["warnings"]
    )


def test_what_cannot_be_pushed_is_refused_before_a_repository_is_made(outcomes, hub):
    assert "pickle" in outcomes["pickles"]["error"] and outcomes["pickles"]["type"] == "ValueError"
    assert "_members/member_0" in outcomes["no members"]["error"]
    assert "user/pickles" not in hub.repositories and "user/no-members" not in hub.repositories


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_upload_leaves_everything_here_and_says_how_to_push_later(outcomes, hub, vit_run, fault):
    outcome, repo_id = outcomes[fault], f"user/{fault.replace(' ', '-')}"
    assert outcome["type"] == "PushError" and outcome["untouched"]
    for expected in FAULTS[fault]:
        assert re.search(expected, outcome["error"]), outcome["error"]
    assert f"`hf-wash push {vit_run} {repo_id}`" in outcome["error"]
    assert "\n" not in outcome["error"]
    assert set(hub.files(repo_id)) == {".gitattributes"}


def test_a_wrong_token_is_named_and_nothing_is_made(outcomes, hub, vit_run):
    error = outcomes["wrong token"]["error"]
    assert "401" in error and "hf auth login" in error
    assert f"hf-wash push {vit_run} user/wrong --members --revision 'a b'" in error
    assert "403" in outcomes["read token"]["error"]
    assert "403" in outcomes["someone else's"]["error"] and "someone/else" in outcomes["someone else's"]["error"]
    assert "user/what is this" in outcomes["bad name"]["error"]
    assert not {"user/wrong", "user/read", "someone/else"} & set(hub.repositories)


def test_a_connection_cut_once_is_tried_again(outcomes, hub, vit_run):
    assert hub.files("user/cut-once")["model.safetensors"] == (vit_run / "model.safetensors").read_bytes()


def test_every_loader_gets_the_soup_that_was_pushed(loaded, vit_run, timm_run):
    vit = logits_of(AutoModelForImageClassification.from_pretrained(vit_run), 16)
    resnet = logits_of(AutoModelForImageClassification.from_pretrained(timm_run), 32)
    for name in ("transformers", "load_model", "branch"):
        torch.testing.assert_close(torch.tensor(loaded[name]), torch.tensor(vit), atol=1e-6, rtol=1e-5)
    for name in ("timm", "timm by transformers"):
        torch.testing.assert_close(torch.tensor(loaded[name]), torch.tensor(resnet), atol=1e-6, rtol=1e-5)
    for name in ("user/vits", "user/resnets"):
        assert {answer["label"] for answer in loaded[f"pipeline {name}"]} == {"ant", "bee", "cat"}


def test_the_ensemble_is_rebuilt_by_one_call(loaded, vit_run):
    members = [AutoModelForImageClassification.from_pretrained(vit_run / "_members" / f"member_{i}") for i in range(2)]
    mean = torch.stack([torch.tensor(logits_of(member, 16)).softmax(-1) for member in members]).mean(0)
    torch.testing.assert_close(torch.tensor(loaded["ensemble"]).softmax(-1), mean, atol=1e-6, rtol=1e-5)
    assert len(loaded["timm ensemble"]) == 2


def test_the_hub_understands_the_card(outcomes, hub):
    front = yaml.safe_load(hub.files("user/resnets")["README.md"].decode().split("---\n")[1])
    assert front["library_name"] == "timm" and front["pipeline_tag"] == "image-classification"


def test_root_files_are_those_that_trainer_would_upload(tmp_path):
    for name in (
        "a.json",
        "runs/x",
        "_members/member_0/a",
        "checkpoint-1/a",
        ".git/config",
        "sub/_b",
        "checkpoints.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert set(root_files(tmp_path)) == {"a.json", "runs/x", "sub/_b", "checkpoints.md"}


def test_an_upload_in_the_background_sends_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("before")
    removed, sent = threading.Event(), {}

    def slow_upload(repo_id, files, **options):
        assert removed.wait(20)
        sent.update({name: path.read_bytes() for name, path in files.items()}, **options)

    monkeypatch.setattr(push, "push_files", slow_upload)
    files = {"model.safetensors": checkpoint / "model.safetensors", "README.md": tmp_path / "README.md"}
    job = push.push_in_background("user/it", files, tmp_path, commit_message="now")
    shutil.rmtree(checkpoint)
    (tmp_path / "README.md").write_text("after")
    removed.set()
    job.result(timeout=20)
    assert sent == {"model.safetensors": b"weights", "README.md": b"before", "commit_message": "now"}
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_missing_member_is_named(tmp_path, vit_run):
    shutil.copytree(vit_run / "_members", tmp_path / "_members")
    assert {name.split("/")[1] for name in member_files(tmp_path)} == {"member_0", "member_1"}
    with pytest.raises(ValueError, match="member_2 is missing"):
        member_files(tmp_path, 3)
