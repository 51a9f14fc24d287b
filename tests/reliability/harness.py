"""
Hostile situations, each tried in a process of its own that is forked from one in which everything is imported.

What a situation is ([`Situation`]), how it is tried ([`attempt`]), and how tests talk to the process that forks
([`Server`]). What is tried stands in the files beside this one; `table.py` writes what came of it.
"""

import atexit
import contextlib
import dataclasses
import fnmatch
import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist


HERE = Path(__file__).parent

# What a situation can get, in the order of the table's columns.
REFUSED = "refused before anything happened"
STOPPED = "stopped with the reason"
WARNED = "warned, and went on"
UNHARMED = "went on as if undisturbed"
OUTCOMES = (REFUSED, STOPPED, WARNED, UNHARMED)


@dataclasses.dataclass(frozen=True)
class Expected:
    """
    What one process shall come to.

    Args:
        outcome (`str`): One of `OUTCOMES`, or `"killed"` for what is only on the way to one.
        says (`tuple[str, ...]`): Parts of the error's sentence; of what was printed, where there is no error.
        silent_about (`tuple[str, ...]`): What must not be printed.
        error (`str`): The class of the error, or one of its bases.
        like (`str`, *optional*): The template whose result the process's own result must equal.
        check (`Callable`, *optional*): From the folder and the result to what is wrong with them, or `None`.
    """

    outcome: str
    says: tuple[str, ...] = ()
    silent_about: tuple[str, ...] = ()
    error: str = ""
    like: str | None = None
    check: Callable[[Path, Any], str | None] | None = None


def refused(*says: str, error: str = "ValueError", **more) -> Expected:
    """An error before anything was written."""
    return Expected(REFUSED, says, error=error, **more)


def stopped(*says: str, error: str = "Exception", **more) -> Expected:
    """An error in mid-run; what was there is still there, and every checkpoint is whole."""
    return Expected(STOPPED, says, error=error, **more)


def warned(*says: str, **more) -> Expected:
    """A message, and the run goes on."""
    return Expected(WARNED, says, **more)


def unharmed(*says: str, like: str | None = None, **more) -> Expected:
    """Nothing is lost by it; with `like`, bit for bit."""
    return Expected(UNHARMED, says, like=like, **more)


KILLED = Expected("killed")


@dataclasses.dataclass(frozen=True)
class Act:
    """
    What is done in each process of a situation, and what shall come of it.

    Args:
        do (`Callable`): Gets a [`Place`]. What it returns goes through JSON.
        expected ([`Expected`]): Of every process.
        ranks (`dict[int, Expected]`, *optional*): Of processes for which it is another.
    """

    do: Callable[["Place"], Any]
    expected: Expected
    ranks: dict[int, Expected] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Situation:
    """
    A hostile situation.

    Args:
        kind (`str`): A row of the table.
        name (`str`): Unique within its kind.
        acts (`list[Act]`): One after the other, each in new processes.
        processes (`int`): How many run at a time.
        template (`str`, *optional*): What lies in the folder before the first act.
        may_change (`tuple[str, ...]`): Patterns of paths that may be changed or removed; nothing else may.
        limit (`float`): Seconds for an act, after which it counts as hanging.
        slow (`bool`): Whether it is left out where only the fast ones run.
    """

    kind: str
    name: str
    acts: tuple[Act, ...]
    processes: int = 1
    template: str | None = None
    may_change: tuple[str, ...] = ()
    limit: float = 60.0
    slow: bool = False

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.name}"

    @property
    def outcome(self) -> str:
        last = self.acts[-1].expected.outcome
        # A signal that does what it does without us.
        return UNHARMED if last == "killed" else last


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process of a situation is: its folder and its rank."""

    folder: Path
    rank: int = 0

    @property
    def run(self) -> Path:
        return self.folder / "run"


# ---- Trying --------------------------------------------------------------------------------------------------------


class Templates:
    """Folders that situations start from, each made once, in a process of its own."""

    def __init__(self, makers: dict[str, Callable[[Place], Any]], root: Path):
        self._makers, self._root = makers, root
        self._results: dict[str, Any] = {}

    def result(self, name: str) -> Any:
        """What the template's maker returned."""
        if name not in self._results:
            folder = self._root / name
            folder.mkdir(parents=True)
            (end,) = _act(self._makers[name], folder, self._root / f"{name}.reports", 1, 120)
            if end["code"] != 0:
                raise RuntimeError(f"The template {name} could not be made:\n{end['output']}")
            self._results[name] = end["result"]
        return self._results[name]

    def copy(self, name: str, target: Path) -> None:
        """Put a template's folder in place."""
        self.result(name)
        shutil.copytree(self._root / name, target, symlinks=True, dirs_exist_ok=True)


