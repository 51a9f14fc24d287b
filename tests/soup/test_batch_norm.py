"""`recalibrate_batch_norm`: the statistics of the data, and nothing else changed."""

import pytest
import timm
import torch
from torch import nn

from hf_wash.soup import has_batch_norm, recalibrate_batch_norm


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.second = nn.BatchNorm2d(3, momentum=None)
        self.unused = nn.BatchNorm1d(2)
        self.fixed = nn.BatchNorm2d(3, track_running_stats=False)
        self.seen = []

    def forward(self, pixel_values, labels=None):
        self.seen.append((self.training, self.drop.training, self.norm.training, labels))
        return self.fixed(self.second(self.drop(self.norm(pixel_values))))


def batches(count=4, size=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 5, 5, generator=generator) * 2 + 1 for _ in range(count)]


def test_statistics_are_the_plain_average_over_the_batches():
    model, data = Net(), batches()
    assert recalibrate_batch_norm(model, data) == 4
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in data]).mean(0)
    variance = torch.stack([batch.var((0, 2, 3), unbiased=True) for batch in data]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    # The second layer sees what the first gives: batches normalised by their own statistics, without dropout.
    torch.testing.assert_close(model.second.running_mean, torch.zeros(3), atol=1e-5, rtol=0)


def test_what_was_there_before_has_no_influence():
    results = []
    for value in (0.0, 100.0):
        model = Net()
        model.norm.running_mean.fill_(value)
        model.norm.num_batches_tracked.fill_(50)
        recalibrate_batch_norm(model, batches())
        results.append(model.norm.running_mean)
    assert torch.equal(*results)


def test_modes_momenta_weights_and_random_generators_stay_as_they_were():
    model = Net()
    model.train()
    model.norm.eval()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    recalibrate_batch_norm(model, batches())
    assert torch.equal(state, torch.get_rng_state())
    assert model.seen == [(False, False, True, None)] * 4
    assert [module.training for module in model.modules()] == [True, False, True, True, True, True]
    assert (model.norm.momentum, model.second.momentum) == (0.3, None)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_no_batch_reaches_keeps_its_statistics():
    model = Net()
    model.unused.running_mean.fill_(3.0)
    model.unused.num_batches_tracked.fill_(8)
    recalibrate_batch_norm(model, batches())
    assert torch.equal(model.unused.running_mean, torch.full((2,), 3.0)) and model.unused.num_batches_tracked == 8


def test_a_batch_that_fails_leaves_everything_as_it_was():
    model = Net()
    model.norm.running_mean.fill_(3.0)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        recalibrate_batch_norm(model, [*batches(2), torch.randn(2, 5, 5, 5)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and model.norm.momentum == 0.3


@pytest.mark.parametrize("form", ["dict", "tuple", "list", "tensor", "own forward"])
def test_batches_come_in_every_form(form):
    model, data = Net(), batches(2)
    forms = {
        # Labels that no cross-entropy takes: they have to be left out.
        "dict": [{"pixel_values": batch, "labels": "soft"} for batch in data],
        "tuple": [(batch, torch.zeros(6)) for batch in data],
        "list": [[batch, torch.zeros(6)] for batch in data],
        "tensor": data,
        "own forward": [{"image": batch} for batch in data],
    }
    forward = (lambda model, batch: model(batch["image"])) if form == "own forward" else None
    assert recalibrate_batch_norm(model, forms[form], forward=forward) == 2
    torch.testing.assert_close(model.norm.running_mean, torch.stack([b.mean((0, 2, 3)) for b in data]).mean(0))
    assert all(labels is None for *_, labels in model.seen)


@pytest.mark.parametrize("asks", ["in its signature", "in its loss"])
def test_a_model_that_asks_for_its_labels_gets_them(asks):
    class Asking(Net):
        def forward(self, pixel_values, labels=None):
            answer = super().forward(pixel_values)
            return nn.functional.mse_loss(answer.mean((1, 2, 3)), labels)

    class Required(Net):
        def forward(self, pixel_values, labels):
            return super().forward(pixel_values)

    model, plain = {"in its signature": Required, "in its loss": Asking}[asks](), Net()
    data = [{"pixel_values": batch, "labels": torch.zeros(6)} for batch in batches()]
    assert recalibrate_batch_norm(model, data) == recalibrate_batch_norm(plain, data) == 4
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_no_batch_is_drawn_beyond_the_maximum():
    drawn = []

    def endless():
        while True:
            drawn.append(1)
            yield torch.randn(4, 3, 5, 5)

    assert recalibrate_batch_norm(Net(), endless(), max_batches=3) == 3
    assert len(drawn) == 3


def test_a_model_without_batch_norm_draws_no_batch():
    def never():
        raise AssertionError("drawn")
        yield

    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.BatchNorm1d(2, track_running_stats=False))
    assert recalibrate_batch_norm(model, never()) == 0
    assert not has_batch_norm(model)
    assert has_batch_norm(Net())


def test_no_batches_are_refused_and_change_nothing():
    model = Net()
    model.norm.running_mean.fill_(3.0)
    with pytest.raises(ValueError, match="no batch to recalibrate"):
        recalibrate_batch_norm(model, [])
    assert torch.equal(model.norm.running_mean, torch.full((3,), 3.0))
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batch_norm(model, batches(), max_batches=0)


def test_timm_layers_that_hold_an_activation_are_recalibrated():
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    data = [torch.randn(8, 3, 64, 64) for _ in range(3)]
    assert recalibrate_batch_norm(model, data) == 3
    expected = torch.stack([model.conv_stem(batch).mean((0, 2, 3)) for batch in data]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, expected, atol=1e-6, rtol=1e-5)
    assert not any(module.training for module in model.modules())


def test_a_dropout_inside_a_batch_norm_layer_stays_off():
    class Layer(nn.BatchNorm2d):  # as timm's BatchNormAct2d is made
        def __init__(self):
            super().__init__(3)
            self.drop = nn.Dropout(0.5)

        def forward(self, images):
            return self.drop(super().forward(images))

    model = nn.Sequential(Layer(), nn.BatchNorm2d(3))
    state = torch.get_rng_state()
    recalibrate_batch_norm(model, batches())
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(model[1].running_var, torch.ones(3), atol=0.02, rtol=0)


def test_recalibration_repairs_a_soup_whose_statistics_are_wrong():
    torch.manual_seed(0)
    data = batches(8, 32)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        model.train()
        expected = model(data[0])  # by the batch's own statistics
        broken = (model.eval()(data[0]) - expected).abs().mean()
        recalibrate_batch_norm(model, data)
        repaired = (model(data[0]) - expected).abs().mean()
    assert repaired < 0.2 * broken
