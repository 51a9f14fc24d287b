"""What each of the peers does in a run, against the same by hand: when, of what, in which order, and going on later."""

import copy
import json
import re
import shutil

import pytest
import torch
from small_peers import EPOCH, LEARNING_RATE, PEERS, Same, Tiny, by_hand, tiny_trainer
from small_population import Digits, StopAt, digest, population, resnet, started

from hf_wash import MemberOverrides, WashConfig, uniform_soup
from hf_wash.methods import METHODS, Times
from hf_wash.mixing import DilocoMixer, PapaMixer, PeriodicAverageMixer
from hf_wash.soup.repair import channel_statistics, mean_statistics, repair
from hf_wash.trainer import checkpoint, exchanging
from hf_wash.trainer.dry_run import mixer_bytes
from hf_wash.trainer.mixing_run import MixingRun


def mean(tensors):
    return torch.stack(tensors).mean(0)


def everyone_at(times, buffers_too):
    """All become their mean after these steps."""

    def exchange(step, weights, buffers, rate):
        if step in times:
            for kind in (weights, buffers) if buffers_too else (weights,):
                middle = mean(kind)
                for own in kind:
                    own.copy_(middle)

    return exchange


def pull_at(times, keep):
    def exchange(step, weights, buffers, rate):
        if step in times:
            for kind in (weights, buffers):
                middle, pull = mean(kind), rate * (1 - keep)
                for own in kind:
                    own.copy_((1 - pull) * own + pull * middle)

    return exchange


def outer_step_at(times, learning_rate=0.7, momentum=0.9):
    start, velocity = torch.tensor([0.3, -0.2, 0.5]), torch.zeros(3)

    def exchange(step, weights, buffers, rate):
        if step in times:
            gradient = start - mean(weights)
            velocity.mul_(momentum).add_(gradient)
            start.sub_(learning_rate * (gradient + momentum * velocity))
            for own in weights:
                own.copy_(start)

    return exchange


# Six steps make an epoch, and twenty the run. By hand, so that no rule of the code is used twice.
BY_HAND = {
    "papa": ("papa", {}, pull_at({1, 7, 13, 19}, 0.99)),
    "papa, every second": ("papa", {"average_interval": 2, "average_rate": 0.5}, pull_at(set(range(1, 21, 2)), 0.5)),
    "papa, more than an epoch apart": ("papa", {"average_interval": 4}, pull_at({1, 5, 7, 11, 13, 17, 19}, 0.99)),
    "papa_all": ("papa_all", {}, everyone_at({6}, True)),
    "papa_all, every fifth step": ("papa_all", {"average_interval": 5}, everyone_at({5, 10, 15}, True)),
    "dart": ("dart", {}, everyone_at(set(range(2, 21, 2)), False)),
    "dart, every seventh step": ("dart", {"average_interval": 7}, everyone_at({7, 14}, False)),
    "local_sgd": ("local_sgd", {}, everyone_at({6, 12, 18}, False)),
    "local_sgd, at the end": ("local_sgd", {"average_interval": 20}, everyone_at({20}, False)),
    "sparta, all weights": ("sparta", {"shuffle_probability": 1.0}, everyone_at(set(range(1, 21)), False)),
    "sparta, later": (
        "sparta", {"shuffle_probability": 1.0, "shuffle_interval": 4, "shuffle_start": 0.3}, everyone_at({8, 12, 16, 20}, False),
    ),
    "diloco": ("diloco", {"average_interval": 7}, outer_step_at({7, 14})),
    "diloco, another rate": ("diloco", {"average_interval": 4, "average_rate": 0.3}, outer_step_at({4, 8, 12, 16, 20}, 0.3)),
}  # fmt: skip


def states(trainer):
    return [(member.weight.detach().clone(), member.seen.clone()) for member in trainer.population.members]


