"""A population in any Trainer: each member is that Trainer's own run, and the soup is saved as that Trainer saves."""

import copy
from collections import Counter

import pytest
import torch
from any_trainer import CHECKPOINT, SCENARIOS, STEPS, answer, losses, scenario, state_digest, with_population
from transformers import Trainer

from hf_wash import PopulationMixin


@pytest.fixture(params=SCENARIOS)
def run(request):
    return scenario(request.param)


def test_without_mixing_member_k_is_that_trainers_own_run_with_seed_plus_k(run, tmp_path):
    trainer = run.population(tmp_path / "population", mixing="independent", same_init=True)
    trainer.train()
    # Adapters that TRL makes are drawn with the run's seed: all members start from member 0's.
    start = copy.deepcopy(run.plain(tmp_path / "plain").model.state_dict())
    for index, member in enumerate(trainer.population.members):
        expected = run.plain(tmp_path / "plain", index)
        expected.model.load_state_dict(start)
        before = state_digest(expected.model)
        expected.train()
        assert state_digest(expected.model) != before, "the plain run learned nothing"
        assert state_digest(member) == state_digest(expected.model), f"member {index}"
        assert len(losses(expected)) == STEPS
        assert losses(trainer, f"member_{index}_loss") == losses(expected), f"member {index}"
        assert trainer.evaluate()[f"eval_member_{index}_loss"] == expected.evaluate()["eval_loss"], f"member {index}"


def test_members_exchange_and_evaluate(run, tmp_path):
    trainer = run.population(tmp_path, shuffle_probability=0.5)
    trainer.train()
    members = [state_digest(member) for member in trainer.population.members]
    metrics = trainer.evaluate()

    assert sum(losses(trainer, "values_moved")) > 0
    assert len({*members, state_digest(trainer.model)}) == 3
    assert [state_digest(member) for member in trainer.population.members] == members
    each = [metrics[f"eval_member_{index}_loss"] for index in range(2)]
    assert metrics["eval_members_loss_mean"] == pytest.approx(sum(each) / 2)
    assert metrics["eval_loss"] == pytest.approx(sum(each) / 2, rel=0.1)


def test_the_saved_soup_is_loaded_by_its_library(run, tmp_path):
    trainer = run.population(tmp_path / "run", shuffle_probability=0.5)
    trainer.train()
    folder = tmp_path / "soup"
    trainer.save_model(str(folder))
    loaded = run.load(folder)

    assert state_digest(loaded) == state_digest(trainer.model)
    # The kernels of attention may be others than in training.
    torch.testing.assert_close(answer(run, loaded), answer(run, trainer.model), rtol=1e-5, atol=1e-6)


def test_what_trl_measures_in_an_evaluation_is_the_soups(tmp_path):
    run = scenario("SFTTrainer")
    trainer = run.population(tmp_path / "population", shuffle_probability=0.5)
    trainer.train()
    plain = run.plain(tmp_path / "plain")
    plain.model.load_state_dict(trainer.model.state_dict())
    ours, expected = trainer.evaluate(), plain.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert ours[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("soup", ["uniform", "greedy"])
def test_what_a_trainer_counts_in_an_evaluation_is_the_soups(tmp_path, soup):
    run = scenario("Trainer")

    class Counting(with_population(run.trainer)):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.batches, self.losses, self.examples = 0, [], {"seen": torch.tensor(0), "each": []}

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.last = super().compute_loss(model, inputs, *args, **kwargs)  # with a graph while training
            if not model.training:
                self.batches += 1
                self.losses.append(self.last[0].item())
                self.examples["seen"] += len(inputs["labels"])
                self.examples["each"].append(len(inputs["labels"]))
            return self.last

    args = with_population(run.config)(**run.arguments(tmp_path, population_size=3, soup=soup))
    trainer = Counting(args=args, **run.given())
    trainer.train()
    metrics = trainer.evaluate()
    whole, each = len(trainer.eval_dataset), trainer.examples["each"]
    assert trainer.batches == len(trainer.losses) == len(each) == len(trainer.get_eval_dataloader())
    assert trainer.examples["seen"] == sum(each) == whole
    mean = sum(loss * count for loss, count in zip(trainer.losses, each, strict=True)) / whole
    assert metrics["eval_loss"] == pytest.approx(mean, rel=1e-6)
    assert len({metrics[f"eval_member_{index}_loss"] for index in range(3)}) == 3


def test_each_member_answers_and_is_saved_by_itself(run, tmp_path):
    trainer = run.population(tmp_path, shuffle_probability=0.5)
    trainer.train()
    trainer.save_members()
    for index, member in enumerate(trainer.population.members):
        loaded = run.load(tmp_path / "_members" / f"member_{index}")
        assert state_digest(loaded) == state_digest(member)
        # A copy whose `forward` is still the first member's would not.
        torch.testing.assert_close(answer(run, loaded), answer(run, member), rtol=1e-5, atol=1e-6)


def test_a_run_resumed_in_the_middle_is_the_undisturbed_one(run, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": CHECKPOINT, "eval_strategy": "steps", "eval_steps": CHECKPOINT}
    whole = run.population(tmp_path / "whole", **settings)
    whole.train()
    resumed = run.population(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{CHECKPOINT}"))

    for ours, undisturbed in zip(resumed.population.members, whole.population.members, strict=True):
        assert state_digest(ours) == state_digest(undisturbed)
    assert state_digest(resumed.model) == state_digest(whole.model)
    for key in ("loss", "member_0_loss", "member_1_loss"):
        assert losses(resumed, key) == losses(whole, key)


def test_what_a_subclass_overrides_stays_in_force(tmp_path):
    run = scenario("a Trainer of one's own")
    called = Counter()

    class Counting(run.trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            # One member's batch on one member, and no more processes than it has.
            called["compute_loss"] += 1
            assert isinstance(inputs["pixel_values"], torch.Tensor) and self.accelerator.num_processes == 1
            assert any(model is member for member in [*self.population.members, self.model])
            return super().compute_loss(model, inputs, *args, **kwargs)

        def training_step(self, model, inputs, *args, **kwargs):
            called["training_step"] += 1
            return super().training_step(model, inputs, *args, **kwargs)

        def get_train_dataloader(self):
            called["get_train_dataloader"] += 1
            return super().get_train_dataloader()

        def create_optimizer(self, *args, **kwargs):
            called["create_optimizer"] += 1
            return super().create_optimizer(*args, **kwargs)

        def prediction_step(self, *args, **kwargs):
            called["prediction_step"] += 1
            return super().prediction_step(*args, **kwargs)

    run.trainer = Counting
    trainer = run.population(tmp_path)
    trainer.train()
    assert called["training_step"] == called["compute_loss"] == 2 * STEPS
    assert called["get_train_dataloader"] == 2 and called["create_optimizer"] >= 2
    assert losses(trainer, "line") == list(range(1, STEPS + 1))
    assert trainer.temperature == 2.0
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert len(rates) == 2 and decays == {0.0, 0.1}

    trainer.evaluate()
    # The soup's and two members' on each of the batches.
    assert called["prediction_step"] == 3 * -(-len(trainer.eval_dataset) // trainer.args.eval_batch_size)


def test_the_population_comes_before_the_trainer():
    class Own(Trainer):
        pass

    with pytest.raises(
        ValueError, match="`PopulationMixin` must be the first base of `Behind`, found it behind `Own`"
    ):
        type("Behind", (Own, PopulationMixin), {})
    type("Before", (PopulationMixin, Own), {})
    type("Later", (type("Plain", (), {}), type("Before", (PopulationMixin, Own), {})), {})