def attempt(situation: Situation, templates: Templates, folder: Path) -> list[str]:
    """
    Try a situation.

    Args:
        situation ([`Situation`]): What is tried.
        templates ([`Templates`]): What it may start from.
        folder (`Path`): An empty folder for it.

    Returns:
        `list[str]`: What fell short of what was expected, each with all that was printed.
    """
    place, short = folder / "place", []
    place.mkdir(parents=True)
    if situation.template is not None:
        templates.copy(situation.template, place)
    for number, act in enumerate(situation.acts):
        # `prepare` belongs to the act: what it leaves is what was there.
        before = snapshot(place)
        reports = folder / f"reports-{number}"
        ends = _act(act.do, place, reports, situation.processes, situation.limit)
        for rank, end in enumerate(ends):
            expected = act.ranks.get(rank, act.expected)
            reference = templates.result(expected.like) if expected.like is not None else None
            problems = list(_judge(expected, end, place, reference))
            if problems:
                who = f"act {number}, process {rank}"
                short.append(f"{who}: {'; '.join(problems)}\n{_indented(end['output'][-6000:])}")
        kept = end_of_prepared(reports, before)
        short += [f"act {number}: {text}" for text in lost(kept, snapshot(place), situation.may_change)]
        if act.expected.outcome == REFUSED:
            new = sorted(path for path, what in snapshot(place).items() if path not in kept and what != "folder")
            if new:
                short.append(f"act {number}: refused, but it wrote {', '.join(new[:4])}")
    return short


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _judge(expected: Expected, end: dict, place: Path, reference: Any):
    if end["hangs"]:
        yield f"hangs (killed after {end['seconds']:.0f} s)"
        return
    if expected.outcome == "killed":
        if end["code"] not in (-signal.SIGKILL, -signal.SIGTERM, 77):
            yield f"was to be killed and ended with exit code {end['code']}"
        return
    error = end["error"]
    fails = expected.outcome in (REFUSED, STOPPED)
    if fails and error is None and end["code"] in (0, None):
        yield "no error"
    elif fails and error is None:
        yield f"no error, but exit code {end['code']}"
    elif fails:
        if expected.error not in error["classes"]:
            yield f"{error['classes'][0]} instead of {expected.error}: {error['message']}"
        text = error["message"]
        for part in expected.says:
            if part.lower() not in text.lower():
                yield f"the error does not say {part!r}: {error['classes'][0]}: {text}"
    elif error is not None:
        yield f"ends with {error['classes'][0]}: {error['message']}"
    elif end["code"] != 0:
        yield f"ends with exit code {end['code']}"
    else:
        for part in expected.says:
            if part.lower() not in end["output"].lower():
                yield f"nothing says {part!r}"
    for part in expected.silent_about:
        if part in end["output"]:
            yield f"something says {part!r}"
    if expected.like is not None and end["result"] != reference:
        yield f"the result differs from the undisturbed run's: {end['result']} instead of {reference}"
    if expected.check is not None:
        try:
            problem = expected.check(place, end["result"])
        except Exception as caught:
            problem = f"the check failed with {type(caught).__name__}: {caught}"
        if problem is not None:
            yield problem