@pytest.mark.parametrize("case", BY_HAND)
def test_a_run_is_what_it_is_by_hand(case, tmp_path):
    mixing, options, exchange = BY_HAND[case]
    trainer = tiny_trainer(tmp_path, mixing, **options)
    trainer.train()
    weights, buffers = by_hand(exchange)
    for (weight, seen), expected, buffer in zip(states(trainer), weights, buffers, strict=True):
        torch.testing.assert_close(weight, expected, rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(seen, buffer, rtol=2e-6, atol=2e-7)
    independent = by_hand(lambda *_: None)[0]
    assert not torch.allclose(weights[0], independent[0], rtol=1e-4)


def test_papa_2_averages_the_pairs_that_its_mixer_draws(tmp_path):
    trainer = tiny_trainer(tmp_path, "papa_2", average_interval=8)
    trainer.train()
    pairs = {step: trainer.mixer.pairs(step) for step in (8, 16)}

    def exchange(step, weights, buffers, rate):
        for kind in (weights, buffers) if step in pairs else ():
            before = [own.clone() for own in kind]
            for own, (one, other) in zip(kind, pairs[step], strict=True):
                own.copy_((before[one] + before[other]) / 2)

    weights, buffers = by_hand(exchange)
    for (weight, seen), expected, buffer in zip(states(trainer), weights, buffers, strict=True):
        torch.testing.assert_close(weight, expected, rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(seen, buffer, rtol=2e-6, atol=2e-7)


def test_papas_pull_follows_a_scheduler_that_does_not_step_with_the_optimizer(tmp_path):
    """A rate that a plateau has lowered, relative to the option, also after resuming."""
    settings = {
        "mixing": "papa", "average_interval": 1, "average_rate": 0.5, "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0, "threshold": 10.0, "threshold_mode": "abs"},
        "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "save_strategy": "steps",
        "save_steps": 5, "steps": 10, "eval_dataset": Same(0),
    }  # fmt: skip
    pulls = []

    class Watch(StopAt):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            pulls.append(optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["initial_lr"])

    whole = tiny_trainer(tmp_path / "whole", callbacks=[Watch(0)], **settings)
    whole.train()
    assert pulls[0] == 1.0 and pulls[-1] < 0.2
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "later" / "checkpoint-5")
    later = tiny_trainer(tmp_path / "later", callbacks=[Watch(0)], **settings)
    before, pulls[:] = list(pulls), []
    later.train(resume_from_checkpoint=True)
    assert pulls == before[5:]
    for (weight, _), (expected, _) in zip(states(later), states(whole), strict=True):
        assert torch.equal(weight, expected)


def test_a_member_with_a_learning_rate_of_its_own_is_pulled_by_its_own_part_of_it(tmp_path):
    trainer = tiny_trainer(tmp_path, "papa", average_interval=1, average_rate=0.5, size=2, steps=4)
    trainer._overrides[1] = MemberOverrides(train_dataset=Same(1), learning_rate=0.01)
    trainer._bring_members_up_to_date()
    trainer.train()
    weights = [torch.tensor([0.3, -0.2, 0.5]) for _ in range(2)]
    for step in range(1, 5):
        for index, (weight, rate) in enumerate(zip(weights, (LEARNING_RATE, 0.01), strict=True)):
            own = Same(index)
            weight.sub_(rate * (1 - (step - 1) / 4) * (own.x @ weight - own.y) * own.x)
        middle, pull = mean(weights), 0.5 * (1 - step / 4)
        for weight in weights:
            weight.copy_((1 - pull) * weight + pull * middle)
    for (weight, _), expected in zip(states(trainer), weights, strict=True):
        torch.testing.assert_close(weight, expected, rtol=2e-6, atol=2e-7)


def test_a_step_that_the_scaler_skips_is_followed_by_its_exchange(tmp_path, monkeypatch):
    """As after an overflow in half precision: the optimizer and the scheduler stand still, the others must not wait."""
    trainer = tiny_trainer(tmp_path, "local_sgd", average_interval=2, steps=4)
    mixed, own = [], MixingRun.mix
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda self: True))
    monkeypatch.setattr(MixingRun, "mix", lambda self, step: (mixed.append(step), own(self, step))[1])
    trainer.train()
    assert mixed == [1, 2, 3, 4] and trainer.values_moved == 2 * 3 * 3


# After an averaging of whole models


class Alike(torch.utils.data.Dataset):
    """One digit over and over, another one for each member, large enough to vary in its last feature map."""

    def __init__(self, index):
        small = Digits(0, 40)[index]
        large = small["pixel_values"].repeat_interleave(4, -1).repeat_interleave(4, -2)
        self.example = {**small, "pixel_values": large}

    def __len__(self):
        return 16 * 5

    def __getitem__(self, index):
        return self.example


