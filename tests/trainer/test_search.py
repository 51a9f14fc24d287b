"""A search for hyperparameters trains a whole population in each trial, as that population would be trained alone."""

import json

import pytest
from small_population import TEST, TRAIN, accuracy, options, population, started, vit
from transformers import TrainerCallback

from hf_wash import WashConfig, WashTrainer


optuna = pytest.importorskip("optuna")
optuna.logging.disable_default_handler()

RATES = (0.001, 0.02)


def searcher(folder, **overrides):
    args = WashConfig(**options(folder, population_size=2, max_steps=4, shuffle_probability=0.2, **overrides))
    return WashTrainer(
        model_init=lambda: vit(), args=args, train_dataset=TRAIN, eval_dataset=TEST, compute_metrics=accuracy
    )  # fmt: skip


def search(trainer, space, trials=2, **given):
    given = {"compute_objective": lambda metrics: metrics["eval_loss"], "direction": "minimize", **given}
    return trainer.hyperparameter_search(hp_space=space, n_trials=trials, backend="optuna", **given)


def learning_rate(trial):
    return {"learning_rate": trial.suggest_categorical("learning_rate", [RATES[trial.number % 2]])}


class Remembers(TrainerCallback):
    """The loss of the soup at each evaluation."""

    def __init__(self):
        self.losses = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses.append(metrics["eval_loss"])


def test_each_trial_is_the_run_of_a_population_of_its_own(tmp_path):
    alone = []
    for rate in RATES:
        trainer = searcher(tmp_path / f"alone-{rate}", learning_rate=rate)
        trainer.train()
        alone.append(trainer.evaluate()["eval_loss"])
    assert alone[0] != alone[1]

    trainer, remembers = searcher(tmp_path / "search", save_strategy="steps", save_steps=2), Remembers()
    trainer.add_callback(remembers)
    rates = iter(RATES)
    best = search(trainer, lambda trial: {"learning_rate": trial.suggest_float("learning_rate", *[next(rates)] * 2)})
    assert remembers.losses == alone
    assert best.objective == min(alone)
    for trial in range(2):
        kept = tmp_path / "search" / f"run-{trial}" / "checkpoint-4"
        assert json.loads((kept / "population.json").read_text())["members"] == [0, 1]


def test_a_trial_may_set_what_members_exchange(tmp_path):
    trainer, moved = searcher(tmp_path), []

    def objective(metrics):
        moved.append(trainer.mixing.state()["values_moved"])
        return metrics["eval_loss"]

    chances = iter((0.0, 0.4))

    def space(trial):
        return {"shuffle_probability": trial.suggest_float("shuffle_probability", *[next(chances)] * 2)}

    search(trainer, space, compute_objective=objective)
    assert moved[0] == 0 < moved[1]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("population_size", 3, "A trial cannot set `population_size` .here 3, the population has 2 members"),
        ("shuffle_probability", 1.5, "`shuffle_probability` must be"),
    ],
)
def test_what_a_trial_cannot_set(tmp_path, name, value, said):
    trainer = searcher(tmp_path)
    with pytest.raises(ValueError, match=said):
        search(trainer, lambda trial: {name: trial.suggest_categorical(name, [value])}, trials=1)


def test_without_a_function_that_makes_models(tmp_path):
    with pytest.raises(ValueError, match="needs `model_init`"):
        population(tmp_path, started()).hyperparameter_search()


def test_over_several_processes(tmp_path, monkeypatch):
    trainer = searcher(tmp_path)
    monkeypatch.setattr(trainer.population, "world_size", 2)
    with pytest.raises(ValueError, match="needs one process"):
        search(trainer, learning_rate)
