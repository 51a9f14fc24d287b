"""Runs that are killed at every phase, and disks that are full or cannot be written to: what was there stays, and `auto` goes on."""

import builtins
import contextlib
import errno
import functools
import os
import shutil
import signal
import threading
import time

from reliability.harness import KILLED, Act, Situation, refused, stopped, unharmed
from reliability.tiny import SAVING, STEPS, On, die, outcome, resumed, trained, trainer


PACE = {"save_total_limit": 2}
# Rotation removes what it should, and a save replaces what has its name.
ROTATED = ("run/checkpoint-*", "run/_incomplete-*", "run/_replaced-*", "run/_running")


# ---- Where a run can be hit -----------------------------------------------------------------------------------------


class Counted:
    """Do something at the k-th call of a function of a module, and behave as it does otherwise."""

    def __init__(self, module, name: str, number: int, do, after: bool = False, where: str = ""):
        self._own, self.calls = getattr(module, name), 0

        @functools.wraps(self._own)  # the Trainer reads a forward's signature
        def call(*args, **kwargs):
            hit = False
            if where in " ".join(map(str, args)):
                self.calls += 1
                hit = self.calls == number
            if hit and not after:
                do()
            result = self._own(*args, **kwargs)
            if hit and after:
                do()
            return result

        setattr(module, name, call)


def killed_in(event: str, step: int | None = None, ranks=(0, 1), **changes):
    """By a callback's event."""

    def do(place):
        given = {"callbacks": [On(event, lambda state, control: die(), step=step)]} if place.rank in ranks else {}
        return trained(place, given=given, **{**SAVING, **PACE, **changes})

    return do


def killed_at(find, name: str, number: int, after: bool = False, where: str = "", how=die, ranks=(0, 1)):
    """At the k-th call of a function."""

    def do(place):
        if place.rank in ranks:
            Counted(find(), name, number, how, after, where)
        return trained(place, **SAVING, **PACE)

    return do


def _checkpoint():
    from hf_wash.trainer import checkpoint

    return checkpoint


def _mixer():
    from hf_wash.mixing.wash import WashMixer

    return WashMixer


def _optimizer():
    import torch

    return torch.optim.AdamW


def _model():
    from transformers import ViTForImageClassification

    return ViTForImageClassification


def _exit():
    os._exit(77)


def _os():
    return os


def _shutil():
    return shutil


def _json():
    import json

    return json


KILLS = {
    **{f"at the beginning of step {step + 1}": killed_in("step_begin", step) for step in (0, 2, 3)},
    **{f"at the end of step {step}": killed_in("step_end", step) for step in (1, 2, 5, 6)},
    "before the optimizer's step": killed_in("pre_optimizer_step", 3),
    "after the optimizer's step, before the shuffle": killed_at(_mixer, "mix", 4),
    "after a shuffle": killed_at(_mixer, "mix", 4, after=True),
    "in a forward pass": killed_at(_model, "forward", 7),
    "when a line is logged": killed_in("log", 4),
    "right after a checkpoint": killed_in("save", 4),
    "before training": killed_in("train_begin"),
    "at the end of an epoch": killed_in("epoch_end"),
    "after the last step": killed_in("train_end"),
    "by os._exit in a step": killed_at(_model, "forward", 9, how=_exit),
}
# In the second save, of step 4, while that of step 2 is there.
IN_A_SAVE = {
    "before a member's files": ("_checkpoint", "write_member", False, ""),
    "after a member's files": ("_checkpoint", "write_member", True, ""),
    "before the manifest": ("_checkpoint", "publish", False, ""),
    "after it has appeared": ("_checkpoint", "publish", True, ""),
    "before the rename": ("_os", "rename", False, "_incomplete"),
    "after the rename": ("_os", "rename", True, "_incomplete"),
    "before the folder is synced": ("_checkpoint", "_sync_folder", False, ""),
    "before the weights of the checkpoint": ("_checkpoint", "save_file", False, ""),
    "after the weights of the checkpoint": ("_checkpoint", "save_file", True, ""),
}
FINDERS = {"_checkpoint": _checkpoint, "_os": _os, "_shutil": _shutil}
# How often a function is called in one save by a process that hosts both members.
CALLS = {"write_member": 2, "save_file": 2}


