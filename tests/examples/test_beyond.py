"""`examples/comparison/beyond.py`: variants of WASH, each seen to do what its row says."""

import json

import pytest
import study
import torch
from comparison.beyond import ALL, VARIANTS, RowMixer, _falling, _then_mean, advised
from comparison.methods import METHODS
from comparison.setting import PRESETS
from torch import nn


class Arguments:
    """What a mixer is made with."""

    def __init__(self, steps: int):
        self.max_steps, self.seed = steps, 3


def members_of(count: int = 3) -> list[nn.Module]:
    """Each value of a member tells whose it is, and where it stands: member + place / 1000."""
    found = []
    for member in range(count):
        model = nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 8), nn.Linear(8, 4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(member + torch.arange(parameter.numel()).view(parameter.shape) / 1000)
        found.append(model)
    return found


def owners(members: list[nn.Module]) -> list[list[torch.Tensor]]:
    return [[parameter.detach().floor() for parameter in member.parameters()] for member in members]


def test_rows_are_shuffled_whole_and_nothing_is_lost():
    members = members_of()
    mixer = RowMixer(members, 0.5, steps=4, seed=1)
    moved = sum(mixer.mix(step).values_moved for step in range(1, 5))
    now = owners(members)
    for own in zip(*now, strict=True):
        for tensor in own:
            rows = tensor.reshape(len(tensor), -1)
            assert (rows == rows[:, :1]).all()  # a row is one member's
        # Each row has one owner among each of the members.
        assert torch.equal(
            torch.stack(own).sort(0).values, torch.arange(3.0).view(-1, *[1] * own[0].ndim) + 0 * own[0]
        )
    places = [parameter.detach() % 1 for parameter in members[0].parameters()]
    assert all(
        torch.allclose(found, torch.arange(found.numel()).view(found.shape) / 1000, atol=1e-6) for found in places
    )
    # Of 240 values of the first layer half, of 328 of the second a quarter, of the last none; 4 times; two of three move.
    assert moved == pytest.approx(4 * 3 * 2 / 3 * (240 * 0.5 + 328 * 0.25), rel=0.25)
    assert torch.equal(now[0][-2], torch.zeros(4, 8))
    assert mixer.mix(5).values_moved == 0 and owners(members)[0][0].equal(now[0][0])


def test_a_p_that_falls_shuffles_as_many_values_and_fewer_and_fewer():
    steps = 200
    mixer = _falling(members_of(), Arguments(steps), None)
    moved = [mixer.mix(step).values_moved for step in range(1, steps + 1)]
    tenths = [sum(moved[first : first + 20]) for first in range(0, steps, 20)]
    assert tenths == sorted(tenths, reverse=True) and tenths[-1] < tenths[0] / 10
    options = advised(steps)
    # (N − 1) / N of what is selected, p·l of the first layer and half of the second's.
    expected = 0.75 * steps * options["shuffle_probability"] * 3 * 2 / 3 * (240 + 328 / 2)
    assert sum(moved) == pytest.approx(expected, rel=0.03)


def test_averagings_follow_the_last_shuffle_and_the_last_step_is_one():
    steps = 40
    members = members_of()
    mixer = _then_mean(members, Arguments(steps), None)
    averaged = [step for step in range(1, steps + 1) if mixer.mix(step).averaged]
    assert averaged == [32, 34, 36, 38, 40]
    for steps in (700, 750, 3000):
        mixer = _then_mean(members_of(), Arguments(steps), None)
        averaged = [step for step in range(1, steps + 1) if mixer.mix(step).averaged]
        assert len(averaged) == 7 and averaged[0] > 0.75 * steps and averaged[-1] == steps


def test_the_study_runs_them_beside_wash(tmp_path, capsys, monkeypatch):
    preset = PRESETS["glyphs-short"].but(batch_size=8, batch_norm_batches=2, max_train_samples=80, max_eval_samples=20)
    monkeypatch.setitem(PRESETS, "glyphs-short", preset)
    arguments = ["--studies", "beyond", "--seeds", "1", "--max_steps", "4", "--jobs", "2"]
    assert study.main([*arguments, "--population_size", "2", "--output_dir", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [cell["method"] for cell in kept["cells"]] == ["wash", *VARIANTS]
    by_method = {cell["method"]: cell for cell in kept["cells"]}
    # The same members, and another averaged model.
    wash, ema = by_method["wash"], by_method["wash_ema"]
    assert ema["accuracy"]["members"] == wash["accuracy"]["members"] and ema["ema_span"] in (0.01, 0.05, 0.2)
    assert ema["digest"] != wash["digest"] and ema["consensus_distance"] == wash["consensus_distance"]
    assert by_method["wash_then_mean"]["consensus_distance"] < 1e-5 < wash["consensus_distance"]
    said = capsys.readouterr().out
    assert all(variant.title in said for variant in VARIANTS.values())
    assert set(ALL) - set(VARIANTS) == set(METHODS)
