"""Two processes that differ in what they must agree on: each prints the error it got. `disagreement_run.py FOLDER MODE...`"""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from small_population import Digits, population, vit
from transformers import TrainerCallback


folder, modes = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
rank = int(os.environ["RANK"])


def option():
    population(folder, size=2, learning_rate=1e-3 * (rank + 1)).train()


def architecture():
    population(folder, vit(hidden_size=16 * (rank + 1)), size=2)


def steps():
    population(folder, size=2, trainer={"train_dataset": Digits(0, 330 - 100 * rank)}).train()


def weights():
    trainer = population(folder, size=2)
    with torch.no_grad():
        trainer.population.members[0].classifier.bias += rank
    trainer.train()


def folders():
    population(folder / f"of-process-{rank}", size=2, save_strategy="steps", save_steps=6).train()


def each_node():
    """Every process a machine of its own, with a folder of its own."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    os.environ["LOCAL_RANK"] = "0"
    trainer = population(
        folder / f"node-{rank}",
        size=2,
        save_strategy="steps",
        save_steps=6,
        save_on_each_node=True,
        eval_strategy="no",
    )
    trainer.train()
    again = population(
        folder / f"node-{rank}", size=2, save_strategy="no", save_on_each_node=True, eval_strategy="no", max_steps=12
    )
    again.train(resume_from_checkpoint=str(folder / f"node-{rank}" / "checkpoint-6"))
    same = all(torch.equal(a, b) for a, b in zip(again.model.parameters(), trainer.model.parameters(), strict=True))
    held = sorted(path.name for path in (folder / f"node-{rank}" / "checkpoint-6").glob("member_*"))
    raise ValueError(f"resumed {same} from {held}")


def skipped():
    """What fp16's scaler does when it finds an overflow on one process only: no step, no step of the schedule."""

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == 3:
                trainer.optimizer._is_overflow = True
                trainer.optimizer.optimizer.step = lambda closure=None: None

        def on_step_end(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == 4:
                trainer.optimizer._is_overflow = False
                del trainer.optimizer.optimizer.step

    trainer = population(folder, size=2, eval_strategy="no", trainer={"callbacks": [Overflow()]})
    trainer.train()
    moved = trainer.population.gather_processes(trainer.values_moved)
    raise ValueError(
        f"{trainer.state.global_step} steps, {trainer.lr_scheduler.last_epoch} scheduled, {len(set(moved))}"
    )


def division():
    population(folder, size=3)


for mode in modes:
    try:
        globals()[mode]()
        said = "nothing"
    except ValueError as error:
        said = str(error)
    (folder / f"{mode}-{rank}.txt").write_text(said)
