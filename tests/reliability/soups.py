"""Soups of members that differ, are damaged, or are none."""

import json
import math
import os

import torch
from reliability.harness import Act, Situation, prepared, refused, unharmed
from reliability.tiny import vit
from safetensors.torch import load_file, save_file
from torch import nn

from hf_wash import greedy_soup, recalibrate_batch_norm, uniform_soup


def states(count=3):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append({"a": torch.randn(4, 3), "b": torch.randn(5), "steps": torch.tensor(3)})
    return made


def with_second(change):
    """Members of which the second is changed."""

    def make(place):
        made = states()
        given = change(made[1])
        if given is not None:
            made[1] = given
        return made

    return make


def _set(name, value):
    return lambda state: state.update({name: value})


def files(damage):
    """Folders of a model each, the second one damaged."""

    def make(place):
        folders = [place.folder / f"model_{index}" for index in range(3)]
        damage(folders[1])
        prepared(place)
        return folders

    return make


def _weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _bytes(change):
    def damage(folder):
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        change(content)
        file.write_bytes(bytes(content))

    return damage


def _truncate(part):
    return _bytes(lambda content: content.__delitem__(slice(int(len(content) * part), None)))


def _header(content):
    content[:8] = (1 << 62).to_bytes(8, "little")


def _no_json(content):
    content[8:20] = b"not json at "


def _instead(make):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        make(folder / "model.safetensors", folder)

    return damage


def _index(content):
    def damage(folder):
        os.rename(folder / "model.safetensors", folder / "part.safetensors")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def _pickle(file, folder):
    torch.save(vit().state_dict(), folder / "pytorch_model.bin")


FIRST = "vit.embeddings.cls_token"
MEMBERS = {
    "no members": (lambda place: [], ["needs at least one member"]),
    "one model": (lambda place: vit(), ["pass a list"]),
    "one state dict": (lambda place: states()[0], ["pass a list"]),
    "one path": (lambda place: "model_0", ["pass a list"]),
    "a number": (lambda place: 3, ["pass a list"]),
    "None": (lambda place: None, ["pass a list"]),
    "members that are numbers": (lambda place: [1, 2], ["Member 0 is a int"]),
    "a member that is None": (with_second(lambda state: _NOTHING), ["Member 1"]),
    "a tensor that is missing": (with_second(lambda state: state.pop("b") is None or None), ["'b' is missing in member 1"]),
    "a tensor more": (with_second(_set("c", torch.zeros(2))), ["'c' is missing in member 0"]),
    "another shape": (with_second(_set("a", torch.zeros(3, 4))), ["'a' has shape", "(3, 4)"]),
    "another number of axes": (with_second(_set("b", torch.zeros(5, 1))), ["'b' has shape"]),
    "another dtype": (with_second(_set("a", torch.zeros(4, 3, dtype=torch.float64))), ["'a' has dtype"]),
    "half precision in one": (with_second(_set("a", torch.zeros(4, 3).bfloat16())), ["'a' has dtype"]),
    "an integer in the place of a weight": (with_second(_set("b", torch.zeros(5, dtype=torch.int64))), ["'b' has dtype"]),
    "a text in the place of a tensor": (with_second(_set("a", "weights")), ["'a'"]),
    "an empty state dict": (with_second(lambda state: state.clear()), ["is missing in member 1"]),
    "a tensor on the meta device": (with_second(_set("a", torch.zeros(4, 3, device="meta"))), ["meta device"]),
    "a folder that is not there": (lambda place: ["nowhere", "nowhere"], ["nowhere"]),
    "a NaN": (with_second(_set("a", torch.full((4, 3), math.nan))), ["member 1", "'a'"]),
    "an infinite value": (with_second(_set("b", torch.tensor([0, 1, math.inf, 0, 0]))), ["member 1", "'b'"]),
    "minus infinite among others": (with_second(_set("b", torch.tensor([0, 1, -math.inf, 0, 0]))), ["member 1", "'b'"]),
    "one NaN at the end": (with_second(lambda s: s["a"].view(-1)[-1:].fill_(math.nan) is None or None), ["member 1", "'a'"]),
    "a NaN in half precision": (
        lambda place: [{"a": torch.tensor([1.0, v]).half()} for v in (1.0, math.nan)], ["member 1", "'a'"],
    ),
    "a complex NaN": (
        lambda place: [{"a": torch.tensor([complex(1, v)])} for v in (1.0, math.nan)], ["member 1", "'a'"],
    ),
    "NaN in all": (lambda place: [{"a": torch.tensor([math.nan])}] * 2, ["member", "'a'"]),
}  # fmt: skip
_NOTHING = type("Nothing", (), {})()

