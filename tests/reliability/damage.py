"""Checkpoints whose files are missing, cut, altered, or something else than files."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from reliability.harness import Act, Expected, Situation, prepared, refused, warned
from reliability.tiny import edit_json, resumed
from safetensors.torch import load_file, save_file


FILES = (
    "model.safetensors", "config.json", "trainer_state.json", "training_args.bin", "population.json",
    *(f"member_{index}/{name}" for index in (0, 1) for name in ("model.safetensors", "optimizer.pt", "streams.json")),
)  # fmt: skip


def _flip(part: float) -> Callable[[Path], None]:
    def damage(file):
        content = bytearray(file.read_bytes())
        content[min(int(part * len(content)), len(content) - 1)] ^= 4
        file.write_bytes(bytes(content))

    return damage


def _cut(part: float) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, int(part * file.stat().st_size))


def _instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(file):
        file.unlink()
        make(file)

    return damage


def _swap(file: Path) -> None:
    """Another file of the same kind and size, from the other checkpoint."""
    other = file.as_posix().replace("checkpoint-4", "checkpoint-2")
    shutil.copyfile(other, file)
    with file.open("ab") as grown:
        grown.write(b"\n")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "is missing": lambda file: file.unlink(),
    "is empty": _cut(0),
    "is cut to a half": _cut(0.5),
    "lacks its last byte": lambda file: os.truncate(file, file.stat().st_size - 1),
    "has a flipped bit at its beginning": _flip(0),
    "has a flipped bit in its middle": _flip(0.5),
    "has a flipped bit at its end": _flip(1),
    "has a byte more": lambda file: file.write_bytes(file.read_bytes() + b"}"),
    "is a folder": _instead(lambda file: file.mkdir()),
    "is a FIFO": _instead(lambda file: os.mkfifo(file)),
    "is a link to itself": _instead(lambda file: file.symlink_to(file.name)),
    "is a link to nothing": _instead(lambda file: file.symlink_to("/nowhere/at/all")),
    "is a device": _instead(lambda file: file.symlink_to("/dev/zero")),
    "is that of another step": _swap,
}

# What happens to files by itself.
USUAL = ("is missing", "is empty", "has a flipped bit in its middle")
REWRITTEN = ("run/checkpoint-4", "run/checkpoint-4/*")


def resume_from(place, harm: Callable[[Path], None], requested: str, **changes):
    """Damage checkpoint-4, and resume: from it, or from whatever `auto` finds."""
    folder = place.run / "checkpoint-4"
    if place.rank == 0:
        harm(folder)
        (place.folder / "harmed").touch()
    while not (place.folder / "harmed").exists():
        pass
    prepared(place)
    return resumed(place, str(folder) if requested == "explicit" else requested, **changes)


def explicitly(harm: Callable[[Path], None], *says: str) -> Act:
    return Act(lambda place: resume_from(place, harm, "explicit"), refused("Cannot resume", *says))


def automatically(harm: Callable[[Path], None], like: str | None = "unfinished") -> Act:
    """The checkpoint before is taken, and the one that was skipped is named."""
    return Act(lambda place: resume_from(place, harm, "auto"), warned("skipped", "checkpoint-4", like=like))


def situation(kind: str, name: str, act: Act, **more) -> Situation:
    rewritten = REWRITTEN if act.expected.outcome != refused().outcome else ()
    return Situation(kind, name, (act,), template="unfinished", may_change=rewritten, **more)


def of_file(name: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: damage(folder / name)


# ---- Files that are what the manifest says, and not what they should be ---------------------------------------------


def sealed(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A change after which the manifest is made to agree with the files, as somebody who knows it would."""
    from hf_wash.trainer.manifest import file_record, seal

    def harm(folder):
        change(folder)

        def agree(manifest):
            for name in manifest["files"]:
                if (folder / name).is_file():
                    manifest["files"][name] = file_record(folder / name)
            return seal(manifest)

        edit_json(folder / "population.json", agree)

    return harm


class Bomb:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "exploded"),)


def _pickle(make) -> Callable[[Path], None]:
    return lambda folder: torch.save(make(folder), folder / "member_0" / "optimizer.pt")


def _training(change) -> Callable[[Path], None]:
    def harm(folder):
        file = folder / "member_0" / "optimizer.pt"
        content = torch.load(file, weights_only=True)
        given = change(content)
        torch.save(content if given is None else given, file)

    return harm


def _weights(change, name="member_1/model.safetensors") -> Callable[[Path], None]:
    def harm(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return harm


def _json(name: str, change) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, change)


