"""
Two processes, one of which fails, stands still, or differs from the other. `failure_run.py FOLDER MODE...` writes
`FOLDER/<mode>/said-<rank>.txt`.
"""

import functools
import os
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import forked_processes
import torch
from accelerate import PartialState
from small_population import TEST, TRAIN, Digits, DigitStream, population, started
from transformers import TrainerCallback

from hf_wash.population import failures
from hf_wash.trainer import checkpoint


torch.set_num_threads(1)
folder = Path(sys.argv[1])


class At(TrainerCallback):
    """Does something on one process at the end of step 3."""

    def __init__(self, rank, work, everywhere=False, on=1):
        self.acts, self.work = rank == on or everywhere, work

    def on_step_end(self, args, state, control, **kwargs):
        if self.acts and state.global_step == 3:
            self.work()


def fail(text="this one"):
    raise KeyError(text)


def trained(rank, *callbacks, size=2, trainer=None, **options):
    trainer = {"callbacks": list(callbacks), **(trainer or {})}
    made = population(folder / "run", size=size, trainer=trainer, **options)
    made.train()
    return f"{made.state.global_step} steps"


# ---- Before training -----------------------------------------------------------------------------------------------


def no_data(rank):
    return trained(rank, trainer={"train_dataset": None if rank else TRAIN})


def empty_data(rank):
    return trained(rank, trainer={"train_dataset": Digits(0, 0) if rank else TRAIN})


class Unlabelled(Digits):
    def __getitem__(self, index):
        return {"pixel_values": super().__getitem__(index)["pixel_values"]}


def no_labels(rank):
    return trained(rank, trainer={"train_dataset": (Unlabelled if rank else Digits)(0, 330)})


def refused_option(rank):
    return trained(rank, shuffle_probability=1.5 if rank else 0.3)


def refused_by_transformers(rank):
    return trained(rank, eval_strategy="sometimes" if rank else "no")


def refused_setting(rank):
    (folder / "a file").write_text("")
    os.environ["LOCAL_RANK"] = "0"  # a machine of its own, which writes
    population(folder / ("a file" if rank else "run"), size=2, save_on_each_node=True).train()


def model_init(rank):
    return trained(rank, trainer={"model_init": (lambda: fail()) if rank else (lambda: started()), "model": None})


def evaluation_set_missing(rank):
    return trained(rank, eval_strategy="no", trainer={"eval_dataset": None if rank else TEST})


def evaluation_set_longer(rank):
    return trained(rank, trainer={"eval_dataset": Digits(1000, 1037 + rank)})


def evaluation_stream_longer(rank):
    return trained(rank, trainer={"eval_dataset": DigitStream(32 + 16 * rank, noisy=False)})


def evaluation_stream_with_a_longer_batch(rank):
    return trained(rank, trainer={"eval_dataset": DigitStream(33 + rank, noisy=False)})


def evaluation_stream_of_the_soup_alone(rank):
    stream = DigitStream(48 - 16 * rank, noisy=False)
    return trained(rank, evaluate_members=False, trainer={"eval_dataset": stream})


def evaluation_stream(rank):
    return trained(rank, trainer={"eval_dataset": DigitStream(33, noisy=False)})


def save_strategy(rank):
    return trained(rank, save_strategy="steps" if rank else "no", save_steps=6)


def other_data(rank):
    return trained(rank, trainer={"train_dataset": Digits(rank, 330 + rank, noisy=True)})


def resumes_alone(rank):
    made = population(folder / "run", size=2)
    made.train(resume_from_checkpoint="auto" if rank else None)


class Flipped(Digits):
    """Augments by a generator of its own, which nothing seeds."""

    def __getitem__(self, index):
        example, generator = super().__getitem__(index), torch.Generator()
        generator.seed()
        flip = torch.rand((), generator=generator) < 0.5
        return {**example, "pixel_values": example["pixel_values"].flip(-1) if flip else example["pixel_values"]}


