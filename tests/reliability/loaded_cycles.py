"""
Full cycles of two processes, train → evaluate → save → exit, while both cores are kept busy: the exit code is 0 each time.

`python tests/reliability/loaded_cycles.py [--runs 50] [--launched 10]`

`--launched` of them start through `torchrun`, as a user's do; the others are forked from a process in which everything is
imported, and end as an interpreter does.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


HERE = Path(__file__).parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

from reliability import tiny  # noqa: E402
from reliability.harness import Place, start, wait  # noqa: E402


BUSY = "while True: pass"
LIMIT = 120.0


def cycle(place: Place) -> dict:
    """Train with evaluations and checkpoints, evaluate, and save what a script saves."""
    run = tiny.trainer(
        place, **tiny.SAVING, eval_strategy="steps", eval_steps=3, given={"compute_metrics": tiny.accuracy}
    )
    result = run.train()
    metrics = run.evaluate()
    run.save_model()
    run.save_members()
    run.save_metrics("all", {**result.metrics, **metrics})
    run.save_state()
    return tiny.outcome(run)


def launched(folder: Path) -> int:
    """One cycle through `torchrun`; its exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [*command, __file__, "--cycle", str(folder)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            return process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            return -1


def forked(folder: Path) -> int:
    """One cycle in two forked processes; the first exit code that is not 0."""
    ends = wait(start(cycle, folder, folder / "reports", 2), LIMIT)
    (folder / "log.txt").write_text("\n".join(end["output"] for end in ends))
    return next((end["code"] if end["code"] is not None else -1 for end in ends if end["code"] != 0), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--launched", type=int, default=10)
    parser.add_argument("--cycle", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cycle is not None:
        cycle(Place(given.cycle, int(os.environ["RANK"])))
        return 0
    cores = os.cpu_count() or 2
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(cores)]
    wrong, times = [], []
    try:
        for number in range(given.runs):
            # Not a `TemporaryDirectory`, which each forked process would remove at its end.
            root = Path(tempfile.mkdtemp(prefix="cycle-"))
            began = time.monotonic()
            code = (launched if number < given.launched else forked)(root)
            times.append(time.monotonic() - began)
            whole = (root / "run" / "all_results.json").is_file()
            if code != 0 or not whole:
                wrong.append(number)
                print(f"run {number} ends with {code}{'' if whole else ', and not all is saved'}")
                print((root / "log.txt").read_text(errors="replace")[-4000:], flush=True)
            shutil.rmtree(root, ignore_errors=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(
        f"{given.runs} full cycles of two processes, {given.launched} of them through torchrun, with {cores} processes that "
        f"keep {cores} cores busy: {len(wrong)} wrong exit codes; {sum(times) / len(times):.1f} s each"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
