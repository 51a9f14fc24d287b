"""Trains small populations that push to the Hub that HF_ENDPOINT names, and prints as JSON what came of it."""

import json
import logging
import sys
import time
from pathlib import Path

from hub import tiny_runs
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_wash.hub.push import PushError


class _WaitForPush(TrainerCallback):
    """Uploads are slower than these runs; let each be done before the next step, or the next save skips its own."""

    def on_save(self, args, state, control, **kwargs):
        self.trainer._finish_current_push()


def run(folder: Path, **options):
    waiting = _WaitForPush()
    trainer = tiny_runs.trainer(folder, options.pop("kind", "vit"), callbacks=[waiting], push_to_hub=True, **options)
    waiting.trainer = trainer
    return trainer


def main(place: Path) -> None:
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")
    transformers_logging.get_logger("hf_wash").addHandler(handler)
    transformers_logging.get_logger("hf_wash").setLevel("INFO")
    saving = {"save_strategy": "steps", "save_steps": 2}
    found = {}

    trainer = run(place / "every-save", hub_strategy="every_save", push_members=True, kind="timm", **saving)
    trainer.train()
    trainer.push_to_hub(dataset="noise", dataset_tags="user/noise", license="mit")
    found["every save"] = {"local": sorted(path.name for path in (place / "every-save").iterdir())}

    options = {"hub_strategy": "checkpoint", "save_total_limit": 1, "hub_revision": "dev", "hub_private_repo": True}
    trainer = run(place / "last", hub_model_id="user/last-checkpoint-run", **options, **saving)
    trainer.train()
    found["checkpoint"] = {"local": sorted(path.name for path in (place / "last").iterdir())}

    run(place / "all", hub_strategy="all_checkpoints", hub_always_push=True, **saving).train()

    # The storage is full: the run goes on, the explicit push says so.
    messages.clear()
    trainer = run(place / "full", hub_model_id="user/quota", hub_strategy="every_save", **saving)
    trainer.train()
    trainer.save_model()
    trainer.save_members()
    found["full"] = {"steps": trainer.state.global_step, "messages": list(messages)}
    try:
        trainer.push_to_hub()
    except PushError as error:
        found["full"]["error"] = str(error)
    found["full"]["local"] = sorted(path.name for path in (place / "full").iterdir())

    start = time.monotonic()
    try:
        run(place / "refused", hub_token="hf_nobody")
    except ValueError as error:
        found["refused"] = {"error": str(error), "seconds": time.monotonic() - start}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
