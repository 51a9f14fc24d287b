"""
The commands put together, and what their words and messages are.

A user's mistake is one line on stderr and exit code 2; a mistake of ours is one line and exit code 1.
"""

import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ..sentences import first_line
from .card import card
from .inspect import inspect
from .push import push
from .report import report
from .soup import soup
from .terminal import Remarks, note


# Letters of a message; a name can have more.
_LONGEST = 2000

app = typer.Typer(
    name="hf-wash",
    help="Soups of models, and population runs: make, inspect, describe and push them.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command in (soup, push, card, inspect, report):
    app.command()(_command)


def main(arguments: list[str] | None = None) -> None:
    """The entry point of `hf-wash`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, handlers=[Remarks()])
    try:
        with warnings.catch_warnings():
            # What libraries have to say of a folder is for who wrote it.
            warnings.simplefilter("ignore", UserWarning)
            code = app(arguments or ["--help"], standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own, about the words of the command
            reason = error.format_message()
        elif isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
            reason = str(error) or type(error).__name__
        else:
            note(f"error: {first_line(error)} ({_place_of(error)}). That is a defect of hf-wash: please report it.")
            sys.exit(1)
        note(f"error: {reason if len(reason) <= _LONGEST else reason[: _LONGEST - 1] + '…'}")
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _place_of(error: Exception) -> str:
    """Where in this package something was not thought of."""
    package = Path(__file__).parents[1]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(package):
            return f"{Path(frame.filename).relative_to(package).as_posix()}, line {frame.lineno}"
    return "nowhere in it"


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