OF_FILES = {
    "a file cut to a half": (_truncate(0.5), ["model_1", "cannot be read as safetensors"]),
    "a file cut to a tenth": (_truncate(0.1), ["model_1", "cannot be read as safetensors"]),
    "an empty file": (_truncate(0), ["model_1", "cannot be read as safetensors"]),
    "a header of 2^62 bytes": (_bytes(_header), ["model_1", "cannot be read as safetensors"]),
    "a header that is no JSON": (_bytes(_no_json), ["model_1", "cannot be read as safetensors"]),
    "bytes behind the end": (_bytes(lambda content: content.extend(b"more")), ["model_1", "cannot be read as safetensors"]),
    "a folder in the place of the file": (_instead(lambda file, _: file.mkdir()), ["model_1"]),
    "no weights": (_instead(lambda *_: None), ["model_1", "no weights"]),
    "a pickle": (_instead(_pickle), ["model_1", "pickle"]),
    "a dangling link": (_instead(lambda file, _: file.symlink_to("nowhere")), ["model_1"]),
    "a FIFO": (_instead(lambda file, _: os.mkfifo(file)), ["model_1"]),
    "a device": (_instead(lambda file, _: file.symlink_to("/dev/zero")), ["model_1"]),
    "a tensor that is missing": (_weights(lambda tensors: tensors.pop(FIRST)), [FIRST, "model_1"]),
    "a tensor more": (_weights(lambda tensors: tensors.update(more=torch.zeros(2))), ["'more'", "model_0"]),
    "another shape": (_weights(lambda tensors: tensors.update({FIRST: torch.zeros(1, 1, 17)})), [FIRST, "shape"]),
    "another dtype": (_weights(lambda tensors: tensors.update({FIRST: torch.zeros(1, 1, 16).half()})), [FIRST, "dtype"]),
    "a NaN": (_weights(lambda tensors: tensors[FIRST].fill_(math.nan)), [FIRST, "model_1"]),
    "an index that is no JSON": (_index("{"), ["index"]),
    "an index that is a list": (_index([]), ["index"]),
    "an index without a map": (_index({}), ["index"]),
    "an index whose map is a list": (_index({"weight_map": ["part.safetensors"]}), ["index"]),
    "an index of numbers": (_index({"weight_map": {FIRST: 3}}), ["index"]),
    "an index of nothing": (_index({"weight_map": {}}), ["index"]),
    "an index of a file that is missing": (_index({"weight_map": {FIRST: "gone.safetensors"}}), ["gone.safetensors"]),
    "an index that points outside": (
        _index({"weight_map": {FIRST: "../model_0/model.safetensors"}}), ["outside"],
    ),
    "an index that points to the root": (_index({"weight_map": {FIRST: "/etc/passwd"}}), ["outside"]),
    "an index with NUL": (_index({"weight_map": {FIRST: "a\0b.safetensors"}}), ["index"]),
}  # fmt: skip


def _score(value):
    def score(weights):
        if isinstance(value, Exception):
            raise value
        return value

    return score


GREEDY = {
    "scores that are all NaN": (_score(math.nan), refused("not a number")),
    "scores that are text": (_score("good"), refused("could not convert")),
    "scores that are None": (_score(None), refused(error="TypeError")),
    "a score that raises": (_score(ZeroDivisionError("no images")), refused("no images", error="ZeroDivisionError")),
}


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x)


BATCH_NORM = {
    "no batches": ([], ["batch"]),
    "a batch of one": ([torch.zeros(1, 4)], []),
    "batches of another width": ([torch.zeros(4, 5)], []),
}

KIND = "soups"


def uniform(make):
    return lambda place: uniform_soup(make(place)) and None


def greedy(make):
    return lambda place: greedy_soup(make(place), _score(1.0)) and None


SITUATIONS = [
    *(Situation(KIND, f"uniform, {name}", (Act(uniform(make), refused(*says)),)) for name, (make, says) in MEMBERS.items()),
    *(
        Situation(KIND, f"of a stream, {name}", (Act(lambda p, m=make: uniform_soup(x for x in m(p)) and None, refused(*says)),))
        for name, (make, says) in MEMBERS.items()
        if name in ("a tensor that is missing", "another shape", "another dtype", "a NaN", "an infinite value")
    ),
    Situation(KIND, "of a stream of nothing", (Act(lambda place: uniform_soup(iter(())), refused("needs at least one")),)),
    *(
        Situation(KIND, f"greedy, {name}", (Act(greedy(make), refused(*says)),))
        for name, (make, says) in MEMBERS.items()
        if name in ("no members", "one path", "a tensor that is missing", "another shape", "another dtype", "a NaN")
    ),
    *(
        Situation(KIND, f"of files, {name}", (Act(uniform(files(damage)), refused(*says)),), template="models",
                  may_change=("model_1/*",))
        for name, (damage, says) in OF_FILES.items()
    ),
    *(
        Situation(KIND, f"greedy, {name}", (Act(lambda place, s=score: greedy_soup(states(), s) and None, expected),))
        for name, (score, expected) in GREEDY.items()
    ),
    Situation(KIND, "a member that is tied and one that is not", (Act(lambda place: _tied(), unharmed()),)),
]  # fmt: skip
for _name, (_batches, _says) in BATCH_NORM.items():
    SITUATIONS.append(
        Situation(
            KIND, f"BatchNorm, {_name}",
            (Act(lambda place, b=_batches: recalibrate_batch_norm(Normed(), b) and None, refused(*_says, error="Exception")),),
        )
    )  # fmt: skip


def _tied():
    first = torch.ones(3)
    soup = uniform_soup([{"a": first, "b": first}, {"a": torch.zeros(3), "b": torch.full((3,), 2.0)}])
    assert soup["a"].tolist() == [0.5] * 3 and soup["b"].tolist() == [1.5] * 3, soup
