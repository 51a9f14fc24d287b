"""The exit code of a run that succeeded is 0: no process group is left for the interpreter's end."""

from pathlib import Path

import pytest


@pytest.mark.distributed
def test_no_process_group_is_alive_when_the_interpreter_ends(launch, tmp_path):
    printed = launch(Path(__file__).with_name("exit_run.py"), tmp_path / "run", timeout=100).stdout
    assert printed.count("training: True") == 2
    assert printed.count("alive: False") == 2