def own_augmentation(rank):
    return trained(rank, eval_strategy="no", max_steps=2, trainer={"train_dataset": Flipped(0, 330)})


class SomeFail(Digits):
    def __getitem__(self, index):
        if index == 165:
            raise OSError("a broken file")
        return super().__getitem__(index)


def a_bad_example_that_is_not_drawn(rank):
    return trained(rank, eval_strategy="no", max_steps=2, trainer={"train_dataset": SomeFail(0, 330)})


# ---- In mid-run ----------------------------------------------------------------------------------------------------


def callback(rank):
    return trained(rank, At(rank, fail))


def first_process(rank):
    return trained(rank, At(rank, fail, on=0))


def first_process_while_others_compute(rank):
    failures.HEARD = 0.5
    return trained(rank, At(rank, fail, on=0), At(rank, lambda: time.sleep(5)))


def callback_with_mixing_off(rank):
    return trained(rank, At(rank, fail), mixing="independent", same_init=True)


class FailsLate(Digits):
    def __init__(self, rank):
        super().__init__(0, 330)
        self.rank, self.fetched = rank, 0

    def __getitem__(self, index):
        self.fetched += 1
        if self.rank == 1 and self.fetched > 80:
            raise OSError(f"cannot identify image file {index // 1000}.jpg")
        return super().__getitem__(index)


def data_set(rank):
    return trained(rank, trainer={"train_dataset": FailsLate(rank)})


def model(rank):
    made = started()
    forward, calls = made.forward, []

    @functools.wraps(forward)
    def failing(*args, **kwargs):
        calls.append(1)
        if rank == 1 and len(calls) > 3:
            raise RuntimeError("shapes do not fit")
        return forward(*args, **kwargs)

    trainer = population(folder / "run", made, size=2)
    trainer.population.members[0].forward = failing
    trainer.train()


def compute_metrics(rank):
    return trained(
        rank, trainer={"compute_metrics": (lambda prediction: fail()) if rank else (lambda prediction: {"a": 1.0})}
    )


def evaluating(rank):
    made = population(
        folder / "run", size=2, trainer={"compute_metrics": (lambda _: fail()) if rank else (lambda _: {})}
    )
    made.evaluate()


def other_evaluation_set(rank):
    population(folder / "run", size=2).evaluate(Digits(1000, 1037 + rank))


def damaged_checkpoint(rank):
    trained(rank, save_strategy="steps", save_steps=6)
    if rank:
        checkpoint.read_weights = lambda *args: (_ for _ in ()).throw(checkpoint.InvalidCheckpoint("a byte is wrong"))
    population(folder / "run", size=2, max_steps=14).train(resume_from_checkpoint=True)


def leaves(rank):
    return trained(rank, At(rank, lambda: sys.exit("has seen enough")))


# ---- Lost ----------------------------------------------------------------------------------------------------------


def stands_still(rank):
    try:
        return trained(rank, At(rank, lambda: time.sleep(24)), ddp_timeout=8)
    finally:
        if not rank:
            time.sleep(20)  # with the store, which a launcher would hold


def killed(rank):
    return trained(rank, At(rank, lambda: os._exit(1)))


def callback_of_three(rank):
    return trained(rank, At(rank, fail), size=3)


def stands_still_of_three(rank):
    PartialState(cpu=True)  # a script that has made the group before, with the library's timeout
    return trained(rank, At(rank, lambda: time.sleep(14)), size=3, ddp_timeout=8)


def killed_of_three(rank):
    return trained(rank, At(rank, lambda: os._exit(1)), size=3)


# ---- All alike -----------------------------------------------------------------------------------------------------


def together(rank):
    """A group in which all have failed alike can be used on."""
    try:
        trained(rank, At(rank, fail, everywhere=True))
    except KeyError as error:
        return f"{error}, then {trained(rank, max_steps=4)}"


if __name__ == "__main__":
    for mode in sys.argv[2:]:
        folder = Path(sys.argv[1]) / mode
        forked_processes.run(globals()[mode], folder, 3 if mode.endswith("_of_three") else 2)
