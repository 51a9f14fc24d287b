"""
Writing a card's generated part and metadata into a card that is there already, without touching what is not ours.

huggingface_hub's `ModelCard` writes all metadata of a card anew. Here comments, order and line ends stay as somebody
wrote them: only lines that are ours are replaced. Needs neither torch nor transformers.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData


CARD = "README.md"

_FRONT_MATTER = re.compile(r"\A(\ufeff?\s*---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
_OPENED = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n")
_BEGIN = re.compile(r"<!-- hf-wash:begin (\{.*?\}) [^>]*-->")
_END = "<!-- hf-wash:end -->"


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
    text = existing if existing and existing.strip() else ""
    newline = "\r\n" if "\r\n" in text else "\n"
    begin, end = _generated(text)
    if begin is not None and end < 0:
        return text, [f"it is left as it is, since the mark `{_END}` that ended its generated part is gone."]
    try:
        ours = json.loads(begin.group(1)) if begin else {}
    except (ValueError, RecursionError):
        ours = {}

    problem = _front_matter_problem(text)
    if problem is None:
        merged, added = _merge_front_matter(text, metadata, ours, newline)
        if _front_matter_problem(merged) is None:
            text, ours = merged, added
        else:  # such as names and values in braces, after which no line can be added
            problem = "its front matter is not written with a name in each line."
    problems = [] if problem is None else [f"{problem} The front matter is kept as it is, and no metadata was added."]
    mark = f"<!-- hf-wash:begin {json.dumps(ours)} What stands between these marks is written anew with the card. -->"
    block = f"{mark}\n{body}{_END}".replace("\n", newline)
    begin, end = _generated(text)
    if begin is not None:
        return text[: begin.start()] + block + text[end:], problems
    if existing and existing.strip():
        text += newline if text.endswith(("\n", "\r")) else 2 * newline
    return f"{text}{block}{newline}", problems


def _generated(text: str) -> tuple[re.Match | None, int]:
    """The mark at which a text's generated part begins, and where that part ends; -1 if the other mark is gone."""
    begin = _BEGIN.search(text)
    end = -1 if begin is None else text.find(_END, begin.end())
    return begin, end if end < 0 else end + len(_END)


def front_matter_problem(path: str | Path) -> str | None:
    """What is wrong with the front matter of the card at `path`, in a sentence; `None` if nothing is."""
    try:
        return _front_matter_problem(Path(path).read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 text ({error.reason})."


def _front_matter_problem(text: str) -> str | None:
    match = _FRONT_MATTER.match(text)
    if match is None:
        return "its front matter begins with `---` and never ends." if _OPENED.match(text) else None
    try:
        content = yaml.safe_load(match.group(2))
    except Exception as error:  # an impossible date, a list in a list in a list: not all are YAML's own
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
    match = _FRONT_MATTER.match(text)
    opening, content, closing = match.groups() if match else (f"---{newline}", "", f"---{newline}{newline}")
    values = yaml.safe_load(content) or {}
    still_ours = {key for key, digest in before.items() if key in values and _digest(values[key]) == digest}
    if still_ours:
        # Line by line, so that the rest stays as it was written, comments and order included.
        lines = content.splitlines(keepends=True)
        keys = [(node.value, node.start_mark.line) for node, _ in yaml.compose(content, Loader=yaml.SafeLoader).value]
        ends = [line for _, line in keys[1:]] + [len(lines)]
        removed = {
            line
            for (key, start), end in zip(keys, ends, strict=True)
            for line in range(start, end)
            if key in still_ours and not lines[line].lstrip().startswith("#")
        }
        content = "".join(line for number, line in enumerate(lines) if number not in removed)
    added = {key: value for key, value in metadata.items() if key in still_ours or key not in values}
    if "base_model_relation" in added and "base_model" not in added:
        del added["base_model_relation"]  # of the base model that somebody else named, we know nothing
    if content and not content.endswith("\n"):
        content += newline
    if added:
        content += CardData(**added).to_yaml(line_break=newline) + newline
    rest = text[match.end() :] if match else text
    return opening + content + closing + rest, {key: _digest(value) for key, value in added.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def own_text(text: str) -> str:
    """A card's text without its front matter and without the part that is generated."""
    own, rest = "", _FRONT_MATTER.sub("", text)
    while True:
        begin, end = _generated(rest)
        if begin is None or end < 0:
            return own + rest
        own, rest = own + rest[: begin.start()], rest[end:]


def has_title(text: str) -> bool:
    """Whether a text has a heading of the first level."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.search(r"^(# |<h1)|^[^\n]+\n===+\s*$", without_code, flags=re.MULTILINE) is not None
