"""`trainer.verify_checkpoint()`: a checkpoint is what its run makes, or the first bit that is not is named."""

import json
import shutil

import datasets
import pytest
import torch
from altered_checkpoints import (
    change,
    damage,
    fingerprint,
    flip_moment,
    flip_outer_momentum,
    flip_stream,
    flip_weight,
    other_rate,
)
from small_population import TRAIN, Digits, DigitStream, digest, outcome, population, resnet, started, vit
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from hf_wash import MemberOverrides
from hf_wash.trainer import manifest


RUN = {"size": 2, "max_steps": 6, "logging_steps": 2, "eval_steps": 3, "save_strategy": "steps", "save_steps": 2}


def saving(folder, **settings):
    return population(folder, **{**RUN, **settings})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saving(folder).train()
    return folder


@pytest.fixture
def copied(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "copy")
    return tmp_path / "copy"


# Identical


@pytest.mark.parametrize("step", [2, 6])
def test_it_is_identical_and_nothing_has_changed(run_folder, tmp_path, step):
    before = fingerprint(run_folder)
    trainer = saving(tmp_path / "other")
    members, stream = [digest(m) for m in trainer.population.members], torch.get_rng_state()
    replay = trainer.verify_checkpoint(run_folder / f"checkpoint-{step}")
    assert replay.identical and replay.difference is None and replay.changed == ()
    assert (replay.start, replay.step, replay.members) == (step - 2, step, 2)
    assert str(replay).startswith("identical: replayed from ")
    assert fingerprint(run_folder) == before
    assert list((tmp_path / "other").iterdir()) == []
    assert [digest(m) for m in trainer.population.members] == members
    assert torch.equal(torch.get_rng_state(), stream)


