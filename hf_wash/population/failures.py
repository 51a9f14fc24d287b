"""
[`told_to_all`]: when a process fails while others wait for it, they end too, at once, and with its reason; and a process
that does not come is named.

A process that fails pins its reason to a board, the store by which the group was made (with `torchrun` the launcher
holds it, else process 0, which stays until the others have looked), and leaves the group, so that the others'
collectives fail. These look at the board. Nothing of this costs anything while all goes well, and each wait in it has
an end.
"""

import contextlib
import functools
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist


# Seconds: for all to fail alike, after which the group can be used on, or to turn out to be lost; for the others to hear
# of a failure; longer where the store goes with this process, since they may be far from their next collective; for them
# to print it, since a launcher ends all when it sees one end; for a store that does not answer.
ALIKE, HEARD, STAYS, PRINTED, ANSWER = 2.0, 5.0, 60.0, 0.5, 5.0

logger = logging.getLogger(__name__)

_BOARD = "hf_wash/failures"
# How many notes on a group's board belong to failures that are over.
_over: "weakref.WeakKeyDictionary[dist.ProcessGroup, int]" = weakref.WeakKeyDictionary()


def known_to_all(error: BaseException) -> BaseException:
    """Mark an error that every process raises, so that nobody needs to be told."""
    vars(error)["known_to_all"] = True
    return error


@contextlib.contextmanager
def told_to_all(where: Callable[[], str], timeout: float) -> Iterator[None]:
    """
    A block of collective work. What fails in it on one process ends it on all.

    Args:
        where (`Callable`): Returns where this process stands, as "step 7".
        timeout (`float`): Seconds after which the group gives a process up, for the message.

    Raises:
        RuntimeError: instead of the error of a collective, with the reason of the process that failed, or naming the
            ones that did not come.
    """
    try:
        yield
    except BaseException as error:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not several or getattr(error, "known_to_all", False):
            raise
        reason = _tell(error, where(), timeout)
        known_to_all(error)
        if reason is None:
            raise
        raise known_to_all(RuntimeError(reason)) from error


def tell(error: BaseException) -> None:
    """Tell the others of an error outside of a block, which they will come to later, and leave the group."""
    with contextlib.suppress(type(error)), told_to_all(lambda: "the start", 0.0):
        raise error


def _tell(error: BaseException, where: str, timeout: float) -> str | None:
    """Pin the error to the board, end the waiting of all; what the error is to be replaced by, if it is an echo."""
    group = dist.group.WORLD
    assert group is not None
    rank, others = dist.get_rank(), set(range(dist.get_world_size())) - {dist.get_rank()}
    lost = _is_lost_connection(error)
    note = {
        "rank": rank,
        "where": where,
        "reason": None if lost else f"{type(error).__name__}: {error}",
        "timed_out": lost and "imed out" in str(error),
    }
    board = _Board(dist.distributed_c10d._get_default_store(), _over.get(group, 0))  # torch has no public name for it
    if lost:
        # A note says that its process has read the others', which may take the store with them when they end.
        notes = board.look(others, 0.0)
        board.pin(note)
    else:
        board.pin(note)
        notes = board.look(others, ALIKE)
    everyone_first = others <= notes.keys()
    if not lost and everyone_first and all(theirs["reason"] for theirs in notes.values()):
        _over[group] = board.seen
        return None
    del group
    # Whoever waits for this process, in whatever collective, is to hear of it.
    _within(ANSWER, dist.destroy_process_group)
    # Where there is no launcher that does.
    holds_the_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not lost:
        heard = board.look(others, HEARD)
        if holds_the_store and not others <= heard.keys():
            logger.error(
                f"{note['reason']} (at {where}). This process stays for up to {STAYS:g} s, until the others have heard of "
                "it: the board where they look for the reason goes with it."
            )
            board.look(others, STAYS)
        time.sleep(PRINTED)
        return None
    if holds_the_store or not any(theirs["reason"] for theirs in notes.values()):
        notes = board.look(others, ALIKE)
    reasons = [f"Process {number}: {theirs['reason']}" for number, theirs in sorted(notes.items()) if theirs["reason"]]
    if reasons:
        return "; ".join(reasons)
    return _who_is_missing(note, notes, others - notes.keys(), timeout, late=everyone_first)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether it is the error of a collective, not of what this process did itself."""
    if isinstance(error, dist.DistError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # Those of gloo have no type of their own (torch 2.14).
    inside = trace is not None and "torch.distributed" in trace.tb_frame.f_globals.get("__name__", "")
    return type(error) is RuntimeError and inside


def _who_is_missing(mine: dict, notes: dict[int, dict], missing: set[int], timeout: float, late: bool) -> str:
    given = f"{timeout:g} s (`ddp_timeout`)"
    if missing:
        several = len(missing) > 1
        names = f"Process{'es' if several else ''} {' and '.join(map(str, sorted(missing)))}"
        if mine["timed_out"] or any(theirs["timed_out"] for theirs in notes.values()):
            return f"{names} did not come to {mine['where']} within {given}."
        what = "were lost" if several else "was lost"
        return f"{names} {what} at {mine['where']}: ended or killed, or out of reach."
    places = {**{number: theirs["where"] for number, theirs in notes.items()}, mine["rank"]: mine["where"]}
    listing = ", ".join(f"process {number} at {place}" for number, place in sorted(places.items()))
    if late and not mine["timed_out"]:
        return f"This process, {mine['rank']}, was given up by the others after {given}: {listing}."
    return f"The processes waited for one another until {given} was over: {listing}."


class _Board:
    """
    Notes of failing processes, which all can read, in a store.

    Args:
        store (`torch.distributed.Store`): Of the process group.
        seen (`int`): How many notes there are of failures that are over.
    """

    def __init__(self, store: Any, seen: int):
        self._store, self.seen = store, seen
        self._notes: dict[int, dict] = {}

    @functools.cached_property
    def _own(self) -> Any:
        """A connection of its own: another thread may hold that of the group."""
        return self._store.clone() if hasattr(self._store, "clone") else self._store

    def pin(self, note: dict) -> None:
        """Put up a note."""
        _within(ANSWER, lambda: self._own.set(f"{_BOARD}/{self._own.add(_BOARD, 1)}", json.dumps(note)))

    def look(self, ranks: set[int], seconds: float) -> dict[int, dict]:
        """The others' notes by their ranks, as soon as all of `ranks` have pinned one, at the latest after `seconds`."""
        end = time.monotonic() + seconds

        def read() -> None:
            while True:
                while self._own.check([f"{_BOARD}/{self.seen + 1}"]):
                    self.seen += 1
                    note = json.loads(self._own.get(f"{_BOARD}/{self.seen}"))
                    self._notes.setdefault(note["rank"], note)
                if ranks <= self._notes.keys() or time.monotonic() >= end:
                    return
                time.sleep(0.02)

        _within(seconds + ANSWER, read)
        return {rank: note for rank, note in list(self._notes.items()) if rank in ranks}


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do what may wait for ever, or fail, on a process that is about to end with an error of its own."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)
