"""A population of LoRA adapters over one frozen backbone: what is shared, what is shuffled, what is saved."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_population import IMAGES, TEST, TRAIN, StopAt, accuracy, digest, options, started, vit

from hf_wash import WashConfig, WashTrainer
from hf_wash.hub import export_model, load_model
from hf_wash.soup import uniform_soup


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A folder with a pretrained model, as far as an adapter can tell."""
    folder = tmp_path_factory.mktemp("backbone")
    started(lambda: vit(hidden_dropout_prob=0.0)).save_pretrained(folder)
    return folder


def adapted(backbone):
    """The backbone with fresh LoRA matrices and a head to train, from torch's generator."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return get_peft_model(vit().from_pretrained(backbone), config)


def population(folder, backbone, **overrides):
    given = {"population_size": 3, "shuffle_probability": 0.3, "learning_rate": 1e-2, **overrides}
    return WashTrainer(
        model_init=lambda: adapted(backbone),
        args=WashConfig(**options(folder, **given)),
        train_dataset=TRAIN,
        eval_dataset=TEST,
        compute_metrics=accuracy,
    )


@pytest.fixture(scope="module")
def trained(backbone, tmp_path_factory):
    trainer = population(tmp_path_factory.mktemp("run"), backbone)
    trainer.train()
    return trainer


def split(model):
    """A model's frozen and its trainable parameters, by name."""
    parameters = dict(model.named_parameters())
    frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}
    return frozen, {name: parameter for name, parameter in parameters.items() if name not in frozen}


def logits(model):
    with torch.no_grad():
        return model.eval()(IMAGES[:40]).logits


def test_there_is_one_backbone_in_the_process_and_each_member_has_its_adapter(trained):
    frozen, adapter = split(trained.population.members[0])
    assert len(frozen) > 30 and len(adapter) == 2 * 2 * 2 + 2
    for other in [*trained.population.members[1:], trained.model]:
        others_frozen, others_adapter = split(other)
        assert all(others_frozen[name] is parameter for name, parameter in frozen.items())
        assert all(others_adapter[name] is not parameter for name, parameter in adapter.items())


def test_training_leaves_the_backbone_alone_and_moves_every_adapter_its_own_way(trained, backbone):
    before, _ = split(adapted(backbone))
    for member in trained.population.members:
        frozen, adapter = split(member)
        assert all(torch.equal(frozen[name], value) for name, value in before.items())
        assert all(parameter.abs().sum() > 0 for name, parameter in adapter.items() if "lora_B" in name)
    first, second = (split(member)[1] for member in trained.population.members[:2])
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_only_adapters_are_shuffled_and_their_values_stay_in_the_population(trained):
    members = trained.population.members
    before = [{name: p.detach().clone() for name, p in member.named_parameters()} for member in members]
    stats = trained.mixer.mix(10_000)
    assert stats.values_moved > 0
    moved = 0
    for name, parameter in members[0].named_parameters():
        was = torch.stack([state[name] for state in before])
        now = torch.stack([dict(member.named_parameters())[name].detach() for member in members])
        if not parameter.requires_grad:
            assert torch.equal(was, now)
        moved += int((was != now).sum())
        assert torch.equal(was.sort(0).values, now.sort(0).values)
    assert 0 < moved <= stats.values_moved


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_what_is_saved_answers_as_the_soup_does(trained, backbone, tmp_path, merge):
    expected = logits(trained.model)
    if merge:
        export_model(trained.model, tmp_path, merge_adapter=True)
        loaded = vit().from_pretrained(tmp_path)
    else:
        trained.save_model(str(tmp_path))
        assert not (tmp_path / "model.safetensors").exists()
        loaded = PeftModel.from_pretrained(vit().from_pretrained(backbone), tmp_path)
        assert torch.equal(logits(load_model(tmp_path)), logits(loaded))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(trained.population.members[0])).abs().max() > 1e-4


def test_the_soup_is_the_mean_of_the_adapters_saved_beside_it(trained, tmp_path):
    trained.save_model(str(tmp_path))
    trained.save_members(str(tmp_path))
    folders = [tmp_path / "_members" / f"member_{index}" for index in range(3)]
    mean = uniform_soup(folders)
    soup = load_file(tmp_path / "adapter_model.safetensors")
    assert soup.keys() == mean.keys()
    for name, value in soup.items():
        torch.testing.assert_close(value, mean[name], rtol=0, atol=0)


def test_members_that_start_apart_have_matrices_of_their_own(backbone, tmp_path):
    trainer = population(tmp_path, backbone, same_init=False, max_steps=2)
    adapters = [split(member)[1] for member in trainer.population.members]
    name = next(name for name in adapters[0] if "lora_A" in name)
    assert not torch.equal(adapters[0][name], adapters[1][name])
    trainer.train()
    torch.testing.assert_close(
        split(trainer.model)[1][name],
        torch.stack([split(member)[1][name] for member in trainer.population.members]).mean(0),
    )


def test_a_run_of_adapters_is_resumed_bit_for_bit_and_its_checkpoint_holds_one_backbone(backbone, tmp_path):
    undisturbed = population(tmp_path / "whole", backbone)
    undisturbed.train()
    stopped = population(tmp_path / "parts", backbone, save_strategy="steps", save_steps=6)
    stopped.add_callback(StopAt(6))
    stopped.train()
    saved = tmp_path / "parts" / "checkpoint-6"
    names = [load_file(file).keys() for file in sorted(saved.glob("member_*/model.safetensors"))]
    frozen, adapter = split(stopped.population.members[0])
    assert names == [adapter.keys()] * 3
    assert load_file(saved / "frozen.safetensors").keys() == frozen.keys()
    resumed = population(tmp_path / "parts", backbone)
    resumed.train(resume_from_checkpoint=str(saved))
    for there, here in zip(
        [*undisturbed.population.members, undisturbed.model], [*resumed.population.members, resumed.model], strict=True
    ):
        assert digest(there) == digest(here)
    frozen = split(resumed.population.members[0])[0]
    for member in resumed.population.members[1:]:
        assert all(split(member)[0][name] is parameter for name, parameter in frozen.items())
    assert torch.equal(
        logits(load_model(saved)), logits(PeftModel.from_pretrained(vit().from_pretrained(backbone), saved))
    )


def test_an_adapter_is_not_trained_into_the_folder_of_a_complete_model_nor_the_other_way_round(backbone, tmp_path):
    started(lambda: vit(hidden_dropout_prob=0.0)).save_pretrained(tmp_path)
    trainer = population(tmp_path, backbone)
    with pytest.raises(ValueError, match="holds a complete model, which loaders would take"):
        trainer.train()
    assert trainer.state.global_step == 0
    (tmp_path / "model.safetensors").unlink()
    adapted(backbone).save_pretrained(tmp_path)
    whole = WashTrainer(started(), WashConfig(**options(tmp_path, eval_strategy="no")), train_dataset=TRAIN)
    with pytest.raises(ValueError, match="holds an adapter"):
        whole.train()
    assert whole.state.global_step == 0
