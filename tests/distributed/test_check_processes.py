"""`trainer.check()` on two processes: one answer for all, no trace, and what is wrong with one is told to each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "check_run.py"
WRONG = {
    "gone": "process 1: OSError: the disk is gone",
    "nothing": "process 0: Training needs a `train_dataset`.",
    "option": "option learning_rate: '0.001' against '0.002'",
    "steps": "different numbers of batches an epoch (member 0: 21, member 1: 15)",
    "folders": "of process 0 is not visible to process(es) 1",
    "disk": "where 5 bytes are free: make room",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each process said in each mode: one launch for all."""
    folder = tmp_path_factory.mktemp("check")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    completed = subprocess.run(
        [*command, str(SCRIPT), str(folder), "well", "without", *WRONG],
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ),
    )
    assert completed.returncode == 0, completed.stderr[-4000:]
    return lambda mode, rank: json.loads((folder / f"{mode}-{rank}.json").read_text())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mode", WRONG)
def test_what_is_wrong_with_one_process_is_told_to_each(said, mode, rank):
    assert WRONG[mode] in said(mode, rank)


def test_all_get_one_answer_and_the_run_is_the_one_without(said):
    first, second = said("well", 0), said("well", 1)
    assert first == second
    assert first["run"] == said("without", 0)["run"]
    assert first["left"] == []
    report = first["report"]
    assert (report["members"], report["processes"], len(report["losses"])) == (2, 2, 2)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    # A name of the same length: it is in what is saved, whose size is compared.
    folder = Path(report["output_dir"]).parent
    folder = folder.with_name(folder.name[::-1])
    folder.mkdir()
    subprocess.run([sys.executable, SCRIPT, folder, "well"], check=True, timeout=120, env=environment)
    alone = json.loads((folder / "well-0.json").read_text())["report"]
    differing = {name for name in report if report[name] != alone[name]}
    assert differing <= {"processes", "output_dir", "disk_free"}
