"""The options of a population: their types and ranges, in front of any Trainer's arguments, on a command line, as JSON."""

import dataclasses
import importlib
import json
from dataclasses import dataclass

import pytest
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import ParallelMode

from hf_wash import PopulationArguments, WashConfig


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
    assert not config.average_tokens_across_devices
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
    assert config.shuffle_stop == 1.0 and config.population_size == 2
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
