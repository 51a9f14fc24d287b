"""A population of one beside the Trainer itself: what it measures, says and leaves behind is the same."""

from unittest.mock import patch

import pytest
import torch
from small_population import TRAIN, Digits, DigitStream, accuracy, digest, options, population, started
from small_text import SENTENCES, special_ids, tokenizer
from transformers import DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_wash import WashConfig, WashTrainer


def both(output_dir, make=started, given=None, **overrides):
    """The Trainer itself and a population of one, each with a model of its own."""
    settings = options(output_dir, eval_strategy="no", **overrides)
    given = {"train_dataset": TRAIN, "compute_metrics": accuracy, **(given or {})}
    yield Trainer(make(), TrainingArguments(**settings), **given)
    yield WashTrainer(make(), WashConfig(population_size=1, **settings), **given)


@pytest.mark.parametrize("overrides", [{}, {"accelerator_config": {"dispatch_batches": False}}], ids=["", "own"])
@pytest.mark.parametrize("count", [37, 32])
def test_a_stream_is_measured_as_the_trainer_measures_it(tmp_path, count, overrides):
    # 37 examples in batches of 16: the last has 5.
    stream = DigitStream(count, noisy=False)
    theirs, ours = (trainer.evaluate(stream) for trainer in both(tmp_path, **overrides))
    assert (ours["eval_loss"], ours["eval_accuracy"]) == (theirs["eval_loss"], theirs["eval_accuracy"])


def test_members_and_ensemble_are_measured_on_a_stream_as_on_the_same_examples(tmp_path):
    trainer = population(tmp_path, size=2)
    of_stream, counted = trainer.evaluate(DigitStream(37, noisy=False)), trainer.evaluate(Digits(0, 37))
    for name, value in counted.items():
        if "loss" in name or "accuracy" in name:
            assert of_stream[name] == pytest.approx(value, abs=1e-7), name


@pytest.mark.parametrize("soup_from_before", [False, True])
def test_the_noise_of_neftune_ends_with_the_training(tmp_path, soup_from_before):
    def language_model():
        config = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, **special_ids()}
        return started(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer()), **config)))

    texts = [{"input_ids": ids} for ids in tokenizer()(SENTENCES)["input_ids"]]
    given = {"train_dataset": texts, "compute_metrics": None}
    given["data_collator"] = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    trained = []
    for trainer in both(tmp_path, language_model, given, max_steps=4, neftune_noise_alpha=5.0):
        if soup_from_before:
            trainer.evaluate(texts)
        trainer.train()
        trained.append(digest(trainer.model))
    assert trained[0] == trained[1]
    trainer.train()
    for model in (trainer.model, trainer.population.members[0]):
        model.train()
        embeddings = model.get_input_embeddings()
        assert torch.equal(embeddings(torch.tensor([[3]])), embeddings.weight[None, 3:4])


def test_a_checkpoint_that_is_not_there_is_spoken_of_in_the_trainers_words(tmp_path):
    missing = "Can't find a valid checkpoint at", "No valid checkpoint found in output directory"
    for trainer in both(tmp_path):
        for asked, words in zip((str(tmp_path / "nowhere"), True), missing, strict=True):
            with pytest.raises(ValueError, match=words):
                trainer.train(resume_from_checkpoint=asked)


@pytest.mark.parametrize("averages", [True, False])
def test_a_loss_that_is_asked_for_is_scaled_as_the_trainers(tmp_path, averages):
    examples = [Digits(0, 4)[index] for index in range(4)]
    losses = []
    for trainer in both(tmp_path, lambda: started().eval(), average_tokens_across_devices=averages):
        batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
        with patch.object(trainer.accelerator.state, "num_processes", 3):
            losses.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=4).item())
    assert losses[0] == losses[1]
