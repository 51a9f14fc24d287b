"""What a mixer works out ahead, in a thread, while the members compute: the plan of a step, and what carries it out."""

import atexit
import operator
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence

from .exchange import DeviceShipment, HostShipment, Route, route
from .memory import Selection, Views
from .plan import Planner


class Promise:
    """A draft that is made in a thread. An executor's future does more, at four times the price of all that is here."""

    def __init__(self, make: "Callable[[], Draft]"):
        self._make: Callable[[], Draft] | None = make
        self._draft: Draft | None = None
        self._failure: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def keep(self) -> None:
        assert self._make is not None
        try:
            self._draft = self._make()
        except BaseException as failure:
            self._failure = failure
        self._make = None
        self._done.release()

    def result(self) -> "Draft":
        """The draft, as soon as it is made; or its exception."""
        with self._done:
            pass
        if self._failure is not None:
            raise self._failure
        assert self._draft is not None
        return self._draft


def keep_promises(tasks: queue.SimpleQueue) -> None:
    """What the thread does: keep one promise after the other, until it is given `None`."""
    while (promise := tasks.get()) is not None:
        with _AT_WORK:
            promise.keep()
        # Else it would be held, and all that it refers to, until the next one comes.
        del promise


# Held by the thread that is at work, and by who forks: a process that is forked off in the middle of it would find what
# locks torch, NumPy or Python's imports held then locked for ever. (A loader's workers are forked while members train.)
_AT_WORK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_AT_WORK.acquire, after_in_parent=_AT_WORK.release, after_in_child=_AT_WORK.release)

_THREADS: weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue] = weakref.WeakKeyDictionary()


def hire(employer: object) -> tuple[queue.SimpleQueue, threading.Thread]:
    """A thread that keeps the promises which are put into the queue, as long as `employer` is there."""
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    thread = threading.Thread(target=keep_promises, args=(tasks,), name="hf_wash-plan", daemon=True)
    thread.start()
    _THREADS[thread] = tasks
    # Told to end, and not waited for: the employer may be freed by a garbage collection, in the middle of anything,
    # with locks held that an ending thread takes.
    weakref.finalize(employer, tasks.put, None)
    return tasks, thread


@atexit.register
def _dismiss_all() -> None:
    # The interpreter must not end while a thread is at work.
    for thread, tasks in list(_THREADS.items()):
        tasks.put(None)
        thread.join()


Load = Callable[[Sequence[Views], Sequence[Route]], HostShipment | DeviceShipment]


class Draft:
    """The plan of a step and what it means for this process: all that can be worked out ahead."""

    def __init__(
        self,
        planner: Planner,
        step: int,
        views: Sequence[Views],
        members: range,
        num_processes: int,
        load: Load,
    ):
        self.plan = planner.draw(step)
        self._members = members
        self._num_processes = num_processes
        self._foreseen = self._ship(views, load)

    def shipment(self, views: Sequence[Views], load: Load) -> HostShipment | DeviceShipment:
        """What carries these planes; made now if it is not what was foreseen, as for a state that is new."""
        foreseen = self._foreseen.views
        if len(views) == len(foreseen) and all(map(operator.is_, views, foreseen)):
            return self._foreseen
        return self._ship(views, load)

    def _ship(self, views: Sequence[Views], load: Load) -> HostShipment | DeviceShipment:
        # Slots of the state mostly lie in memory as the weights do, and then they have the same route.
        routes: dict[Selection, Route] = {}
        for view in views:
            if view.selection not in routes:
                routes[view.selection] = route(self.plan, view.selection, self._members, self._num_processes)
        return load(views, [routes[view.selection] for view in views])
