"""What cannot work is refused before anything has happened, in a sentence that says what would."""

import datasets
import pytest
import torch
from small_population import TRAIN, Digits, options, population, resnet, started, vit
from transformers import TrainingArguments

from hf_wash import MemberOverrides, WashConfig, WashTrainer
from hf_wash.config import ENOUGH_SHUFFLES


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("shuffle_probability", 1.5, "between 0 and 1"),
        ("shuffle_probability", -0.1, "between 0 and 1"),
        ("shuffle_probability", float("nan"), "between 0 and 1"),
        ("shuffle_schedule", "rising", "'decreasing', 'constant', 'increasing'"),
        ("mixing", "papa_3", "'wash', 'papa', 'papa_all', 'papa_2', 'dart'"),
        ("population_size", 0, "at least 1"),
        ("shuffle_interval", 0, "at least 1"),
        ("shuffle_start", 0.9, None),
        ("shuffle_stop", 1.1, "between 0 and 1"),
        ("member_data", "half", "'full', 'shard'"),
        ("soup", "tomato", "'uniform', 'greedy'"),
        ("soup_holdout", 1.0, "between 0 and 1"),
        ("soup_batch_norm", "forget", "'recalibrate', 'average'"),
        ("soup_batch_norm_batches", 0, "at least 1"),
    ],
)
def test_an_option_outside_its_range(tmp_path, option, value, said):
    extra = {"shuffle_stop": 0.5} if option == "shuffle_start" else {}
    with pytest.raises(ValueError, match=f"`{option}` must be") as refusal:
        WashConfig(output_dir=str(tmp_path), **{option: value, **extra})
    assert said is None or said in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "DeepSpeed"),
        ({"neftune_noise_alpha": 1.0}, "neftune"),
        ({"optim": "adalomo"}, "backward pass"),
    ],
)
def test_a_setting_that_does_not_go_with_a_population(tmp_path, settings, said):
    args = WashConfig(**options(tmp_path))
    # Set afterwards: some need packages that are not installed to be accepted at all.
    for name, value in settings.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=said):
        WashTrainer(started(), args, train_dataset=TRAIN)


@pytest.mark.parametrize("inside", [False, True])
def test_an_output_folder_that_is_a_file(tmp_path, inside):
    file = tmp_path / "notes.txt"
    file.write_text("keep me")
    args = WashConfig(**options(file / "run" if inside else file))
    with pytest.raises(ValueError, match="`output_dir` .*cannot be made" if inside else "`output_dir` .* is a file"):
        WashTrainer(started(), args, train_dataset=TRAIN)
    assert file.read_text() == "keep me"


def test_plain_training_arguments(tmp_path):
    with pytest.raises(ValueError, match="must be a `WashConfig`, found `TrainingArguments`"):
        WashTrainer(started(), TrainingArguments(**options(tmp_path, eval_strategy="no")), train_dataset=TRAIN)


def test_different_starts_of_a_given_model(tmp_path):
    with pytest.raises(ValueError, match="`same_init=False` needs `model_init`"):
        population(tmp_path, same_init=False)


def test_optimizers_made_before_the_members(tmp_path):
    model = started()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="`optimizers` cannot serve a population of 4"):
        population(tmp_path, model, trainer={"optimizers": (optimizer, None)})


def test_overrides_for_another_number_of_members(tmp_path):
    with pytest.raises(ValueError, match="lists 1 members, but the population has 4"):
        population(tmp_path, trainer={"members": [MemberOverrides()]})


def test_members_of_different_architectures(tmp_path):
    made = iter([vit(), vit(), vit(hidden_size=32), vit()])
    with pytest.raises(
        ValueError, match=r"Member 2 does not have.* member 0: 'vit.*' has shape .*32.* in member 2 and .*16"
    ):
        population(tmp_path, same_init=False, trainer={"model_init": lambda: next(made)})


def test_no_training_data(tmp_path):
    with pytest.raises(ValueError, match="needs a `train_dataset`"):
        population(tmp_path, trainer={"train_dataset": None}).train()


def test_an_empty_training_set(tmp_path):
    with pytest.raises(ValueError, match="training set of member 0 is empty"):
        population(tmp_path, trainer={"train_dataset": Digits(0, 0)}).train()


def test_a_training_set_without_labels(tmp_path):
    unlabelled = datasets.Dataset.from_dict({"pixel_values": torch.zeros(20, 1, 8, 8).tolist()}).with_format("torch")
    with pytest.raises(ValueError, match="has no labels"):
        population(tmp_path, trainer={"train_dataset": unlabelled}).train()


def test_members_that_would_take_different_numbers_of_steps(tmp_path):
    members = [MemberOverrides(), MemberOverrides(train_dataset=Digits(0, 100))]
    with pytest.raises(ValueError, match=r"different numbers of batches an epoch \(member 0: 21, member 1: 7\)"):
        population(tmp_path, size=2, trainer={"members": members}).train()


def test_more_members_than_examples_to_deal(tmp_path):
    with pytest.raises(ValueError, match="3 examples cannot be dealt to 4 members"):
        population(tmp_path, member_data="shard", trainer={"train_dataset": Digits(0, 3)}).train()


def test_resuming_from_nothing(tmp_path):
    with pytest.raises(ValueError, match="No complete checkpoint was found"):
        population(tmp_path).train(resume_from_checkpoint=True)


def test_a_run_too_short_for_its_probability_is_warned_about(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_wash.trainer.mixing_run.logger.warning", said.append)
    population(tmp_path, shuffle_probability=0.5, max_steps=10, shuffle_stop=0.8, eval_strategy="no").train()
    (warning,) = (text for text in said if "first-layer weight" in text)
    assert (
        "about 4.0 times" in warning and f"{ENOUGH_SHUFFLES} shuffles served" in warning and "train longer" in warning
    )

    said.clear()
    config = WashConfig(output_dir=str(tmp_path), shuffle_probability=0.1)
    assert config.expected_shuffles(200) == pytest.approx(20)
    assert WashConfig(output_dir=str(tmp_path), shuffle_probability=0.175).expected_shuffles(200) >= ENOUGH_SHUFFLES


def test_several_gpus_under_a_plain_python_are_one_and_a_hint(tmp_path):
    config = WashConfig(**options(tmp_path))
    config._n_gpu = 4
    with pytest.warns(UserWarning, match="4 GPUs are visible .* only the first is used.*num_processes 4"):
        assert config.n_gpu == 1
    assert config.train_batch_size == 16


def test_shuffling_happens_between_start_and_stop_and_every_interval(tmp_path):
    config = WashConfig(output_dir=str(tmp_path), shuffle_start=0.25, shuffle_stop=0.75, shuffle_interval=2)
    assert [step for step in range(1, 21) if config.shuffles(step, 20)] == [6, 8, 10, 12, 14]


def test_batch_norm_of_all_processes_is_refused_only_where_there_are_several(tmp_path):
    population(tmp_path, torch.nn.SyncBatchNorm.convert_sync_batchnorm(resnet()))
