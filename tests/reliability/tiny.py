"""A population that trains in a tenth of a second, and what situations do with it."""

import dataclasses
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from reliability.harness import Place
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, set_seed
from transformers.utils import logging

from hf_wash import WashConfig, WashTrainer


STEPS = 6
CLASSES = 3


class Points(torch.utils.data.Dataset):
    """Images of nothing with a class each; `fails_at` is the example that raises, `wrong` what to give in its place."""

    def __init__(self, count: int = 24, fails_at: int | None = None, wrong: Any = None, **changes):
        self.images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.fails_at, self.wrong, self.changes = fails_at, wrong, changes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == self.fails_at:
            if isinstance(self.wrong, Exception):
                raise self.wrong
            return self.wrong
        return {"pixel_values": self.images[index], "labels": index % CLASSES, **self.changes}


class Stream(torch.utils.data.IterableDataset):
    """The same without a length."""

    def __init__(self, count: int = 24):
        self.points = Points(count)

    def __iter__(self):
        return (self.points[index] for index in range(len(self.points)))


def vit(seed: int = 0, **changes) -> ViTForImageClassification:
    set_seed(seed)
    config = {
        "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "num_labels": CLASSES, "hidden_dropout_prob": 0.1, **changes,
    }  # fmt: skip
    return ViTForImageClassification(ViTConfig(**config))


def options(folder: Path | str, **changes) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "population_size": 2, "max_steps": STEPS, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 2, "save_strategy": "no",
        "eval_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3,
        "shuffle_probability": 0.5, "dataloader_pin_memory": False, "ddp_timeout": 10,
        "report": False,  # which is made anew, in a folder where nothing else changes
        **changes,
    }  # fmt: skip


def known(changes: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(WashConfig)}
    return {name: value for name, value in changes.items() if name in names}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(place: Place, *, given: dict[str, Any] | None = None, **changes) -> WashTrainer:
    """Ours over the points; `given` are further arguments of the Trainer, `changes` options."""
    logging.set_verbosity_info() if changes.pop("info", False) else None
    args = WashConfig(**options(changes.pop("folder", place.run), **changes))
    arguments = {"train_dataset": Points(), "eval_dataset": Points(7), **(given or {})}
    if "model_init" not in arguments and "model" not in arguments:
        arguments["model"] = vit()
    return WashTrainer(args=args, **arguments)


def digest(model: torch.nn.Module) -> str:
    whole = hashlib.sha256()
    for name, value in model.state_dict().items():
        whole.update(name.encode() + value.detach().float().numpy().tobytes())
    return whole.hexdigest()[:12]


def outcome(run: WashTrainer) -> dict[str, Any]:
    """*Collective.* What must be the same as without the disturbance."""
    members = run.population.gather([digest(member) for member in run.population.members])
    return {"members": members, "soup": digest(run.model), "step": run.state.global_step}


def trained(place: Place, resume=None, **changes) -> dict[str, Any]:
    """*Collective.* Train, and say what came of it."""
    run = trainer(place, **changes)
    run.train(resume_from_checkpoint=resume)
    return outcome(run)


SAVING = {"save_strategy": "steps", "save_steps": 2}


def resumed(place: Place, resume="auto", **changes) -> dict[str, Any]:
    return trained(place, resume, **{**SAVING, **changes})


class On(TrainerCallback):
    """Do something at an event: `On("step_end", lambda state, control: ..., step=3)`; at every step if not given."""

    def __init__(self, event: str, do, step: int | None = None):
        self._do, self._step = do, step

        def happens(args, state, control, **kwargs):
            if self._step is None or state.global_step == self._step:
                self._do(state, control)

        setattr(self, f"on_{event}", happens)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- What situations start from ------------------------------------------------------------------------------------


def _modules(place: Place) -> list[str]:
    import sys

    from transformers import ViTImageProcessor

    run = trainer(
        place, **SAVING, eval_strategy="steps", eval_steps=3, soup="greedy", soup_holdout=0.2,
        given={"compute_metrics": accuracy, "processing_class": ViTImageProcessor(size={"height": 8, "width": 8})},
    )  # fmt: skip
    run.train()
    run.save_model()
    run.save_members()
    run.create_model_card()
    return [name for name in sys.modules if not name.startswith("__") and "test" not in name]


def _undisturbed(place: Place) -> dict[str, Any]:
    """Checkpoints at 2, 4 and 6, and what the run came to."""
    return resumed(place, None)


def _independent(place: Place) -> dict[str, Any]:
    """The same without an exchange."""
    return resumed(place, None, mixing="independent")


def _unfinished(place: Place) -> dict[str, Any]:
    """As a run that was stopped after step 4 leaves it; returns what the whole run comes to."""
    import shutil

    result = resumed(place, None)
    shutil.rmtree(place.run / "checkpoint-6")
    return result


def _finished_run(place: Place) -> None:
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    run = trainer(place, **SAVING, given={"processing_class": processor, "compute_metrics": accuracy})
    result = run.train()
    run.save_model()
    run.save_members()
    run.save_metrics("all", {**result.metrics, **run.evaluate()})
    run.save_state()
    run.create_model_card(dataset="noise")


def _models(place: Place) -> None:
    """Four exported models, as `hf-wash soup` takes them."""
    from transformers import ViTImageProcessor

    from hf_wash.hub import export_model

    for seed in range(4):
        export_model(
            vit(seed),
            place.folder / f"model_{seed}",
            check=False,
            processing_class=ViTImageProcessor(size={"height": 8, "width": 8}),
        )


TEMPLATES = {
    "modules": _modules,
    "undisturbed": _undisturbed,
    "independent": _independent,
    "unfinished": _unfinished,
    "finished": _finished_run,
    "models": _models,
}


def edit_json(path: Path, change) -> None:
    """Let `change` alter a file's JSON in place, or return what stands in its place."""
    content = json.loads(path.read_text())
    given = change(content)
    path.write_text(json.dumps(content if given is None else given))
