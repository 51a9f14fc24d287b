"""
A storm: a run of two processes that is killed again and again, and meets a NaN, a full disk and a lost process on its
way. It has to end with the weights of an undisturbed run, or in an error that says what to do.

`python tests/reliability/storm.py [--storms 10] [--events 20] [--seed 0]`

Processes are forked from one in which everything is imported, so that a start costs a tenth of a second.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path


HERE = Path(__file__).parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch  # noqa: E402
from reliability import interruptions, tiny  # noqa: E402
from reliability.harness import Children, Place, start, verify_newest, wait  # noqa: E402


STEPS = 60
RUN = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 3,
    "eval_strategy": "steps",
    "eval_steps": 10,
}
LIMIT = 60.0


def train(place: Place, given: dict | None = None) -> dict:
    """*Collective.* Go on from wherever the run stands."""
    callbacks = [tiny.On("step_end", lambda state, control: _tell(place, state.global_step))]
    arguments = {"compute_metrics": tiny.accuracy, "callbacks": [*callbacks, *(given or {}).get("callbacks", [])]}
    return tiny.trained(place, "auto", given=arguments, ddp_timeout=8, **RUN)


def _tell(place: Place, step: int) -> None:
    # Slow enough that a kill can find any phase.
    time.sleep(0.01)
    if place.rank == 0:
        (place.folder / "step").write_text(str(step))


def plainly(place: Place) -> dict:
    return train(place)


def with_nan(step: int, rank: int):
    """A member becomes NaN at the end of a step."""

    def do(place):
        def poison(state, control):
            model = callback.run.population.members[0]
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))

        callback = tiny.On("step_end", poison, step=step if place.rank == rank else -1)
        own = tiny.WashTrainer.train

        def remember(run, *args, **kwargs):
            callback.run = run
            return own(run, *args, **kwargs)

        tiny.WashTrainer.train = remember
        return train(place, {"callbacks": [callback]})

    return do


def with_full_disk(number: int, rank: int):
    """The disk is full when the k-th member's files are written."""

    def do(place):
        if place.rank == rank:
            interruptions.disk_full_at(number)
        return train(place)

    return do


def step_of(place: Path) -> int:
    file = place / "step"
    text = file.read_text() if file.is_file() else ""
    return int(text or 0)


def storm(folder: Path, seed: int, events: int, undisturbed: dict) -> list[str]:
    """One storm; what was wrong about it."""
    draw = random.Random(seed)
    place = folder / "place"
    place.mkdir(parents=True)
    kinds = ["NaN", "full disk", "lost process", *["kill"] * (events - 3)]
    draw.shuffle(kinds)
    wrong, told = [], []
    for number, kind in enumerate(kinds):
        began = step_of(place)
        ahead = min(began + draw.randint(1, 6), STEPS - 1)
        rank = draw.randrange(2)
        do = {"NaN": with_nan(ahead, rank), "full disk": with_full_disk(1, rank)}.get(kind, plainly)
        children = start(do, place, folder / f"reports-{number}", 2)
        if kind in ("kill", "lost process"):
            _until_step(place, ahead, children)
            time.sleep(draw.uniform(0, 0.15))
            children.kill([rank] if kind == "lost process" else [0, 1])
        ends = wait(children, LIMIT)
        for end, number_of in zip(ends, range(2), strict=True):
            killed = kind == "kill" or (kind == "lost process" and number_of == rank)
            if end["hangs"]:
                wrong.append(f"event {number}, a {kind}: process {number_of} hangs\n{end['output'][-2000:]}")
            elif end["error"] is not None:
                told.append(f"{kind}: {end['error']['message'][:110]}")
            elif not killed and end["code"] != 0:
                wrong.append(
                    f"event {number}, a {kind}: process {number_of} ends with {end['code']}\n{end['output'][-2000:]}"
                )
        problem = verify_newest(place / "run")
        wrong += [f"after event {number}, a {kind}: {problem}"] if problem is not None else []
        if all(end["code"] == 0 for end in ends):
            break  # it came to its end before the event
    ends = wait(start(plainly, place, folder / "reports-end", 2), LIMIT)
    for end in ends:
        if end["hangs"] or end["code"] != 0:
            wrong.append(f"the last run ends with {end['code']}\n{end['output'][-2000:]}")
        elif end["result"] != undisturbed:
            wrong.append(f"the end is {end['result']} instead of {undisturbed}")
    print(f"storm {seed}: {len(kinds)} events ({number + 1} met), {'; '.join(sorted(set(told)))[:400]}")
    return wrong


def _until_step(place: Path, step: int, children: Children) -> None:
    end = time.monotonic() + 30
    while step_of(place) < step and not children.ended() and time.monotonic() < end:
        time.sleep(0.005)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storms", type=int, default=10)
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="storm-"))
    failed = 0
    try:
        (root / "undisturbed").mkdir()
        ends = wait(start(plainly, root / "undisturbed", root / "reports", 2), LIMIT)
        assert ends[0]["code"] == 0, ends[0]["output"]
        for seed in range(given.seed, given.seed + given.storms):
            began = time.monotonic()
            wrong = storm(root / str(seed), seed, given.events, ends[0]["result"])
            failed += bool(wrong)
            print(
                "\n".join(wrong)
                or f"storm {seed}: ends as the undisturbed run, after {time.monotonic() - began:.0f} s",
                flush=True,
            )
            shutil.rmtree(root / str(seed), ignore_errors=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"{given.storms} storms of {given.events} events, {failed} of them did not end as they should")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