def overridden():
    return {"members": [MemberOverrides(train_dataset=Alike(index)) for index in range(3)]}


def batches_of(index):
    example = Alike(index).example
    return [{"pixel_values": torch.stack([example["pixel_values"]] * 16)}] * 5


@pytest.mark.parametrize("mixing", ["papa_all", "papa_2"])
def test_after_averaging_the_activations_are_rescaled_to_those_of_the_parents(tmp_path, mixing):
    quiet = {"size": 3, "eval_strategy": "no", "shuffle_probability": None}
    with_callbacks = {"trainer": {**overridden(), "callbacks": [StopAt(5)]}}
    before = population(tmp_path / "a", started(resnet), mixing="independent", **quiet, **with_callbacks)
    before.train()
    after = population(tmp_path / "b", started(resnet), mixing=mixing, **quiet, **with_callbacks)
    after.train()
    old = [copy.deepcopy(member) for member in before.population.members]
    statistics = [channel_statistics(member, batches_of(index)) for index, member in enumerate(old)]
    for index, member in enumerate(after.population.members):
        parents = range(3) if mixing == "papa_all" else after.mixer.pairs(5)[index]
        expected = copy.deepcopy(old[0])
        expected.load_state_dict(uniform_soup([old[parent].state_dict() for parent in parents]), strict=False)
        plain = copy.deepcopy(expected)
        repair(expected, mean_statistics([statistics[parent] for parent in parents]), batches_of(index))
        for name, value in member.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=2e-6)
        convolution = "resnet.embedder.embedder.convolution.weight"
        assert not torch.allclose(plain.state_dict()[convolution], member.state_dict()[convolution], rtol=1e-3)


def test_repairing_leaves_the_members_data_and_their_random_streams_as_they_are(tmp_path, monkeypatch):
    class Told(Digits):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    epochs = []
    data = {"train_dataset": Told(0, 120)}
    alone = population(tmp_path / "a", started(resnet), size=2, mixing="independent", max_steps=25, trainer=data)
    alone.train()
    epochs_alone, repaired = epochs.copy(), []
    epochs.clear()
    monkeypatch.setattr(exchanging, "repair", lambda model, target, batches, **_: repaired.append(len(batches)))
    monkeypatch.setattr(MixingRun, "mix", lambda self, step: None)
    settings = {"size": 2, "mixing": "papa_all", "max_steps": 25, "shuffle_probability": None, "trainer": data}
    trainer = population(tmp_path / "b", started(resnet), **settings)
    trainer.train()
    assert repaired and set(repaired) == {5} and epochs == epochs_alone
    assert [digest(m) for m in trainer.population.members] == [digest(m) for m in alone.population.members]


def test_repairing_a_frozen_backbone_leaves_it_as_it_is(tmp_path):
    model = started(resnet)
    for parameter in model.resnet.embedder.parameters():
        parameter.requires_grad_(False)
    frozen = model.resnet.embedder.embedder.convolution.weight.clone()
    settings = {"size": 2, "mixing": "papa_all", "shuffle_probability": None, "average_interval": 3, "max_steps": 5}
    trainer = population(tmp_path, model, eval_strategy="no", **settings)
    trainer.train()
    for member in trainer.population.members:
        assert torch.equal(member.resnet.embedder.embedder.convolution.weight, frozen)
    assert trainer.values_moved


def test_buffers_stay_with_their_member_where_the_method_leaves_them(tmp_path):
    settings = {"size": 2, "shuffle_probability": None, "average_interval": 5, "max_steps": 5, "eval_strategy": "no"}
    trainer = population(tmp_path, started(resnet), mixing="local_sgd", **settings)
    trainer.train()
    one, other = trainer.population.members
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


# Going on