SETTINGS = {
    "BatchNorm": {"make": resnet},
    "epochs": {
        "save_strategy": "epoch",
        "max_steps": -1,
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "trainer": {"train_dataset": Digits(0, 50, noisy=True)},
    },
    "best": {"eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "accuracy"},
    "plateau": {"eval_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"},
    "optimizer state": {"shuffle_optimizer_state": True},
    "greedy soup": {"soup": "greedy", "soup_holdout": 0.1},
    "model_init": {"init": True, "same_init": False},
    "a stream": {"trainer": {"train_dataset": DigitStream(330)}},
    "one member": {"size": 1},
    "DiLoCo": {"mixing": "diloco", "average_interval": 2, "shuffle_probability": None},
    "PAPA": {"mixing": "papa", "average_interval": 2, "shuffle_probability": None},
    "members of their own": {
        "trainer": {"members": [MemberOverrides(learning_rate=1e-2), MemberOverrides(label_smoothing_factor=0.1)]}
    },
    "weights only": {"save_only_model": True},
    "accumulation": {"gradient_accumulation_steps": 3},
    "workers": {"dataloader_num_workers": 1, "max_steps": 4},
}


def make(folder, settings):
    settings = {**settings}
    model, trainer = settings.pop("make", vit), dict(settings.pop("trainer", {}))
    if settings.pop("init", False):
        return saving(folder, trainer={**trainer, "model_init": lambda: model()}, **settings)
    return saving(folder, model=started(model), trainer=trainer, **settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_whatever_the_options_and_the_trainer_goes_on_as_if_nothing_had_been(name, tmp_path):
    plain = make(tmp_path / "run", SETTINGS[name])
    plain.train()
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) >= 2
    trainer = make(tmp_path / "again", SETTINGS[name])
    first = trainer.verify_checkpoint(checkpoints[0])
    assert first.identical, str(first)
    last = trainer.verify_checkpoint(checkpoints[-1])
    assert last.identical, str(last)
    assert last.start == (int(checkpoints[-2].name.split("-")[1]) if name != "weights only" else 0)
    trainer.train()
    assert outcome(trainer) == outcome(plain)


def test_after_training_the_trainer_stays_as_it_is(run_folder, tmp_path):
    trainer, other = saving(tmp_path / "a"), saving(tmp_path / "b")
    trainer.train()
    other.train()
    before = outcome(trainer)
    assert trainer.verify_checkpoint(tmp_path / "a" / "checkpoint-6").identical
    assert outcome(trainer) == before
    trainer.train()
    other.train()
    assert outcome(trainer) == outcome(other)
    with pytest.raises(ValueError, match=r"no complete checkpoint before .* make the trainer anew"):
        trainer.verify_checkpoint(run_folder / "checkpoint-2")


def test_a_users_own_optimizer_stays_as_it_is(tmp_path):
    def with_optimizer(folder):
        model = started()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        return saving(tmp_path / folder, model=model, size=1, trainer={"optimizers": (optimizer, schedule)})

    plain, trainer = with_optimizer("run"), with_optimizer("again")
    plain.train()
    for step in (2, 6):
        replay = trainer.verify_checkpoint(tmp_path / "run" / f"checkpoint-{step}")
        assert replay.identical, str(replay)
    trainer.train()
    assert outcome(trainer) == outcome(plain)


def test_a_checkpoint_that_a_callback_asked_for_in_mid_run(tmp_path):
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step in (3, 5)

    saving(tmp_path, save_strategy="no", trainer={"callbacks": [Asks()]}).train()
    replay = saving(tmp_path, save_strategy="no").verify_checkpoint(tmp_path / "checkpoint-5")
    assert replay.identical and replay.start == 3


def test_nothing_is_reported_or_printed(run_folder, tmp_path, capsys):
    class Reports(TensorBoardCallback):
        def __init__(self):
            self.told = []

        def on_log(self, *args, **kwargs):
            self.told.append("log")

        on_train_begin = on_train_end = on_log

    class Counts(TrainerCallback):
        def __init__(self):
            self.steps = []

        def on_step_end(self, args, state, control, **kwargs):
            self.steps.append(state.global_step)

    reports, counts = Reports(), Counts()
    trainer = saving(tmp_path, trainer={"callbacks": [reports, counts]})
    callbacks = list(trainer.callback_handler.callbacks)
    assert trainer.verify_checkpoint(run_folder / "checkpoint-4").identical
    assert reports.told == [] and counts.steps == []  # what it remembered has been put back, too
    assert trainer.callback_handler.callbacks == callbacks
    assert "loss" not in capsys.readouterr().out


# Different


FLIPS = {
    "a weight": ("member_1/model.safetensors", flip_weight, 1, "weights", "vit.layernorm.weight", "1 of 16 values"),
    "a moment": (
        "member_0/optimizer.pt",
        flip_moment,
        0,
        "optimizer state",
        "classifier.bias.exp_avg_sq",
        "1 of 10 values",
    ),
    "a rate": ("member_1/optimizer.pt", other_rate, 1, "scheduler", "_last_lr.0", "the checkpoint has"),
    "a stream": ("member_1/streams.json", flip_stream, 1, "random streams", "streams.python.1", "another state"),
    "the soup": ("model.safetensors", flip_weight, None, "weights of the soup", "vit.layernorm.weight", "1 of 16"),
}


@pytest.mark.parametrize("what", FLIPS)
def test_one_flipped_bit_is_named(copied, tmp_path, what):
    name, edit, member, part, tensor, how = FLIPS[what]
    change(copied / "checkpoint-4", name, edit)
    replay = saving(tmp_path / "other").verify_checkpoint(copied / "checkpoint-4")
    found = replay.difference
    assert not replay.identical
    assert (found.step, found.member, found.part, found.tensor) == (4, member, part, tensor)
    assert how in found.how
    assert str(replay).startswith(f"different: `{tensor}` ({part}")
    assert "at step 4" in str(replay)
    # Of the checkpoint after it, it is the beginning: that one is found to be another, too.
    if what not in ("the soup", "a rate"):  # which is computed from the step
        assert not saving(tmp_path / "other").verify_checkpoint(copied / "checkpoint-6").identical


def test_a_flipped_bit_of_what_the_exchange_keeps_is_named(tmp_path):
    diloco = {"mixing": "diloco", "average_interval": 2, "shuffle_probability": None}
    saving(tmp_path / "run", **diloco).train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    change(checkpoint, "mixer.pt", flip_outer_momentum)
    found = saving(tmp_path / "other", **diloco).verify_checkpoint(checkpoint).difference
    assert (found.step, found.member, found.part) == (4, None, "state of the exchange")
    assert found.how.startswith("1 of ")


def test_the_first_member_that_differs_is_named(copied, tmp_path):
    for member in (1, 0):
        change(copied / "checkpoint-4", f"member_{member}/model.safetensors", flip_weight)
    assert saving(tmp_path / "other").verify_checkpoint(copied / "checkpoint-4").difference.member == 0


def test_other_data_that_cannot_be_told_make_another_checkpoint(run_folder, tmp_path):
    trainer = saving(tmp_path / "other", trainer={"train_dataset": Digits(400, 730, noisy=True)})
    replay = trainer.verify_checkpoint(run_folder / "checkpoint-4")
    assert replay.difference.part == "weights" and replay.difference.step == 4 and replay.changed == ()


def test_options_that_the_checkpoint_before_brings_are_told(run_folder, tmp_path):
    replay = saving(tmp_path / "other", learning_rate=1e-2).verify_checkpoint(run_folder / "checkpoint-4")
    assert replay.identical and replay.changed == ("learning_rate was 0.003 and is 0.01",)


def test_another_thread_count_is_told(copied, tmp_path):
    path = copied / "checkpoint-4" / "population.json"
    content = json.loads(path.read_text())
    content["made_with"].update({"number of threads": 64, "torch": "1.0"})
    path.write_text(json.dumps(manifest.seal(content)))
    replay = saving(tmp_path / "other").verify_checkpoint(copied / "checkpoint-4")
    assert replay.identical
    assert "number of threads was 64 and is 1" in replay.changed
    assert any(told.startswith("torch was '1.0'") for told in replay.changed)


# Refused


def untouched(trainer, folder):
    return [digest(member) for member in trainer.population.members], fingerprint(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": 8}, "was shuffled with seed 7, this run's is 8"),
        ({"size": 3}, "holds a population of 2, this run's is 3"),
        ({"model": started(lambda: vit(hidden_size=8))}, "holds another architecture"),
    ],
)
def test_another_run_is_refused_with_the_difference(run_folder, tmp_path, settings, said):
    trainer = saving(tmp_path / "other", **settings)
    before = untouched(trainer, run_folder)
    with pytest.raises(ValueError, match=f"Cannot replay: .*{said}"):
        trainer.verify_checkpoint(run_folder / "checkpoint-4")
    assert untouched(trainer, run_folder) == before


