"""Whatever stands in a manifest, reading it gives what was written or one sentence, and `auto` takes the checkpoint before."""

import base64
import json
import os
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_population import digest, population

from hf_wash.trainer import checkpoint, manifest


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = population(folder, size=2, save_strategy="steps", save_steps=4, eval_strategy="no")
    trainer.train()
    (folder / "soup.txt").write_text(digest(trainer.model))
    return folder


@pytest.fixture
def copied(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoint-12")
    return tmp_path / "copy"


def resume(folder, from_where="auto", **settings):
    settings = {"save_strategy": "no", "eval_strategy": "no", "size": 2, **settings}
    trainer = population(folder, **settings)
    trainer.train(resume_from_checkpoint=from_where)
    return trainer


def content_of(folder):
    return json.loads((folder / "population.json").read_text())


def reseal(folder, change):
    """Change a manifest as somebody would who knows how its digest is made."""
    content = content_of(folder)
    change(content)
    (folder / "population.json").write_text(json.dumps(manifest.seal(content)))


def put_in_place(folder, name, write):
    """Put another file in the place of one, with its own size and SHA-256 in the manifest."""
    write(folder / name)
    reseal(folder, lambda content: content["files"].update({name: manifest.file_record(folder / name)}))


def one_sentence(error):
    text = str(error)
    assert "\n" not in text and len(text) < 600
    return text


# ---- Its digest ----------------------------------------------------------------------------------------------------


def test_no_digit_of_a_manifest_can_change(copied):
    path = copied / "checkpoint-8" / "population.json"
    text = path.read_text()
    places = [match.start() for match in re.finditer(r"\d", text)]
    for place in random.Random(0).sample(places, 200):
        digit = str((int(text[place]) + 1) % 10)
        path.write_text(text[:place] + digit + text[place + 1 :])
        with pytest.raises(manifest.InvalidCheckpoint) as caught:
            manifest.read_manifest(copied / "checkpoint-8")
        one_sentence(caught.value)
    path.write_text(text)
    assert manifest.read_manifest(copied / "checkpoint-8")["step"] == 8


def test_no_byte_of_a_manifest_can_change_what_it_says(copied):
    path = copied / "checkpoint-8" / "population.json"
    raw, written = path.read_bytes(), content_of(copied / "checkpoint-8")
    draw = random.Random(0)
    for _ in range(300):
        changed = bytearray(raw)
        changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(changed))
        try:
            assert manifest.read_manifest(copied / "checkpoint-8") == written  # white space between values
        except manifest.InvalidCheckpoint as error:
            one_sentence(error)


def test_a_digest_cannot_be_taken_away(copied):
    content = content_of(copied / "checkpoint-8")
    del content["digest"]
    (copied / "checkpoint-8" / "population.json").write_text(json.dumps({**content, "position": 3}))
    with pytest.raises(manifest.InvalidCheckpoint, match="its digest differs"):
        manifest.read_manifest(copied / "checkpoint-8")


def test_a_checkpoint_of_the_version_before_is_resumed_from(copied, run_folder):
    for step in (4, 8):
        content = content_of(copied / f"checkpoint-{step}")
        for name in ("digest", "run", "arguments"):
            del content[name]
        names = ["mixing", "shuffle_probability", "shuffle_schedule", "shuffle_optimizer_state", "shuffle_interval"]
        names += ["shuffle_start", "shuffle_stop", "same_init", "member_data", "soup"]
        content["options"] = {name: content["options"][name] for name in names} | {"data_seed": None}
        path = copied / f"checkpoint-{step}" / "population.json"
        path.write_text(json.dumps({"format": 1, **{k: v for k, v in content.items() if k != "format"}}))
    trainer = resume(copied, save_strategy="steps", save_steps=4)
    assert digest(trainer.model) == (run_folder / "soup.txt").read_text()
    # All of a folder are one run's, also those that are written now.
    assert resume(copied).state.global_step == 12


# ---- What it says --------------------------------------------------------------------------------------------------


def without(name):
    return lambda content: content.pop(name)


def nested(depth):
    return "[" * depth + "]" * depth