@pytest.mark.parametrize("mixing", ["wash", *PEERS])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(mixing, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "data": lambda index: Same(index, 4)}
    if mixing not in ("wash", "sparta"):
        settings["average_interval"] = 3
    else:
        settings["shuffle_probability"] = 0.5
    whole = tiny_trainer(tmp_path / "whole", mixing, **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", tmp_path / "later" / "checkpoint-10")
    later = tiny_trainer(tmp_path / "later", mixing, **settings)
    later.train(resume_from_checkpoint="auto")
    for (weight, seen), (expected, buffer) in zip(states(later), states(whole), strict=True):
        assert torch.equal(weight, expected) and torch.equal(seen, buffer)
    assert (later.values_moved, later.bytes_exchanged) == (whole.values_moved, whole.bytes_exchanged)
    files = json.loads((tmp_path / "whole" / "checkpoint-10" / "population.json").read_text())["files"]
    assert (checkpoint.MIXER in files) == (mixing == "diloco")
    if mixing == "diloco":
        for a, b in zip(*(t.mixer.state_dict()["outer"]["state"][0].values() for t in (later, whole)), strict=True):
            assert torch.equal(a, b)


def test_a_checkpoint_without_the_methods_state_is_refused_and_another_methods_is_none(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "average_interval": 3}
    tiny_trainer(tmp_path / "sgd", "local_sgd", **settings).train()
    later = tiny_trainer(tmp_path / "sgd", "diloco", **settings)
    later.train(resume_from_checkpoint=str(tmp_path / "sgd" / "checkpoint-10"))
    assert later.state.global_step == 20

    tiny_trainer(tmp_path / "diloco", "diloco", **settings).train()
    folder = tmp_path / "diloco" / "checkpoint-10"
    content = json.loads((folder / "population.json").read_text())
    (folder / checkpoint.MIXER).unlink()
    del content["files"][checkpoint.MIXER]
    (folder / "population.json").write_text(json.dumps(checkpoint.seal(content)))
    with pytest.raises(ValueError, match=r"Cannot resume: the checkpoint does not hold the state of DiLoCo\."):
        tiny_trainer(tmp_path / "diloco", "diloco", **settings).train(resume_from_checkpoint=str(folder))


def test_what_stands_in_the_methods_state_runs_no_code(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "average_interval": 3}
    tiny_trainer(tmp_path, "diloco", **settings).train()
    folder = tmp_path / "checkpoint-10"
    for state, said in (
        ({"start": torch.zeros(3), "outer": print}, "it may run code"),
        ({"start": torch.zeros(7), "outer": {}}, "another state than one of DiLoCo"),
        ([1], "another state than one of DiLoCo"),
    ):
        torch.save(state, folder / checkpoint.MIXER)
        content = json.loads((folder / "population.json").read_text())
        content["files"][checkpoint.MIXER] = checkpoint.file_record(folder / checkpoint.MIXER)
        (folder / "population.json").write_text(json.dumps(checkpoint.seal(content)))
        with pytest.raises(ValueError, match=said):
            tiny_trainer(tmp_path, "diloco", **settings).train(resume_from_checkpoint=str(folder))


def test_an_outer_rate_that_was_changed_takes_effect_and_is_told(tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 5, "average_interval": 5}
    tiny_trainer(tmp_path, "diloco", **settings).train()
    said = []
    monkeypatch.setattr("hf_wash.trainer.checkpointing.logger.warning", said.append)
    later = tiny_trainer(tmp_path, "diloco", average_rate=0.1, **settings)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert "average_rate was None and is 0.1" in " ".join(said) and "Without effect" not in " ".join(said)
    assert later.mixer.state_dict()["outer"]["param_groups"][0]["lr"] == 0.1


def test_a_p_of_another_method_is_not_taken_over(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5}
    tiny_trainer(tmp_path, "local_sgd", **settings).train()
    later = tiny_trainer(tmp_path, "wash", **settings)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert later.mixing.probability == 0.5


# What is counted, and what is expected of it


class Masked(Tiny):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1), persistent=False)


@pytest.mark.parametrize("mixing", ["papa", "papa_all", "papa_2"])
def test_a_buffer_that_is_not_saved_is_neither_averaged_nor_expected_to_be(mixing, tmp_path, monkeypatch):
    monkeypatch.setattr("small_peers.Tiny", Masked)
    trainer = tiny_trainer(tmp_path, mixing, average_interval=7)
    expected = trainer.check()
    trainer.train()
    assert (trainer.values_moved, trainer.bytes_exchanged) == (expected.values_moved, expected.bytes_exchanged)
    assert all(torch.equal(member.mask, Masked().mask) for member in trainer.population.members)


