"""Values and other libraries' errors as they can stand in a sentence, and sentences as a terminal can show them."""

import re
from typing import Any


# Those of the terminal, ends of lines that `\n` is not, what turns the direction of writing, and bytes of a file's name
# that were no UTF-8.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shortened(value: Any) -> str:
    """A value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's library says, and which it is."""
    text = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:299] + '…'}".removesuffix(": ")


def printable(text: str) -> str:
    """A text that a terminal or a page shows and does not obey: control characters but for ends of lines are spelt out."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def all_printable(value: Any) -> Any:
    """The same of every text in a value of JSON."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {all_printable(name): all_printable(each) for name, each in value.items()}
    return [all_printable(each) for each in value] if isinstance(value, list) else value
