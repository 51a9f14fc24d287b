"""A process that fails, differs or stands still ends all, at once, and all say why."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("failure_run.py")
# What is wrong on process 1, as it says itself; the other one puts `Process 1: ` in front.
REASONS = {
    "no_data": "ValueError: Training needs a `train_dataset`.",
    "empty_data": "ValueError: The training set of member 1 is empty.",
    "no_labels": "ValueError: The training set of member 1 has no labels: a batch has none of labels.",
    "refused_option": "ValueError: `shuffle_probability` must be a probability between 0 and 1, found 1.5.",
    "refused_by_transformers": "ValueError: sometimes is not a valid IntervalStrategy",
    "refused_setting": "ValueError: `output_dir` (",
    "model_init": "KeyError: 'this one'",
    "callback": "KeyError: 'this one'",
    "callback_with_mixing_off": "KeyError: 'this one'",
    "data_set": "OSError: cannot identify image file 0.jpg",
    "model": "RuntimeError: shapes do not fit",
    "compute_metrics": "KeyError: 'this one'",
    "evaluating": "KeyError: 'this one'",
    "damaged_checkpoint": "InvalidCheckpoint: Cannot resume: process 1: a byte is wrong.",
    "leaves": "SystemExit: has seen enough",
}
# What both say.
DIFFERENCES = {
    "evaluation_set_missing": "examples to evaluate on: 37 against 'no data set'",
    "evaluation_set_longer": "examples to evaluate on: 37 against 38",
    "other_evaluation_set": "examples to evaluate on: 37 against 38",
    "evaluation_stream_longer": "after 2 batches process 0 is at its end, process 1 has 16 examples",
    "evaluation_stream_with_a_longer_batch": "after 2 batches process 0 has 1 example, process 1 has 2 examples",
    "evaluation_stream_of_the_soup_alone": "examples in the evaluation stream: 48 against 32",
    "save_strategy": "option save_strategy: 'no' against 'steps'",
    "other_data": "Processes 0 and 1 do not have the same training data: example 0 of 330 differs.",
    "resumes_alone": "resuming: 'none' against 'auto'",
}
FINE = {
    "evaluation_stream": "12 steps",
    "own_augmentation": "2 steps",
    "a_bad_example_that_is_not_drawn": "2 steps",
    "together": "'this one', then 4 steps",
}
# The first process, which holds the store where there is no launcher, and has to be there until the other one has read it.
FIRST = ["first_process", "first_process_while_others_compute"]
# Of three processes it is the second one; what the two others say.
OF_THREE = {
    "callback_of_three": "RuntimeError: Process 1: KeyError: 'this one'",
    "stands_still_of_three": "RuntimeError: Process 1 did not come to step 3 within 8 s (`ddp_timeout`).",
    "killed_of_three": "RuntimeError: Process 1 was lost at step 3",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each process said in each mode: one launch for all."""
    folder = tmp_path_factory.mktemp("failures")
    modes = [*REASONS, *DIFFERENCES, *FINE, *OF_THREE, *FIRST, "stands_still", "killed"]
    subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *modes],
        timeout=900,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )

    def read(mode, rank, what="said"):
        return (folder / mode / f"{what}-{rank}.txt").read_text()

    return read


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", REASONS)
def test_the_reason_reaches_everyone(said, mode):
    assert said(mode, 1).startswith(REASONS[mode])
    if mode == "damaged_checkpoint":  # all find out together
        assert said(mode, 0) == said(mode, 1)
        return
    assert re.match(r"(Runtime|Value)Error: Process 1: " + re.escape(REASONS[mode]), said(mode, 0))


@pytest.mark.parametrize("mode", DIFFERENCES)
def test_a_difference_is_named_by_all_before_anything_else(said, mode):
    for rank in range(2):
        assert said(mode, rank).startswith("ValueError: ")
        assert DIFFERENCES[mode] in said(mode, rank)


@pytest.mark.parametrize("mode", FINE)
def test_what_is_no_difference_and_no_failure_of_one_goes_on(said, mode):
    assert [said(mode, rank) for rank in range(2)] == [FINE[mode]] * 2


def test_a_process_that_stands_still_is_named_after_the_users_time(said):
    assert said("stands_still", 0) == "RuntimeError: Process 1 did not come to step 3 within 8 s (`ddp_timeout`)."
    assert "This process, 1, was given up by the others after 8 s (`ddp_timeout`)" in said("stands_still", 1)


def test_a_process_that_was_killed_is_named(said):
    assert said("killed", 0).startswith("RuntimeError: Process 1 was lost at step 3")


@pytest.mark.parametrize("mode", OF_THREE)
def test_two_others_say_the_same(said, mode):
    for rank in (0, 2):
        assert said(mode, rank).startswith(OF_THREE[mode])


@pytest.mark.parametrize("mode", FIRST)
def test_the_process_that_holds_the_store_may_fail_too(said, mode):
    assert [said(mode, rank) for rank in range(2)] == [
        "KeyError: 'this one'",
        "RuntimeError: Process 0: KeyError: 'this one'",
    ]


def test_a_launcher_that_ends_all_lets_the_others_say_why(tmp_path, launch):
    began = time.monotonic()
    script = tmp_path / "one_fails.py"
    script.write_text(
        f"""
import os, sys
sys.path[:0] = [{str(SCRIPT.parent.parent)!r}]
from small_population import population
from transformers import TrainerCallback

class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and os.environ["RANK"] == "1":
            raise KeyError("this one")

population({str(tmp_path / "run")!r}, size=2, trainer={{"callbacks": [Fails()]}}).train()
"""
    )
    completed = launch(script, timeout=110, check=False)
    assert completed.returncode != 0
    assert "RuntimeError: Process 1: KeyError: 'this one'" in completed.stderr
    assert time.monotonic() - began < 110
