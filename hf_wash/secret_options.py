"""Which options are secrets, and options without them: what a run writes and uploads holds none."""

import re
from typing import Any


_SECRET = re.compile(r"(.*_)?(token|password|secret|credentials?|(api|access|private|secret)_?key)", re.IGNORECASE)
# Pieces of text that stand for something, as tokenizers have them.
_TOKEN_OF_TEXT = re.compile(
    r"(additional_special|audio|bos|cls|end|eos|image|mask|pad|sep|special|start|stop|unk|video)_token", re.IGNORECASE
)


def is_secret(name: Any, value: Any) -> bool:
    """Whether an option, or an entry of one, is a token, a password or a key that somebody could use."""
    if not (isinstance(name, str) and isinstance(value, str) and value):
        return False
    hidden_already = re.fullmatch("<[A-Z_]+>", value)  # as the Trainer's arguments have it
    return bool(_SECRET.fullmatch(name)) and not _TOKEN_OF_TEXT.fullmatch(name) and not hidden_already


def without_secrets(value: Any) -> Any:
    """
    A value of an option, or a dictionary of options, with `None` in the place of each secret in it.

    Dictionaries, lists and tuples that hold one are copied; everything else is the same object.
    """
    if type(value) is dict:
        kept = {name: None if is_secret(name, item) else without_secrets(item) for name, item in value.items()}
        return kept if any(kept[name] is not item for name, item in value.items()) else value
    if type(value) in (list, tuple):
        items = [without_secrets(item) for item in value]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value