@pytest.mark.parametrize("mixing", PEERS)
def test_what_is_counted_is_what_check_expects_and_the_log_says(mixing, tmp_path):
    options = {"average_interval": 7} if mixing not in ("sparta",) else {"shuffle_probability": 1.0}
    trainer = tiny_trainer(tmp_path, mixing, save_strategy="steps", save_steps=10, **options)
    expected = trainer.check()
    trainer.train()
    assert (trainer.values_moved, trainer.bytes_exchanged) == (expected.values_moved, expected.bytes_exchanged)
    logged = [entry["values_moved"] for entry in trainer.state.log_history if "values_moved" in entry]
    assert sum(5 * value for value in logged) == pytest.approx(trainer.values_moved)
    assert METHODS[mixing].title in str(expected) and "shuffles" not in str(expected)
    assert set(expected.others_send) == {"DDP", "PAPA", "SPARTA"} - {METHODS[mixing].title}
    written = tmp_path / "checkpoint-20" / checkpoint.MIXER
    assert mixer_bytes(trainer.args, trainer.model, 3) == (24 if mixing == "diloco" else 0)
    assert written.is_file() == (mixing == "diloco")


@pytest.mark.parametrize("total", [1, 5, 11, 12, 13, 40])
@pytest.mark.parametrize("interval", [1, 3, 5, 7])
def test_the_number_of_exchanges_is_that_of_the_steps_at_which_mixers_are_due(total, interval):
    weights = [torch.nn.Linear(1, 1) for _ in range(2)]
    optimizers = [torch.optim.SGD(member.parameters(), 0.1) for member in weights]
    pairs = [
        (PapaMixer(weights, optimizers, interval=interval, steps_per_epoch=6), Times(interval, first=1, epoch=6)),
        (
            PeriodicAverageMixer(weights, interval=interval, first=4, last=11),
            Times(interval, first=4, last=11),
        ),
        (DilocoMixer(weights, interval=interval), Times(interval, first=interval)),
    ]
    for mixer, times in pairs:
        assert times.count(total) == sum(mixer.is_due(step) for step in range(1, total + 1))


# What cannot be


FOREIGN = [
    ("papa", "shuffle_optimizer_state", True, "'wash'"),
    ("papa", "shuffle_probability", 0.1, "'wash' or 'sparta'"),
    ("diloco", "shuffle_stop", 0.5, "'wash' or 'sparta'"),
    ("sparta", "shuffle_schedule", "constant", "'wash'"),
    ("wash", "average_interval", 10, "'papa', 'papa_all', 'papa_2', 'dart', 'local_sgd' or 'diloco'"),
    ("independent", "average_interval", 10, "'papa', 'papa_all', 'papa_2', 'dart', 'local_sgd' or 'diloco'"),
    ("papa_all", "average_rate", 0.5, "'papa' or 'diloco'"),
]


@pytest.mark.parametrize(("mixing", "option", "value", "whose"), FOREIGN)
def test_an_option_of_another_method_is_refused_and_it_is_said_whose_it_is(mixing, option, value, whose):
    said = f"`{option}` is an option of `mixing` {whose}, and `mixing` is '{mixing}', which takes `"
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        WashConfig("out", mixing=mixing, **{option: value})
    assert raised.value.args[0].endswith(": leave it out.")


def test_a_default_that_a_class_of_arguments_has_of_its_own_is_not_taken_for_an_option():
    from dataclasses import dataclass

    @dataclass
    class Config(WashConfig):
        shuffle_stop: float = 0.75

    assert Config("out", mixing="papa").shuffle_stop == 0.75
    with pytest.raises(ValueError, match="`shuffle_stop` is an option of"):
        Config("out", mixing="papa", shuffle_stop=1.0)


def test_an_outer_learning_rate_of_zero():
    with pytest.raises(ValueError, match="`average_rate` must be above 0 with `mixing='diloco'`"):
        WashConfig("out", mixing="diloco", average_rate=0)
    assert WashConfig("out", mixing="papa", average_rate=0).used_average_rate == 0


