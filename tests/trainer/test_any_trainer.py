"""A population in any Trainer: each member is that Trainer's own run, and the soup is saved as that Trainer saves."""

import copy

import pytest
import torch
from any_trainer import CHECKPOINT, SCENARIOS, STEPS, answer, losses, scenario, state_digest


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
