"""`Ensemble` answers like one model."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from hf_wash.hub import export_model
from hf_wash.soup import Ensemble


def members(count=3):
    torch.manual_seed(0)
    return [nn.Linear(4, 5) for _ in range(count)]


def vits(count=3):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return [ViTForImageClassification(config).eval() for _ in range(count)]


def test_a_softmax_over_the_answer_is_the_mean_of_the_probabilities():
    models, inputs = members(), torch.randn(6, 4)
    answer = Ensemble(models)(inputs)
    mean = sum(model(inputs).softmax(-1) for model in models) / 3
    torch.testing.assert_close(answer.softmax(-1), mean)
    torch.testing.assert_close(answer, mean.log())


def test_logits_are_averaged_when_asked_for():
    models, inputs = members(), torch.randn(6, 4)
    torch.testing.assert_close(Ensemble(models, average="logits")(inputs), sum(model(inputs) for model in models) / 3)


def test_vanishing_probabilities_do_not_become_infinite():
    models = members(2)
    answer = Ensemble(models)(torch.full((1, 4), 1e4))
    assert answer.isfinite().all()


def test_half_precision_members_are_averaged_in_float32():
    models = [model.bfloat16() for model in members()]
    inputs = torch.randn(6, 4).bfloat16()
    answer = Ensemble(models)(inputs)
    assert answer.dtype == torch.float32
    mean = sum(model(inputs).float().softmax(-1) for model in models) / 3
    torch.testing.assert_close(answer.softmax(-1), mean)


def test_members_with_outputs_of_transformers_are_answered_for_in_kind():
    models, images, labels = vits(), torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    ensemble = Ensemble(models)
    output = ensemble(pixel_values=images, labels=labels)
    assert type(output) is type(models[0](pixel_values=images))
    mean = sum(model(pixel_values=images).logits.softmax(-1) for model in models) / 3
    torch.testing.assert_close(output.logits.softmax(-1), mean)
    torch.testing.assert_close(output.loss, functional.nll_loss(mean.log(), labels))
    assert ensemble(images).loss is None
    loss, logits = ensemble(pixel_values=images, labels=labels, return_dict=False)
    torch.testing.assert_close(logits, output.logits)
    torch.testing.assert_close(loss, output.loss)
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]])
    torch.testing.assert_close(ensemble(pixel_values=images, labels=soft).loss, -(soft * mean.log()).sum(-1).mean())


def test_an_ensemble_of_one_predicts_as_its_member():
    (model,), inputs = members(1), torch.randn(6, 4)
    torch.testing.assert_close(Ensemble([model])(inputs).softmax(-1), model(inputs).softmax(-1))


def test_bad_ensembles_are_refused():
    with pytest.raises(ValueError, match="at least one member"):
        Ensemble([])
    with pytest.raises(ValueError, match="'probabilities' or 'logits', not 'votes'"):
        Ensemble(members(), average="votes")
    with pytest.raises(ValueError, match="Member 1 of the ensemble is a str"):
        Ensemble([members(1)[0], "folder"])


def test_a_member_that_is_not_finite_is_named():
    models = members()
    with torch.no_grad():
        models[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^Member 1 holds NaN or infinite values in 'weight', .*: leave it out\.$"):
        Ensemble(models)
    assert len(Ensemble([models[0], models[2]]).members) == 2


def test_weights_that_are_elsewhere_are_left_to_the_members():
    """As those of a model that is larger than the memory, which is loaded piece by piece."""
    assert len(Ensemble(model.to("meta") for model in members()).members) == 3


@pytest.mark.parametrize("layout", ["members", "_members"])
def test_an_ensemble_is_rebuilt_from_the_folder_of_a_run(layout, tmp_path):
    models, images = vits(11), torch.randn(2, 3, 16, 16)
    for index, model in enumerate(models):
        export_model(model, tmp_path / layout / f"member_{index}", check=False)
    (tmp_path / layout / "member_average").mkdir()  # no member, for all its name
    ensemble = Ensemble.from_pretrained(tmp_path)
    assert not any(
        module.training for module in ensemble.modules() if module is not ensemble and module is not ensemble.members
    )
    for loaded, model in zip(ensemble.members, models, strict=True):  # member_10 after member_9
        assert torch.equal(loaded(images).logits, model(images).logits)
    torch.testing.assert_close(ensemble(images).logits, Ensemble(models)(images).logits)
    torch.testing.assert_close(
        Ensemble.from_pretrained(tmp_path, average="logits")(images).logits,
        Ensemble(models, average="logits")(images).logits,
    )


def test_a_folder_without_members_or_with_one_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no members"):
        Ensemble.from_pretrained(tmp_path)
    model = vits(1)[0]
    for index in (0, 2):
        export_model(model, tmp_path / "_members" / f"member_{index}", check=False)
    with pytest.raises(ValueError, match="no _members/member_1"):
        Ensemble.from_pretrained(tmp_path)
    # A run that says why has no more to give.
    (tmp_path / "wash_run.json").write_text('{"soup": {"left_out": [1]}}')
    assert len(Ensemble.from_pretrained(tmp_path).members) == 2
