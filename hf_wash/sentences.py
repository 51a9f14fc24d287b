"""Values and other libraries' errors as they can stand in a sentence, and sentences as a terminal can show them."""

from typing import Any


def shortened(value: Any) -> str:
    """A value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's library says, and which it is."""
    text = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:299] + '…'}".removesuffix(": ")


def printable(text: str) -> str:
    """A text that a terminal shows and does not obey: what is not printable is spelt out, but for ends of lines."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )
