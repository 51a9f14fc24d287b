"""What commands share of the terminal: remarks on stderr, long values cut, and libraries that keep quiet."""

import sys
from typing import Any


def note(text: str) -> None:
    """Says something beside the result."""
    print(f"hf-wash: {text}", file=sys.stderr)


def shortened(value: Any) -> str:
    """A value as it can stand in a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


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
