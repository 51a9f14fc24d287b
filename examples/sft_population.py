#!/usr/bin/env python
"""
Train a population of language models with TRL's SFTTrainer: they shuffle a few of their weights as they learn, and
their average, the soup, is one model, to be used like any other.

    python examples/sft_population.py                               # small models, on sentences the script writes
    python examples/sft_population.py --model_name_or_path outputs/sft --lora_rank 4 --output_dir outputs/sft-lora
    python examples/sft_population.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara
    torchrun --nproc-per-node 2 examples/sft_population.py          # two processes, a member or more in each

`--help` lists the flags; every field of `PopulationArguments` and of TRL's `SFTConfig` is one. What makes SFTTrainer a
population is the two classes `WashSFTTrainer` and `WashSFTConfig`; docs/your_own_trainer.md tells of other Trainers.
"""

import math
import random
import sys
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from command_line import (
    CommandLine,
    InsteadOfTraining,
    Run,
    done_instead,
    interruptible,
    name_report,
    refuse,
    trained,
)
from datasets import Dataset, DatasetDict
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging

from hf_wash import PopulationArguments, PopulationMixin


try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    sys.exit('sft_population.py: error: This example trains with TRL, which is missing: pip install "hf-wash[trl]".')


# One text and one split for every run, whatever its seed, so that runs can be compared.
TEXT_SEED = 0
HELD_OUT = 0.1

SMALL_LEARNING_RATE, FINETUNING_LEARNING_RATE, LORA_LEARNING_RATE = 3e-3, 2e-5, 2e-4


# ---- The population: nothing else is needed ------------------------------------------------------------------------


class WashSFTTrainer(PopulationMixin, SFTTrainer):  # type: ignore[misc] # TRL's card takes other arguments
    """TRL's [`~trl.SFTTrainer`] with a population in the place of the model."""


def default(name: str, value: Any, help: str | None = None) -> Any:
    """A field of `SFTConfig` with another default, and the same help unless `help` is given."""
    metadata = dict(SFTConfig.__dataclass_fields__[name].metadata)
    if help is not None:
        metadata["help"] = help
    return field(default=value, metadata=metadata)


@dataclass
class WashSFTConfig(InsteadOfTraining, PopulationArguments, SFTConfig):
    """The population's options and TRL's, with defaults under which a small model learns a small text in a minute."""

    output_dir: str = default("output_dir", "outputs/sft")
    num_train_epochs: float = default("num_train_epochs", 8)
    per_device_train_batch_size: int = default("per_device_train_batch_size", 16)
    per_device_eval_batch_size: int = default("per_device_eval_batch_size", 32)
    learning_rate: float | None = default(  # type: ignore[assignment] # `None` until the model is known
        "learning_rate",
        None,
        help=f"The initial learning rate. By default {SMALL_LEARNING_RATE:g} for the small model, "
        f"{FINETUNING_LEARNING_RATE:g} for one you name, and {LORA_LEARNING_RATE:g} for adapters.",
    )
    lr_scheduler_type: str = default("lr_scheduler_type", "cosine")
    warmup_steps: float = default("warmup_steps", 0.1)
    logging_steps: float = default("logging_steps", 0.1)
    save_strategy: str = default("save_strategy", "no")
    gradient_checkpointing: bool = default("gradient_checkpointing", False)
    report_to: str | None = default("report_to", "none")
    shuffle_stop: float = field(
        default=0.75, metadata=dict(PopulationArguments.__dataclass_fields__["shuffle_stop"].metadata)
    )

    def __post_init__(self):
        if self.bf16 is None:
            # TRL's default is True wherever it trains; a CPU is slower with it.
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()


