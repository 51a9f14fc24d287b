"""`trainer.check()`: a run is tried out, says what it would cost and what is wrong with it, and leaves no trace."""

import shutil
from collections import namedtuple

import pytest
import torch
from any_trainer import SCENARIOS, scenario, state_digest
from small_population import (
    TRAIN,
    Digits,
    DigitStream,
    StopAt,
    digest,
    history,
    outcome,
    population,
    resnet,
    started,
    vit,
)
from torch import nn

from hf_wash import MemberOverrides
from hf_wash.hub.wording import bytes_text, short
from hf_wash.trainer import dry_run
from hf_wash.trainer.mixing_run import MixingRun


# No trace


def all_of(trainer):
    """Whatever of a run a check could change."""
    timed = ("runtime", "per_second", "total_flos")
    log = [{k: v for k, v in line.items() if not k.endswith(timed)} for line in trainer.state.log_history]
    return [state_digest(member) for member in trainer.population.members], state_digest(trainer.model), log


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_after_it_is_bit_for_bit_the_run_without(name, tmp_path):
    run = scenario(name)
    without, checked = (run.population(tmp_path / kind, shuffle_probability=0.5) for kind in ("without", "checked"))
    report = checked.check()
    assert list((tmp_path / "checked").iterdir()) == []
    assert len(report.losses) == 2 and all(loss == loss for loss in report.losses)
    assert report.steps == 4
    without.train()
    checked.train()
    assert all_of(checked) == all_of(without)


SETTINGS = {
    "BatchNorm": {"make": resnet},
    "accumulation": {"gradient_accumulation_steps": 3, "max_steps": 6},
    "bf16": {"bf16": True},
    "optimizer state": {"shuffle_optimizer_state": True},
    "greedy soup": {"soup": "greedy", "soup_holdout": 0.1},
    "greedy BatchNorm in shards": {"make": resnet, "soup": "greedy", "soup_holdout": 0.1, "member_data": "shard"},
    "workers": {"dataloader_num_workers": 1, "max_steps": 4},
    "independent starts": {"same_init": False, "init": True},
    "model_init": {"init": True},
    "a stream": {"trainer": {"train_dataset": DigitStream(330)}},
    "one member": {"size": 1},
    "members of their own": {
        "size": 2,
        "trainer": {"members": [MemberOverrides(learning_rate=1e-2), MemberOverrides(label_smoothing_factor=0.1)]},
    },
}


def make(folder, settings):
    settings = {**settings}
    model, trainer = settings.pop("make", vit), dict(settings.pop("trainer", {}))
    if settings.pop("init", False):
        trainer["model_init"] = lambda: model()
        return population(folder, trainer=trainer, **settings)
    return population(folder, started(model), trainer=trainer, **settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_option_lets_it_leave_a_trace(name, tmp_path):
    without, checked = (make(tmp_path / kind, SETTINGS[name]) for kind in ("without", "checked"))
    before = torch.get_rng_state()
    weights = [digest(member) for member in checked.population.members]
    checked.check()
    checked.check()
    assert torch.equal(torch.get_rng_state(), before)
    assert [digest(member) for member in checked.population.members] == weights
    assert all(p.grad is None for member in checked.population.members for p in member.parameters())
    assert checked.optimizer is None and len(checked.accelerator._models) == len(without.accelerator._models)
    without.train()
    checked.train()
    assert outcome(checked) == outcome(without)


def test_a_collator_that_draws_by_itself_draws_the_same(tmp_path):
    class Noisy:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(3)

        def __call__(self, examples):
            images = torch.stack([example["pixel_values"] for example in examples])
            noise = torch.randn(images.shape, generator=self.generator)
            return {"pixel_values": images + noise, "labels": torch.stack([e["labels"] for e in examples])}

    runs = [population(tmp_path / str(i), size=2, trainer={"data_collator": Noisy()}) for i in range(2)]
    runs[1].check()
    for run in runs:
        run.train()
    assert outcome(runs[1]) == outcome(runs[0])


def test_between_two_runs_the_soup_stays_and_the_next_run_is_the_same(tmp_path):
    runs = [population(tmp_path / str(i), size=2, trainer={"callbacks": [StopAt(5)]}) for i in range(2)]
    for run in runs:
        run.train()
    served, members = runs[1].model, [digest(member) for member in runs[1].population.members]
    runs[1].check()
    assert runs[1].model is served and runs[1].soup.served
    assert [digest(member) for member in runs[1].population.members] == members
    for run in runs:
        run.train()
    assert outcome(runs[1]) == outcome(runs[0])


def test_an_optimizer_of_the_users_is_left_as_it_is(tmp_path):
    def run(kind):
        model = started()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return population(tmp_path / kind, model, size=1, trainer={"optimizers": (optimizer, None)})

    without, checked = run("without"), run("checked")
    checked.check()
    assert not checked.optimizer.state
    without.train()
    checked.train()
    assert outcome(checked) == outcome(without)


# What it says


def test_it_says_what_the_run_then_costs(tmp_path, capsys):
    model = started(lambda: vit(hidden_size=64, intermediate_size=128))
    saves = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2}
    trainer = population(tmp_path, model, max_steps=40, **saves)
    report = trainer.check()
    trainer.args.disable_tqdm = False
    trainer.train()
    # And the run the short of it when it begins.
    line = next(line for line in capsys.readouterr().err.splitlines() if "members ×" in line)
    assert line == (
        "4 members × 40 steps on 1 process. WASH: a first-layer weight is shuffled 12 times, p = 0.3; about "
        f"{short(report.values_moved)} values, {bytes_text(report.bytes_exchanged)}."
    )
    assert report.values_moved == pytest.approx(trainer.values_moved, rel=0.05)
    assert report.bytes_exchanged == 4 * report.values_moved
    assert report.expected_shuffles == pytest.approx(0.3 * 40)
    assert (report.members, report.steps, report.batch_size, report.samples) == (4, 40, 16, 330)
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoint-40").rglob("*") if path.is_file())
    assert report.checkpoint_bytes == pytest.approx(written, rel=0.1)
    assert (report.checkpoints_written, report.checkpoints_kept) == (4, 3)
    trained = sum(4 * p.numel() for p in trainer.population.members[0].parameters())
    expected = {"SPARTA": round(4 * 40 * 0.005 * trained), "PAPA": 4 * 4 * trained, "DDP": 4 * 40 * trained}
    assert report.others_send == expected
    shown = str(report)
    for expected in (
        "4 members × 40 steps of 16 samples",
        "loaded back by transformers",
        "12 of a weight of the first",
    ):
        assert expected in shown