def save_kills():
    for what, (module, name, after, where) in IN_A_SAVE.items():
        each = CALLS.get(name, 1)
        for number in range(1, each + 1):
            which = f", {('first', 'second')[number - 1]}" if each > 1 else ""
            yield f"in a save, {what}{which}", killed_at(FINDERS[module], name, each + number, after, where)
    for number in (1, 2, 3):
        yield (
            f"in a save, after file {number} was synced",
            killed_at(lambda: _os(), "fsync", 11 + number, after=True),
        )
    yield "in a rotation, before it", killed_at(lambda: _shutil(), "rmtree", 1, where="/checkpoint-2")
    yield "in a rotation, half-way", lambda place: _half_rotated(place)


def _half_rotated(place):
    own = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        if os.path.basename(path) == "checkpoint-2":
            os.unlink(os.path.join(path, "population.json"))
            die()
        own(path, *args, **kwargs)

    shutil.rmtree = rmtree
    trained(place, **SAVING, **{**PACE, "save_total_limit": 1})


# ---- Full disks -----------------------------------------------------------------------------------------------------


def full(number: int, where: str = "checkpoint-4", code: int = errno.ENOSPC):
    """The disk is full when the k-th file is opened for writing below a folder of some name."""

    def do(place):
        own, count = builtins.open, [0]

        def open_(file, mode="r", *args, **kwargs):
            if where in str(file) and set(mode) & set("wax"):
                count[0] += 1
                if count[0] >= number:
                    raise OSError(code, os.strerror(code), str(file))
            return own(file, mode, *args, **kwargs)

        import io

        builtins.open = io.open = open_
        return trained(place, **SAVING)

    return do


def disk_full_at(number: int) -> None:
    """From now on: the disk is full when the k-th member's files are written."""

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    Counted(_checkpoint(), "write_member", number, fail)


def full_call(find, name: str, number: int, where: str = "", code: int = errno.ENOSPC):
    """The disk is full at the k-th call of a function."""

    def fail():
        raise OSError(code, os.strerror(code))

    return killed_at(find, name, number, where=where, how=fail)


def small(size: int):
    """No file can become larger than so many bytes: what is written beyond fails, wherever it is written from."""

    def do(place):
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            return trained(place, **SAVING)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return do


def kept(*steps):
    def check(place, result):
        from hf_wash.trainer import checkpoint

        # An empty folder that the run had made is gone.
        found = sorted(path.name for path in (place / "run").glob("*") if not path.name.startswith("_running"))
        expected = [f"checkpoint-{step}" for step in steps]
        if found != expected:
            return f"the folder holds {found} instead of {expected}"
        for name in expected:
            checkpoint.verify(place / "run" / name)
        return None

    return check


FULL = {
    "before a member's files": (full_call(_checkpoint, "write_member", 3), "No space left"),
    "at the second member's files": (full_call(_checkpoint, "write_member", 4), "No space left"),
    "at the weights": (full_call(_checkpoint, "save_file", 3), "No space left"),
    "at the manifest": (full_call(_checkpoint, "publish", 2), "No space left"),
    "at the rename": (full_call(_os, "rename", 2, where="_incomplete"), "No space left"),
    "at the sync of a file": (full_call(_os, "fsync", 14), "No space left"),
    "with a broken disk": (full_call(_os, "fsync", 14, code=errno.EIO), "Input/output error"),
    "with a quota that is reached": (full_call(_checkpoint, "write_member", 3, code=errno.EDQUOT), "quota"),
    "with a file system that became read-only": (full_call(_checkpoint, "save_file", 3, code=errno.EROFS), "Read-only"),
    **{f"at file {number} that is opened": (full(number), "No space left") for number in (1, 2, 3, 4)},
}  # fmt: skip


def in_folder(make, **changes):
    """A run whose output folder is not as it should be."""

    def do(place):
        from reliability.harness import prepared

        folder = make(place)
        prepared(place)
        return trained(place, folder=folder, **{**SAVING, **changes})

    return do


def _file(place):
    place.run.write_text("mine")
    return place.run


def _below_a_file(place):
    place.run.write_text("mine")
    return place.run / "deep" / "run"


def _link_to_nothing(place):
    place.run.symlink_to("/nowhere/at/all")
    return place.run


def _loop(place):
    place.run.symlink_to(place.run.name)
    return place.run


def _fifo(place):
    os.mkfifo(place.run)
    return place.run


def _device(place):
    return "/dev/null"


def _proc(place):
    return "/proc/1/run"


def _long(place):
    return place.folder / ("x" * 300)


def _named(name):
    return lambda place: place.folder / name