@pytest.mark.parametrize(
    ("settings", "step", "said"),
    [
        ({"shuffle_probability": 0.2}, 4, "shuffle_probability was 0.3 and is 0.2"),
        ({"learning_rate": 1e-2}, 2, "learning_rate was 0.003 and is 0.01"),  # the run's beginning takes it
        ({"max_steps": 20}, 4, "max_steps was 6 and is 20"),
        ({"max_steps": 5}, 6, "max_steps was 6 and is 5"),
    ],
)
def test_other_options_are_refused_with_the_difference(run_folder, tmp_path, settings, step, said):
    trainer = saving(tmp_path / "other", **settings)
    before = untouched(trainer, run_folder)
    with pytest.raises(ValueError, match=f"Cannot replay: .* was written with other options: {said}"):
        trainer.verify_checkpoint(run_folder / f"checkpoint-{step}")
    assert untouched(trainer, run_folder) == before


def table(start, stop):
    """Digits as a table, with noise from torch's generator."""
    digits = Digits(start, stop)
    rows = {name: [digits[index][name].tolist() for index in range(len(digits))] for name in digits[0]}

    def noisy(batch):
        images = torch.tensor(batch["pixel_values"])
        return {"pixel_values": images + 0.1 * torch.randn_like(images), "labels": torch.tensor(batch["labels"])}

    return datasets.Dataset.from_dict(rows).with_transform(noisy)