def test_with_the_optimizers_state_more_is_sent(tmp_path):
    trainer = population(tmp_path, max_steps=40, shuffle_optimizer_state=True)
    report = trainer.check()
    trainer.train()
    assert report.values_moved == pytest.approx(trainer.values_moved, rel=0.1)


@pytest.mark.parametrize("settings", [{"mixing": "independent"}, {"size": 1}], ids=["independent", "one member"])
def test_where_nothing_is_exchanged_it_says_so(tmp_path, settings):
    report = population(tmp_path, **settings).check()
    assert (report.values_moved, report.bytes_exchanged) == (0, 0)
    assert "nothing is exchanged" in str(report) and "others send" not in str(report)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mixing": "papa"}, "PAPA: members are pulled towards their mean, 2 times; about 40.1 k values, 161 kB."),
        ({"mixing": "sparta"}, "SPARTA: a weight is averaged with p = 0.005; about 1.2 k values, 4.82 kB."),
        ({"mixing": "independent"}, "nothing is exchanged."),
        ({"shuffle_optimizer_state": True}, ", and the optimizer's state for them."),
    ],
    ids=str,
)
def test_a_run_says_in_a_line_what_its_members_exchange(tmp_path, settings, said):
    # Of four members with 5,018 trained weights of 4 bytes.
    trainer = population(tmp_path, max_steps=12, shuffle_probability=None, **settings)
    optimizer, args = trainer.create_optimizer(), trainer.args
    run = MixingRun(args, trainer.population, optimizer, 12, 20, args.probability_for(12))
    assert run.forecast().startswith("4 members × 12 steps on 1 process") and run.forecast().endswith(said)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save_strategy": "no"}, (0, 0)),
        ({"save_strategy": "steps", "save_steps": 5}, (3, 3)),
        ({"save_strategy": "steps", "save_steps": 0.25}, (4, 4)),
        ({"save_strategy": "steps", "save_steps": 5, "save_total_limit": 1}, (3, 2)),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "eval_strategy": "no"}, (2, 2)),
        (
            {"save_strategy": "steps", "save_steps": 3, "eval_steps": 3, "save_total_limit": 1}
            | {"load_best_model_at_end": True},
            (4, 3),  # which is only so if the best is not the last or the one before
        ),
    ],
    ids=str,
)
def test_it_counts_as_many_checkpoints_as_the_run_writes(tmp_path, settings, expected, monkeypatch):
    trainer = population(tmp_path, size=2, **settings)
    report = trainer.check()
    assert (report.checkpoints_written, report.checkpoints_kept) == expected
    steps, at_once = [], []
    write = trainer._write_checkpoint

    def counted(folder):
        write(folder)
        steps.append(folder.name)
        at_once.append(len(list(tmp_path.glob("checkpoint-*"))))

    monkeypatch.setattr(trainer, "_write_checkpoint", counted)
    trainer.train()
    assert len(steps) == expected[0]
    assert max(at_once, default=0) in ([2, 3] if "load_best_model_at_end" in settings else [expected[1]])


# What is wrong


