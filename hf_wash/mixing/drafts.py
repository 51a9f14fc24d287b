"""What a mixer works out ahead, in a thread, while the members compute: the plan of a step, and what carries it out."""

import atexit
import functools
import operator
import os
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from .exchange import DeviceShipment, HostShipment, Route
from .memory import Selection, Views


T = TypeVar("T")


class Promise(Generic[T]):
    """A draft that is made in a thread. An executor's future does more, at four times the price of all that is here."""

    def __init__(self, make: Callable[[], T]):
        self._make: Callable[[], T] | None = make
        self._draft: T | None = None
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

    def result(self) -> T:
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


class Draft(ABC):
    """What a step selects, and what it means for this process: all that can be worked out ahead."""

    def __init__(self, views: Sequence[Views], load: Load):
        self._foreseen = self._ship(views, load)

    @abstractmethod
    def _route(self, selection: Selection) -> Route:
        """The way of what is selected of some tensors."""

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
                routes[view.selection] = self._route(view.selection)
        return load(views, [routes[view.selection] for view in views])


D = TypeVar("D", bound=Draft)


class Ahead(Generic[D]):
    """
    Has the draft of the step that probably comes next made in a thread, going by the distance between the last two.

    What makes a draft must not refer to the mixer, or the thread would keep it alive.
    """

    def __init__(self) -> None:
        self._last_step: int | None = None
        self._interval = 1
        self._promised: tuple[int, Promise[D]] | None = None
        self._tasks: queue.SimpleQueue | None = None
        self._thread: threading.Thread | None = None

    def take(self, step: int) -> D | None:
        """The draft of a step, if it was this step that was expected. It is handed out once."""
        # Should the thread have failed, then the next call for this step draws anew.
        promised, self._promised = self._promised, None
        if promised is not None and promised[0] == step and self._thread_lives():
            return promised[1].result()
        return None

    def expect(self, step: int, make: Callable[[int], D]) -> None:
        """Has the draft made that follows on this step's. Called last of all, since the thread takes the interpreter."""
        if self._last_step is not None and step > self._last_step:
            self._interval = step - self._last_step
        self._last_step = step
        self._promise(step + self._interval, make)

    def prepare(self, step: int, make: Callable[[int], D]) -> None:
        """Has the draft of a step made, and waits for it."""
        if self._promised is None or self._promised[0] != step or not self._thread_lives():
            self._promise(step, make)
        self.wait()

    def wait(self) -> None:
        """Waits for the draft that is being made, and raises what went wrong with it."""
        if self._promised is not None:
            try:
                self._promised[1].result()
            except BaseException:
                self._promised = None
                raise

    def _promise(self, step: int, make: Callable[[int], D]) -> None:
        if self._tasks is None or not self._thread_lives():
            self._tasks, self._thread = hire(self)
        # Now, not below: freeing tensors lets other threads in, and the one that draws would go first.
        self._promised = None
        promise: Promise[D] = Promise(functools.partial(make, step))
        self._promised = (step, promise)
        self._tasks.put(promise)

    def _thread_lives(self) -> bool:
        """Whether the thread that draws is there. In a process that was forked off it is not."""
        return self._thread is not None and self._thread.is_alive()