def _text(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


TENSOR = "classifier.weight"
STATE = "trainer_state.json"
STREAMS = "member_1/streams.json"
SEALED = {
    "weights that lack a tensor": (_weights(lambda tensors: tensors.pop(TENSOR)), [TENSOR]),
    "weights with a tensor more": (_weights(lambda tensors: tensors.update(more=torch.ones(1))), ["more"]),
    "weights of another shape": (_weights(lambda tensors: tensors.update({TENSOR: torch.zeros(4, 16)})), [TENSOR]),
    "weights of another dtype": (_weights(lambda tensors: tensors.update({TENSOR: torch.zeros(3, 16).half()})), [TENSOR]),
    "weights that are integers": (_weights(lambda tensors: tensors.update({TENSOR: torch.zeros(3, 16).int()})), [TENSOR]),
    "weights that are none": (_weights(lambda tensors: tensors.clear()), ["member_1"]),
    "weights that are no safetensors": (_text("member_1/model.safetensors", "weights"), ["member_1"]),
    "an optimizer that is a program": (_pickle(lambda folder: {"groups": Bomb(folder)}), ["optimizer.pt"]),
    "an optimizer that is no pickle": (_text("member_0/optimizer.pt", "state"), ["optimizer.pt"]),
    "an optimizer that is a list": (_training(lambda content: [1, 2]), ["optimizer.pt"]),
    "an optimizer of nothing": (_training(lambda content: {}), ["optimizer.pt"]),
    "an optimizer without a loss": (_training(lambda content: content.pop("loss") is None or None), ["optimizer.pt"]),
    "a loss that is a text": (_training(lambda content: content.update(loss="low")), ["optimizer.pt"]),
    **{
        f"an optimizer without `{name}`": (_training(lambda content, n=name: content.pop(n) is None or None), ["optimizer.pt"])
        for name in ("groups", "state", "scheduler")
    },
    **{
        f"streams that are {text!r}": (_text(STREAMS, text), ["streams.json"])
        for text in ("", "{", "null", "[]", "{}", "3", '{"streams": null, "loader": null}', '{"streams": {}, "loader": {}}')
    },
    "streams of deep nesting": (_text(STREAMS, "[" * 100_000 + "]" * 100_000), ["streams.json"]),
    **{
        f"a trainer's state that is {text!r}": (_text(STATE, text), ["checkpoint-4"])
        for text in ("", "{", "null", "[]", "{}", "3", '{"global_step": "4"}', '{"global_step": 2}', '{"global_step": 4, "what": 1}')
    },
    "a trainer's state of deep nesting": (_text(STATE, "[" * 100_000 + "]" * 100_000), ["checkpoint-4"]),
    "a trainer's state of bytes": (_text(STATE, b"\xff\xfe\x00"), ["checkpoint-4"]),
    "a trainer's state whose log is a text": (_json(STATE, lambda content: content.update(log_history="none")), [STATE]),
    "a trainer's state whose callbacks are a list": (_json(STATE, lambda c: c.update(stateful_callbacks=[1])), ["checkpoint-4"]),
}  # fmt: skip


def _nan(tensors) -> None:
    tensors[TENSOR].fill_(math.nan)


def _unmarked(folder: Path) -> None:
    """As an older version wrote it: the manifest does not say whether the members are finite."""
    edit_json(folder / "population.json", lambda manifest: manifest.pop("finite", None) and None)
    _weights(_nan)(folder)


KIND = "damaged checkpoints"


def no_advice_to_run_code(expected: Expected) -> Expected:
    import dataclasses

    return dataclasses.replace(
        expected, silent_about=("weights_only=False", "weights_only to False"), check=_not_exploded
    )


def _not_exploded(place: Path, result) -> str | None:
    return "the pickle was executed" if list(place.rglob("exploded")) else None


def _sealed_act(harm, says) -> Act:
    act = explicitly(lambda folder: sealed(harm)(folder), *says)
    return Act(act.do, no_advice_to_run_code(act.expected)) if "optimizer.pt" in says else act


SITUATIONS = [
    *(
        situation(KIND, f"{name} {what}", explicitly(of_file(name, damage), "checkpoint-4", *([] if "another step" in what else [name.split("/")[-1]])),
                  slow=name in ("config.json", "training_args.bin", "trainer_state.json") and what not in USUAL)
        for name in FILES
        for what, damage in DAMAGES.items()
        # Members are alike: of the second one, what depends on the place.
        if not name.startswith("member_1") or what in ("is missing", "has a flipped bit in its middle", "is a FIFO")
    ),
    *(
        situation(KIND, f"`auto`: {name} {what}", automatically(of_file(name, DAMAGES[what])))
        for name in FILES
        for what in ("is missing", "has a flipped bit in its middle")
    ),
    *(
        situation(KIND, f"`auto`: {name} {what}", automatically(of_file(name, DAMAGES[what])))
        for name in ("population.json", "member_1/optimizer.pt")
        for what in ("is empty", "is a folder", "is a FIFO", "is a link to itself", "is a device")
    ),
    *(
        situation(KIND, f"two processes, `auto`: {name} {what}", automatically(of_file(name, DAMAGES[what])), processes=2)
        for name in ("population.json", "member_1/streams.json")
        for what in ("is missing", "has a flipped bit in its middle")
    ),
    *(situation(KIND, f"sealed anew, {name}", _sealed_act(harm, says)) for name, (harm, says) in SEALED.items()),
    situation(KIND, "NaN in a member", explicitly(lambda folder: sealed(_unmarked)(folder), "NaN")),
    situation(KIND, "`auto`: NaN in a member", automatically(lambda folder: sealed(_unmarked)(folder))),
    situation(KIND, "two processes, `auto`: NaN in a member", automatically(lambda folder: sealed(_unmarked)(folder)), processes=2),
]  # fmt: skip
# What process 0 tells is told once.
SITUATIONS = [
    Situation(s.kind, s.name, (Act(s.acts[0].do, s.acts[0].expected, {1: warned(like="unfinished")}),), 2, s.template, s.may_change)
    if s.processes == 2 else s
    for s in SITUATIONS
]  # fmt: skip
