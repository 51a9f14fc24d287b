"""Hostile manifests: each key left out, of another type, out of range; text that is none; and digests that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability.damage import automatically, explicitly, resume_from, situation
from reliability.harness import Act, warned
from reliability.tiny import edit_json


NAME = "population.json"
KEYS = (
    "run", "step", "total_steps", "epoch", "position", "population_size", "seed", "probability", "options", "overrides",
    "values_moved", "bytes_exchanged", "log_window", "architecture", "members", "files",
)  # fmt: skip
VALUES: dict[str, Any] = {
    "null": None, "a text": "four", "a list": [[]], "a dictionary": {"a": {}}, "negative": -1, "a truth": True,
    "NaN": float("nan"), "huge": 10**30, "a text with NUL": "a\0b", "half a character": "\ud800",
}  # fmt: skip
# What a key may well be.
RIGHT = {("run", "a text")}


def sealed_with(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """A manifest that was changed by somebody who knows how it is sealed."""

    def harm(folder):
        from hf_wash.trainer.manifest import seal

        def agree(manifest):
            given = change(manifest)
            try:
                return seal(manifest if given is None else given)
            except UnicodeEncodeError:  # half a character has no digest
                return given

        edit_json(folder / NAME, agree)

    return harm


def _without(key):
    return lambda manifest: manifest.pop(key) is None or None


def _set(key, value):
    return lambda manifest: manifest.update({key: value})


def _in(key, **values):
    return lambda manifest: manifest[key].update(values)


def _file(name: str, record=None) -> Callable[[dict], Any]:
    return _in("files", **{name: record if record is not None else {"size": 1, "sha256": "0" * 64}})


SENTENCES: dict[str, tuple[Callable[[dict], Any], list[str]]] = {
    "a population of 0": (_set("population_size", 0), ["population_size"]),
    "a population of 10⁹": (_set("population_size", 10**9), ["population"]),
    "a population of another size": (_set("population_size", 4), ["population"]),
    "a population of 2.0": (_set("population_size", 2.0), ["population_size"]),
    "a step that it is not": (_set("step", 2), ["step"]),
    "fewer steps in all than were taken": (_set("total_steps", 1), ["step"]),
    "a probability above 1": (_set("probability", 1.5), ["probability"]),
    "another seed": (_set("seed", 99), ["seed"]),
    "training data of -1 examples": (_set("training_data", {"count": -1, "digests": {}}), ["training_data"]),
    "training data that is a text": (_set("training_data", "images"), ["training_data"]),
    "no members": (_set("members", []), ["members"]),
    "a member twice": (_set("members", [0, 0]), ["members"]),
    "a member that is not there": (_set("members", [0, 7]), ["members"]),
    "members that are texts": (_set("members", ["0", "1"]), ["members"]),
    "no files": (_set("files", {}), ["does not list"]),
    "a file outside": (_file("../checkpoint-2/model.safetensors"), ["outside"]),
    "a file of the root": (_file("/etc/passwd"), ["outside"]),
    "a file with NUL": (_file("a\0b"), ["file"]),
    "a file without a name": (_file(""), ["file"]),
    "a file that is a folder": (_file("member_0"), ["member_0"]),
    "a size that is a text": (_file("config.json", {"size": "9", "sha256": "0" * 64}), ["files"]),
    "a size that is negative": (_file("config.json", {"size": -9, "sha256": "0" * 64}), ["files"]),
    "a digest that is none": (_file("config.json", {"size": 9, "sha256": "?"}), ["files"]),
    "a record that is a list": (_file("config.json", [1]), ["files"]),
    "an option that nobody knows": (_in("options", speed=3), ["speed"]),
    "an architecture of nothing": (_set("architecture", []), ["architecture"]),
    "an architecture of another shape": (
        lambda manifest: manifest["architecture"][0][1].append(7), ["architecture"],
    ),
    "an architecture with a short line": (lambda manifest: manifest["architecture"][0].pop() is None or None, ["architecture"]),
    "an architecture with another name": (
        lambda manifest: manifest["architecture"][0].__setitem__(0, "vit.\0"), ["architecture"],
    ),
    "overrides of one member": (_set("overrides", [{}]), ["population"]),
    "a log window without its step": (_set("log_window", {"moved": [0, 0, 0]}), ["log_window"]),
    "a log window of two numbers": (_set("log_window", {"since": 4, "moved": [0, 0]}), ["log_window"]),
    "a log window of texts": (_set("log_window", {"since": 4, "moved": ["0", "0", "0"]}), ["log_window"]),
}  # fmt: skip
# What this run does otherwise is told, whatever it was before.
TOLD = {"an option of another type": ("mixing", [3]), "an option out of range": ("shuffle_interval", 0)}


def _text(change: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    def harm(folder):
        given = change((folder / NAME).read_text())
        (folder / NAME).write_bytes(given if isinstance(given, bytes) else given.encode())

    return harm


TEXTS: dict[str, Callable[[str], str | bytes]] = {
    "no JSON": lambda text: "{",
    "null": lambda text: "null",
    "a number": lambda text: "3",
    "a text": lambda text: '"population"',
    "an empty list": lambda text: "[]",
    "an empty dictionary": lambda text: "{}",
    "bytes": lambda text: b"\xff\xfe\x00\x01",
    "another encoding": lambda text: text.encode("utf-16"),
    "a mark of bytes before it": lambda text: "\ufeff" + text,
    "zeros": lambda text: b"\0" * len(text),
    "twice": lambda text: text + text,
    "more behind it": lambda text: text + "}",
    "a comment before it": lambda text: "// " + text,
    "deep nesting of lists": lambda text: "[" * 100_000 + "]" * 100_000,
    "deep nesting inside": lambda text: text.replace(
        '"options": {', '"options": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + ', "x": {', 1
    ),
    "100 MB of blanks": lambda text: text + " " * 100_000_000,
    "a number of a million digits": lambda text: text.replace('"epoch": ', '"epoch": ' + "9" * 1_000_000, 1),
    "another format": lambda text: text.replace('"format": ', '"format": 9', 1),
}


def _digit(number: int) -> Callable[[str], str]:
    """One digit of the text altered; they are counted through it evenly."""

    def change(text):
        places = [index for index, character in enumerate(text) if character.isdigit()]
        place = places[int(number / DIGITS * len(places))]
        return text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]

    return change


DIGITS = 20


def _unsealed(change) -> Callable[[Path], None]:
    """A change by somebody who does not know that it is sealed."""

    def harm(folder):
        edit_json(folder / NAME, change)

    return harm


UNSEALED = {
    "another epoch": _set("epoch", 7), "another position": _set("position", 1), "another p": _set("probability", 0.25),
    "more values moved": _set("values_moved", 5), "another run": _set("run", "mine"), "no digest": _without("digest"),
    "a digest that is null": _set("digest", None), "a digest that is empty": _set("digest", ""),
    "an unknown key": _set("note", "mine"),
}  # fmt: skip

AUTOMATICALLY: dict[str, Callable[[Path], None]] = {
    "no JSON": _text(TEXTS["no JSON"]),
    "deep nesting": _text(TEXTS["deep nesting of lists"]),
    "another encoding": _text(TEXTS["another encoding"]),
    "a population of 10⁹": sealed_with(_set("population_size", 10**9)),
    "a population of 0": sealed_with(_set("population_size", 0)),
    "a size that is a text": sealed_with(_set("population_size", "2")),
    "a file outside": sealed_with(_file("../../escape")),
    "an option that nobody knows": sealed_with(_in("options", speed=3)),
    "no files": sealed_with(_without("files")),
    "files with NUL": sealed_with(_file("a\0b")),
    "half a character": sealed_with(_set("run", "\ud800")),
    "another epoch": _unsealed(_set("epoch", 7)),
    "no architecture": sealed_with(_without("architecture")),
}


def _named(key: str, what: str) -> str:
    """What the error names: half a character cannot be read at all."""
    return NAME if what == "half a character" else "option" if key == "options" else key


def _told(option: str, value: Any) -> Act:
    harm = sealed_with(_in("options", **{option: value}))
    return Act(lambda place: resume_from(place, harm, "explicit"), warned(f"{option} was {value!r}"))


KIND = "hostile manifests"
SITUATIONS = [
    *(situation(KIND, f"without `{key}`", explicitly(sealed_with(_without(key)), key)) for key in KEYS),
    *(
        situation(KIND, f"`{key}` is {what}", explicitly(sealed_with(_set(key, value)), _named(key, what)),
                  slow=what not in ("null", "a text", "negative"))
        for key in KEYS
        for what, value in VALUES.items()
        if (key, what) not in RIGHT
    ),
    *(situation(KIND, name, explicitly(sealed_with(change), *says)) for name, (change, says) in SENTENCES.items()),
    *(situation(KIND, name, _told(option, value)) for name, (option, value) in TOLD.items()
    ),
    *(situation(KIND, f"its text is {name}", explicitly(_text(change), NAME)) for name, change in TEXTS.items()),
    *(situation(KIND, f"not sealed anew, {name}", explicitly(_unsealed(change), "digest")) for name, change in UNSEALED.items()),
    *(
        situation(KIND, f"the digit at {number} of {DIGITS} of its text is another", explicitly(_text(_digit(number)), NAME), slow=number % 4 > 0)
        for number in range(DIGITS)
    ),
    *(situation(KIND, f"`auto`: {name}", automatically(harm)) for name, harm in AUTOMATICALLY.items()),
]  # fmt: skip
