"""
One test for each Trainer method that WashTrainer overrides: a release of transformers that moves it fails here, by
name. Each entry says where the Trainer calls the method from, in words that stand in that method's source.
"""

import inspect

import pytest
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler

from hf_wash import WashTrainer
from hf_wash.trainer.requests import EVENTS


# method: (the Trainer's method that calls it, the call as it is written there)
SEAMS = {
    "call_model_init": ("train", "self.call_model_init("),
    "num_examples": ("set_initial_training_values", "self.num_examples("),
    "get_total_train_batch_size": ("set_initial_training_values", "self.get_total_train_batch_size("),
    "_inner_training_loop": ("train", "self._inner_training_loop"),
    "set_initial_training_values": (
        "_inner_training_loop",
        "self.set_initial_training_values(args, train_dataloader)",
    ),
    "create_optimizer": ("_prepare_for_training", "self.create_optimizer()"),
    "_wrap_model": ("_prepare_for_training", "self._wrap_model(self.model_wrapped)"),
    "_prepare_for_training": ("_inner_training_loop", "self._prepare_for_training("),
    "_run_epoch": ("_inner_training_loop", "self._run_epoch("),
    "_get_num_items_in_batch": ("get_batch_samples", "self._get_num_items_in_batch(batch_samples, device)"),
    "training_step": ("_run_epoch", "self.training_step(model, inputs, num_items_in_batch)"),
    "compute_loss": ("training_step", "self.compute_loss("),
    "_clip_grad_norm": ("_run_epoch", "self._clip_grad_norm(model)"),
    "_get_grad_norm": ("_run_epoch", "self._get_grad_norm(model, grad_norm=grad_norm)"),
    "floating_point_ops": ("_run_epoch", "self.floating_point_ops(inputs)"),
    "_track_num_input_tokens": ("_run_epoch", "self._track_num_input_tokens(inputs)"),
    "_maybe_log_save_evaluate": ("_run_epoch", "self._maybe_log_save_evaluate("),
    "_get_learning_rate": ("_run_epoch", "self._get_learning_rate()"),
    "log": ("_maybe_log_save_evaluate", "self.log(logs, start_time)"),
    "_finalize_training": ("_inner_training_loop", "self._finalize_training("),
    "evaluate": ("_evaluate", "self.evaluate("),
    "evaluation_loop": ("evaluate", "self.evaluation_loop("),
    "prediction_step": ("evaluation_loop", "self.prediction_step("),
    "save_model": (None, None),
    "_save": ("save_model", "self._save(output_dir)"),
    "_save_checkpoint": ("_maybe_log_save_evaluate", "self._save_checkpoint(model, trial)"),
    "_init_training_state": ("_inner_training_loop", "self._init_training_state("),
    "_load_from_checkpoint": ("train", "self._load_from_checkpoint(resume_from_checkpoint)"),
    "_load_optimizer_and_scheduler": ("_prepare_for_training", "self._load_optimizer_and_scheduler("),
    "_load_scaler": ("_prepare_for_training", "self._load_scaler("),
    "_load_rng_state": ("_run_epoch", "self._load_rng_state(resume_from_checkpoint)"),
    "_load_best_model": ("_finalize_training", "self._load_best_model()"),
    "create_model_card": ("push_to_hub", "self.create_model_card("),
    "_push_from_checkpoint": (None, None),
    "push_to_hub": ("save_model", "self.push_to_hub("),
    "train": (None, None),
    "predict": (None, None),
    "hyperparameter_search": (None, None),
    "_hp_search_setup": ("train", "self._hp_search_setup(trial)"),
    "save_state": (None, None),
    "init_hf_repo": ("__init__", "self.init_hf_repo()"),
}


def overridden():
    classes = [part for part in WashTrainer.__mro__ if part.__module__.startswith("hf_wash.")]
    own = {n for part in classes for n, value in vars(part).items() if callable(value) and not n.startswith("__")}
    return sorted(name for name in own if hasattr(Trainer, name))


@pytest.mark.parametrize("name", overridden())
def test_the_trainer_still_calls(name):
    assert name in SEAMS, f"WashTrainer overrides `{name}`, but no line here says where the Trainer calls it"
    caller, call = SEAMS[name]
    if caller is not None:
        assert call in inspect.getsource(getattr(Trainer, caller)), f"`{caller}` does not call `{name}` any more"
    theirs = list(inspect.signature(getattr(Trainer, name)).parameters)
    ours = inspect.signature(getattr(WashTrainer, name)).parameters
    kinds = {parameter.kind for parameter in ours.values()}
    if not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        assert set(theirs) <= set(ours), f"`{name}` takes {theirs} now"


def test_the_trainer_passes_what_an_epoch_needs_by_name():
    """`_run_epoch` is given its arguments by keyword, two of which resuming depends on."""
    source = inspect.getsource(Trainer._inner_training_loop)
    assert "epoch=epoch" in source and "steps_trained_in_current_epoch=steps_trained_in_current_epoch" in source


def test_an_exchange_hangs_on_the_optimizers_step_before_anything_is_logged_or_saved():
    source = inspect.getsource(Trainer._run_epoch)
    step, event = source.index("self.optimizer.step()"), source.index("self.callback_handler.on_optimizer_step(")
    assert step < event < source.index("self._maybe_log_save_evaluate(")


def test_the_loop_clears_gradients_after_the_schedulers_turn_in_every_step_and_before_anything_else():
    """What averages hangs on it: PAPA's pull goes by the rate that the scheduler has just set."""
    source = inspect.getsource(Trainer._run_epoch)
    step, schedule = source.index("self.optimizer.step()"), source.index("self.lr_scheduler.step()")
    lines = source[schedule:].splitlines()
    after = next(line for line in lines[1:] if line.strip())
    assert step < schedule and after.strip() == "model.zero_grad()" and source.count(".zero_grad()") == 1
    # Not inside of what asks whether the scheduler steps at all.
    assert source.splitlines()[source[:step].count("\n")].index("self.") == after.index("model.")


def test_the_loop_asks_for_its_loader_once_and_takes_the_prepared_one():
    """The members' loaders are put in the place of that one call."""
    source = inspect.getsource(Trainer._inner_training_loop)
    assert source.count("self.get_train_dataloader()") == 1
    assert "model, train_dataloader = self._prepare_for_training(" in source


@pytest.mark.parametrize("event", EVENTS)
def test_what_callbacks_ask_for_comes_through_one_call(event):
    assert "self.call_event(" in inspect.getsource(getattr(CallbackHandler, event))


def test_the_trainer_acts_on_requests_only_after_events_at_which_processes_agree():
    source = inspect.getsource(Trainer._run_epoch)
    step, saved = source.index("on_step_end("), source.index("self._maybe_log_save_evaluate(")
    asked = source.index("if self.control.should_epoch_stop or self.control.should_training_stop")
    assert step < saved < source.index("on_substep_end(") < asked
    assert source.rindex("on_epoch_end(") < source.rindex("self._maybe_log_save_evaluate(")
    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    order = [
        "control.should_log",
        "self.log(",
        "control.should_evaluate",
        "self._evaluate(",
        "control.should_save:",
        "on_save(",
    ]
    places = [source.index(what) for what in order]
    assert places == sorted(places)
    assert "control.should" not in source[places[-1] :]
