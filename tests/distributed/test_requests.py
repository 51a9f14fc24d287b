"""What a callback asks for on one process, all do, at the step at which a single process would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from requests_run import REQUESTS


pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("requests_run.py")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each process said of each request: one launch for all."""
    folder = tmp_path_factory.mktemp("requests")
    command = [sys.executable, str(SCRIPT), str(folder), *REQUESTS, "logs_alone", "stop_beside_nccl", "chance"]
    subprocess.run(command, timeout=600, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    return lambda name, rank: (folder / name / f"said-{rank}.txt").read_text()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_of_one_process_is_one_of_all(said, name):
    alone, first, second = said(f"{name}-on-1", 0), said(f"{name}-on-2", 0), said(f"{name}-on-2", 1)
    assert json.loads(first) == json.loads(second) == json.loads(alone)


def test_requests_have_their_effect(said):
    """Else the test above would compare runs in which nothing happens."""
    found = {name: json.loads(said(f"{name}-on-2", 0)) for name in REQUESTS}
    stopped = dict.fromkeys(REQUESTS, 12)
    stopped |= {"stop": 3, "stop, mixing off": 3, "stop, asked for before the step": 4, "stop, within a step": 3}
    stopped |= {
        "stop, after an evaluation": 3,
        "stop, after a save": 3,
        "end the epoch": 3,
        "save, after an epoch": 24,
    }
    assert {name: outcome["step"] for name, outcome in found.items()} == stopped
    saves = {name for name, outcome in found.items() if outcome["saved"]}
    assert saves == {name for name in REQUESTS if "save" in name}
    assert next(entry["step"] for entry in found["evaluate"]["history"] if "eval_loss" in entry) == 3
    assert next(entry["step"] for entry in found["log"]["history"] if "loss" in entry) == 3


def test_logging_on_one_process_alone_is_no_request(said):
    assert [said("logs_alone", rank) for rank in range(2)] == ["12", "12"]


def test_requests_have_a_group_of_their_own_where_the_default_one_is_not_on_the_host(said):
    assert said("stop_beside_nccl", 0) == said("stop_beside_nccl", 1) == said("stop-on-2", 0)


def test_the_best_model_is_one_even_where_metrics_are_chance(said):
    assert [said("chance", rank) for rank in range(2)] == ["12", "12"]