def test_an_interval_longer_than_the_run_is_refused_as_soon_as_the_length_is_known(tmp_path):
    said = r"`average_interval` \(21 steps\) is longer than the run, which has 20 steps"
    with pytest.raises(ValueError, match=said):
        WashConfig("out", mixing="papa", average_interval=21, max_steps=20)
    trainer = tiny_trainer(tmp_path, "papa", average_interval=21, steps=-1, num_train_epochs=20 / EPOCH)
    before = states(trainer)
    for begin in (trainer.check, trainer.train):
        with pytest.raises(ValueError, match=said):
            begin()
    assert trainer.state.global_step == 0 and not list(tmp_path.glob("checkpoint-*"))
    assert all(
        torch.equal(a, b)
        for now, was in zip(states(trainer), before, strict=True)
        for a, b in zip(now, was, strict=True)
    )


@pytest.mark.parametrize(
    ("mixing", "options", "said"),
    [
        (
            "diloco",
            {},
            "averages every 500 steps unless `average_interval` is set, which is longer than the run of 20 steps: set it, to 2 for instance.",
        ),
        (
            "papa_all",
            {"steps": 6},
            "after epochs 0, 5, 10, ... and not after the last step, so never in this run of 6",
        ),
        ("papa_2", {"average_interval": 20}, "every 20 steps and not after the last step, so never in this run of 20"),
    ],
)
def test_a_method_that_would_never_exchange_is_refused(mixing, options, said, tmp_path):
    trainer = tiny_trainer(tmp_path, mixing, **options)
    with pytest.raises(ValueError, match=re.escape(said)):
        trainer.train()


def test_one_member_has_nobody_to_exchange_with(tmp_path):
    trainer = tiny_trainer(tmp_path, "diloco", size=1)
    trainer.train()
    assert trainer.mixer is None and trainer.values_moved == 0


# What a card says


SAYS = {
    "papa": (
        "pulled a little towards their average",
        "| mixing | PAPA |",
        "| pulled together | after every 10 optimizer steps, counted anew in each epoch of 6 steps, from its first step on |",
        "| α, the part of itself that a member keeps | 0.99 |",
        "2304.03094",
    ),
    "papa_all": (
        "PAPA-all, with REPAIR", "| averaged | after every 30 optimizer steps, from step 6 on, up to step 19 |",
        "2304.03094", "2211.08403",
    ),
    "papa_2": ("average of a random pair", "| mixing | PAPA-2 |", "2304.03094", "2211.08403"),
    "dart": ("| averaged | after every 2 optimizer steps |", "2302.14685"),
    "sparta": ("| probability p | 0.005 |", "| averaged | after every optimizer step |", "exo-explore/gym"),
    "local_sgd": ("| mixing | local SGD |", "| averaged | after every 6 optimizer steps |", "1602.05629"),
    "diloco": (
        "| averaged | after every 7 optimizer steps |", "| outer learning rate | 0.7 |",
        "| outer momentum | 0.9, Nesterov's |", "2311.08105",
    ),
}  # fmt: skip
PAPERS = ("2304.03094", "2211.08403", "2302.14685", "exo-explore/gym", "1602.05629", "2311.08105", "2405.17517")


@pytest.mark.parametrize("mixing", PEERS)
def test_the_card_names_the_method_its_settings_and_its_papers_and_no_others(mixing, tmp_path):
    trainer = tiny_trainer(tmp_path, mixing, **({"average_interval": 7} if mixing == "diloco" else {}))
    trainer.train()
    (tmp_path / "config.json").write_text('{"architectures": ["Tiny"]}')
    trainer.create_model_card()
    record = json.loads((tmp_path / "wash_run.json").read_text())["mixing"]
    assert record["method"] == mixing
    assert ("shuffle_schedule" in record, "average_interval" in record) == (False, mixing != "sparta")
    text = (tmp_path / "README.md").read_text()
    for part in SAYS[mixing]:
        assert part in text
    cited = text[text.index("# Citation") :]
    assert [paper in cited for paper in PAPERS] == [paper in SAYS[mixing] for paper in PAPERS]
    compared = text[text.index("# What was exchanged") : text.index("# Citation")]
    assert "were averaged, counted" in compared
    assert ("as one model for each member every" in compared) == (mixing != "papa")
    assert ("% of a model for each member and step" in compared) == (mixing != "sparta")
    assert "\n- wash\n" not in text
