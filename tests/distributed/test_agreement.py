"""A difference between processes is an error that names it, on every process, before the first step."""

from pathlib import Path

import pytest


pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "disagreement_run.py"
EXPECTED = {
    "division": "A population of 3 does not divide among 2 processes",
    "architecture": "'vit.embeddings.cls_token' has shape (1, 1, 32) in member 1 and (1, 1, 16) in member 0",
    "option": "option learning_rate: '0.001' against '0.002'",
    "steps": "different numbers of batches an epoch (member 0: 21, member 1: 15)",
    "weights": "initial weights: '",
    "folders": "of process 0 is not visible to process(es) 1",
    "each_node": "resumed True from ['member_{rank}']",
}


# An overflow on process 1 alone: all take 12 steps with one count of moved values, process 1 schedules one less.
SKIPPED = ["12 steps, 12 scheduled, 1", "12 steps, 11 scheduled, 1"]


@pytest.fixture(scope="module")
def said(tmp_path_factory, request):
    """What each process said in each mode: one launch for all."""
    import os
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("disagreement")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    completed = subprocess.run(
        [*command, str(SCRIPT), str(folder), *EXPECTED, "skipped"],
        capture_output=True,
        text=True,
        timeout=200,
        env=dict(os.environ),
    )
    return lambda mode, rank: (
        path.read_text() if (path := folder / f"{mode}-{rank}.txt").exists() else completed.stderr[-4000:]
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mode", EXPECTED)
def test_every_process_is_told_what_differs(said, mode, rank):
    assert EXPECTED[mode].format(rank=rank) in said(mode, rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_skipped_on_one_process_neither_stops_nor_shifts_the_shuffle(said, rank):
    assert said("skipped", rank) == SKIPPED[rank]