def test_other_data_are_refused_with_the_difference(tmp_path):
    run = saving(tmp_path / "run", trainer={"train_dataset": table(0, 64)})
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    same = saving(tmp_path / "same", trainer={"train_dataset": table(0, 64)}).verify_checkpoint(checkpoint)
    assert same.identical
    for data, said in (
        (table(0, 63), "they had 64 examples and have 63"),
        (table(100, 164), "example 0 of 64 is another"),
        (Digits(0, 32), "they had 64 examples and have 32"),
    ):
        trainer = saving(tmp_path / "other", trainer={"train_dataset": data})
        with pytest.raises(ValueError, match=f"Cannot replay: .* was trained on other data: {said}"):
            trainer.verify_checkpoint(checkpoint)


def test_what_is_no_checkpoint_is_refused_in_a_sentence(copied, tmp_path):
    trainer = saving(tmp_path / "other")
    for folder, said in (
        (copied / "nowhere", "Cannot replay: there is no folder"),
        (copied, "Cannot replay: .* has no population.json: it is not a whole population checkpoint"),
    ):
        with pytest.raises(ValueError, match=said):
            trainer.verify_checkpoint(folder)
    damage(copied / "checkpoint-6" / "member_1" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"Cannot replay: .*optimizer\.pt. is not what was written"):
        trainer.verify_checkpoint(copied / "checkpoint-6")


def test_a_damaged_one_before_it_is_passed_over(copied, tmp_path, monkeypatch):
    damage(copied / "checkpoint-4" / "member_1" / "optimizer.pt")
    told = []
    monkeypatch.setattr("hf_wash.trainer.replaying.logger.warning", lambda text: told.append(text))
    replay = saving(tmp_path / "other").verify_checkpoint(copied / "checkpoint-6")
    assert replay.identical and replay.start == 2
    assert any("A checkpoint is skipped" in text and "checkpoint-4" in text for text in told)


def test_checkpoints_of_another_run_are_no_beginning(copied, tmp_path):
    saving(tmp_path / "another", seed=9).train()
    shutil.rmtree(copied / "checkpoint-4")
    shutil.copytree(tmp_path / "another" / "checkpoint-4", copied / "checkpoint-4")
    replay = saving(tmp_path / "other").verify_checkpoint(copied / "checkpoint-6")
    assert replay.identical and replay.start == 2


def test_not_in_the_middle_of_a_run(run_folder, tmp_path):
    class Verifies(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.verify_checkpoint(run_folder / "checkpoint-2")

    trainer = saving(tmp_path, trainer={"callbacks": [Verifies()]})
    with pytest.raises(ValueError, match="before or after `train`"):
        trainer.train()


def test_an_error_of_the_data_comes_through_and_all_is_put_back(run_folder, tmp_path):
    class Gone(Digits):
        broken = True

        def __getitem__(self, index):
            if self.broken and index > 200:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    trainer, plain = (
        saving(tmp_path / "a", trainer={"train_dataset": Gone(0, 330, noisy=True)}),
        saving(tmp_path / "b"),
    )
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.verify_checkpoint(run_folder / "checkpoint-4")
    trainer.train_dataset = TRAIN
    trainer.train()
    plain.train()
    assert outcome(trainer) == outcome(plain)


def test_bits_are_compared_not_values():
    from hf_wash.trainer.replay import first_difference

    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert first_difference({"a": nan}, {"a": nan.clone()}) is None
    assert first_difference({"a": zero}, {"a": -zero})[0] == "a"
    assert first_difference({"a": 0.0}, {"a": -0.0})[0] == "a"
    assert first_difference({"a": zero}, {"a": zero.double()})[1].startswith("the checkpoint's dtype")
    assert first_difference({"a": [1, 2]}, {"a": [1]})[0] == "a"
    assert first_difference({"a": 1}, {}) == ("a", "the replay has none")
    assert first_difference({}, {"a": 1}) == ("a", "the checkpoint has none")
    # A scalar has a dimension of no length.
    assert first_difference(torch.tensor(1.0), torch.tensor(1.0)) is None
    assert first_difference(nn.Parameter(zero), zero.clone()) is None
