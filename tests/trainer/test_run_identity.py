"""Whose a folder and its checkpoints are: a run has an identity, and its folder to itself while it trains."""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_population import StopAt, digest, population
from transformers import TrainerCallback

from hf_wash.hub.push import root_files
from hf_wash.trainer import run_folder as locking
from hf_wash.trainer.manifest import UNNAMED_RUN, InvalidCheckpoint, runs_in
from hf_wash.trainer.run_folder import LOCK, FolderInUse, RunFolder


SETTINGS = {"size": 2, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "no"}


def run(folder, resume=None, **settings):
    trainer = population(folder, **{**SETTINGS, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def run_of(checkpoint):
    return json.loads((checkpoint / "population.json").read_text())["run"]


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.fixture
def say(caplog):
    def said():
        ours = [record for record in caplog.records if record.name.startswith("hf_wash")]
        return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]

    return said


# ---- Identity ------------------------------------------------------------------------------------------------------


def test_a_run_is_named_in_manifest_record_and_log_and_keeps_its_name(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_wash"):
        trainer = run(tmp_path, trainer={"callbacks": [StopAt(8)]})
    trainer.save_state()
    (named,) = runs_in(tmp_path)
    assert len(named) == 32 and f"This is run {named}." in caplog.text
    assert json.loads((tmp_path / "wash_run.json").read_text())["run"] == named
    again = run(tmp_path, "auto")
    assert {run_of(path) for path in tmp_path.glob("checkpoint-*")} == {named}
    again.create_model_card()
    assert json.loads((tmp_path / "wash_run.json").read_text())["run"] == named
    # Another run has another one, another training of one trainer, too.
    first = run(tmp_path / "other")
    of_first = run_of(tmp_path / "other" / "checkpoint-12")
    first.train()
    assert len({named, of_first, run_of(tmp_path / "other" / "checkpoint-12")}) == 3


def test_a_name_changes_nothing_that_is_trained(tmp_path):
    assert digest(run(tmp_path / "a").model) == digest(run(tmp_path / "b").model)
    assert run_of(tmp_path / "a" / "checkpoint-4") != run_of(tmp_path / "b" / "checkpoint-4")


# ---- Checkpoints of several runs in a folder -----------------------------------------------------------------------


@pytest.fixture
def two_runs(tmp_path):
    """Checkpoints 4, 8 and 12 of one run, 3 and 6 of another one that was stopped."""
    run(tmp_path / "out")
    (tmp_path / "old").write_text(digest(run(tmp_path / "alone", seed=3, save_steps=3).model))
    run(tmp_path / "out", seed=3, save_steps=3, trainer={"callbacks": [StopAt(7)]})
    return tmp_path / "out"


@pytest.mark.parametrize("asked", ["auto", True])
def test_auto_names_the_runs_instead_of_taking_anothers_checkpoint(two_runs, asked):
    old, new = run_of(two_runs / "checkpoint-12"), run_of(two_runs / "checkpoint-6")
    with pytest.raises(InvalidCheckpoint) as caught:
        run(two_runs, asked, seed=3, save_steps=3)
    said = str(caught.value)
    assert "2 runs" in said and f"run {old[:8]} up to `checkpoint-12`" in said
    assert f"run {new[:8]} up to `checkpoint-6`" in said and "name the checkpoint" in said
    assert names(two_runs) == ["checkpoint-12", "checkpoint-3", "checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_a_checkpoint_that_is_named_is_gone_on_from(two_runs, tmp_path, say):
    new = run_of(two_runs / "checkpoint-6")
    trainer = run(two_runs, str(two_runs / "checkpoint-6"), seed=3, save_steps=3)
    assert digest(trainer.model) == (tmp_path / "old").read_text()
    assert run_of(two_runs / "checkpoint-9") == new
    assert any("holds checkpoints of another run" in text for text in say())


def test_a_new_run_in_a_folder_with_anothers_checkpoints_is_warned(tmp_path, say):
    run(tmp_path)
    old = run_of(tmp_path / "checkpoint-12")
    assert not [text for text in say() if "another run" in text]
    run(tmp_path, max_steps=5)
    (told,) = [text for text in say() if "another run" in text]
    assert f"run {old[:8]} up to `checkpoint-12`" in told and "is replaced" in told and "They stay" in told


def test_a_run_in_the_place_of_a_finished_one_is_told(tmp_path, say):
    first = run(tmp_path, max_steps=2, save_strategy="no")
    assert not [text for text in say() if "takes its place" in text]
    first.save_model()
    first.save_state()
    run(tmp_path, max_steps=2, save_strategy="no")
    (told,) = [text for text in say() if "takes its place" in text]
    assert f"holds what run {first._run[:8]} left" in told
    # A record that names none, or no text, costs nothing.
    for damaged in ("{", '{"run": 3}', "{}"):
        (tmp_path / "wash_run.json").write_text(damaged)
        run(tmp_path, max_steps=2, save_strategy="no")
    assert len([text for text in say() if "takes its place" in text]) == 1


def test_a_run_that_writes_no_checkpoints_is_not_warned(tmp_path, say):
    run(tmp_path, max_steps=4)
    run(tmp_path, max_steps=1, save_strategy="no")
    assert not [text for text in say() if "another run" in text]


def test_a_run_rotates_its_own_checkpoints_and_no_others(tmp_path):
    run(tmp_path, save_total_limit=2)
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-8"]
    run(tmp_path, save_steps=3, max_steps=10, save_total_limit=1)
    # Of the new run the newest one: what it saved at the end.
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-12", "checkpoint-8"]


def test_the_best_alone_is_kept_and_no_other_runs_checkpoint_deleted(tmp_path):
    run(tmp_path)
    best = {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = run(tmp_path, save_steps=3, eval_steps=3, max_steps=11, save_total_limit=1, learning_rate=0.1, **best)
    kept = Path(trainer.state.best_model_checkpoint).name
    assert kept != "checkpoint-12" and set(names(tmp_path)) == {kept, "checkpoint-4", "checkpoint-8", "checkpoint-12"}
    assert trainer.args.save_total_limit == 1


def test_what_is_no_checkpoint_of_ours_is_left_alone(tmp_path):
    for name in ("checkpoint-1", "checkpoint-final", "checkpoint-2-of-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keep.txt").write_text("mine")
    run(tmp_path, save_total_limit=1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-12", "checkpoint-2-of-mine", "checkpoint-final"]


def test_checkpoints_without_a_name_are_one_runs(tmp_path):
    from test_manifest import content_of

    run(tmp_path)
    for path in tmp_path.glob("checkpoint-*"):
        content = content_of(path)
        for name in ("digest", "run", "arguments"):
            del content[name]
        (path / "population.json").write_text(json.dumps({**content, "format": 1}))
    assert list(runs_in(tmp_path)) == [UNNAMED_RUN]
    run(tmp_path, "auto", max_steps=16)
    assert run_of(tmp_path / "checkpoint-16") == UNNAMED_RUN
    assert run(tmp_path, "auto", max_steps=20).state.global_step == 20


# ---- One run at a time ---------------------------------------------------------------------------------------------


class During(TrainerCallback):
    """Does something at a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def test_a_second_run_in_a_folder_is_refused_while_the_first_trains_and_nothing_is_lost(tmp_path):
    said = []

    def second():
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        for asked in (None, "auto"):
            with pytest.raises(FolderInUse) as caught:
                run(tmp_path, asked)
            said.append(str(caught.value))
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert LOCK not in {name.split("/")[0] for name in root_files(tmp_path)}

    first = run(tmp_path, trainer={"callbacks": [During(6, second)]})
    assert len(said) == 2 and first.state.global_step == 12
    named = run_of(tmp_path / "checkpoint-12")
    for text in said:
        assert (
            f"run {named}, process {os.getpid()} on " in text and "another run writes to" in text and "\n" not in text
        )
    assert not (tmp_path / LOCK).exists()
    run(tmp_path, "auto")


def test_another_folder_is_free(tmp_path):
    run(tmp_path / "a", trainer={"callbacks": [During(2, lambda: run(tmp_path / "b", max_steps=2))]}, max_steps=4)


def test_a_run_that_failed_frees_its_folder(tmp_path):
    def fail():
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose") as caught:
        run(tmp_path, trainer={"callbacks": [During(2, fail)]})
    assert caught.value is not None and not (tmp_path / LOCK).exists()
    run(tmp_path, max_steps=1)


HOLD = """
import sys, time
from hf_wash.trainer.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.enter()
folder.tell("of-another-process")
import os
if len(sys.argv) > 2 and os.fork() == 0:
    time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


def holder(folder, *more):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("more", [(), ("with a child that lives on",)], ids=["alone", "with a forked worker"])
def test_a_killed_run_keeps_nobody_out(tmp_path, more):
    process = holder(tmp_path, *more)
    try:
        with pytest.raises(FolderInUse, match=f"run of-another-process, process {process.pid} on"):
            RunFolder(tmp_path).enter()
        process.kill()
        process.wait(10)
        assert (tmp_path / LOCK).exists()
        folder = RunFolder(tmp_path)
        folder.enter()
        folder.leave()
        assert not (tmp_path / LOCK).exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _count_up(folder, times):
    for _ in range(times):
        place = RunFolder(folder)
        while True:
            try:
                place.enter()
                break
            except FolderInUse:
                time.sleep(0)
        count = Path(folder) / "count"
        before = int(count.read_text())
        time.sleep(0.001)
        count.write_text(str(before + 1))
        place.leave()


def test_two_are_never_in_a_folder_at_once(tmp_path):
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count_up, args=(tmp_path, 100)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "count").read_text() == "400"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"run": 7, "host": ["a"]}', "\0\x1b[31m", "[" * 4000])
def test_what_stands_in_the_lock_does_not_matter(tmp_path, content):
    folder = RunFolder(tmp_path)
    folder.enter()
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(FolderInUse, match="another run writes to") as caught:
        RunFolder(tmp_path).enter()
    assert str(caught.value).isprintable()
    folder.leave()


def test_a_file_system_without_locks_only_warns(tmp_path, monkeypatch, say):
    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(locking.fcntl, "flock", no_locks)
    trainer = run(tmp_path, max_steps=4)
    assert trainer.state.global_step == 4
    assert any("cannot be locked" in text and "would not be noticed" in text for text in say())
    shutil.rmtree(tmp_path)
