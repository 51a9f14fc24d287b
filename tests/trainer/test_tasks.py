"""
Whatever the task: what the loss is, is the model's and the collator's to say, and a population trains, evaluates,
saves and resumes with it as a plain Trainer does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from small_population import Digits, digest, options, started, vit
from small_text import KINDS, SENTENCES, special_ids, token_ids, tokenizer
from torch import nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForObjectDetection,
    AutoModelForQuestionAnswering,
    AutoModelForSemanticSegmentation,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    YolosConfig,
    YolosForObjectDetection,
    default_data_collator,
)

from hf_wash import WashConfig, WashTrainer


STEPS, CHECKPOINT = 4, 2


@dataclass
class Task:
    """A model, examples for it, and the class that loads it."""

    make: Callable[[], nn.Module]
    examples: list[dict[str, Any]]
    auto: type
    collate: Callable = default_data_collator
    # What of the examples a model without labels takes.
    inputs: tuple[str, ...] = ("input_ids",)
    # Whether the collator draws at random, and so makes other batches in each evaluation.
    draws: bool = False

    def options(self, folder, **overrides) -> dict[str, Any]:
        return options(
            folder,
            max_steps=STEPS,
            logging_steps=1,
            per_device_train_batch_size=4,
            eval_strategy="no",
            eval_do_concat_batches=self.auto is not AutoModelForObjectDetection,
            **overrides,
        )

    def given(self) -> dict[str, Any]:
        train, test = self.examples[:32], self.examples[32:]
        return {
            "model": started(self.make),
            "train_dataset": train,
            "eval_dataset": test,
            "data_collator": self.collate,
        }

    def population(self, folder, **overrides) -> WashTrainer:
        args = WashConfig(
            **self.options(folder, **{"population_size": 2, "shuffle_probability": 0.3, **overrides}),
        )
        return WashTrainer(args=args, **self.given())

    def plain(self, folder) -> Trainer:
        return Trainer(args=TrainingArguments(**self.options(folder)), **self.given())

    @torch.no_grad()
    def answer(self, model: nn.Module) -> list[torch.Tensor]:
        """All that a model gives for two examples, in evaluation."""
        batch = default_data_collator([{name: one[name] for name in self.inputs} for one in self.examples[-2:]])
        given = dict(batch)
        if isinstance(model, T5ForConditionalGeneration):
            given["decoder_input_ids"] = given["input_ids"]
        output = model.eval()(**given)
        return [value for value in output.values() if isinstance(value, torch.Tensor)]


def bert(cls, **overrides):
    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        **{**special_ids(), **overrides},
    )
    return lambda: cls(config)


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer()), n_positions=40, n_embd=16, n_layer=1, n_head=2, **special_ids())
    )


def t5():
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


def wav2vec2():
    # Its masks of time are drawn by NumPy.
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_kernel=(8, 4),
            conv_stride=(8, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.3,
            mask_time_length=2,
            classifier_proj_size=8,
            num_labels=3,
        )
    )


def segformer():
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=8,
            num_labels=4,
        )
    )


def yolos():
    return YolosForObjectDetection(
        YolosConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=[16, 16],
            patch_size=4,
            num_detection_tokens=5,
            num_labels=3,
            hidden_dropout_prob=0.1,
        )
    )


DIGITS = [Digits(0, 48)[index] for index in range(48)]
NUMBERS = np.random.default_rng(0)
IDS = [ids.tolist() for ids in token_ids(*SENTENCES)]


def images(labels) -> list[dict[str, Any]]:
    return [{"pixel_values": one["pixel_values"], "labels": label} for one, label in zip(DIGITS, labels, strict=True)]


def texts(**columns) -> list[dict[str, Any]]:
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), **{name: values[i] for name, values in columns.items()}}
        for i, ids in enumerate(IDS)
    ]


def sounds() -> list[dict[str, Any]]:
    waves = NUMBERS.standard_normal((48, 640)).astype(np.float32)
    return [{"input_values": wave, "labels": kind} for wave, kind in zip(waves, KINDS, strict=True)]


def maps() -> list[dict[str, Any]]:
    """Images, and for each pixel what it shows; some show nothing that counts."""
    pixels = NUMBERS.standard_normal((48, 3, 16, 16)).astype(np.float32)
    labels = NUMBERS.choice([0, 1, 2, 3, 255], (48, 16, 16))
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


def scenes() -> list[dict[str, Any]]:
    """Images with one to three boxes each."""
    found = []
    for index in range(48):
        count = 1 + index % 3
        boxes = np.concatenate([NUMBERS.uniform(0.3, 0.7, (count, 2)), NUMBERS.uniform(0.1, 0.4, (count, 2))], axis=1)
        found.append(
            {
                "pixel_values": torch.tensor(NUMBERS.standard_normal((3, 16, 16)), dtype=torch.float32),
                "labels": {
                    "class_labels": torch.tensor(NUMBERS.integers(0, 3, count)),
                    "boxes": torch.tensor(boxes, dtype=torch.float32),
                },
            }
        )
    return found


def collate_scenes(scenes: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([scene["pixel_values"] for scene in scenes]),
        "labels": [scene["labels"] for scene in scenes],
    }


TASKS = {
    "single label": lambda: Task(
        vit, images([one["labels"] for one in DIGITS]), AutoModelForImageClassification, inputs=("pixel_values",)
    ),
    "several labels": lambda: Task(
        vit,
        # As many as there are classes, each on or off; nothing but their type tells the task.
        images(torch.tensor(NUMBERS.integers(0, 2, (48, 10)), dtype=torch.float32)),
        AutoModelForImageClassification,
        inputs=("pixel_values",),
    ),
    "regression": lambda: Task(
        lambda: vit(num_labels=1),
        images(torch.tensor([[float(one["labels"])] for one in DIGITS])),
        AutoModelForImageClassification,
        inputs=("pixel_values",),
    ),
    "text": lambda: Task(
        bert(BertForSequenceClassification, num_labels=3), texts(labels=KINDS), AutoModelForSequenceClassification
    ),
    "text with a number": lambda: Task(
        bert(BertForSequenceClassification, num_labels=1),
        texts(labels=[float(kind) for kind in KINDS]),
        AutoModelForSequenceClassification,
    ),
    "tokens": lambda: Task(
        bert(BertForTokenClassification, num_labels=4),
        texts(labels=[[index % 4, -100, *[kind] * (len(IDS[0]) - 2)] for index, kind in enumerate(KINDS)]),
        AutoModelForTokenClassification,
    ),
    "questions": lambda: Task(
        bert(BertForQuestionAnswering),
        texts(start_positions=KINDS, end_positions=[kind + 1 for kind in KINDS]),
        AutoModelForQuestionAnswering,
    ),
    "causal language": lambda: Task(
        gpt2, texts(), AutoModelForCausalLM, DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    ),
    "masked language": lambda: Task(
        bert(BertForMaskedLM), texts(), AutoModelForMaskedLM, DataCollatorForLanguageModeling(tokenizer()), draws=True
    ),
    "translation": lambda: Task(t5, texts(labels=[ids[::-1] for ids in IDS]), AutoModelForSeq2SeqLM),
    "sound": lambda: Task(wav2vec2, sounds(), AutoModelForAudioClassification, inputs=("input_values",)),
    "segmentation": lambda: Task(segformer, maps(), AutoModelForSemanticSegmentation, inputs=("pixel_values",)),
    "detection": lambda: Task(yolos, scenes(), AutoModelForObjectDetection, collate_scenes, inputs=("pixel_values",)),
}


@pytest.fixture(params=TASKS)
def task(request):
    if request.param == "detection":
        pytest.importorskip("scipy", reason="transformers matches boxes with scipy")
    return TASKS[request.param]()


def logged(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if "loss" in line]


def test_the_loss_is_the_plain_trainers(task, tmp_path):
    expected = task.plain(tmp_path / "plain")
    expected.train()
    trainer = task.population(tmp_path / "population", mixing="independent")
    trainer.train()

    assert all(loss > 0 for loss in logged(expected)) and len(set(logged(expected))) == STEPS
    assert logged(trainer, "member_0_loss") == logged(expected)
    assert digest(trainer.population.members[0]) == digest(expected.model)
    if not task.draws:
        assert trainer.evaluate()["eval_member_0_loss"] == pytest.approx(expected.evaluate()["eval_loss"], rel=1e-5)


def test_a_population_evaluates_saves_and_resumes(task, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": CHECKPOINT}
    trainer = task.population(tmp_path / "whole", **settings)
    trainer.train()
    metrics = trainer.evaluate()
    assert all(np.isfinite(metrics[key]) for key in ("eval_loss", "eval_member_0_loss", "eval_member_1_loss"))
    soup = trainer.model
    members = [digest(member) for member in trainer.population.members]
    assert len({*members, digest(soup)}) == 3

    trainer.save_model(str(tmp_path / "soup"))
    loaded = task.auto.from_pretrained(tmp_path / "soup")
    for ours, theirs in zip(task.answer(loaded), task.answer(soup), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    resumed = task.population(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{CHECKPOINT}"))
    assert [digest(member) for member in resumed.population.members] == members
    assert digest(resumed.model) == digest(soup)
    assert logged(resumed) == logged(trainer)
