"""
Many cells, side by side, each in a process of its own. What is finished is not run again, and cells of
two rows that are the same run are run once.
"""

import dataclasses
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_wash.files import write_whole

from .cell import Cell, work_on
from .methods import METHODS
from .models import make_model
from .record import commit, machine, rounded, run_of
from .setting import Setting


EXAMPLES = Path(__file__).resolve().parents[1]

# What a cell takes beside its steps, to measure it. In seconds.
OVERHEAD = 10


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_words(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def step_seconds(setting: Setting, label_names: list[str]) -> float:
    """How long a step of one member takes on this machine, on one thread: measured on a few."""
    threads = torch.get_num_threads()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = make_model(setting, label_names).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    shape = (setting.batch_size, 3, setting.image_size, setting.image_size)
    torch.set_num_threads(1)
    times = []
    try:
        for _ in range(4):
            began = time.perf_counter()
            batch = torch.rand(shape, device=device), torch.zeros(setting.batch_size, dtype=torch.long, device=device)
            loss = model(*batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return min(times[1:])


def processes() -> multiprocessing.context.ForkServerContext:
    """Makes processes for cells: each a copy of one that has imported everything, on one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["comparison.cell"])
    paths = os.pathsep.join(filter(None, [str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    before = dict(os.environ)
    os.environ.update({"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


@dataclass
class Running:
    """A cell that is being run."""

    cell: Cell
    process: multiprocessing.process.BaseProcess
    folder: Path
    done_before: float = 0.0
    began: float = 0.0

    def part(self) -> float:
        """How much of it is done, from 0 to 1."""
        try:
            step, last, *_ = (self.folder / "progress").read_text().split()
            return int(step) / int(last)
        except (OSError, ValueError):
            return 0.0


class Runner:
    """
    Runs cells.

    Args:
        folder (`str` or `Path`):
            `cells/NAME.json` below it holds a cell's result, `cells/NAME/` what it needs while it is run.
        jobs (`int`):
            Cells that are run at a time.
        seconds_per_step (`float`):
            Of one member, to begin with; what is measured then takes its place.
    """

    def __init__(self, folder: str | Path, jobs: int, seconds_per_step: float):
        self.folder = Path(folder) / "cells"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.jobs = jobs
        self._rate = seconds_per_step
        self._work = self._seconds = 0.0
        self._shown = ""
        # That of the code which the processes load here, whatever is committed while they run.
        self._where = {"commit": commit(), "machine": machine()}
        self._processes = processes()

    def result_of(self, cell: Cell) -> dict[str, Any] | None:
        """
        What is known of a cell; `None` if it is not finished.

        Raises:
            ValueError: if a cell of this name was run, or begun, with another setting.
        """
        spec = self.folder / cell.name / "cell.json"
        if spec.exists() and rounded(json.loads(spec.read_text())) != rounded(cell.as_dict()):
            raise ValueError(
                f"The cell {cell.name} in {self.folder} was run with another setting; give another --output_dir, or "
                f"remove {self.folder / cell.name} and {cell.name}.json."
            )
        path = self.folder / f"{cell.name}.json"
        return json.loads(path.read_text()) if path.exists() and spec.exists() else None

    def adopt(self, results: list[dict[str, Any]], cells: list[Cell]) -> int:
        """
        Take results that are known from elsewhere for finished: a comparison goes on where another machine, or a folder that
        is gone, left it.

        Args:
            results (`list[dict]`): Of the same setting as the cells.
            cells (`list[Cell]`): What is about to be run.

        Returns:
            `int`: How many cells of these are finished now. One that was run with other options is not.
        """
        known = {run_of(result): result for result in results}
        # Its own before another row's, of another time and perhaps another machine.
        own = {(result["label"], run_of(result)): result for result in results}
        taken = 0
        for cell in cells:
            run = run_of(cell.as_dict())
            result = own.get((cell.label, run), known.get(run))
            if result is not None and self.result_of(cell) is None:
                self._take(result, cell)
                taken += 1
        return taken

    def _take(self, result: dict[str, Any], cell: Cell) -> dict[str, Any]:
        """Write the result of a run as that of another cell, which is the same run."""
        own = {**result, **{name: value for name, value in cell.as_dict().items() if name in result}}
        folder = self.folder / cell.name
        folder.mkdir(exist_ok=True)
        write_whole(self._result(cell), json.dumps(own, indent=1).encode())
        write_whole(folder / "cell.json", json.dumps(cell.as_dict()).encode())
        self._clear(folder)
        return own

    @staticmethod
    def _clear(folder: Path) -> None:
        """Checkpoints of a finished cell are of no more use; `cell.json` says what it was run with."""
        for found in folder.iterdir():
            if found.name != "cell.json":
                shutil.rmtree(found) if found.is_dir() else found.unlink()

    def finished(self, setting: Setting) -> tuple[list[dict[str, Any]], int]:
        """
        The results of all finished cells in the folder, whichever call they were run by.

        Args:
            setting ([`Setting`]): Theirs.

        Returns:
            `tuple[list[dict], int]`: Those of this setting, of methods that are compared; how many have another setting.
        """
        wanted = json.loads(json.dumps(dataclasses.asdict(setting)))
        found, others = [], 0
        for path in sorted(self.folder.glob("*.json")):
            spec = self.folder / path.stem / "cell.json"
            if not spec.exists():
                continue
            if json.loads(spec.read_text())["setting"] != wanted:
                others += 1
            elif (result := json.loads(path.read_text()))["method"] in METHODS:
                found.append(result)
        return found, others

    def estimate(self, cells: list[Cell]) -> float:
        """The seconds that these cells will take, so many at a time, if none of them is the same run as another."""
        each = [cell.work * self._rate + OVERHEAD for cell in cells]
        return max(sum(each) / self.jobs, max(each, default=0.0))

    def run(self, cells: list[Cell], time_limit: float | None = None) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """
        Run what is not finished, in the order given.

        Args:
            cells (`list[Cell]`): All cells of a comparison.
            time_limit (`float`, *optional*): Seconds after which the rest is left for another call.

        Returns:
            `tuple[list[dict], dict[str, str]]`: The results of the finished cells in the order given, and why others
            failed, by name.
        """
        results = {cell.name: self.result_of(cell) for cell in cells}
        runs = {cell.name: (run_of(cell.as_dict()), cell.setting) for cell in cells}
        known = {runs[name]: result for name, result in results.items() if result is not None}
        waiting = [cell for cell in cells if results[cell.name] is None]
        running: list[Running] = []
        failed: dict[str, str] = {}
        began = time.monotonic()
        try:
            while (waiting or running) and (time_limit is None or time.monotonic() - began < time_limit):
                for one in [one for one in running if not one.process.is_alive()]:
                    running.remove(one)
                    result, reason = self._finish(one)
                    if result is None:
                        failed[one.cell.name] = reason
                    else:
                        results[one.cell.name] = known[runs[one.cell.name]] = result
                for cell in [cell for cell in waiting if runs[cell.name] in known]:
                    waiting.remove(cell)
                    results[cell.name] = self._take(known[runs[cell.name]], cell)
                busy = {runs[one.cell.name] for one in running}
                for cell in [cell for cell in waiting if runs[cell.name] not in busy]:
                    if len(running) < self.jobs and runs[cell.name] not in busy:
                        waiting.remove(cell)
                        running.append(self._start(cell))
                        busy.add(runs[cell.name])
                self._show(len(cells), results, running, waiting, failed)
                time.sleep(0.2)
        finally:
            for one in running:
                one.process.kill()  # it goes on from its checkpoint
                one.process.join()
            if running or waiting:
                self._say(f"{len(running) + len(waiting)} cells are left: the same command goes on with them.")
        for cell in cells:
            # It failed, and the same run for another row did not.
            if results[cell.name] is None and runs[cell.name] in known:
                results[cell.name] = self._take(known[runs[cell.name]], cell)
                failed.pop(cell.name, None)
        return [result for result in results.values() if result is not None], failed

    def _start(self, cell: Cell) -> Running:
        folder = self.folder / cell.name
        folder.mkdir(exist_ok=True)
        write_whole(folder / "cell.json", json.dumps(cell.as_dict()).encode())
        arguments = (cell.as_dict(), str(folder), str(self._result(cell)), str(self.folder.parent), self._where)
        process = self._processes.Process(target=work_on, args=arguments)
        process.start()
        one = Running(cell, process, folder)
        one.done_before, one.began = one.part(), time.monotonic()
        return one

    def _result(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def _finish(self, one: Running) -> tuple[dict[str, Any] | None, str]:
        path = self._result(one.cell)
        if one.process.exitcode == 0 and path.exists():
            result = json.loads(path.read_text())
            self._clear(one.folder)
            self._work += one.cell.work * (1 - one.done_before)
            self._seconds += max(0.0, time.monotonic() - one.began - OVERHEAD)
            self._rate = self._seconds / self._work if self._work else self._rate
            return result, ""
        log = one.folder / "log.txt"
        lines = log.read_text().strip().splitlines() if log.exists() else []
        reason = lines[-1] if lines else f"it ended with code {one.process.exitcode}"
        return None, f"{reason} (all of it is in {log})"

    def _show(self, total, results, running, waiting, failed) -> None:
        done = sum(result is not None for result in results.values())
        left = [one.cell.work * (1 - one.part()) * self._rate for one in running]
        left += [cell.work * self._rate + OVERHEAD for cell in waiting]
        busy = ", ".join(f"{one.cell.name} {one.part():.0%}" for one in running)
        text = f"{done} of {total} cells done" + (f", {len(failed)} failed" if failed else "")
        text += f"; running: {busy or 'none'}; {len(waiting)} to begin; about {in_words(sum(left) / self.jobs)} left"
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", file=sys.stderr, flush=True)
        elif (key := f"{done} {sorted(failed)}") != self._shown:  # a line in a log for each cell
            self._shown = key
            print(text, file=sys.stderr, flush=True)

    def _say(self, text: str) -> None:
        print(("\n" if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)
