"""Runs that are killed, at any moment and in the middle of a save, go on as if nothing had happened."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hf_wash.trainer import checkpoint


pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "fault_run.py"
STEPS = 18
KILLS = int(os.environ.get("HF_WASH_KILLS", "3"))


class Run:
    """The script in `processes` processes."""

    def __init__(self, folder, *args, processes=2, steps=STEPS):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        self.log = (self.folder / "log.txt").open("ab")
        self.process = subprocess.Popen(
            [*command, str(SCRIPT), str(folder), str(steps), *map(str, args)],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    def workers(self):
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [child for child in children if str(SCRIPT) in child.cmdline()]
        except psutil.NoSuchProcess:
            return []

    @property
    def step(self):
        path = self.folder / "step.txt"
        return int(path.read_text() or 0) if path.exists() else 0

    def wait(self, timeout=150):
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()

    def wait_until(self, condition, timeout=120):
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.text()
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        return True

    def kill(self):
        for worker in self.workers():
            worker.kill()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def text(self):
        return (self.folder / "log.txt").read_text(errors="replace")[-6000:]

    def outcome(self):
        return json.loads((self.folder / "outcome.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    assert run.wait() == 0, run.text()
    return run


@pytest.mark.timeout(120 * (KILLS + 2))
def test_killed_at_random_moments_the_run_ends_as_the_undisturbed_one(tmp_path, undisturbed):
    draw = random.Random(int(os.environ.get("HF_WASH_KILL_SEED", "0")))
    kills, ended = 0, False
    while not ended:
        # Slow enough that a kill often finds a save under way.
        run = Run(tmp_path, "--slow-save", "0.2", "--pace", "0.05")
        if kills < KILLS:
            start, more = run.step, draw.randint(1, 4)
            alive = run.wait_until(
                lambda run=run, start=start, more=more: run.step != start and run.step >= min(start + more, STEPS - 1)
            )
            if alive:
                time.sleep(draw.uniform(0, 0.5))
                workers = run.workers()
                victims = workers if draw.random() < 0.5 or not workers else [draw.choice(workers)]
                for victim in victims:
                    victim.kill()
                kills += bool(victims)
        ended = run.wait() == 0
        assert ended or kills, run.text()
    expected = undisturbed.outcome()
    found = run.outcome()
    assert found["members"] == expected["members"]
    assert found["soup"] == expected["soup"]
    assert found["history"] == expected["history"]
    assert kills == KILLS


def test_when_a_process_dies_the_others_end_with_an_error_within_30_seconds(tmp_path):
    """Without a launcher, which would end the others by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(2):
        with (tmp_path / f"log-{rank}.txt").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(SCRIPT), str(tmp_path), str(STEPS), "--die-rank", "1", "--die-at", "4"],
                    env={
                        **os.environ,
                        **shared,
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "CUDA_VISIBLE_DEVICES": "",
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        assert processes[1].wait(120) == -signal.SIGKILL
        died = time.monotonic()
        assert processes[0].wait(60) != 0
        assert time.monotonic() - died < 30
    finally:
        for process in processes:
            process.kill()
    assert "Error" in (tmp_path / "log-0.txt").read_text()
    assert not (tmp_path / "outcome.json").exists()


def test_a_full_disk_loses_nothing_that_was_there(tmp_path, undisturbed):
    run = Run(tmp_path, "--full-disk-at", "9")
    assert run.wait() != 0
    assert "No space left on device" in run.text()
    kept = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert kept == ["checkpoint-3", "checkpoint-6"]
    for name in kept:
        checkpoint.verify(tmp_path / "run" / name)
    again = Run(tmp_path)
    assert again.wait() == 0, again.text()
    assert again.outcome()["soup"] == undisturbed.outcome()["soup"]


def test_sigterm_saves_a_checkpoint_at_one_step_of_all_processes_first(tmp_path, undisturbed):
    run = Run(tmp_path, "--jit", "--pace", "0.4", steps=STEPS)
    run.wait_until(lambda: run.step >= 1)
    # One process is told; both must stop.
    run.workers()[0].send_signal(signal.SIGTERM)
    assert run.wait() == 0, run.text()
    stopped = run.outcome()["step"]
    assert stopped < STEPS
    assert (tmp_path / "run" / f"checkpoint-{stopped}").is_dir()
    checkpoint.verify(tmp_path / "run" / f"checkpoint-{stopped}")
    again = Run(tmp_path)
    assert again.wait() == 0, again.text()
    assert again.outcome()["soup"] == undisturbed.outcome()["soup"]
