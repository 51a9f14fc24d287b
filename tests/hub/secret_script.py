"""
Trains with tokens among the options and pushes to the Hub that HF_ENDPOINT names, at `PLACE/run`; everything that is
logged goes to the standard streams, and what is pickled otherwise to `PLACE`.
"""

import copy
import io
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hub import tiny_runs
from hub.loopback_hub import WRITER
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_wash import PopulationArguments, PopulationMixin, WashTrainer


NESTED, KEY = "hf_anothersecretoftheuser", "key-0123456789abcdef"


@dataclass
class Config(PopulationArguments, TrainingArguments):
    """With secrets in more places than one."""

    model_init_kwargs: dict | None = None
    service_api_key: str | None = None
    eos_token: str = field(default="<|end|>")


def tell_token(config, answer):
    """In a process of its own, which has to be able to import this."""
    answer.put(config.hub_token)


class AnyTrainer(PopulationMixin, Trainer):
    """A Trainer that knows nothing of image classifiers, and pickles its arguments once more."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            torch.save({"arguments": self.args}, Path(output_dir or self.args.output_dir) / "more.bin")


class WriteItAll(TrainerCallback):
    """As reporting callbacks do."""

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, "runs")
        folder.mkdir(exist_ok=True)
        (folder / "options.json").write_text(args.to_json_string())
        (folder / "sanitized.txt").write_text(str(args.to_sanitized_dict()))
        (folder / "shown.txt").write_text(f"{args}\n{args!r}\n{copy.deepcopy(args)}")


def main(place: Path) -> None:
    logging.basicConfig(level="DEBUG")
    transformers_logging.set_verbosity_debug()
    for kind, trainer_class in (("vit", WashTrainer), ("any", AnyTrainer)):
        model, processor = tiny_runs.vit()
        config = Config(
            str(place / f"run-{kind}"), population_size=2, max_steps=4, per_device_train_batch_size=8, use_cpu=True,
            report_to="none", save_strategy="steps", save_steps=2, push_members=True, logging_steps=1,
            push_to_hub=True, hub_strategy="all_checkpoints", hub_always_push=True, hub_token=WRITER,
            hub_model_id=f"user/{kind}", model_init_kwargs={"token": NESTED, "deep": [{"api_key": KEY}]},
            service_api_key=KEY,
        )  # fmt: skip
        trainer = trainer_class(
            model, config, train_dataset=tiny_runs.Noise(16, 16), processing_class=processor, callbacks=[WriteItAll()]
        )
        trainer.train()
        trainer.save_model()
        trainer.save_members()
        trainer.save_state()
        trainer.push_to_hub()
        print(trainer.members[1].args)
        assert trainer.args.hub_token == trainer.members[1].args.hub_token == WRITER
        assert copy.deepcopy(config).hub_token == copy.copy(config).hub_token == WRITER
        assert config.model_init_kwargs == {"token": NESTED, "deep": [{"api_key": KEY}]}
        pickled = io.BytesIO()
        torch.save(trainer.members[1].args, pickled)
        restored = torch.load(io.BytesIO(pickled.getvalue()), weights_only=False)
        assert type(restored) is Config, type(restored)
        found = (restored.hub_token, restored.eos_token)
        assert found == (None, "<|end|>"), found
        assert restored.model_init_kwargs == {"token": None, "deep": [{"api_key": None}]}
        assert restored.seed == config.seed + 1 and restored.learning_rate == config.learning_rate


if __name__ == "__main__":
    main(Path(sys.argv[1]))
