"""The README and the quick start: what they show runs, and their tables are the same."""

import re
from pathlib import Path

import torch
from small_population import TEST, Digits, started

from hf_wash.hub import load_members


ROOT = Path(__file__).parents[2]
README, QUICK_START = ((ROOT / name).read_text() for name in ("README.md", "docs/quick_start.md"))


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def trained(snippet, tmp_path, monkeypatch):
    """What a snippet on the Trainer leaves, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    names = {"model": started(), "train_dataset": Digits(0, 16), "eval_dataset": TEST}
    exec(compile(snippet, "a snippet", "exec"), names)
    return names


def test_three_lines_train_a_soup(tmp_path, monkeypatch):
    (snippet,) = snippets(README)
    soup = trained(snippet, tmp_path, monkeypatch)["trainer"].model
    loaded = type(soup).from_pretrained(tmp_path / "my-soup").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in soup.state_dict().items())


def test_the_quick_start_saves_soup_and_members_and_its_soup_loads(tmp_path, monkeypatch):
    loading, training, _ = snippets(QUICK_START)
    names = trained(training, tmp_path, monkeypatch)
    assert len(load_members(tmp_path / "my-soup")) == 4
    names["trainer"].save_model("outputs/vit")
    exec(loading, names)
    assert type(names["model"]) is type(names["trainer"].model)


def test_the_loop_of_the_quick_start_mixes_members():
    members = [torch.nn.Linear(10, 2) for _ in range(3)]
    names = {
        "members": members,
        "optimizers": [torch.optim.SGD(member.parameters(), lr=0.1) for member in members],
        "loader": [[torch.randn(8, 10) for _ in members] for _ in range(5)],
        "loss": lambda member, batch: member(batch).square().mean(),
    }
    exec(snippets(QUICK_START)[2], names)
    weights = torch.stack([member.weight.detach() for member in members])
    torch.testing.assert_close(names["soup_weights"]["weight"], weights.mean(0))


def test_the_two_pages_show_one_table():
    (table,) = re.findall(r"```\n(360.*?)```", README, re.DOTALL)
    assert f"```\n{table}```" in QUICK_START
