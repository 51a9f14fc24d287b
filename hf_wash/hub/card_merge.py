"""
Writing a card's generated part and metadata into a card that is there already, without touching what is not ours.

Needs neither torch nor transformers.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


CARD = "README.md"

_FRONT_MATTER = re.compile(r"\A(\ufeff?\s*---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
_OPENED = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n")
_BEGIN = re.compile(r"<!-- hf-wash:begin (\{.*?\}) [^>]*-->")
_END = "<!-- hf-wash:end -->"
_BLOCK = re.compile(_BEGIN.pattern + r".*?" + re.escape(_END), re.DOTALL)


def merge_card(existing: str | None, metadata: Mapping[str, Any], body: str) -> tuple[str, list[str]]:
    """
    Puts generated text and metadata into a card without touching what is not ours.

    The generated text stands between two marks; where they are not there yet, it goes to the end. Metadata are added
    where the card has none of that name. Those that were added before are recognized, by a digest kept in the mark,
    and brought up to date unless somebody has changed them since.

    Args:
        existing (`str`, *optional*):
            The card so far.
        metadata (`Mapping[str, Any]`):
            What the front matter should say.
        body (`str`):
            The generated text.

    Returns:
        `tuple[str, list[str]]`: the new card, and what could not be done, in sentences.
    """
    if existing is None or not existing.strip():
        front = _dump(metadata)
        return f"---\n{front}---\n\n{_block(_digests(metadata), body)}\n", []
    newline = "\r\n" if "\r\n" in existing else "\n"
    problems = []
    begin = _BEGIN.search(existing)
    if begin is not None and _BLOCK.search(existing) is None:
        return existing, [f"it is left as it is, since the mark `{_END}` that ended its generated part is gone."]
    try:
        before = json.loads(begin.group(1)) if begin else {}
    except ValueError:
        before = {}

    problem = _front_matter_problem(existing)
    ours = dict(before)
    text = existing
    if problem is not None:
        problems.append(f"{problem} The front matter is kept as it is, and no metadata was added.")
    else:
        text, ours = _merge_front_matter(existing, metadata, before, newline)
    block = _block(ours, body).replace("\n", newline)
    if begin is not None:
        # A function, since a backslash in a replacement string has a meaning.
        return _BLOCK.sub(lambda _: block, text, count=1), problems
    separator = newline if text.endswith(("\n", "\r")) else 2 * newline
    return f"{text}{separator}{block}{newline}", problems


def front_matter_problem(path: str | Path) -> str | None:
    """
    What is wrong with the front matter of a card, in a sentence; `None` if nothing is.

    Args:
        path (`str` or `Path`):
            The card.
    """
    try:
        return _front_matter_problem(Path(path).read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 text ({error.reason})."


def front_matter(path: str | Path) -> dict[str, Any]:
    """
    The metadata of a card; empty where there are none, or none that can be read.

    Args:
        path (`str` or `Path`):
            The card.
    """
    import yaml

    if front_matter_problem(path) is not None:
        return {}
    match = _FRONT_MATTER.match(Path(path).read_text(encoding="utf-8"))
    return (yaml.safe_load(match.group(2)) or {}) if match else {}


def _front_matter_problem(text: str) -> str | None:
    import yaml

    match = _FRONT_MATTER.match(text)
    if match is None:
        return "its front matter begins with `---` and never ends." if _OPENED.match(text) else None
    try:
        content = yaml.safe_load(match.group(2))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # The line in the file: the first one is `---`.
        line = f" in line {mark.line + 1 + match.group(1).count(chr(10))}" if mark is not None else ""
        return f"its front matter is not valid YAML{line} ({getattr(error, 'problem', None) or error})."
    if content is not None and not isinstance(content, dict):
        return f"its front matter is a {type(content).__name__} where names and values are expected."
    return None


def _merge_front_matter(
    text: str, metadata: Mapping[str, Any], before: Mapping[str, str], newline: str
) -> tuple[str, dict[str, str]]:
    """The text with its front matter completed, and digests of what in it is ours."""
    import yaml

    match = _FRONT_MATTER.match(text)
    if match is None:
        front = _dump(metadata).replace("\n", newline)
        return f"---{newline}{front}---{newline}{newline}{text}", _digests(metadata)
    opening, content, closing = match.groups()
    values = yaml.safe_load(content) or {}
    still_ours = {key for key, digest in before.items() if key in values and _digest(values[key]) == digest}
    if still_ours:
        # Line by line, so that the rest stays as it was written, comments and order included.
        lines = content.splitlines(keepends=True)
        keys = [(node.value, node.start_mark.line) for node, _ in yaml.compose(content, Loader=yaml.SafeLoader).value]
        ends = [line for _, line in keys[1:]] + [len(lines)]
        removed = set()
        for (key, start), end in zip(keys, ends, strict=True):
            if key in still_ours:
                removed |= {line for line in range(start, end) if not lines[line].lstrip().startswith("#")}
        content = "".join(line for number, line in enumerate(lines) if number not in removed)
        values = {key: value for key, value in values.items() if key not in still_ours}
    added = {key: value for key, value in metadata.items() if key not in values}
    if "base_model_relation" in added and "base_model" not in added:
        del added["base_model_relation"]  # of the base model that somebody else named, we know nothing
    if content and not content.endswith("\n"):
        content += newline
    content += _dump(added).replace("\n", newline) if added else ""
    return opening + content + closing + text[match.end() :], _digests(added)


def _dump(metadata: Mapping[str, Any]) -> str:
    import yaml

    if not metadata:
        return ""
    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=10_000)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _digests(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {key: _digest(value) for key, value in metadata.items()}


def _block(digests: Mapping[str, str], body: str) -> str:
    note = f"<!-- hf-wash:begin {json.dumps(dict(digests))} What stands between these marks is written anew with the card. -->"
    return f"{note}\n{body}{_END}"


def own_text(text: str) -> str:
    """A card's text without its front matter and without the part that is generated."""
    match = _FRONT_MATTER.match(text)
    return _BLOCK.sub("", text[match.end() :] if match else text)


def has_title(text: str) -> bool:
    """Whether a text has a heading of the first level."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.search(r"^(# |<h1)|^[^\n]+\n===+\s*$", without_code, flags=re.MULTILINE) is not None
