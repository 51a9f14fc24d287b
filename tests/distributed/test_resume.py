"""What a checkpoint holds, and whose a folder is, comes to the same on every process, and none waits for another."""

from pathlib import Path

import pytest


pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "resume_run.py"
REFUSED = {
    "hostile_optimizer": r"InvalidCheckpoint: Cannot resume: ",
    "hostile_streams": r"InvalidCheckpoint: Cannot resume: ",
    "lacking_tensor": r"InvalidCheckpoint: Cannot resume: ",
    "several_runs": r"InvalidCheckpoint: Cannot resume: ",
    "in_use": "FolderInUse: Cannot train: another run writes to",
}
NAMED = {
    "hostile_optimizer": "member_1/optimizer.pt` holds no state of an optimizer",
    "hostile_streams": "member_0/streams.json` holds no random streams",
    "lacking_tensor": "member_1/model.safetensors` lacks `classifier.bias`",
    "several_runs": "holds checkpoints of 2 runs",
    "in_use": "process ",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    import os
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("resume")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    completed = subprocess.run(
        [*command, str(SCRIPT), str(folder), "whole", "passed_over", "finished", *REFUSED],
        capture_output=True, text=True, timeout=240, env=dict(os.environ),
    )  # fmt: skip
    return lambda mode, rank: (
        path.read_text() if (path := folder / f"{mode}-{rank}.txt").exists() else completed.stderr[-4000:]
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mode", REFUSED)
def test_every_process_is_told_why(said, mode, rank):
    assert said(mode, rank).startswith(REFUSED[mode]) and NAMED[mode] in said(mode, rank)


@pytest.mark.parametrize("mode", ["whole", "passed_over", "finished"])
def test_all_processes_are_in_one_run_and_end_alike(said, mode):
    assert said(mode, 0) == said(mode, 1) == said("whole", 0)
    assert said(mode, 0).startswith("step 12, run ")
