"""Whoever waits for files sees how far they are; what takes less than two seconds shows nothing."""

import pytest
from small_population import population

from hf_wash import progress


BARS = ("writing checkpoint-2", "loading the export back", "saving the members")


@pytest.mark.parametrize(
    ("patience", "disable_tqdm", "shown"), [(0, False, True), (0, True, False), (1000, False, False)]
)
def test_bars_appear_where_something_takes_long(tmp_path, monkeypatch, capsys, patience, disable_tqdm, shown):
    monkeypatch.setattr(progress, "PATIENCE", patience)
    trainer = population(tmp_path, size=3, max_steps=2, eval_strategy="no", save_strategy="steps", save_steps=2,
                         disable_tqdm=disable_tqdm)  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.save_members()
    printed = capsys.readouterr().err
    assert [name in printed for name in BARS] == [shown] * 3


def test_a_bar_counts_the_soup_and_each_member(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", 0)
    made = []

    def bar_of(*args, **kwargs):
        bar = progress.tqdm(desc=args[0], total=args[1], mininterval=0, leave=True)
        made.append(bar)
        return bar

    from hf_wash.trainer import checkpointing, mixin

    monkeypatch.setattr(checkpointing, "bar_of", bar_of)
    monkeypatch.setattr(mixin, "bar_of", bar_of)
    trainer = population(tmp_path, size=3, max_steps=2, eval_strategy="no", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_members()
    assert [(bar.desc, bar.n, bar.total) for bar in made] == [
        ("writing checkpoint-2", 4, 4),
        ("saving the members", 3, 3),
    ]
