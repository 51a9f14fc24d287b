"""`trainer.verify_checkpoint()` of a run of one process, on two, and the other way round: one verdict on all."""

import json
import shutil
from pathlib import Path

import pytest
from altered_checkpoints import change, damage, fingerprint, flip_moment, flip_stream, flip_weight
from replay_run import RUN
from small_population import outcome, population


pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "replay_run.py"


def test_on_another_number_of_processes(launch, tmp_path):
    trainer = population(tmp_path / "run", **RUN)
    trainer.train()
    run = outcome(trainer)
    for name, edit in (
        ("member_3/model.safetensors", flip_weight),
        ("member_2/optimizer.pt", flip_moment),
        ("member_1/streams.json", flip_stream),
        ("model.safetensors", flip_weight),
    ):
        folder = tmp_path / name.split("/")[0]
        shutil.copytree(tmp_path / "run", folder)
        change(folder / "checkpoint-4", name, edit)
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    damage(tmp_path / "damaged" / "checkpoint-4" / "member_3" / "model.safetensors")
    well = [str(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 6)]
    flipped = {
        str(tmp_path / place / "checkpoint-4"): found
        for place, found in (
            ("member_3", (4, 3, "weights", "vit.layernorm.weight")),
            ("member_2", (4, 2, "optimizer state", "classifier.bias.exp_avg_sq")),
            ("member_1", (4, 1, "random streams", "streams.python.1")),
            ("model.safetensors", (4, None, "weights of the soup", "vit.layernorm.weight")),
        )
    }
    refused = [str(tmp_path / "damaged" / "checkpoint-4"), str(tmp_path / "nowhere")]
    before = fingerprint(tmp_path / "run")
    launch(SCRIPT, tmp_path, *well, *flipped, *refused, timeout=240)
    said, other = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    assert said == other
    assert all(said[checkpoint]["difference"] is None for checkpoint in well)
    for checkpoint, found in flipped.items():
        difference = said[checkpoint]["difference"]
        assert tuple(difference[name] for name in ("step", "member", "part", "tensor")) == found
    assert "is not what was written" in said[refused[0]]
    assert "Cannot replay: there is no folder" in said[refused[1]]
    assert said["run"] == run
    assert said["own"]
    assert fingerprint(tmp_path / "run") == before
    replay = population(tmp_path / "again", **RUN).verify_checkpoint(tmp_path / "here" / "checkpoint-4")
    assert replay.identical, str(replay)
