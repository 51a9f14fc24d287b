"""
One run at a time in a folder: a run's identity, and [`RunFolder`], the lock that a run holds while it trains. What a
run that is refused leaves of its folder: [`MadeFolders`].
"""

import contextlib
import functools
import json
import logging
import os
import socket
import uuid
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..hub.record import RUN_RECORD, read_json


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


logger = logging.getLogger(__name__)

# As all that begins with an underscore it is in no upload, and it is no checkpoint.
LOCK = "_running"

_held: "weakref.WeakSet[RunFolder]" = weakref.WeakSet()


def new_run() -> str:
    """The identity of a new run."""
    return uuid.uuid4().hex


# What the Trainer (5.24) measures of a training.
_FIGURES = (
    *("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"),
    "num_input_tokens_seen",
)


def training_figures(folder: str | Path, run: str | None) -> dict[str, float]:
    """
    What the training of a run came to, from the results that were saved at its end; empty where there are none.

    Args:
        folder (`str` or `Path`): The run's output folder.
        run (`str`, *optional*): The run. Results beside a `wash_run.json` of another one are not its.
    """
    try:
        if read_json(Path(folder) / RUN_RECORD).get("run", run) != run:
            return {}
        results = [read_json(Path(folder) / name) for name in ("train_results.json", "all_results.json")]
    except (OSError, ValueError):
        return {}  # damaged: they will be written anew
    found = next((result for result in results if "train_loss" in result), {})
    return {key: found[key] for key in _FIGURES if type(found.get(key)) in (int, float)}


def run_that_left(folder: str | Path) -> str | None:
    """The run whose record is in a folder, beside the soup that it left there; `None` where there is none, or none is named."""
    try:
        run = read_json(Path(folder) / RUN_RECORD).get("run")
    except (OSError, ValueError):
        return None  # none, or damaged: it will be written anew
    return run if isinstance(run, str) else None


class MadeFolders:
    """
    The folders that a run is about to make, so that those that are empty can go when it is refused.

    Args:
        folder (`str` or `Path`): The run's output folder. What is there already, it or the folders it lies in, stays.
    """

    def __init__(self, folder: str | Path):
        self._made: list[Path] = []
        with contextlib.suppress(OSError, ValueError):  # a name that cannot be, which is refused elsewhere
            path = Path(os.path.abspath(folder))
            self._made = [place for place in (path, *path.parents) if not place.exists()]

    @contextlib.contextmanager
    def none_stays_empty(self) -> Iterator[None]:
        """A block whose failure removes those that are empty."""
        try:
            yield
        except BaseException:
            self.remove_empty()
            raise

    def remove_empty(self) -> None:
        """Remove those that are empty."""
        with contextlib.suppress(OSError, ValueError):  # the first that holds something, is not there, or cannot be
            for place in self._made:
                place.rmdir()


def leaves_no_empty_folder(method: Callable) -> Callable:
    """A method whose failure removes the folders that its object made (`_made_folders`) and that are empty."""

    @functools.wraps(method)
    def tidy(self, *args, **kwargs):
        if self._replay is not None:  # which ends by an exception
            return method(self, *args, **kwargs)
        with self._made_folders.none_stays_empty():
            return method(self, *args, **kwargs)

    return tidy


class FolderInUse(ValueError):
    """Another run writes to the folder."""


class RunFolder:
    """
    The right to write a run into a folder, held from [`enter`] to [`leave`].

    The operating system ends it with the process, however that ends, so a run that was killed keeps nobody out.

    Args:
        folder (`str` or `Path`): The run's output folder.
    """

    def __init__(self, folder: str | Path):
        self._path = Path(folder) / LOCK
        self._file: Any = None

    def enter(self) -> None:
        """
        Take the right; makes the folder. On a file system without locks only a warning says so.

        Raises:
            FolderInUse: if another run has it, saying which.
        """
        if fcntl is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    raise FolderInUse(self._who(file)) from None
            except OSError as error:
                file.close()
                logger.warning(
                    f"`{self._path.parent}` cannot be locked ({error}), so a second run that writes to it at the same "
                    "time would not be noticed."
                )
                return
            if self._is_still_there(file):
                break
            file.close()  # of a run that ended meanwhile
        self._file = file
        _held.add(self)
        self.tell(None)

    def _is_still_there(self, file: Any) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def tell(self, run: str | None) -> None:
        """Write down who holds the folder, for whoever is kept out: the run, this process and the time."""
        if self._file is None:
            return
        who = {"run": run, "host": socket.gethostname(), "process": os.getpid()}
        self._file.seek(0)
        self._file.truncate()
        json.dump({**who, "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}, self._file)
        self._file.flush()

    def _who(self, file: Any) -> str:
        who: Any = None
        with contextlib.suppress(OSError, ValueError, RecursionError):
            file.seek(0)
            who = json.loads(file.read(4096))
        known = who if isinstance(who, dict) else {}
        run = f"run {ascii(known['run'])[1:-1][:32]}, " if isinstance(known.get("run"), str) else ""
        listing = f" ({run}process {known.get('process')!a} on {known.get('host')!a}, since {known.get('since')!a})"
        return (
            f"another run writes to `{self._path.parent}` at this time{listing if known else ''}: wait for it to end, or "
            "give this one an `output_dir` of its own"
        )

    def leave(self) -> None:
        """Give the right back."""
        if self._file is None:
            return
        file, self._file = self._file, None
        # While it is still held, or another run could have taken it.
        with contextlib.suppress(OSError):
            self._path.unlink()
        file.close()

    def _forget(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _forget_in_child() -> None:
    # A forked process, a loader's worker, shares the lock, and would keep it if its parent were killed.
    for folder in list(_held):
        folder._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
