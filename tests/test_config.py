"""The options of a population: their types and ranges, in front of any Trainer's arguments, on a command line, as JSON."""

import dataclasses
import importlib
import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import ParallelMode

from hf_wash import PopulationArguments, WashConfig
from hf_wash.config import ENOUGH_SHUFFLES
from hf_wash.methods import METHODS


OPTIONS = [option.name for option in dataclasses.fields(PopulationArguments)]

# The arguments of other Trainers, and an option of theirs with a value.
OTHERS = {
    "transformers.Seq2SeqTrainingArguments": ("predict_with_generate", True),
    "trl.SFTConfig": ("max_length", 77),
    "trl.DPOConfig": ("beta", 0.3),
    "trl.RewardConfig": ("max_length", 77),
    "sentence_transformers.SentenceTransformerTrainingArguments": ("batch_sampler", "no_duplicates"),
}


@pytest.fixture(params=OTHERS)
def other(request):
    """A user's own class over the arguments of another Trainer, and an option of that Trainer."""
    module, name = request.param.split(".")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    base = getattr(importlib.import_module(module), name)

    @dataclass
    class WashOther(PopulationArguments, base): ...

    return WashOther, *OTHERS[request.param]


def test_the_first_positional_argument_is_the_output_folder():
    config = WashConfig("out", population_size=3, learning_rate=0.1)
    assert (config.output_dir, config.population_size, config.learning_rate) == ("out", 3, 0.1)
    names = [option.name for option in dataclasses.fields(WashConfig)]
    assert names == [option.name for option in dataclasses.fields(TrainingArguments)] + OPTIONS


def test_the_population_goes_in_front_of_any_trainers_arguments(other):
    kind, name, value = other
    config = kind("out", population_size=3, use_cpu=True, **{name: value})
    assert config.output_dir == "out" and getattr(config, name) == value
    assert config.population_size == 3 and config.mixing == "wash"
    assert config.n_gpu == 0
    with pytest.raises(ValueError, match="`shuffle_stop` must be a fraction"):
        kind("out", shuffle_stop=2.0)


def test_other_trainers_arguments_have_flags_and_go_through_json(other, tmp_path):
    kind, name, value = other
    flags = ["--output_dir", "out", "--use_cpu", "--population_size", "3", "--no_same_init", f"--{name}", str(value)]
    (config,) = HfArgumentParser(kind).parse_args_into_dataclasses(flags)
    assert config.population_size == 3 and not config.same_init and getattr(config, name) == value
    written = json.loads(json.dumps(config.to_dict()))
    assert {option: written[option] for option in OPTIONS} == {option: getattr(config, option) for option in OPTIONS}
    again = dataclasses.replace(config, population_size=5)
    assert again.population_size == 5 and getattr(again, name) == value


def test_wash_config_goes_through_flags_json_and_replace(tmp_path):
    parser = HfArgumentParser(WashConfig)
    (config,) = parser.parse_args_into_dataclasses(
        ["--output_dir", "out", "--shuffle_stop", "0.75", "--shuffle_optimizer_state", "--evaluate_members", "false"]
    )
    assert config.shuffle_stop == 0.75 and config.shuffle_optimizer_state and not config.evaluate_members
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"output_dir": "out", "shuffle_stop": 1, "population_size": 2}))
    (config,) = parser.parse_json_file(file)
    assert config.shuffle_stop == 1.0 and isinstance(config.shuffle_stop, float) and config.population_size == 2
    assert dataclasses.replace(config, soup="greedy").population_size == 2
    assert json.loads(config.to_json_string())["soup"] == "uniform"


def test_the_population_stands_first():
    with pytest.raises(ValueError, match="must be the first base of `Behind`, found it behind `TrainingArguments`"):

        class Behind(TrainingArguments, PopulationArguments): ...


def test_the_token_of_the_hub_is_not_shown():
    config = WashConfig("out", hub_token="hf_secret")
    assert "hf_secret" not in repr(config) and "hf_secret" not in str(config)
    assert "population_size=None" in repr(config)


