"""N members on one process, on 2 and on 4 are the same run, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scenarios


pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

NAMES = [scenario.__name__ for scenario in scenarios.SCENARIOS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def outcomes(folder):
    """All scenarios' outcomes on a number of processes, run once."""
    done = {}

    def on(processes):
        if processes not in done:
            # One launch for all scenarios: starting Python and importing torch takes longer than any of them.
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(processes),
            ]
            if processes == 1:
                command = [sys.executable]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "CUDA_VISIBLE_DEVICES": ""}
            completed = subprocess.run(
                [*command, scenarios.__file__, str(folder), *NAMES],
                env=environment, capture_output=True, text=True, timeout=500,
            )  # fmt: skip
            done[processes] = completed
            if completed.returncode:
                print(completed.stdout[-3000:], completed.stderr[-30_000:])
        return {
            name: json.loads(path.read_text()) if (path := folder / f"{name}-on-{processes}.json").exists() else None
            for name in NAMES
        }

    return on


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_the_same_members_soup_and_metrics(outcomes, name, processes):
    alone, spread = outcomes(1)[name], outcomes(processes)[name]
    assert alone is not None, "the scenario failed on one process"
    assert spread is not None, f"the scenario failed on {processes} processes"
    assert spread == alone


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_run_resumed_on_any_layout_is_the_undisturbed_one(outcomes, processes):
    outcomes(1)
    assert outcomes(processes)["resumed"] == outcomes(1)["checkpointed"]


def test_members_differ_and_training_did_something(outcomes):
    for name, outcome in outcomes(1).items():
        assert len(set(outcome["members"])) == 4, name
        assert outcome["soup"] not in outcome["members"], name
        losses = [entry["loss"] for entry in outcome["history"] if "loss" in entry]
        assert len(set(losses)) == len(losses) and losses, name