def fails(trainer):
    """The sentence of a check; nothing has happened."""
    weights = [digest(member) for member in trainer.population.members]
    with pytest.raises(ValueError) as caught:
        trainer.check()
    assert [digest(member) for member in trainer.population.members] == weights
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Odd(Digits):
    """Digits of which each example goes through `change`."""

    def __init__(self, change):
        super().__init__(0, 330)
        self.change = change

    def __getitem__(self, index):
        return self.change(super().__getitem__(index))


def test_data_and_labels(tmp_path):
    def said(data):
        return fails(population(tmp_path, size=2, trainer={"train_dataset": data}))

    def broken(example):
        raise OSError("the disk is gone")

    assert said(None) == "Training needs a `train_dataset`."
    assert said(Digits(0, 0)) == "The training set of member 0 is empty."
    assert "has no labels" in said(Odd(lambda example: {"pixel_values": example["pixel_values"]}))
    assert "OSError: the disk is gone" in said(Odd(broken))
    too_many = Odd(lambda example: {**example, "labels": torch.tensor(10)})
    assert said(too_many).startswith("The forward and backward pass of member 0 failed: ")
    small = Odd(lambda example: {**example, "pixel_values": example["pixel_values"][:, :4, :4]})
    assert said(small).startswith("The forward and backward pass of member 0 failed: ")
    none = population(tmp_path, size=2, dataloader_drop_last=True, trainer={"train_dataset": Digits(0, 9)})
    assert "no batch" in fails(none)


def test_a_loss_that_is_no_number(tmp_path):
    data = Odd(lambda example: {**example, "pixel_values": example["pixel_values"] * float("nan")})
    said = fails(population(tmp_path, size=2, trainer={"train_dataset": data}))
    assert said == "The loss of member 0 on its first batch is nan."


def test_a_model_that_cannot_be_saved_or_does_not_load_back(tmp_path, monkeypatch):
    trainer = population(tmp_path, size=2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_save", full)
        assert fails(trainer) == "Saving the untrained model failed: OSError: [Errno 28] No space left on device"

    save = trainer._save

    def altered(folder):
        from safetensors.torch import load_file, save_file

        save(folder)
        file = f"{folder}/model.safetensors"
        save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})

    monkeypatch.setattr(trainer, "_save", altered)
    assert fails(trainer).startswith("The saved model does not load back as it was: ")
    assert list(tmp_path.iterdir()) == []


def test_a_plain_module_is_read_back(tmp_path):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, pixel_values, labels=None):
            logits = self.linear(pixel_values.flatten(1))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    trainer = population(tmp_path, Linear(), size=2)
    assert "its weights read back" in str(trainer.check())


def test_a_disk_that_is_too_small_for_what_is_kept(tmp_path, monkeypatch):
    trainer = population(tmp_path, save_strategy="steps", save_steps=1)
    needed = trainer.check().disk_needed
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - needed + 1, needed - 1))
    said = fails(trainer)
    assert "12 checkpoints of" in said and "are free: make room, or keep fewer with `save_total_limit`" in said
    fewer = population(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert fewer.check().disk_needed < needed


def test_a_stream_that_cannot_be_read_twice_is_left_alone(tmp_path):
    class Once(torch.utils.data.IterableDataset):
        def __init__(self):
            self.examples = (TRAIN[index % 330] for index in range(10_000))

        def __iter__(self):
            return self.examples

    trainer = population(tmp_path, size=1, trainer={"train_dataset": Once()}, eval_strategy="no")
    report = trainer.check()
    assert report.losses == [] and "cannot be read twice" in str(report)
    trainer.train()
    expected = population(tmp_path, size=1, trainer={"train_dataset": Once()}, eval_strategy="no")
    expected.train()
    assert history(trainer) == history(expected)


def test_not_in_the_middle_of_a_run(tmp_path):
    from transformers import TrainerCallback

    class Curious(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.check()

    trainer = population(tmp_path, size=2, trainer={"callbacks": [Curious()]})
    with pytest.raises(ValueError, match="call it before `train`"):
        trainer.train()


def test_attributes_and_all_that_is_in_them_are_put_back():
    class Thing:
        pass

    thing = Thing()
    thing.number, thing.lists, thing.same = 1, {"train": [1, 2]}, [3]
    inner, same = thing.lists["train"], thing.same
    streams = dry_run.RandomStreams(torch.device("cpu"))
    with dry_run.as_it_was(vars(thing), streams=streams, owners=[None]):
        inner.append(3)
        thing.number, thing.new, thing.same = 2, 5, []
        thing.lists["eval"] = [0]
        torch.rand(3)
        state = torch.get_rng_state()
    assert not torch.equal(torch.get_rng_state(), state)
    assert vars(thing) == {"number": 1, "lists": {"train": [1, 2]}, "same": [3]}
    assert thing.lists["train"] is inner and thing.same is same
