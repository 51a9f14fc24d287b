"""A storm, and full cycles under load, as `storm.py` and `loaded_cycles.py` have them; a few, since they take long."""

import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = [pytest.mark.reliability, pytest.mark.slow, pytest.mark.distributed]

HERE = Path(__file__).parent


def run(script, *arguments):
    completed = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)], capture_output=True, text=True, timeout=280
    )
    assert completed.returncode == 0, completed.stdout[-4000:] + completed.stderr[-4000:]


def test_a_storm_ends_as_the_undisturbed_run():
    run("storm.py", "--storms", 1)


def test_full_cycles_under_load_end_with_exit_code_0():
    run("loaded_cycles.py", "--runs", 4, "--launched", 1)
