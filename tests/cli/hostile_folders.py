"""What others may leave in a folder, as changes of folders that are right, and a command that is run on these."""

import json
import os
import stat

import pytest
from safetensors.torch import load_file, save_file

from hf_wash.cli import main


SOUP = "soup {a} {b} --out {out}"
SOUP_EVAL = "soup {a} {b} --eval-data {photos} --out {out}"
ADAPTERS = "soup {adapter_a} {adapter_b} --out {out}"
TIMM = "soup {timm_a} {timm_b} --out {out}"
ESCAPES = "\x1b[31mred\x1b]0;title\x07\r\n\u202ebackwards\x9b2J"


def fifo(*path):
    def put(place):
        file = place.joinpath(*path)
        file.unlink(missing_ok=True)
        os.mkfifo(file)

    return put


def folder(*path):
    def put(place):
        place.joinpath(*path).unlink(missing_ok=True)
        place.joinpath(*path).mkdir()

    return put


def device(*path):
    """A link to a device that never ends."""
    return link("/dev/zero", *path)


def link(target, *path):
    def put(place):
        place.joinpath(*path).unlink(missing_ok=True)
        place.joinpath(*path).symlink_to(target)

    return put


def content(content, *path):
    def put(place):
        place.joinpath(*path).parent.mkdir(parents=True, exist_ok=True)
        place.joinpath(*path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return put


def removed(*path):
    return lambda place: place.joinpath(*path).unlink()


def fields(*path, **changes):
    """Some fields of a file of JSON; a dictionary changes what is inside of the field."""

    def put(place):
        file = place.joinpath(*path)
        known = json.loads(file.read_text()) if file.exists() else {}
        for name, value in changes.items():
            inner = isinstance(value, dict) and isinstance(known.get(name), dict)
            known[name] = {**known[name], **value} if inner else value
        file.write_text(json.dumps(known))

    return put


def each(*changes):
    def put(place):
        for change in changes:
            change(place)

    return put


def both(change, *names, **changes):
    """The same in both models, so that they do not differ."""
    return each(*(change(name, *names, **changes) for name in "ab"))


def index(weight_map):
    """An index of shards in the place of the first model's weights, which lie outside of it."""

    def put(place):
        os.rename(place / "a" / "model.safetensors", place / "weights.safetensors")
        text = json.dumps({"metadata": {}, "weight_map": weight_map(place)})
        (place / "a" / "model.safetensors.index.json").write_text(text)

    return put


def weights(change):
    def put(place):
        for name in "ab":
            file = place / name / "model.safetensors"
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, metadata={"format": "pt"})

    return put


def header(text, size=None):
    """Weights whose header is this."""
    data = text.encode()
    return content((len(data) if size is None else size).to_bytes(8, "little") + data, "a", "model.safetensors")


DEEP = "[" * 100_000 + "]" * 100_000


def cased(cases):
    return pytest.mark.parametrize(("command", "change", "expected"), [pytest.param(*c[1:], id=c[0]) for c in cases])


def everything_in(place):
    """Each path with its kind and, of a file, what it holds."""
    found = {}
    for path in place.rglob("*"):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        is_file = stat.S_ISREG(status.st_mode)
        found[path.relative_to(place)] = (
            kind, status.st_mtime_ns if is_file else 0, path.read_bytes() if is_file else None
        )  # fmt: skip
    return found


def run_command(command, place):
    words = command.split() if isinstance(command, str) else command
    known = {path.name: path for path in place.iterdir()} | {"place": place, "out": place / "out"}
    try:
        main([word.format(**known) for word in words])
    except SystemExit as ended:
        return ended.code or 0
    return 0


def is_clean(text):
    return all(line.isprintable() for line in text.splitlines())