def test_a_member_keeps_its_last_batch_on_several_processes(monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")

    @dataclass
    class Config(PopulationArguments, sentence_transformers.SentenceTransformerTrainingArguments): ...

    monkeypatch.setattr(TrainingArguments, "parallel_mode", property(lambda self: ParallelMode.DISTRIBUTED))
    assert not Config("out", use_cpu=True).dataloader_drop_last
    assert Config("out", use_cpu=True, dataloader_drop_last=True).dataloader_drop_last


def test_several_cpu_processes_need_no_flag(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert WashConfig("out").use_cpu
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not WashConfig("out").use_cpu


WHOLE = ("population_size", "shuffle_interval", "average_interval", "soup_batch_norm_batches")
FRACTIONS = ("shuffle_probability", "shuffle_start", "shuffle_stop", "average_rate", "soup_holdout")
TRUTHS = ("shuffle_optimizer_state", "same_init", "evaluate_members", "push_members", "report")
NAMES = ("mixing", "shuffle_schedule", "member_data", "soup", "soup_batch_norm")


def test_every_option_is_checked():
    assert sorted(WHOLE + FRACTIONS + TRUTHS + NAMES) == sorted(OPTIONS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in WHOLE for value in (True, "2", 2.0, 0, -1, float("nan"), np.float64(2.0))),
        *((name, value) for name in FRACTIONS for value in (True, "0.1", -0.1, 1.5, float("nan"), np.True_, [0.1])),
        *((name, value) for name in TRUTHS for value in ("False", "no", 0, 1, None, np.int64(1))),
        *((name, value) for name in NAMES for value in ("WASH", "", True, None, ["wash"])),
        ("shuffle_interval", None),
        ("shuffle_start", None),
        ("soup_holdout", 0.0),
        ("soup_holdout", 1),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(name, value):
    with pytest.raises(ValueError) as raised:
        WashConfig("out", **{name: value})
    found = value.item() if isinstance(value, np.generic) else value
    message = str(raised.value)
    assert message.startswith(f"`{name}` must be ") and message.endswith(f", found {found!r}.")


def test_every_method_is_a_flag_with_what_is_its_own(capsys):
    parser = HfArgumentParser(WashConfig)
    given = ["--output_dir", "out", "--mixing", "papa", "--average_interval", "5", "--average_rate", "0.9"]
    config = parser.parse_args_into_dataclasses(given)[0]
    assert (config.mixing, config.average_interval, config.average_rate) == ("papa", 5, 0.9)
    for method in METHODS:
        assert parser.parse_args_into_dataclasses(["--output_dir", "out", "--mixing", method])[0].mixing == method
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"--mixing {{{','.join(METHODS)}}}" in shown and "are pulled towards their mean (papa)" in shown


def test_a_start_behind_the_stop_is_refused():
    with pytest.raises(ValueError, match=r"`shuffle_start` must be at most `shuffle_stop` \(0.25\), found 0.5"):
        WashConfig("out", shuffle_start=0.5, shuffle_stop=0.25)


def test_numpys_numbers_become_pythons():
    given = {
        "population_size": np.int64(3),
        "shuffle_interval": np.uint8(2),
        "shuffle_probability": np.float32(0.5),
        "shuffle_start": np.int32(0),
        "shuffle_stop": 1,
        "same_init": np.False_,
        "soup": np.str_("greedy"),
    }
    config = WashConfig("out", **given)
    for name, value in given.items():
        assert getattr(config, name) == value
        assert type(getattr(config, name)) in (int, float, bool, str)
    assert isinstance(config.shuffle_start, float) and isinstance(config.shuffle_stop, float)
    assert json.loads(json.dumps({name: getattr(config, name) for name in OPTIONS}))["population_size"] == 3


# How long and how often


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 400),
    st.integers(1, 9),
    st.tuples(*2 * [st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.07, 0.1, 0.29, 0.5, 0.57, 0.75, 1.0]))]),
)
def test_mixing_steps_are_those_at_which_the_population_shuffles(total_steps, interval, window):
    config = object.__new__(WashConfig)  # what depends on the machine is slow to find out
    config.mixing, config.shuffle_interval, config.shuffle_probability = "wash", interval, None
    config.shuffle_start, config.shuffle_stop = sorted(window)
    counted = sum(config.shuffles(step, total_steps) for step in range(1, total_steps + 1))
    assert config.mixing_steps(total_steps) == counted
    assert config.expected_shuffles(total_steps) == config.probability_for(total_steps) * counted
    assert 0.0 <= config.probability_for(total_steps) <= 0.5
    assert (config.probability_for(total_steps) == 0.0) == (counted == 0)


@pytest.mark.parametrize(
    ("options", "total_steps", "probability"),
    [
        ({}, 460, 140 / 460),
        ({"shuffle_stop": 0.75}, 460, 140 / 460),
        ({"shuffle_start": 0.1}, 1400, 0.1),
        ({"shuffle_interval": 10}, 14000, 0.1),
        ({}, 234_000, 140 / 234_000),
        ({}, 100, 0.5),
        ({}, 0, 0.0),
        ({"shuffle_interval": 11}, 10, 0.0),
        ({"shuffle_start": 0.5, "shuffle_stop": 0.5}, 1000, 0.0),
        ({"mixing": "independent"}, 1000, 0.0),
        ({"shuffle_probability": 0.001}, 10, 0.001),
        ({"shuffle_probability": 0.0}, 1000, 0.0),
    ],
)
def test_p_fits_the_run_unless_it_is_given(options, total_steps, probability):
    assert WashConfig("out", **options).probability_for(total_steps) == probability


def test_a_fitted_p_is_enough_wherever_a_run_is_long_enough():
    config = WashConfig("out", shuffle_stop=0.75)
    assert config.expected_shuffles(94) >= ENOUGH_SHUFFLES
    assert config.expected_shuffles(10**9) == pytest.approx(105)
    assert WashConfig("out").expected_shuffles(700) == pytest.approx(140)
    assert WashConfig("out", mixing="independent", shuffle_probability=0.5).expected_shuffles(700) == 0


def test_none_is_a_p_that_fits_also_from_json(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"output_dir": "out", "shuffle_probability": None}))
    (config,) = HfArgumentParser(WashConfig).parse_json_file(file)
    assert config.probability_for(1400) == 0.1
    (config,) = HfArgumentParser(WashConfig).parse_args_into_dataclasses(["--shuffle_probability", "0.2"])
    assert config.probability_for(1400) == 0.2
