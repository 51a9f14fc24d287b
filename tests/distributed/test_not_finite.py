"""A member that diverges on one process is the same news on all of them, and nobody waits for anybody."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("not_finite_run.py")
ENDING, GOING_ON = ("saving", "evaluating"), ("soup", "greedy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What each process saw in each mode: one launch of two processes, and one of one, for all."""
    folder = tmp_path_factory.mktemp("not_finite")
    for processes, modes in ((2, (*ENDING, *GOING_ON)), (1, GOING_ON)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        with (folder / "log.txt").open("wb") as log:
            completed = subprocess.run([*command, SCRIPT, folder, *modes], stdout=log, stderr=log, timeout=150)
        assert completed.returncode == 0, (folder / "log.txt").read_text(errors="replace")[-4000:]
    return folder


@pytest.mark.parametrize("mode", ENDING)
def test_every_process_ends_with_the_same_error_instead_of_a_checkpoint(folder, mode):
    first, second = (json.loads((folder / f"{mode}-2-{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["members"] == [1] and first["step"] == 8
    assert first["error"].startswith("Member 1 (`") and "no checkpoint is written" in first["error"]
    kept = ["checkpoint-4"] if mode == "saving" else []
    assert sorted(path.name for path in (folder / mode).glob("*checkpoint*")) == kept


def untimed(path):
    # As text, since a NaN is not equal to itself.
    content = json.loads(path.read_text())
    return json.dumps({k: v for k, v in content.items() if not k.endswith(("runtime", "per_second"))}, indent=1)


@pytest.mark.parametrize("mode", GOING_ON)
def test_the_soup_of_the_others_is_the_same_on_every_process_and_every_layout(folder, mode):
    first, second, alone = (untimed(folder / f"{mode}-{name}.json") for name in ("2-0", "2-1", "1-0"))
    assert first == second == alone
    result = json.loads(first)
    assert result["finite"] and result["soup"] == result["members"][0]
    assert result["eval_member_1_left_out"] == 1
    assert any(line.get("member_1_skipped_losses") for line in result["history"])
    assert result["history"][-1]["member_1_left_out"] == 1
