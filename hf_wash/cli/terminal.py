"""What commands share of the terminal: what they print, and libraries that keep quiet."""

import logging
import sys
from typing import TextIO

from ..sentences import printable


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a result, or to `file`; also where the terminal has no such letters."""
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=file)


def note(text: str) -> None:
    """Says something beside the result."""
    say(f"hf-wash: {' '.join(text.split())}", sys.stderr)


class Remarks(logging.Handler):
    """Says warnings as [`note`] does."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def no_bars_in_files() -> None:
    """No progress bars of the Hub where nobody watches them move."""
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def quiet() -> None:
    """What loading has to say of itself is not what the user asked about."""
    import transformers

    no_bars_in_files()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