def _holding(name, folder=False):
    """A folder that holds something of the user's where the run will write."""

    def make(place):
        place.run.mkdir()
        if folder:
            (place.run / name).mkdir()
            (place.run / name / "thesis.txt").write_text("mine")
        else:
            (place.run / name).write_text("mine")
        return place.run

    return make


FOLDERS = {
    "the folder is a file": (_file, refused("is a file")),
    "the folder is below a file": (_below_a_file, refused("is a file")),
    "the folder is a link to nothing": (_link_to_nothing, refused("output_dir")),
    "the folder is a link to itself": (_loop, refused("output_dir")),
    "the folder is a FIFO": (_fifo, refused("is a file")),
    "the folder is a device": (_device, refused("is a file")),
    "the folder is one that nobody can make": (_proc, refused("output_dir", error="Exception")),
    "the folder's name is too long": (_long, refused("output_dir", error="Exception")),
    "the folder's name has NUL": (_named("a\0b"), refused("output_dir", error="Exception")),
    "a file of the user's where a checkpoint goes": (_holding("checkpoint-4"), stopped("checkpoint-4", error="RuntimeError")),
    "a file of the user's where it is staged": (
        _holding("_incomplete-checkpoint-4"), stopped("checkpoint-4", error="RuntimeError"),
    ),
    "other files of the user's": (_holding("thesis.txt"), unharmed(like="undisturbed")),
    "a folder of the user's": (_holding("thesis", folder=True), unharmed(like="undisturbed")),
    "blanks and umlauts in its name": (_named("mein Läufchen 🥣"), unharmed(like="undisturbed")),
    "a leading dash in its name": (_named("-rf"), unharmed(like="undisturbed")),
    "a per cent sign in its name": (_named("100%d {0}"), unharmed(like="undisturbed")),
}  # fmt: skip

# ---- Signals --------------------------------------------------------------------------------------------------------


def signalled(number: int, step: int = 3, jit: bool = False, ranks=(0,), **changes):
    """A signal at the end of a step."""

    def do(place):
        from hf_wash.trainer import mixing_run

        for module in (mixing_run, _requests()):
            if module is not None and hasattr(module, "StopSignal"):
                module.StopSignal.WAIT_SECONDS = 0.05
        steps = 60 if jit else STEPS
        callbacks = (
            [On("step_end", lambda state, control: os.kill(os.getpid(), number), step=step)]
            if place.rank in ranks
            else []
        )
        callbacks.append(On("step_end", lambda state, control: time.sleep(0.02 if jit else 0)))
        run = trainer(place, given={"callbacks": callbacks}, enable_jit_checkpoint=jit,
                      **{**SAVING, "save_steps": 2, "max_steps": steps, **changes})  # fmt: skip
        run.train()
        result = outcome(run)
        assert not jit or result["step"] < steps, "it was not stopped"
        return sorted(path.name for path in place.run.glob("checkpoint-*"))[-1:]

    return do


def _requests():
    try:
        from hf_wash.trainer import requests
    except ImportError:
        return None
    return requests


def after_an_exception(place):
    """SIGTERM after a run with `enable_jit_checkpoint` that ended in an error does what it did before."""

    def boom(state, control):
        raise ValueError("no luck today")

    run = trainer(place, given={"callbacks": [On("step_end", boom, step=2)]}, enable_jit_checkpoint=True, **SAVING)
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(ValueError):
        run.train()
    assert signal.getsignal(signal.SIGTERM) == before, "SIGTERM is still the run's"
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def from_a_thread(place):
    """Trained in a thread, where no signal can be taken."""
    found = []

    def work():
        try:
            found.append(trained(place, enable_jit_checkpoint=True, **SAVING))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


KIND_KILLS, KIND_DISKS, KIND_SIGNALS = "kills, then `auto`", "disks and folders", "signals"
GOES_ON = Act(lambda place: resumed(place, **PACE), unharmed(like="undisturbed"))


ALONE = Act(lambda place: resumed(place, mixing="independent", **PACE), unharmed(like="independent"))


def kill(name, do, **more):
    return Situation(KIND_KILLS, name, (Act(do, KILLED), GOES_ON), may_change=ROTATED, **more)