@dataclass
class ScriptArguments:
    """Which model to train, and on what."""

    _argument_group_name = "model and data (default: a small model, on sentences that the script writes)"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A causal language model on the Hub or in a folder. By default a small one from scratch."},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train adapters of this rank over one frozen model, which --model_name_or_path names."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set on the Hub, or a folder of files, in a format of TRL's: columns text, messages, or "
            "prompt and completion. By default a few hundred sentences about animals, written by this script."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "The split to evaluate on. By default a tenth of the training split, the same in every run."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many samples at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many samples at most."})
    prompt: str = field(default="In winter", metadata={"help": "What the soup goes on from at the end."})

    def __post_init__(self):
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"--lora_rank must be at least 1, found {self.lora_rank}.")
        if self.lora_rank is not None and self.model_name_or_path is None:
            raise ValueError(
                "--lora_rank needs --model_name_or_path: adapters adapt a model that has learned something."
            )
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError("--dataset_config_name goes with --dataset_name, which is missing.")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, found {value}.")


# ---- A text ----------------------------------------------------------------------------------------------------------

WEATHER = {
    "spring": "the rain is warm",
    "summer": "the days are long",
    "autumn": "the leaves come down",
    "winter": "the lake is frozen",
}
CHARACTERS = ["old", "young", "patient", "hungry", "careless", "shy"]
# For each animal: where it lives, what it does all day, and what it is after.
ANIMALS = {
    "heron": ("by the river", "stands still", "a fish"),
    "badger": ("under the hill", "digs", "a worm"),
    "squirrel": ("in the oak", "climbs", "a nut"),
    "owl": ("above the barn", "listens", "a mouse"),
    "otter": ("along the stream", "dives", "a crab"),
    "hedgehog": ("behind the hedge", "rolls about", "a beetle"),
    "raven": ("on the chimney", "looks around", "a spoon"),
    "goat": ("on the rocks", "jumps", "a thistle"),
    "beaver": ("at the dam", "builds", "a branch"),
    "cat": ("on the wall", "pretends to sleep", "a bird"),
}


def write_sentences() -> list[str]:
    """All 720 sentences of a small grammar, in an order of their own. Who does what and where has to be learned."""
    sentences = []
    for season, weather in WEATHER.items():
        for character in CHARACTERS:
            for animal, (place, act, prize) in ANIMALS.items():
                who = f"the {character} {animal}"
                sentences += [
                    f"In {season} {weather}, and {who} {act} {place}.",
                    f"It is {season}: {who} waits {place} for {prize}.",
                    f"{who.capitalize()} has found {prize} {place}, though {weather}.",
                ]
    random.Random(TEXT_SEED).shuffle(sentences)
    return sentences


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of at most 400 tokens, for these texts."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=400, min_frequency=2, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=128,
    )


def at_most(dataset: Dataset, num_samples: int | None) -> Dataset:
    """A fixed random choice of `num_samples`."""
    if num_samples is None or num_samples >= len(dataset):
        return dataset
    return dataset.shuffle(seed=TEXT_SEED).select(range(num_samples))


def load_data(arguments: ScriptArguments, token: str | None = None) -> tuple[Dataset, Dataset]:
    """
    What to train on and what to evaluate on.

    Raises:
        ValueError: in one sentence, for data that cannot be loaded, or is too small.
    """
    if arguments.dataset_name is None:
        splits = DatasetDict({"train": Dataset.from_dict({"text": write_sentences()})})
    else:
        try:
            splits = datasets.load_dataset(arguments.dataset_name, arguments.dataset_config_name, token=token)
        except Exception as error:  # whatever it is (no network, no such data set): say which data
            reason = str(error).strip().splitlines() or [""]
            raise ValueError(
                f"Could not load {arguments.dataset_name!r}: {type(error).__name__}: {reason[0]}"
            ) from error
    for flag in ("train_split", "eval_split"):
        split = getattr(arguments, flag)
        if split is not None and split not in splits:
            raise ValueError(f"--{flag} {split}: there is no such split. There are: {', '.join(splits)}.")
    train = splits[arguments.train_split]
    if arguments.eval_split is not None:
        evaluation = splits[arguments.eval_split]
    elif len(train) < 2:
        raise ValueError(f"The split {arguments.train_split!r} is too small to hold out a part of it to evaluate on.")
    else:
        parts = train.train_test_split(test_size=math.ceil(HELD_OUT * len(train)), seed=TEXT_SEED)
        train, evaluation = parts["train"], parts["test"]
    return at_most(train, arguments.max_train_samples), at_most(evaluation, arguments.max_eval_samples)