BELIEVED = [
    "run", "step", "total_steps", "epoch", "position", "population_size", "seed", "probability", "options", "overrides",
    "values_moved", "bytes_exchanged", "log_window", "architecture", "members", "files",
]  # fmt: skip
HOSTILE = {
    **{f"no {name}": (without(name), f"has no `{name}`") for name in BELIEVED},
    **{
        f"{name} is {value!r}": (
            lambda content, name=name, value=value: content.update({name: value}),
            f"`{name}` must be",
        )
        for name in BELIEVED
        for value in (None, [[]], "x" * 100, {"a": 1}, -1, 1.5, True, 10**30)
        if (name, value) not in [("options", {"a": 1}), ("seed", -1), ("seed", 10**30)]
    },
    "a run with escape codes": (lambda content: content.update(run="\x1b[31m"), "`run` must be the name of a run"),
    "a population of 0": (
        lambda content: content.update(population_size=0),
        "must be a number of at least 1, found 0",
    ),
    "a population of 10⁹": (lambda content: content.update(population_size=10**9), "lists 2 members' own settings"),
    "no members": (lambda content: content.update(members=[]), "`members` must be"),
    "a member twice": (lambda content: content.update(members=[0, 0]), r"lists the members \[0, 0\]"),
    "a member too many": (lambda content: content.update(members=[0, 7]), r"lists the members \[0, 7\]"),
    "an unknown option": (lambda content: content["options"].update(magic=1), "option `magic`, which this version"),
    "a probability that is no number": (
        lambda content: content.update(probability=float("nan")),
        "`probability` must be",
    ),
    "a negative shape": (lambda content: content["architecture"][0].__setitem__(1, [-1]), "`architecture` must be"),
    "a window of two": (lambda content: content["log_window"].update(moved=[0, 0]), "`log_window` must be"),
    "a NUL in a name": (lambda content: content["files"].update({"a\0b": {"size": 1, "sha256": "0" * 64}}), "outside"),
    "an absolute name": (
        lambda content: content["files"].update({"/etc/passwd": {"size": 1, "sha256": "0" * 64}}),
        "outs",
    ),
    "a size of −1": (lambda content: content["files"]["model.safetensors"].update(size=-1), "`files` must be"),
    "a SHA-256 that is none": (
        lambda content: content["files"]["model.safetensors"].update(sha256="x"),
        "`files` must",
    ),
    "a member's file unnamed": (
        lambda content: content["files"].pop("member_1/model.safetensors"),
        "does not list `member_1/model.safetensors`",
    ),
    "another step": (lambda content: content.update(step=9), "trainer_state.json` is not that of step 9"),
    "arguments that are none": (lambda content: content.update(arguments=[1]), "`arguments` must be"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_cannot_be_is_refused_in_a_sentence_and_passed_over(copied, what):
    change, said = HOSTILE[what]
    reseal(copied / "checkpoint-8", change)
    with pytest.raises(manifest.InvalidCheckpoint, match=said) as caught:
        manifest.verify(copied / "checkpoint-8")
    one_sentence(caught.value)
    found, skipped = manifest.newest_complete(copied)
    assert found.name == "checkpoint-4" and [path.name for path, _ in skipped] == ["checkpoint-8"]


TEXTS = {
    "nothing": "",
    "a list": "[]",
    "a number": "7",
    "null": "null",
    "another format": '{"format": 99}',
    "a format that is a list": '{"format": [1]}',
    "deep nesting": '{"format": 2, "a": ' + nested(100_000) + "}",
    "nesting as deep as can be read": '{"format": 2, "a": ' + nested(900) + "}",
    "a surrogate": '{"format": 2, "run": "\\ud800"}',
    "a NUL": '{"format": 2, "run": "a\\u0000b"}',
    "a number without end": '{"format": 2, "step": ' + "9" * 10_000 + "}",
    "no UTF-8": b"\xff\xfe{}",
    "a NUL byte": b'{"format": 2}\0',
}


@pytest.mark.parametrize("what", TEXTS)
def test_what_is_no_manifest_is_refused_in_a_sentence(copied, what):
    text = TEXTS[what]
    (copied / "checkpoint-8" / "population.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(manifest.InvalidCheckpoint) as caught:
        manifest.read_manifest(copied / "checkpoint-8")
    one_sentence(caught.value)
    assert manifest.newest_complete(copied)[0].name == "checkpoint-4"


def test_a_huge_manifest_is_not_read(copied):
    with open(copied / "checkpoint-8" / "population.json", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(manifest.InvalidCheckpoint, match="which no manifest has"):
        manifest.read_manifest(copied / "checkpoint-8")


@pytest.mark.parametrize("name", ["population.json", "member_0/model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "link to itself", "device"])
def test_what_is_no_file_is_not_waited_for(copied, name, kind):
    path = copied / "checkpoint-8" / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "link to itself" else "/dev/zero")
    assert manifest.newest_complete(copied)[0].name == "checkpoint-4"


def test_auto_goes_on_from_the_checkpoint_before(copied, run_folder, caplog):
    reseal(copied / "checkpoint-8", lambda content: content.update(population_size=10**9))
    trainer = resume(copied)
    assert digest(trainer.model) == (run_folder / "soup.txt").read_text()
    assert "A checkpoint is skipped" in caplog.text


# ---- The files it vouches for --------------------------------------------------------------------------------------


def rewritten(change):
    def write(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return write


BIAS = "classifier.bias"
WEIGHTS = {
    "a tensor less": (lambda tensors: tensors.pop(BIAS), f"lacks `{BIAS}`"),
    "another dtype": (
        lambda tensors: tensors.update({BIAS: tensors[BIAS].double()}),
        f"`{BIAS}` of dtype torch.float64",
    ),
    "another shape": (lambda tensors: tensors.update({BIAS: tensors[BIAS][:-1].clone()}), f"`{BIAS}` of shape"),
    "a tensor more": (lambda tensors: tensors.update(more=torch.zeros(1)), "`more`, which the model has not"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_a_members_file_that_is_not_the_models_is_refused_before_any_member_changes(copied, what):
    change, said = WEIGHTS[what]
    put_in_place(copied / "checkpoint-8", "member_1/model.safetensors", rewritten(change))
    trainer = population(copied, size=2, save_strategy="no", eval_strategy="no")
    before = [digest(member) for member in trainer.population.members]
    with pytest.raises(manifest.InvalidCheckpoint, match=said) as caught:
        trainer.train(resume_from_checkpoint="auto")
    assert one_sentence(caught.value).startswith("Cannot resume: ")
    assert [digest(member) for member in trainer.population.members] == before


def streams(change):
    def write(path):
        content = json.loads(path.read_text())
        change(content["dict"])
        path.write_text(json.dumps(content))

    return write


def numpy_words(content):
    return content["streams"]["dict"]["numpy"]["tuple"]


def objects(content):
    numpy_words(content)[1] = {"array": base64.b64encode(b"\0" * 4992).decode(), "dtype": "O", "shape": [624]}


STREAMS = {
    "no streams": lambda content: content.pop("streams"),
    "no loader": lambda content: content.pop("loader"),
    "words of another shape": lambda content: numpy_words(content)[1].update(shape=[312, 2]),
    "words of another dtype": lambda content: numpy_words(content)[1].update(dtype="float64"),
    "words of objects": objects,
    "a position beyond the words": lambda content: numpy_words(content).__setitem__(2, 10**6),
    "another generator": lambda content: numpy_words(content).__setitem__(0, "PCG64"),
    "a shape without end": lambda content: content["streams"]["dict"]["cpu"].update(shape=[10**12]),
    "no base64": lambda content: content["streams"]["dict"]["cpu"].update(tensor="!"),
    "a text": lambda content: content.update(streams="x"),
    "a number": lambda content: content["loader"]["dict"].update(before_upcoming=7),
    "Python's of another version": lambda content: content["streams"]["dict"]["python"]["tuple"].__setitem__(0, 9),
}


@pytest.mark.parametrize("what", STREAMS)
def test_hostile_streams_are_refused_in_a_sentence(copied, what):
    put_in_place(copied / "checkpoint-8", "member_1/streams.json", streams(STREAMS[what]))
    with pytest.raises(manifest.InvalidCheckpoint, match=r"streams.json` holds no random streams") as caught:
        resume(copied)
    one_sentence(caught.value)


STATES = {
    "a list": [],
    "no groups": {"state": {}, "scheduler": {}, "loss": 0.0},
    "groups of texts": {"groups": ["x"], "state": {}, "scheduler": {}, "loss": 0.0},
    "a loss that is none": {"groups": [], "state": {}, "scheduler": {}, "loss": "x"},
    "no group": {"groups": [], "state": {}, "scheduler": {}, "loss": 0.0},
}


@pytest.mark.parametrize("what", STATES)
def test_a_hostile_state_of_the_optimizer_is_refused_in_a_sentence(copied, what):
    put_in_place(copied / "checkpoint-8", "member_0/optimizer.pt", lambda path: torch.save(STATES[what], path))
    with pytest.raises(manifest.InvalidCheckpoint, match="optimizer") as caught:
        resume(copied)
    assert "weights_only" not in one_sentence(caught.value)


def test_what_is_no_pickle_at_all_is_refused_in_a_sentence(copied):
    put_in_place(copied / "checkpoint-8", "member_0/optimizer.pt", lambda path: path.write_bytes(b"GIF89a"))
    with pytest.raises(manifest.InvalidCheckpoint, match=r"optimizer.pt") as caught:
        resume(copied)
    assert "weights_only" not in one_sentence(caught.value)


def test_another_kind_of_optimizer_is_refused(copied):
    with pytest.raises(manifest.InvalidCheckpoint, match=r"another kind \(`optim`\).*has no `amsgrad`"):
        resume(copied, optim="sgd")


def test_the_names_under_which_checkpoints_are_read_stay():
    assert checkpoint.verify is manifest.verify and checkpoint.InvalidCheckpoint is manifest.InvalidCheckpoint
