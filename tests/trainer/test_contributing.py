"""The page on contributing: the mixer that it adds, step by step, runs in a loop and in the Trainer."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from small_peers import by_hand, tiny_trainer

from hf_wash import config, methods
from hf_wash.trainer import mixing_run


PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
MIXER, LOOP, ENTRY, MAKING = map(
    textwrap.dedent, re.findall(r"^ *```python\n(.*?)^ *```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
)


@pytest.fixture
def names():
    """What the first snippet defines."""
    names = {"__name__": "contributing"}
    exec(compile(MIXER, f"{PAGE.name}, the mixer", "exec"), names)
    return names


def test_the_mixer_pulls_members_at_its_interval_and_no_other_step(names):
    exec(compile(LOOP, f"{PAGE.name}, the loop", "exec"), names)
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


def test_with_an_entry_and_a_line_it_is_a_method_of_the_trainer(names, monkeypatch, tmp_path):
    exec(ENTRY, {"Method": methods.Method}, names)
    monkeypatch.setitem(methods.METHODS, "pull", names["pull"])
    monkeypatch.setattr(config, "MIXINGS", tuple(methods.METHODS))
    body = f"def line(args, wholes, times, rate):\n{textwrap.indent(MAKING, '    ')}"
    exec(compile(body, f"{PAGE.name}, the line of make_mixer", "exec"), names)
    monkeypatch.setattr(
        mixing_run,
        "make_mixer",
        lambda args, wholes, optimizer, probability, seed, times: names["line"](
            args, wholes, times, args.used_average_rate
        ),
    )

    def exchange(step, weights, buffers, rate):
        if step % 6 == 0:
            mean = sum(weights) / len(weights)
            for own in weights:
                own.lerp_(mean, 0.5)

    trainer = tiny_trainer(tmp_path, "pull", average_interval=6)
    trainer.train()
    for member, expected in zip(trainer.population.members, by_hand(exchange)[0], strict=True):
        torch.testing.assert_close(member.weight.detach(), expected, rtol=2e-6, atol=2e-7)
    with pytest.raises(ValueError, match="shuffle_probability"):
        tiny_trainer(tmp_path / "refused", "pull", average_interval=6, shuffle_probability=0.1)
