"""`examples/benchmarks/step_time.py`: two trees, timed in turns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "benchmarks" / "step_time.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=200, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_tree_is_compared_with_another(tmp_path, processes):
    # The other one is this one, with half a second more before each step ends for the Trainer's loop.
    tree = tmp_path / "other"
    tree.mkdir()
    (tree / "hf_wash").mkdir()
    for path in (ROOT / "hf_wash").iterdir():
        (tree / "hf_wash" / path.name).symlink_to(path)
    (tree / "hf_wash" / "__init__.py").unlink()
    package = (ROOT / "hf_wash" / "__init__.py").read_text()
    slow = "\nimport time\nfrom .trainer.wash_trainer import WashTrainer as _Theirs\n\n\nclass WashTrainer(_Theirs):\n"
    slow += "    def _maybe_log_save_evaluate(self, *args, **kwargs):\n        time.sleep(0.5)\n"
    slow += "        return super()._maybe_log_save_evaluate(*args, **kwargs)\n"
    (tree / "hf_wash" / "__init__.py").write_text(package + slow)
    done = run(tree, "--turns", 3, "--steps", 1, "--processes", processes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pairs"] == 3 and found["members"] == 2 and found["processes"] == processes
    assert found["other_seconds_a_step"] > found["seconds_a_step"]
    assert found["seconds_ratio_quartiles"][1] < 0.9
    # It sleeps, and does not compute.
    assert 0.3 < found["processor_seconds_ratio_quartiles"][1] < 3


def test_a_folder_without_the_package_is_refused(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and "holds no hf_wash/" in done.stderr


def test_a_single_pair_has_no_quartiles(tmp_path):
    done = run(ROOT, "--turns", 1)
    assert done.returncode == 2 and "--turns at least 2" in done.stderr
