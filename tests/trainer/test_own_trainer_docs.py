"""The page on Trainers of one's own: its snippets run."""

import re
import sys
import types
from pathlib import Path

import any_trainer
import pytest
import torch
from small_population import TRAIN, started
from small_text import SENTENCES, tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM


PAGE = Path(__file__).parents[2] / "docs" / "your_own_trainer.md"


def snippet(number: int) -> types.ModuleType:
    """A snippet of the page as a module: dataclasses look their module up by name."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[number]
    module = types.ModuleType(f"snippet_{number}")
    sys.modules[module.__name__] = module
    exec(compile(code, f"{PAGE.name}, snippet {number}", "exec"), module.__dict__)
    return module


def is_mean_of_members(trainer):
    members = [member.state_dict() for member in trainer.population.members]
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, sum(member[name] for member in members) / len(members))
    return True


def test_language_models(tmp_path):
    pytest.importorskip("trl")
    model = started(lambda: LlamaForCausalLM(any_trainer.llama_config()))
    trainer = snippet(0).train_language_models(model, tokenizer(), SENTENCES, str(tmp_path))
    assert is_mean_of_members(trainer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any_trainer.state_digest(loaded) == any_trainer.state_digest(trainer.model)


def test_sentence_encoders(tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    given = any_trainer.sentence_transformer_trainer().given()
    trainer = snippet(1).train_encoders(given["model"], given["train_dataset"], 16, str(tmp_path))
    assert is_mean_of_members(trainer)
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert any_trainer.state_digest(loaded) == any_trainer.state_digest(trainer.model)


def test_a_trainer_of_ones_own(tmp_path):
    trainer = snippet(2).train_classifiers(started(), TRAIN, str(tmp_path))
    assert is_mean_of_members(trainer) and trainer.temperature == 2.0
