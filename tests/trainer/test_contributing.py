"""CONTRIBUTING.md: the mixer that it adds, step by step, runs in a loop and in the Trainer."""

import dataclasses
import textwrap

import pytest
import torch
from small_peers import CONTRIBUTING, add_the_pages_method, by_hand, snippets, tiny_trainer
from small_population import population
from transformers import HfArgumentParser

from hf_wash import WashConfig, methods
from hf_wash.methods import Method, add_method
from hf_wash.trainer import mixing_run


MIXER, LOOP, _, MAKING = snippets()


@pytest.fixture
def forgotten():
    """Methods that a test adds are none afterwards."""
    known = dict(methods.METHODS)
    yield
    methods.METHODS.clear()
    methods.METHODS.update(known)


@pytest.fixture
def names(forgotten):
    """What the page defines, with its method added."""
    return add_the_pages_method()


def pulled(step, weights, buffers, rate):
    if step % 6 == 0:
        mean = sum(weights) / len(weights)
        for own in weights:
            own.lerp_(mean, 0.5)


def is_pulled(trainer):
    for member, expected in zip(trainer.population.members, by_hand(pulled)[0], strict=True):
        torch.testing.assert_close(member.weight.detach(), expected, rtol=2e-6, atol=2e-7)


def test_the_mixer_pulls_members_at_its_interval_and_no_other_step(names):
    exec(compile(LOOP, f"{CONTRIBUTING.name}, the loop", "exec"), names)
    assert names["stats"].values_moved == 3 * 22  # step 20
    members = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    for member, value in zip(members, (0.0, 4.0), strict=True):
        torch.nn.init.constant_(member.weight, value)
    mixer = names["PullMixer"](members, interval=2, rate=0.25)
    mixer.mix(1)
    assert [member.weight.item() for member in members] == [0.0, 4.0]
    mixer.mix(2)
    assert [member.weight.item() for member in members] == [0.5, 3.5]
    with pytest.raises(ValueError, match="interval"):
        names["PullMixer"](members, interval=0)
    with pytest.raises(ValueError, match="rate"):
        names["PullMixer"](members, rate=2)


def test_a_method_that_is_added_is_one_of_the_trainers(names, tmp_path):
    kept = {"average_interval": 6, "save_strategy": "steps", "save_steps": 10}
    trainer = tiny_trainer(tmp_path / "run", "pull", **kept)
    trainer.train()
    is_pulled(trainer)
    assert "Pull: members are pulled towards their mean now and then, 3 times" in trainer.mixing.forecast()
    resumed = tiny_trainer(tmp_path / "run", "pull", **kept)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    is_pulled(resumed)
    vision = population(
        tmp_path / "vit", size=2, mixing="pull", average_interval=1, max_steps=2, shuffle_probability=None
    )
    vision.train()
    vision.save_model()
    vision.create_model_card()
    assert "were pulled towards their average now and then" in (tmp_path / "vit" / "README.md").read_text()
    # Its own interval; of options, those that it takes.
    assert tiny_trainer(tmp_path / "ten", "pull").args.average_times(20, 6).interval == 10
    with pytest.raises(ValueError, match="shuffle_probability"):
        tiny_trainer(tmp_path / "refused", "pull", average_interval=6, shuffle_probability=0.1)
    (parsed,) = HfArgumentParser(WashConfig).parse_args_into_dataclasses(["--output_dir", "x", "--mixing", "pull"])
    assert parsed.mixing == "pull"


def test_with_an_entry_and_a_line_it_is_a_method_of_the_library(names, monkeypatch, tmp_path):
    monkeypatch.setitem(methods.METHODS, "pull", dataclasses.replace(names["pull"], make=None, interval=None))
    body = f"def line(args, wholes, times, rate):\n{textwrap.indent(MAKING, '    ')}"
    exec(compile(body, f"{CONTRIBUTING.name}, the line of make_mixer", "exec"), names)
    monkeypatch.setattr(
        mixing_run,
        "make_mixer",
        lambda args, wholes, optimizer, probability, seed, times: names["line"](
            args, wholes, times, args.used_average_rate
        ),
    )
    trainer = tiny_trainer(tmp_path, "pull", average_interval=6)
    trainer.train()
    is_pulled(trainer)


def own(**changed):
    given = {"options": ("average_interval",), "make": lambda members, args, times: object(), **changed}
    return Method("Own", "do something", "did something", **given)


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("Pull it", own(), "small letters, digits and underscores"),
        ("wash", own(), "There is a method 'wash' already"),
        ("own", own(make=None), "has no `make`"),
        ("own", own(options=()), "must be `average_interval`"),
        ("own", own(options=("average_interval", "shuffle_stop")), "must be `average_interval`"),
        ("own", own(repaired=True), "cannot be `repaired`"),
    ],
)
def test_a_method_that_the_trainer_could_not_run_is_refused(forgotten, name, method, said):
    with pytest.raises(ValueError, match=said):
        add_method(name, method)
    assert "own" not in methods.METHODS


def test_what_is_no_mixer_is_refused_before_the_first_step(forgotten, tmp_path):
    add_method("own", own())
    add_method("own", methods.METHODS["own"])  # a module that is imported twice
    trainer = tiny_trainer(tmp_path, "own", average_interval=6)
    with pytest.raises(ValueError, match="a object, is no mixer: it has no `mix` and no `state_dict`"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match="set `average_interval`, in steps"):
        tiny_trainer(tmp_path, "own").train()
