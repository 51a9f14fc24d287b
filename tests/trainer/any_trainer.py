"""
A tiny run of each Trainer that a population is promised to work in: those of transformers, of TRL and of
sentence-transformers, and one that overrides nearly all it can. Nothing is downloaded.

A [`Scenario`] makes the same run twice: with the Trainer as it is, and as a population by [`PopulationMixin`].
"""

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from small_population import TEST, TRAIN, started
from small_text import KINDS, SENTENCES, special_ids, token_ids, tokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_wash import PopulationArguments, PopulationMixin


SEED = 7
STEPS, CHECKPOINT = 4, 2


def llama_config(**overrides) -> LlamaConfig:
    """A causal language model with dropout in its attention."""
    return LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        attn_implementation="eager",
        **{**special_ids(), **overrides},
    )


def t5() -> T5ForConditionalGeneration:
    """An encoder with a decoder, and dropout."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer()),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=tokenizer().pad_token_id,
            **special_ids(),
        )
    )


# ---- The runs ------------------------------------------------------------------------------------------------------


@cache
def with_population(cls: type) -> type:
    """What a user writes as a class without a body."""
    if issubclass(cls, TrainingArguments):
        made = make_dataclass(f"Wash{cls.__name__}", [], bases=(PopulationArguments, cls))
    else:
        made = type(f"Wash{cls.__name__}", (PopulationMixin, cls), {})
    # The Trainer pickles its arguments, which wants their class to be found by its name.
    made.__module__ = __name__
    globals()[made.__name__] = made
    return made


@dataclass
class Scenario:
    """A Trainer, what it takes beside its arguments, and how what it saves is used."""

    trainer: type
    config: type
    # The constructor's arguments beside `args`, all made anew: each run starts from the same weights.
    given: Callable[[], dict[str, Any]]
    load: Callable[[Path], nn.Module]
    answer: Callable[[nn.Module], torch.Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    def arguments(self, folder, **overrides) -> dict[str, Any]:
        """The options of a run, for a plain Trainer and for a population."""
        return {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "max_steps": STEPS,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": SEED,
            **self.settings,
            **overrides,
        }

    def plain(self, folder, index: int = 0, **overrides) -> Trainer:
        """The Trainer as it is, with the seed of member `index`."""
        arguments = self.arguments(folder, **overrides)
        arguments["seed"] += index
        return self.trainer(args=self.config(**arguments), **self.given())

    def population(self, folder, size: int = 2, **overrides) -> Trainer:
        """The Trainer with nothing but [`PopulationMixin`] put before it."""
        trainer, config = with_population(self.trainer), with_population(self.config)
        arguments = {"population_size": size, "shuffle_probability": 0.3, "report": False, **overrides}
        return trainer(args=config(**self.arguments(folder, **arguments)), **self.given())


def plain_trainer() -> Scenario:
    return Scenario(
        Trainer,
        TrainingArguments,
        lambda: {"model": started(), "train_dataset": TRAIN, "eval_dataset": TEST},
        AutoModelForImageClassification.from_pretrained,
        lambda model: model(TEST[0]["pixel_values"][None]).logits,
    )


def seq2seq_trainer() -> Scenario:
    texts = tokenizer()(SENTENCES)["input_ids"]
    data = Dataset.from_dict(
        {"input_ids": texts, "attention_mask": [[1] * len(ids) for ids in texts], "labels": [ids[1:] for ids in texts]}
    )

    def given():
        model = started(t5)
        collator = DataCollatorForSeq2Seq(tokenizer(), model=model)
        return {
            "model": model,
            "train_dataset": data,
            "eval_dataset": data.select(range(10)),
            "data_collator": collator,
        }

    return Scenario(
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        given,
        AutoModelForSeq2SeqLM.from_pretrained,
        lambda model: model.generate(token_ids(SENTENCES[0]), max_new_tokens=5, do_sample=False),
        {"predict_with_generate": True, "generation_max_length": 6},
    )


def sft_trainer() -> Scenario:
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": SENTENCES})
    return Scenario(
        SFTTrainer,
        SFTConfig,
        lambda: {
            "model": started(lambda: LlamaForCausalLM(llama_config())),
            "train_dataset": data,
            "eval_dataset": data.select(range(10)),
            "processing_class": tokenizer(),
        },
        AutoModelForCausalLM.from_pretrained,
        lambda model: model(token_ids(SENTENCES[0])).logits,
        {"max_length": 16, "bf16": False, "gradient_accumulation_steps": 2},
    )


def with_adapters(scenario: Scenario) -> Scenario:
    """The same, where TRL puts adapters on the model it is given, and all but those are frozen."""
    from peft import LoraConfig, PeftModel

    def base():
        return started(lambda: LlamaForCausalLM(llama_config()))

    given = scenario.given
    # The model without its adapter is DPO's reference.
    scenario.given = lambda: {
        **{name: value for name, value in given().items() if name != "ref_model"},
        "peft_config": LoraConfig(r=2, lora_dropout=0.1, task_type="CAUSAL_LM"),
    }
    scenario.load = lambda folder: PeftModel.from_pretrained(base(), folder)
    return scenario


def preferences() -> Dataset:
    """Sentences with an end that is better than another."""
    starts = [sentence.rsplit(" ", 1)[0] for sentence in SENTENCES]
    return Dataset.from_dict(
        {"prompt": starts, "chosen": [" here"] * len(starts), "rejected": [" there"] * len(starts)}
    )


def dpo_trainer() -> Scenario:
    from trl import DPOConfig, DPOTrainer

    return Scenario(
        DPOTrainer,
        DPOConfig,
        lambda: {
            "model": started(lambda: LlamaForCausalLM(llama_config())),
            # As one that is loaded is: its dropout would draw in evaluation, too.
            "ref_model": started(lambda: LlamaForCausalLM(llama_config())).eval(),
            "train_dataset": preferences(),
            "eval_dataset": preferences().select(range(10)),
            "processing_class": tokenizer(),
        },
        AutoModelForCausalLM.from_pretrained,
        lambda model: model(token_ids(SENTENCES[0])).logits,
        {"max_length": 16, "bf16": False},
    )


def reward_trainer() -> Scenario:
    from trl import RewardConfig, RewardTrainer

    data = Dataset.from_dict(
        {
            "chosen": [f"{row['prompt']}{row['chosen']}" for row in preferences()],
            "rejected": [f"{row['prompt']}{row['rejected']}" for row in preferences()],
        }
    )
    return Scenario(
        RewardTrainer,
        RewardConfig,
        lambda: {
            "model": started(lambda: LlamaForSequenceClassification(llama_config(num_labels=1))),
            "train_dataset": data,
            "eval_dataset": data.select(range(10)),
            "processing_class": tokenizer(),
        },
        AutoModelForSequenceClassification.from_pretrained,
        lambda model: model(token_ids(SENTENCES[0])).logits,
        {"max_length": 16, "bf16": False},
    )


@cache
def _sentence_encoder():
    """An encoder of sentences, BERT's parts put together in memory."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=tokenizer().pad_token_id,
    )
    # Its Transformer module is made from a folder only.
    with tempfile.TemporaryDirectory() as folder:
        # By hand: of several processes transformers has the first one write, and each has a folder of its own here.
        config.to_json_file(Path(folder) / "config.json")
        save_file(
            started(lambda: BertModel(config)).state_dict(), Path(folder) / "model.safetensors", {"format": "pt"}
        )
        tokenizer(pair=True).save_pretrained(folder)
        return SentenceTransformer(modules=[Transformer(folder), Pooling(config.hidden_size)])


