"""What every test relies on: no network, one thread, a skip where hardware is missing, and real processes on demand."""

import os


# Before torch and huggingface_hub are imported, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_DISABLED"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import contextlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch finds none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _kill_tree(process: subprocess.Popen):
    # Elastic starts each worker in a session of its own, so the launcher's process group does not reach them.
    if process.poll() is not None:
        return
    launcher = psutil.Process(process.pid)
    for member in [launcher, *launcher.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


@pytest.fixture
def launch(tmp_path):
    """
    Runs a script in several processes over gloo, as `torchrun --standalone` would, and returns what it printed.

    ```python
    completed = launch("tests/distributed/some_script.py", "--flag", "value", processes=2, timeout=120)
    ```

    The test fails, with everything the processes printed, when they run past `timeout` seconds or, unless
    `check=False`, end with another exit code than 0. No process outlives the call. CUDA devices are hidden unless
    `env` sets `CUDA_VISIBLE_DEVICES`.
    """
    runs = 0

    def run(
        script: str | os.PathLike,
        *args: object,
        processes: int = 2,
        timeout: float = 120,
        env: dict[str, str] | None = None,
        cwd: str | os.PathLike | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess:
        nonlocal runs
        runs += 1
        command = [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *(str(Path(script).resolve()), *map(str, args)),
        ]
        # Files, not pipes: a pipe that a stray grandchild keeps open would make the read wait for it.
        out_file, err_file = tmp_path / f"launch_{runs}.stdout", tmp_path / f"launch_{runs}.stderr"
        timed_out = False
        with out_file.open("wb") as stdout, err_file.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                _kill_tree(process)
        out, err = (file.read_bytes().decode(errors="replace") for file in (out_file, err_file))
        if timed_out or (check and process.returncode != 0):
            what = f"ran past {timeout} s" if timed_out else f"ended with exit code {process.returncode}"
            pytest.fail(f"{' '.join(command)}\n{what}\n--- stdout\n{out}\n--- stderr\n{err}", pytrace=False)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run
