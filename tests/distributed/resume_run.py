"""
Two processes go on from checkpoints of all kinds; what each process said of each goes to `FOLDER/<mode>-<rank>.txt`.
`resume_run.py FOLDER MODE...`
"""

import json
import os
import shutil
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from small_population import digest, population

from hf_wash.trainer import manifest
from hf_wash.trainer.run_folder import RunFolder


place, modes = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
SETTINGS = {"size": 2, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "no"}


def run(folder, resume=None, **settings):
    trainer = population(folder, **{**SETTINGS, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def alone(work):
    """Done by process 0, while the other one waits."""
    if rank == 0:
        work()
    dist.barrier()


def copied(mode, *left_out):
    def copy():
        shutil.copytree(place / "whole", place / mode)
        for name in left_out:
            shutil.rmtree(place / mode / name)

    alone(copy)
    return place / mode


def put_in_place(folder, name, write):
    def put():
        write(folder / name)
        content = json.loads((folder / "population.json").read_text())
        content["files"][name] = manifest.file_record(folder / name)
        (folder / "population.json").write_text(json.dumps(manifest.seal(content)))

    alone(put)


def report(trainer):
    return f"step {trainer.state.global_step}, run {trainer._run}, soup {digest(trainer.model)}"


def whole():
    return report(run(place / "whole"))


def passed_over():
    folder = copied("passed_over", "checkpoint-12")
    alone(
        lambda: (folder / "checkpoint-8" / "population.json").write_text(
            '{"format": 2, "population_size": 1000000000}'
        )
    )
    return report(run(folder, "auto"))


def finished():
    return report(run(copied("finished"), "auto"))


def hostile_optimizer():
    folder = copied("hostile_optimizer", "checkpoint-12")
    put_in_place(folder / "checkpoint-8", "member_1/optimizer.pt", lambda path: torch.save([], path))
    run(folder, "auto")


def hostile_streams():
    folder = copied("hostile_streams", "checkpoint-12")
    put_in_place(folder / "checkpoint-8", "member_0/streams.json", lambda path: path.write_text("{}"))
    run(folder, "auto")


def lacking_tensor():
    def less(path):
        tensors = load_file(path)
        del tensors["classifier.bias"]
        save_file(tensors, path)

    folder = copied("lacking_tensor", "checkpoint-12")
    put_in_place(folder / "checkpoint-8", "member_1/model.safetensors", less)
    run(folder, "auto")


def several_runs():
    folder = copied("several_runs")
    run(folder, seed=3, save_steps=3, max_steps=3)
    run(folder, "auto", seed=3)


def in_use():
    folder = RunFolder(place / "in_use")
    if rank == 0:
        folder.enter()
    dist.barrier()
    try:
        run(place / "in_use")
    finally:
        folder.leave()


for mode in modes:
    try:
        said = globals()[mode]()
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    (place / f"{mode}-{rank}.txt").write_text(said or "nothing")
    dist.barrier()
