"""The soup of a model with BatchNorm: whatever its forward asks for, and what is kept where it cannot be recalibrated."""

import pytest
import torch
from safetensors.torch import load_file
from small_population import TRAIN, Digits, digest, population, resnet, started
from torch import nn

from hf_wash.hub import load_members


class Plain(nn.Module):
    """A ResNet that computes its own loss, and answers without labels."""

    def __init__(self):
        super().__init__()
        self.net = resnet()

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values).logits
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Required(Plain):
    def forward(self, pixel_values, labels):
        return super().forward(pixel_values, labels)


class Used(Plain):
    def forward(self, pixel_values, labels=None):
        output = super().forward(pixel_values)
        return {**output, "loss": nn.functional.cross_entropy(output["logits"], labels)}


class OnlyTrained(Plain):
    """No answer in evaluation mode, in which a soup is recalibrated."""

    def forward(self, pixel_values, labels=None):
        if not self.training:
            raise RuntimeError("this model is for training")
        return super().forward(pixel_values, labels)


def run(folder, model, **settings):
    return population(folder, started(model), size=2, eval_strategy="no", **{"max_steps": 4, **settings})


REPAIRED = {"mixing": "papa_all", "average_interval": 2, "shuffle_probability": None}


@pytest.mark.parametrize(("model", "options"), [(Required, {}), (Used, {}), (Required, REPAIRED)])
def test_a_model_that_asks_for_its_labels_gets_them(tmp_path, model, options):
    trainer, expected = (run(tmp_path / each.__name__, each, **options) for each in (model, Plain))
    trainer.check()
    trainer.train()
    expected.train()
    assert digest(trainer.model) == digest(expected.model)


def test_a_check_says_that_a_soup_could_not_be_recalibrated(tmp_path):
    with pytest.raises(
        ValueError, match=r"^The pass .* BatchNorm .* failed: RuntimeError: this model is for training"
    ):
        run(tmp_path, OnlyTrained).check()
    run(tmp_path, OnlyTrained, soup_batch_norm="average").check()


@pytest.mark.parametrize("saves", ["no", "steps"])
def test_the_members_are_kept_where_the_soup_cannot_be_recalibrated(tmp_path, saves):
    trainer = run(tmp_path, OnlyTrained, save_strategy=saves, save_steps=2)
    with pytest.raises(RuntimeError, match="this model is for training") as caught:
        trainer.train()
    assert trainer.state.global_step == (4 if saves == "no" else 2)
    said = str(caught.value)
    assert str(tmp_path / "_members") in said and "soup_batch_norm" in said and "\n" not in said
    for index, member in enumerate(trainer.population.members):
        saved = load_file(tmp_path / "_members" / f"member_{index}" / "model.safetensors")
        assert all(torch.equal(saved[name], value) for name, value in member.state_dict().items())


def test_so_they_are_where_the_data_fail(tmp_path):
    class Spent(Digits):
        def __getitem__(self, index):
            if trainer.state.global_step == 4:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    data = Spent(TRAIN.start, TRAIN.stop)
    trainer = run(tmp_path, resnet, trainer={"train_dataset": data})
    with pytest.raises(RuntimeError, match="OSError: the disk is gone"):
        trainer.train()
    assert [digest(member) for member in load_members(tmp_path)] == [digest(m) for m in trainer.population.members]


def test_before_a_run_nothing_is_written_for_it(tmp_path):
    with pytest.raises(RuntimeError, match="this model is for training") as caught:
        run(tmp_path, OnlyTrained).evaluate()
    assert "_members" not in str(caught.value) and not (tmp_path / "_members").exists()