# ---- A model -----------------------------------------------------------------------------------------------------------


def small_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of about 100,000 parameters, from scratch."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            attention_dropout=0.1,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def load_model(arguments: ScriptArguments, config: WashSFTConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model all members start as, and its tokenizer."""
    if arguments.model_name_or_path is None:
        tokenizer = train_tokenizer(write_sentences())
        set_seed(config.seed)
        return small_model(tokenizer), tokenizer
    hub = {"token": config.hub_token} if config.hub_token else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, **hub)
        model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=torch.float32, **hub)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(f"Could not load {arguments.model_name_or_path!r}: {reason[0]}") from error
    return model, tokenizer


def adapter_config(arguments: ScriptArguments):
    """What makes each member an adapter over one frozen model; `None` if whole models are to be trained."""
    if arguments.lora_rank is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError('--lora_rank needs peft: pip install "hf-wash[peft]".') from error
    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


# ---- The command -------------------------------------------------------------------------------------------------------


def results_table(metrics: dict[str, float]) -> str:
    """Loss and perplexity of the members' mean, the ensemble where there is one, and the soup."""
    rows = [
        ("members' mean", "eval_members_loss_mean"),
        ("ensemble", "eval_ensemble_loss"),
        ("soup", "eval_loss"),
    ]
    lines = [f"{'':<14}{'loss':>10}{'perplexity':>12}"]
    lines += [
        f"{title:<14}{metrics[key]:>10.4f}{math.exp(min(metrics[key], 700)):>12.2f}"
        for title, key in rows
        if key in metrics
    ]
    return "\n".join(lines)


@torch.no_grad()
def go_on(folder: str, prompt: str) -> str:
    """What the saved soup makes of a prompt, loaded as any other model is."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(tokens[0], skip_special_tokens=True).splitlines()[0]


def prepare(arguments: list[str] | None = None) -> tuple[WashSFTTrainer, ScriptArguments]:
    """Everything before training: what is wrong with the input shows here."""
    parser = CommandLine([ScriptArguments, WashSFTConfig], __doc__)
    script, config = parser.parse_args_into_dataclasses(args=arguments)
    if config.process_index > 0:
        logging.set_verbosity_error()
        datasets.disable_progress_bars()
    if config.learning_rate is None:
        if script.model_name_or_path is None:
            config.learning_rate = SMALL_LEARNING_RATE
        else:
            config.learning_rate = FINETUNING_LEARNING_RATE if script.lora_rank is None else LORA_LEARNING_RATE
    # One process downloads and prepares what is not there yet, the others read it.
    with config.main_process_first(desc="loading the data"):
        train, evaluation = load_data(script, config.hub_token)
    with config.main_process_first(desc="loading the model"):
        model, tokenizer = load_model(script, config)
    trainer = WashSFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=adapter_config(script),
    )
    trainer.replay_command = [
        "examples/sft_population.py",
        *(arguments if arguments is not None else sys.argv[1:]),
    ]
    return trainer, script


@interruptible
def main(run: Run) -> None:
    try:
        run.trainer, script = prepare()
        trainer = run.trainer
        config = trainer.args
        if done_instead(trainer):
            return
    except ValueError as error:
        refuse(error)

    outcome = trained(trainer)
    trainer.save_model()
    trainer.save_members()
    metrics = {**outcome.metrics, **trainer.evaluate()}
    trainer.save_metrics("all", metrics)
    trainer.save_state()
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)

    if trainer.is_world_process_zero():
        print(f"\n{trainer.population.size} members, mixing: {config.mixing}\n")
        print(results_table(metrics))
        name_report(config.output_dir)
        print(f"\nThe soup is saved in {config.output_dir}. Loaded with AutoModelForCausalLM, it says:\n")
        print(f"  {go_on(config.output_dir, script.prompt)}\n")
    # A process group that is left to the interpreter's end may abort the process there (gloo in torch 2.15).
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