SITUATIONS = [
    *(kill(name, do) for name, do in (KILLS | dict(save_kills())).items()),
    *(
        Situation(
            KIND_KILLS, f"two processes, both, {name}", (Act(do, KILLED), GOES_ON), 2, may_change=ROTATED,
        )
        for name, do in {
            "at the end of step 3": killed_in("step_end", 3),
            "in a save, before the rename": killed_in("save", 4),
        }.items()
    ),
    *(
        Situation(
            KIND_KILLS, f"two processes, one, {name}",
            (Act(do, stopped(error="Exception"), {rank: KILLED}), ALONE if "without" in name else GOES_ON), 2,
            may_change=ROTATED,
        )
        for name, do, rank in (
            ("in a step", killed_in("step_end", 3, ranks=(1,)), 1),
            ("in a step, the main one", killed_in("step_end", 3, ranks=(0,)), 0),
            ("in a save", killed_at(_checkpoint, "write_member", 2, ranks=(1,)), 1),
            ("in a save, the main one", killed_at(_checkpoint, "publish", 2, ranks=(0,)), 0),
            ("after a save", killed_in("save", 4, ranks=(1,)), 1),
            ("before training", killed_in("train_begin", ranks=(1,)), 1),
            ("at the end", killed_in("train_end", ranks=(1,)), 1),
            ("in a step without an exchange", killed_in("step_end", 3, ranks=(1,), mixing="independent"), 1),
        )
    ),
    *(
        Situation(
            KIND_DISKS, f"full {name}" if "with" not in name else f"a save {name}",
            (Act(do, stopped(says, error="RuntimeError", check=kept(2))), Act(resumed, unharmed(like="undisturbed"))),
        )
        for name, (do, says) in FULL.items()
    ),
    *(
        Situation(
            KIND_DISKS, f"no file above {size} bytes",
            (Act(small(size), stopped("File too large" if size < 15_000 else "could not be written", error="RuntimeError", check=kept())),
             Act(resumed, unharmed(like="undisturbed"))),
        )
        for size in (5_000, 10_000, 15_000, 20_000)
    ),
    *(
        Situation(
            KIND_DISKS, f"two processes, full {name}",
            (Act(do, stopped("No space left", f"process {rank}", error="RuntimeError", check=kept(2))),
             Act(resumed, unharmed(like="undisturbed"))),
            2,
        )
        for name, do, rank in (
            ("at one's member", lambda p: (full_call(_checkpoint, "write_member", 2) if p.rank else _plainly)(p), 1),
            ("at the manifest", lambda p: (full_call(_checkpoint, "publish", 2) if not p.rank else _plainly)(p), 0),
        )
    ),
    *(Situation(KIND_DISKS, name, (Act(in_folder(make), expected),)) for name, (make, expected) in FOLDERS.items()),
    Situation(KIND_SIGNALS, "SIGTERM", (Act(signalled(signal.SIGTERM), KILLED), GOES_ON), may_change=ROTATED),
    Situation(
        KIND_SIGNALS, "SIGINT", (Act(signalled(signal.SIGINT), stopped(error="KeyboardInterrupt")), GOES_ON), may_change=ROTATED
    ),
    *(
        Situation(KIND_SIGNALS, f"SIGTERM with a checkpoint in time{name}", (Act(signalled(signal.SIGTERM, jit=True, ranks=ranks, **changes), unharmed()),), number, may_change=ROTATED)
        for name, ranks, number, changes in (
            ("", (0,), 1, {}), (", mixing off", (0,), 1, {"mixing": "independent"}),
            (", two processes, to both", (0, 1), 2, {}), (", two processes, to the second", (1,), 2, {}),
            (", two processes, to the first", (0,), 2, {}),
            (", two processes, mixing off", (1,), 2, {"mixing": "independent"}),
            (", a single member", (0,), 1, {"population_size": 1}),
        )
    ),
    Situation(KIND_SIGNALS, "SIGTERM after an error", (Act(after_an_exception, KILLED),), may_change=ROTATED),
    Situation(KIND_SIGNALS, "training in a thread, which gets no signals", (Act(from_a_thread, refused("main thread")),)),
    *(
        Situation(
            KIND_SIGNALS, f"two processes, {name}",
            (Act(signalled(signal.SIGINT, ranks=ranks), stopped(error="BaseException"),
                 {r: stopped(error="KeyboardInterrupt") for r in ranks}), GOES_ON),
            2, may_change=ROTATED,
        )
        for name, ranks in (("SIGINT to both", (0, 1)), ("SIGINT to the second", (1,)), ("SIGINT to the first", (0,)))
    ),
]  # fmt: skip


def _plainly(place):
    return trained(place, **SAVING, **PACE)
