"""Commands in the documentation name scripts, sub-commands, targets and flags that there are."""

import argparse
import functools
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from hf_wash.cli.app import app


ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"^(?:\w+=\S+ )*(?:python|torchrun|accelerate|hf-wash|make|pytest|pip)\b")


def commands_of(text: str) -> list[str]:
    """The lines of a page's blocks that are commands, without comments and without the bars of diagrams."""
    blocks = BLOCK.findall(text.replace("\\\n", " "))
    lines = [line for language, block in blocks if language in ("", "bash") for line in block.splitlines()]
    return [line.partition(" #")[0].strip() for line in lines if PROGRAM.match(line)]


@functools.cache
def flags_of(script: str) -> set[str]:
    """The flags that a script's parser has."""
    found: set[str] = set()

    def print_help(parser, file=None):
        found.update(option for action in parser._actions for option in action.option_strings)

    # Here, where everything is imported already; what a script does to make its imports work must not stay.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "print_help", print_help)
        patch.setattr(sys, "argv", [script, "--help"])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        patch.setattr(os, "environ", os.environ.copy())
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code
    return found


def problems_of(command: str) -> list[str]:
    """What a command names that there is not."""
    words = shlex.split(command.replace("[", "").replace("]", ""))
    found = [word for word in words if re.fullmatch(r"(?:examples|tests|docs)/\S+\.(?:py|yaml)", word)]
    missing = [f"there is no {path}" for path in found if not (ROOT / path).exists()]
    scripts = [path for path in found if path.endswith(".py") and path.startswith(("examples", "tests"))]
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    if scripts and not missing:
        # What stands before the script is the launcher's.
        after = words[words.index(scripts[0]) + 1 :]
        given = {word.partition("=")[0] for word in after if word.startswith("--")}
        return [f"{scripts[0]} knows no {flag}" for flag in sorted(given - flags_of(scripts[0]))]
    if words[0] == "hf-wash" or words[:3] == ["python", "-m", "hf_wash"]:
        name = words[1] if words[0] == "hf-wash" else words[3]
        known = get_command(app).commands
        if name not in known:
            return [f"hf-wash has no {name}"]
        options = {flag for parameter in known[name].params for flag in [*parameter.opts, *parameter.secondary_opts]}
        return [f"hf-wash {name} knows no {flag}" for flag in sorted(given - options - {"--help"})]
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return [f"make has no {word}" for word in words[1:] if "=" not in word and word not in targets]
    return missing


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of((ROOT / page).read_text())])
def test_commands_name_what_there_is(page):
    commands = commands_of((ROOT / page).read_text())
    assert [problem for command in commands for problem in problems_of(command)] == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("torchrun --nproc-per-node 2 examples/train_vit.py --populaton_size 4", "knows no --populaton_size"),
        ("python examples/benchmarks/report_contrast.py a b --mixing wash", "knows no --mixing"),  # of its docstring
        ("python examples/train_vitt.py", "there is no examples/train_vitt.py"),
        ("hf-wash soop run --out soup", "hf-wash has no soop"),
        ("hf-wash soup run --ouut soup", "hf-wash soup knows no --ouut"),
        ("make trane", "make has no trane"),
    ],
)
def test_what_there_is_not_is_noticed(command, problem):
    (found,) = problems_of(command)
    assert problem in found


def test_commands_are_found():
    text = "```bash\nmake train  # this\nOMP_NUM_THREADS=1 torchrun \\\n  a.py --b\n```\n```python\nmake = 1\n```\n"
    assert commands_of(text) == ["make train", "OMP_NUM_THREADS=1 torchrun    a.py --b"]
    assert sum(len(commands_of((ROOT / page).read_text())) for page in PAGES) > 50
