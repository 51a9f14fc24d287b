"""A Hub on this machine, runs to push to it, and fresh processes that take it for the real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import tiny_runs
from hub.loopback_hub import WRITER, LoopbackHub


HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as running:
        yield running


@pytest.fixture(scope="session")
def vit_run(tmp_path_factory):
    """The folder of a finished run of two small ViTs."""
    folder = tmp_path_factory.mktemp("runs") / "vits"
    tiny_runs.finished_run(folder)
    return folder


@pytest.fixture(scope="session")
def timm_run(tmp_path_factory):
    """The folder of a finished run of two of timm's ResNets."""
    folder = tmp_path_factory.mktemp("runs") / "resnets"
    tiny_runs.finished_run(folder, "timm")
    return folder


@pytest.fixture(scope="module")
def fresh_process(hub, tmp_path_factory):
    """
    Runs a script of this folder, or a module with `-m`, in a process of its own that knows no other Hub.

    Returns the completed process, and what the script printed as JSON on its last line.
    """

    def run(*arguments, token=WRITER, timeout=150, check=True, home=None, cwd=None):
        home = home or tmp_path_factory.mktemp("home")
        command = [sys.executable, *map(str, arguments)]
        if arguments[0] != "-m":
            command[1] = str(HERE / arguments[0])
        # Before what this process was given, so that both test one and the same hf_wash.
        paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **hub.environment(home, token), "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
        completed = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
        )
        if check:
            assert completed.returncode == 0, completed.stderr[-4000:]
        lines = completed.stdout.strip().splitlines()
        try:
            return completed, json.loads(lines[-1]) if lines else None
        except ValueError:
            return completed, None

    return run
