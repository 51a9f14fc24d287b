"""The plan of the next step, drawn in a thread while the caller computes."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from small_members import linears, snapshot

from hf_wash.mixing import SpartaMixer, WashMixer
from hf_wash.mixing import wash as wash_module


def test_plans_drawn_ahead_leave_the_random_states_alone():
    members = linears(3, 30, 30)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in members]
    mixer = WashMixer(members, optimizers, probability=0.5, shuffle_optimizer_state=True)
    for step in range(3):
        mixer.mix(step)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_the_next_plan_is_drawn_while_the_caller_computes(monkeypatch):
    members = linears(3, 30, 30)
    mixer = WashMixer(members, probability=0.5)
    drawn = []
    original = wash_module.Planner.draw

    def draw(self, step):
        drawn.append((step, threading.current_thread() is threading.main_thread()))
        return original(self, step)

    monkeypatch.setattr(wash_module.Planner, "draw", draw)
    for step in (0, 5, 10, 15):
        mixer.mix(step)
        mixer._ahead.wait()
    # The interval is known from the second call on.
    assert drawn == [(0, True), (1, False), (5, True), (10, False), (15, False), (20, False)]


def test_an_error_of_the_thread_that_draws_reaches_the_caller(monkeypatch):
    members = linears(2, 30, 30)
    mixer = WashMixer(members, probability=0.5)
    original = wash_module.Planner.draw

    def draw(self, step):
        if step == 1:
            raise MemoryError("no room for this plan")
        return original(self, step)

    monkeypatch.setattr(wash_module.Planner, "draw", draw)
    mixer.mix(0)
    before = snapshot(members)
    with pytest.raises(MemoryError, match="no room for this plan"):
        mixer.mix(1)
    assert torch.equal(before, snapshot(members))
    # Once is enough: what was wrong for a moment is drawn anew. And the thread lives on.
    monkeypatch.setattr(wash_module.Planner, "draw", original)
    mixer.mix(1)
    assert not torch.equal(before, snapshot(members))
    mixer.prepare(2)
    mixer.mix(2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_draws_its_own_plans():
    members = linears(2, 30, 30)
    mixer = WashMixer(members, probability=0.5)
    mixer.mix(0)
    mixer.prepare(1)
    child = os.fork()
    if child == 0:
        # The thread is not there. An alarm ends the process if it is waited for.
        signal.alarm(20)
        try:
            mixer.mix(1)
            mixer.mix(2)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_is_not_forked_in_the_middle_of_a_drawing(monkeypatch):
    mixer = WashMixer(linears(2, 30, 30), probability=0.5)
    lock, drawing = threading.Lock(), threading.Event()  # as those inside of libraries, which nobody resets
    original = wash_module.Planner.draw

    def draw(self, step):
        if threading.current_thread() is threading.main_thread():
            return original(self, step)
        with lock:
            drawing.set()
            time.sleep(0.5)
            return original(self, step)

    monkeypatch.setattr(wash_module.Planner, "draw", draw)
    mixer.mix(1)
    assert drawing.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if lock.acquire(timeout=5) else 1)
    assert os.waitpid(child, 0)[1] == 0
    mixer.mix(2)


@pytest.mark.parametrize("kind", [WashMixer, SpartaMixer])
def test_a_mixer_that_is_dropped_leaves_no_thread_and_no_member_behind(kind):
    members = linears(2, 30, 30)
    mixer = kind(members, probability=0.5)
    others = set(threading.enumerate())  # of mixers that other tests left to the garbage collector
    mixer.mix(1)
    (thread,) = set(threading.enumerate()) - others
    gone = weakref.ref(members[0])
    del mixer, members
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert gone() is None


FREED_AMID_A_LOCK = """
import threading, torch
from hf_wash import WashMixer

mixer = WashMixer([torch.nn.Linear(5, 5) for _ in range(2)], probability=0.5)
mixer.mix(0)
with threading._active_limbo_lock:  # as a garbage collection may find it, and an ending thread takes it
    del mixer
print("freed")
"""


def test_a_mixer_is_freed_without_a_wait_whatever_lock_is_held():
    done = subprocess.run(
        [sys.executable, "-c", FREED_AMID_A_LOCK], capture_output=True, text=True, timeout=120
    )  # a deadlock before the thread was only told to end
    assert done.stdout == "freed\n", done.stderr
