"""The peers' runs on one process and on two are the same to float32 rounding, also when they go on on the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_peers import PEERS


pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

RESUMED = ("papa", "sparta", "diloco", "pull")
SCRIPT = Path(__file__).parent / "peers_run.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable], launcher):
        completed = subprocess.run(
            [*command, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=240, env=dict(os.environ)
        )
        assert completed.returncode == 0, completed.stderr[-6000:]
    return folder


def read(folder, case, processes):
    return torch.load(folder / f"{case}-on-{processes}.pt", weights_only=True)


def same(one, other, **tolerance):
    assert one["moved"] == other["moved"] and one["moved"][0] > 0
    for first, second in zip(one["members"], other["members"], strict=True):
        for name in first:
            torch.testing.assert_close(
                first[name], second[name], msg=lambda text, at=name: f"{at}: {text}", **tolerance
            )


@pytest.mark.parametrize(
    "mixing", [*PEERS, "pull"]
)  # the last is a user's own, added as the page on contributing says
def test_on_two_processes_it_is_the_run_on_one(runs, mixing):
    same(read(runs, mixing, 1), read(runs, mixing, 2), rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("mixing", RESUMED)
def test_two_processes_go_on_from_the_checkpoint_of_one(runs, mixing):
    same(read(runs, mixing, 1), read(runs, f"{mixing}-resumed", 2), rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("mixing", ["papa_all", "papa_2"])
def test_what_is_repaired_is_so_on_two_processes_as_on_one(runs, mixing):
    case = f"{mixing}-repaired"
    same(read(runs, case, 1), read(runs, case, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "said"), [("too_long", "is longer than the run"), ("never", "every 500 steps unless")]
)
def test_every_process_is_told_what_does_not_fit_into_the_run(runs, case, said):
    told = {(runs / f"{case}-{rank}-of-2.txt").read_text() for rank in (0, 1)}
    assert told == {(runs / f"{case}-0-of-1.txt").read_text()} and said in told.pop()