def sentence_transformer_trainer() -> Scenario:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import SoftmaxLoss

    pairs = list(zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True))
    data = Dataset.from_dict(
        {"first": [first for first, _ in pairs], "second": [second for _, second in pairs], "label": KINDS}
    )

    def given():
        # On a CPU, as the Trainer will: the model picks a device by itself.
        model = copy.deepcopy(_sentence_encoder()).to("cpu")
        set_seed(0)
        loss = SoftmaxLoss(model, 16, num_labels=3)
        return {"model": model, "loss": loss, "train_dataset": data, "eval_dataset": data.select(range(10))}

    return Scenario(
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        given,
        lambda folder: SentenceTransformer(str(folder), device="cpu"),
        lambda model: torch.tensor(model.encode(SENTENCES[:3])),
    )


class OpinionatedTrainer(Trainer):
    """Overrides what subclasses of the Trainer override, and takes an argument of its own."""

    def __init__(self, *args, temperature: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = temperature
        self.lines = 0

    def get_train_dataloader(self):
        # Not prepared, and shuffled by whatever the global generator says.
        return DataLoader(self.train_dataset, batch_size=self.args.train_batch_size, shuffle=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"])
        losses = nn.functional.cross_entropy(outputs.logits / self.temperature, inputs["labels"], reduction="none")
        # As in TRL: normalized over the processes that share a batch, which are this member's.
        count = self.accelerator.gather(torch.tensor([len(losses)], device=losses.device)).sum()
        loss = losses.sum() * self.accelerator.num_processes / count
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        noise = torch.randn_like(inputs["pixel_values"])
        return super().training_step(
            model, {**inputs, "pixel_values": inputs["pixel_values"] + 0.1 * noise}, num_items_in_batch
        )

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = [
                {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in model.parameters() if p.ndim <= 1], "lr": 2 * self.args.learning_rate},
            ]
            self.optimizer = torch.optim.SGD(groups, lr=self.args.learning_rate, momentum=0.9)
        return self.optimizer

    def log(self, logs, *args, **kwargs):
        self.lines += 1
        super().log({**logs, "line": self.lines}, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, logits / self.temperature if logits is not None else None, labels


def opinionated_trainer() -> Scenario:
    return Scenario(
        OpinionatedTrainer,
        TrainingArguments,
        lambda: {"model": started(), "train_dataset": TRAIN, "eval_dataset": TEST, "temperature": 2.0},
        AutoModelForImageClassification.from_pretrained,
        lambda model: model(TEST[0]["pixel_values"][None]).logits,
    )


SCENARIOS = {
    "Trainer": plain_trainer,
    "Seq2SeqTrainer": seq2seq_trainer,
    "SFTTrainer": sft_trainer,
    "SFTTrainer with adapters": lambda: with_adapters(sft_trainer()),
    "DPOTrainer": dpo_trainer,
    "DPOTrainer with adapters": lambda: with_adapters(dpo_trainer()),
    "RewardTrainer": reward_trainer,
    "SentenceTransformerTrainer": sentence_transformer_trainer,
    "a Trainer of one's own": opinionated_trainer,
}

NEEDS = {"SFT": "trl", "DPO": "trl", "Reward": "trl", "Sentence": "sentence_transformers"}


def scenario(name: str) -> Scenario:
    """A scenario by its name; the test is skipped where its library is missing."""
    for start, library in NEEDS.items():
        if name.startswith(start):
            pytest.importorskip(library)
    return SCENARIOS[name]()


# ---- What came out of them -----------------------------------------------------------------------------------------


def state_digest(model: nn.Module) -> str:
    """A short digest of all weights and buffers, with their names."""
    whole = hashlib.sha256()
    for name, value in model.state_dict().items():
        whole.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


@torch.no_grad()
def answer(scenario: Scenario, model: nn.Module) -> torch.Tensor:
    """What a model says to a fixed input."""
    model.eval()
    return scenario.answer(model)


def losses(trainer: Trainer, key: str = "loss") -> list[float]:
    """The logged losses, or another value of the lines about training."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [line.get(key, line["loss"]) for line in lines]


OURS = ("loss", "grad_norm", "learning_rate", "values_moved", "bytes_exchanged", "consensus_distance", "line")


def population_outcome(trainer: Trainer) -> dict[str, Any]:
    """*Collective.* What must be the same on every layout; not what a Trainer measures and keeps by itself, as TRL does."""
    lines = [
        {name: value for name, value in line.items() if name.removeprefix("eval_").endswith(OURS) or "loss" in name}
        for line in trainer.state.log_history
        if "train_loss" not in line
    ]
    return {
        "members": trainer.population.gather([state_digest(member) for member in trainer.population.members]),
        "soup": state_digest(trainer.model),
        "log": json.loads(json.dumps(lines)),
    }
