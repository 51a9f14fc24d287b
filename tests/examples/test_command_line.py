"""`examples/command_line.py`: what a person reads of the examples' flags, and of a run that is interrupted."""

import dataclasses
import signal
import sys
from types import SimpleNamespace

import command_line
import pytest
from transformers import TrainingArguments

from hf_wash import PopulationArguments, WashConfig
from hf_wash.trainer.run_folder import MadeFolders


@pytest.fixture(scope="module")
def parser():
    return command_line.CommandLine([WashConfig], "A script.\n\nMore.")


def test_each_flag_stands_in_one_group(parser):
    shown = [action for group in parser._action_groups for action in group._group_actions]
    assert sorted(map(id, shown)) == sorted(map(id, parser._actions))
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    # The name that transformers took after 5.17.
    assert set(command_line.TRAINING) - names <= {"activation_checkpointing"}
    assert set(command_line.SAVING) <= names | {field.name for field in dataclasses.fields(PopulationArguments)}


def test_what_turns_an_option_of_ours_off_says_what_comes_of_it(parser):
    help_of = {option: action.help for action in parser._actions for option in action.option_strings}
    on = {field.name for field in dataclasses.fields(PopulationArguments) if field.default is True}
    assert on == set(command_line.TURNED_OFF)
    for name in on:
        assert help_of[f"--no_{name}"] == f"Turns --{name} off: {command_line.TURNED_OFF[name]}"
    assert help_of["--no_dataloader_pin_memory"] == "Turns --dataloader_pin_memory off."
    assert "(default: False)" not in parser.format_help().split("--no_report")[1].split("--report_to")[0]


def stopped_at(step):
    flags = {"dry_run": False, "verify_checkpoint": None, "resume_from_checkpoint": None}
    args = SimpleNamespace(output_dir="run", **flags)
    return SimpleNamespace(args=args, state=SimpleNamespace(global_step=step, max_steps=10), _run="this")


@pytest.mark.parametrize(
    ("step", "runs", "said"),
    [
        (
            3,
            {},
            "interrupted at step 3 of 10: no checkpoint was saved (--save_strategy), so the run has to begin anew.",
        ),
        (3, {"another": ["x"]}, "the run has to begin anew."),
        (7, {"this": ["run/checkpoint-6", "run/checkpoint-4"]}, "with --resume_from_checkpoint run/checkpoint-6"),
        (
            10,
            {"this": ["run/checkpoint-10"]},
            "interrupted after the last step, 10, before all was saved: the same command goes on",
        ),
        (None, {}, "interrupted before training: nothing is lost."),
    ],
)
def test_an_interrupted_run_says_in_a_line_where_it_was_and_how_it_goes_on(monkeypatch, capsys, step, runs, said):
    monkeypatch.setattr(sys, "argv", ["examples/script.py"])
    monkeypatch.setattr(command_line, "runs_in", lambda folder: runs)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    @command_line.interruptible
    def main(run):
        run.trainer = None if step is None else stopped_at(step)
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("script.py: interrupted ") and said in told[0]
    # The others of a launch say nothing.
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == ""


def test_a_dry_run_leaves_no_folder_that_it_made(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    folder = tmp_path / "there" / "new" / "run"
    made = MadeFolders(folder)
    folder.mkdir(parents=True)
    ended = []
    trainer = SimpleNamespace(
        check=lambda: "the table",
        is_world_process_zero=lambda: True,
        accelerator=SimpleNamespace(end_training=lambda: ended.append(True)),
        _made_folders=made,
    )
    command_line.try_out(trainer)
    assert "the table" in capsys.readouterr().out and ended
    assert (tmp_path / "there").exists() and not any((tmp_path / "there").iterdir())


def test_a_report_that_is_there_is_named(tmp_path, capsys):
    command_line.name_report(str(tmp_path))
    assert capsys.readouterr().out == ""
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").touch()
    command_line.name_report(str(tmp_path))
    assert str(tmp_path / "report" / "index.html") in capsys.readouterr().out