def snapshot(folder: Path) -> dict[str, str]:
    """What a folder holds: for each path a digest, or what else it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "special"
    return found


def lost(before: dict[str, str], after: dict[str, str], may_change: tuple[str, ...]) -> list[str]:
    """What was there and is not, or is something else."""
    gone = []
    for name, what in before.items():
        if after.get(name) == what or any(fnmatch.fnmatch(name, pattern) for pattern in may_change):
            continue
        gone.append(f"lost `{name}`" if name not in after else f"changed `{name}`")
    return gone[:6]


PREPARED = "prepared.json"


def prepared(place: Place) -> None:
    """Called by an act between making its situation and meeting it: from here on nothing may be lost."""
    if place.rank == 0:
        target = Path(os.environ["RELIABILITY_REPORTS"]) / PREPARED
        target.write_text(json.dumps(snapshot(place.folder)))


def end_of_prepared(reports: Path, before: dict[str, str]) -> dict[str, str]:
    file = reports / PREPARED
    return json.loads(file.read_text()) if file.is_file() else before


# ---- Processes -----------------------------------------------------------------------------------------------------


class Children:
    """Forked processes of one act; the end of each is in `ends`."""

    def __init__(self, reports: Path, pids: list[int], store: Any = None):
        self.reports, self.pids, self._store = reports, pids, store
        self.began = time.monotonic()
        self.ends: list[dict] = [{"hangs": False, "code": None, "seconds": 0.0} for _ in pids]
        self._waiting = {pid: rank for rank, pid in enumerate(pids)}

    def ended(self) -> bool:
        """Whether all have ended."""
        for pid, rank in list(self._waiting.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.ends[rank] |= {
                    "code": os.waitstatus_to_exitcode(status),
                    "seconds": time.monotonic() - self.began,
                }
                del self._waiting[pid]
        return not self._waiting

    def kill(self, ranks: list[int]) -> None:
        """SIGKILL, to those that are still there."""
        for pid, rank in self._waiting.items():
            if rank in ranks:
                os.kill(pid, signal.SIGKILL)

    def give_up(self) -> None:
        """What has not ended by now hangs."""
        for pid, rank in self._waiting.items():
            self.ends[rank] |= {"hangs": True, "seconds": time.monotonic() - self.began}
            os.kill(pid, signal.SIGABRT)  # with a look at where it stands, from faulthandler
        time.sleep(0.3)
        self.kill(list(range(len(self.pids))))
        while not self.ended():
            time.sleep(0.01)


def start(do: Callable, place: Path, reports: Path, processes: int) -> Children:
    """Fork processes that do something in a folder; `reports` is a new folder for what they say."""
    reports.mkdir(parents=True)
    world, store = {"RELIABILITY_REPORTS": str(reports)}, None
    if processes > 1:
        # Held here, as `torchrun` holds it: it outlives a process that is lost.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        world |= {
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
    pids = []
    for rank in range(processes):
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            _be(do, Place(place, rank), reports, world | own)
        pids.append(pid)
    return Children(reports, pids, store)


def wait(children: Children, limit: float) -> list[dict]:
    """
    Wait for processes, and kill what is late.

    Returns:
        `list[dict]`: For each, `code`, `hangs`, `seconds`, `output` (stdout and stderr), `error` (`classes`, `message`)
            and `result`, what `do` returned.
    """
    pause = 0.002
    while not children.ended():
        if time.monotonic() - children.began > limit:
            children.give_up()
            break
        time.sleep(pause)
        pause = min(pause * 1.2, 0.02)
    for rank, (pid, end) in enumerate(zip(children.pids, children.ends, strict=True)):
        # What it has started itself, such as workers of data loaders.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        report, printed = children.reports / f"{rank}.json", children.reports / f"{rank}.txt"
        written = json.loads(report.read_text() or "{}") if report.is_file() else {}
        end |= {"error": written.get("error"), "result": written.get("result")}
        end["output"] = printed.read_text(errors="replace") if printed.is_file() else ""
    return children.ends


def _act(do: Callable, place: Path, reports: Path, processes: int, limit: float) -> list[dict]:
    return wait(start(do, place, reports, processes), limit)


def verify_newest(run: Path) -> str | None:
    """What is wrong with a run's newest checkpoint. An older one may be half rotated away."""
    from hf_wash.trainer import checkpoint

    found = sorted(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    try:
        return checkpoint.verify(found[-1]) and None if found else None
    except ValueError as error:
        return str(error)


def _be(do: Callable, place: Place, reports: Path, world: dict[str, str]) -> None:
    """The life of a forked process; does not return."""
    import faulthandler

    code = 70
    try:
        os.setpgid(0, 0)
        out = os.open(reports / f"{place.rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0), os.dup2(out, 1), os.dup2(out, 2)
        faulthandler.enable()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.update(world)
        os.chdir(place.folder)
        told: dict[str, Any] = {"error": None, "result": None}
        try:
            told["result"] = do(place)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if code:
                told["error"] = {"classes": ["SystemExit", "Exception"], "message": _printed(reports, place)}
        except BaseException as error:
            traceback.print_exc()
            classes = [cls.__name__ for cls in type(error).__mro__]
            told["error"] = {"classes": classes, "message": str(error)}
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
        (reports / f"{place.rank}.json").write_text(json.dumps(told, default=str))
        # What an interpreter does at its end.
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        code = 71
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _printed(reports: Path, place: Place) -> str:
    sys.stdout.flush()
    sys.stderr.flush()
    return (reports / f"{place.rank}.txt").read_text(errors="replace")


# ---- The process that forks ----------------------------------------------------------------------------------------


def serve() -> None:
    """Import everything, then try what each line of stdin names and answer with a line: `python -m reliability.harness`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from reliability import everything

    situations = {situation.id: situation for situation in everything.SITUATIONS}
    # Not a `TemporaryDirectory`, which each forked process would remove at its end.
    root = Path(tempfile.mkdtemp(prefix="reliability-"))
    try:
        templates = Templates(everything.TEMPLATES, root)
        # What is imported when it is first needed is imported here, once.
        for name in templates.result("modules"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        # Or each child's collector would copy every page that it looks at.
        gc.collect()
        gc.freeze()
        for line in sys.stdin:
            name, folder = json.loads(line)
            began = time.monotonic()
            try:
                short = attempt(situations[name], templates, Path(folder))
            except Exception:
                short = [f"could not be tried:\n{traceback.format_exc()}"]
            answers.write(json.dumps({"short": short, "seconds": time.monotonic() - began}) + "\n")
            answers.flush()
    finally:
        shutil.rmtree(root, ignore_errors=True)


class Server:
    """The process that forks, for as long as the `with` block lasts."""

    def __enter__(self) -> "Server":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"WANDB_DISABLED": "true", "TOKENIZERS_PARALLELISM": "false", "PYTHONFAULTHANDLER": "1"}
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from reliability.harness import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
            cwd=HERE.parent,  # not where another hf_wash may lie
        )  # fmt: skip
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def attempt(self, name: str, folder: Path) -> dict:
        """`short`, what fell short, and `seconds` of a situation, by its id, in an empty folder."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([name, str(folder)]) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise RuntimeError(f"The process that forks has ended:\n{self._errors.read().decode()[-4000:]}")
        return json.loads(answer)
