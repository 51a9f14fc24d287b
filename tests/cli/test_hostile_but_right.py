"""What looks hostile in a folder, or in a name, and is not: `hf-wash` does what is right, and nothing else is changed."""

import os
import subprocess
import sys

import pytest
from cli.hostile_folders import (
    ESCAPES,
    SOUP,
    SOUP_EVAL,
    both,
    cased,
    content,
    each,
    everything_in,
    fields,
    fifo,
    index,
    is_clean,
    link,
    removed,
    run_command,
)


# Who opens a FIFO waits for ever.
pytestmark = pytest.mark.timeout(30)

CARDS = {
    "an impossible date": "---\ndate: 2001-99-99\n---\n",
    "deep lists": "---\na: " + "[" * 5000 + "]" * 5000 + "\n---\n",
    "an alias of itself": "---\na: &a [*a]\n---\n",
    "a laugh": "---\na: &a [x, x]\n" + "".join(f"{n}: &{n} [*{m}, *{m}, *{m}]\n" for m, n in zip("abcdefghi", "bcdefghij", strict=True)) + "---\n",
    "an object of Python": "---\na: !!python/object/apply:os.system ['touch ran']\n---\n",
    "a list as a name": "---\n? [a]\n: b\n---\n",
    "a tag": "---\na: !!int many\n---\n",
    "a control character": "---\na: \x1b[31m\n---\n",
    "a mark that holds a list": "<!-- hf-wash:begin {\"a\": [1]} x -->\n<!-- hf-wash:end -->\n",
    "a mark that is deep": "<!-- hf-wash:begin " + '{"a":' * 50_000 + "1" + "}" * 50_000 + " x -->\n<!-- hf-wash:end -->\n",
    "many marks": "<!-- hf-wash:begin {} x -->\n" * 2000,
    "two parts": "<!-- hf-wash:begin {} x --> a <!-- hf-wash:end -->\n" * 2,
    "no UTF-8": b"\xff\xfe\x00",
    "no end": "---\nlicense: mit\n",
}  # fmt: skip

RIGHT = [
    *((f"card: {name}", "card {run}", content(text, "run", "README.md"), ["README.md"]) for name, text in CARDS.items()),
    *((f"architecture {name}", SOUP, both(fields, "config.json", architectures=[name]), ["2 models"]) for name in ("__version__", "ViTConfig", "pipeline")),
    ("no labels", SOUP, both(fields, "config.json", id2label=None), ["2 models"]),
    ("no architecture", SOUP, both(fields, "config.json", architectures=None), ["2 models"]),
    ("unknown fields", SOUP, both(fields, "config.json", **{ESCAPES: ESCAPES, "x": [{"y": None}]}), ["2 models"]),
    ("what does not change the model", SOUP, fields("b", "config.json", hidden_dropout_prob=0.3, transformers_version="4.0", _name_or_path=ESCAPES, initializer_range=0.5, pad_token_id=0, problem_type="single_label_classification"), ["2 models"]),
    ("defaults left out", SOUP, fields("b", "config.json", hidden_act="gelu", qkv_bias=True), ["2 models"]),
    ("links to all folders above", SOUP_EVAL, each(link("../..", "photos", "blue", "up"), link("../..", "photos", "red", "up")), ["2 models"]),
    ("a fifo that nobody asks for", SOUP, fifo("a", "events.out"), ["2 models"]),
    ("code of its own for what is known", SOUP, both(fields, "config.json", auto_map={"AutoConfig": "x.C", "AutoModelForImageClassification": "x.M"}), ["2 models"]),
    ("twice the same", "soup {a} {a} --out {out}", None, ["2 models"]),
    ("a sharded model", SOUP, each(index(lambda _: {"x": "sub/s.safetensors"}), lambda p: (p / "a/sub").mkdir(), lambda p: os.rename(p / "weights.safetensors", p / "a/sub/s.safetensors")), ["2 models"]),
    ("weights by a link", SOUP, each(lambda p: os.rename(p / "a/model.safetensors", p / "blob"), link("../blob", "a", "model.safetensors")), ["2 models"]),
    ("out below folders that are not there", "soup {a} {b} --out {out}/x/y", None, ["2 models"]),
    ("out is an empty folder", SOUP, lambda p: (p / "out").mkdir(), ["2 models"]),
    ("out is a link to an empty folder", "soup {a} {b} --out {place}/to_out", each(lambda p: (p / "out").mkdir(), link("out", "to_out")), ["2 models"]),
    ("out is a link to nothing", "soup {a} {b} --out {place}/to_out", link("out", "to_out"), ["2 models"]),
    ("folders of the user's that look like ours", SOUP, each(*(content("mine", name, "thesis.txt") for name in ("_trial-out", "_incomplete-out", "_hf-wash-"))), ["2 models"]),
    ("a folder whose name has escapes", ["inspect", "{place}/\x1b[31mred"], lambda p: os.rename(p / "a", p / "\x1b[31mred"), ["\\x1b[31mred"]),
    ("a folder whose name is no UTF-8", ["inspect", "{place}/\udcff"], lambda p: os.rename(p / "a", p / "\udcff"), ["\\udcff"]),
    ("escapes in the record", "inspect {run}", fields("run", "wash_run.json", mixing={"method": ESCAPES}, training={"optimizer": ESCAPES}, versions={ESCAPES: ESCAPES}, hardware={"text": ESCAPES}, card={"dataset": ESCAPES}, soup={"ingredients": [ESCAPES]}), ["\\x1b[31mred"]),
    ("escapes in the results", "inspect {run}", fields("run", "all_results.json", **{"eval_" + ESCAPES: 1.0}), ["x1b[31mred"]),
    ("results that are no numbers", "inspect {run}", fields("run", "all_results.json", eval_accuracy=float("nan"), eval_loss=float("inf"), eval_members_accuracy_mean=10**400, eval_f1=[1], eval_precision=None), ["nan"]),
    ("a card of such results", "card {run}", fields("run", "all_results.json", eval_accuracy=float("nan"), eval_loss=float("inf"), eval_samples=float("inf"), eval_f1=True), ["README.md"]),
    ("a log of such values", "card {run}", fields("run", "trainer_state.json", log_history=[{"step": 1, "eval_accuracy": float("nan")}, {"step": "x", "eval_accuracy": 1}, {"step": 2, "eval_accuracy": float("inf")}, {"eval_accuracy": [1]}]), ["README.md"]),
    ("everything null", "card {run}", fields("run", "wash_run.json", **dict.fromkeys(("model", "population", "mixing", "exchange", "soup", "training", "data", "hardware", "versions", "card"))), ["README.md"]),
    ("everything inside null", "card {run}", fields("run", "wash_run.json", population={"size": None, "overrides": None}, mixing={"method": None, "shuffle_probability": None}, soup={"method": None, "ingredients": None, "chosen": None}, training={"steps": None, "learning_rate": None, "seed": None}, model={"parameters": None, "trainable_parameters": None, "trainable_bytes": None}, card={"tags": None, "dataset": None}), ["README.md"]),
    ("chosen that are not there", "card {run}", fields("run", "wash_run.json", soup={"ingredients": ["a", "b"], "chosen": [7, -3], "scores": [0.5]}), ["README.md"]),
    ("a population of 10^9", "card {run}", fields("run", "wash_run.json", population={"size": 10**9}), ["README.md"]),
    ("a size of images that is text", "card {run}", each(removed("run", "preprocessor_config.json"), fields("run", "config.json", image_size="large")), ["README.md"]),
    ("a name for a heading of two lines", "card {run}", fields("run", "wash_run.json", card={"model_name": ESCAPES}), ["README.md"]),
    ("a picture that is a link", "card {run}", link("../../a/config.json", "run", "pictures", "accuracy.png"), ["README.md"]),
    ("a checkpoint with a step of another alphabet", "inspect {run}", lambda p: (p / "run/checkpoint-²").mkdir(), ["checkpoint-2"]),
]  # fmt: skip


@cased(RIGHT)
def test_it_is_done_and_nothing_else_is_changed(command, change, expected, place, capfd, monkeypatch):
    monkeypatch.chdir(place)
    if change is not None:
        change(place)
    before = everything_in(place)
    code = run_command(command, place)
    out, err = capfd.readouterr()
    assert code == 0, (out, err)
    assert is_clean(out) and is_clean(err) and all(line.startswith("hf-wash: ") for line in err.splitlines()), (
        out,
        err,
    )
    for text in expected:
        assert text in out, out
    after = everything_in(place)
    what = command.split()[0] if isinstance(command, str) else command[0]
    if what == "inspect":
        assert after == before
    own = ("out", "run/README.md", "run/pictures")
    is_own = {path: str(path).startswith(own) for path in {**before, **after}}
    assert {path: after[path] for path in after if not is_own[path]} == {
        path: before[path] for path in before if not is_own[path]
    }
    if what == "soup":
        assert len(list((place / "out").rglob("model.safetensors"))) == 1


def test_what_a_folder_says_reaches_no_card_as_an_escape_code(place):
    fields(
        "run", "wash_run.json", mixing={"shuffle_schedule": ESCAPES}, card={"dataset": ESCAPES, "model_name": ESCAPES}
    )(place)
    assert run_command("card {run}", place) == 0
    assert is_clean((place / "run" / "README.md").read_text())


def test_a_soup_has_the_rights_of_any_new_folder(place):
    assert run_command(SOUP, place) == 0
    (place / "new").mkdir()
    assert (place / "out").stat().st_mode == (place / "new").stat().st_mode


def test_leftovers_of_an_upload_are_removed_and_what_only_looks_like_one_is_not(tmp_path):
    import platform

    from hf_wash.hub.push import remove_snapshots

    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    ours = f"_pushing-{platform.node()}"
    names = (f"{ours}-{int(ended.stdout)}-abcd1234", f"{ours}-{os.getpid()}-abcd1234", "_pushing-mine", ours)
    for name in names:
        (tmp_path / name).mkdir()
    remove_snapshots(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


@pytest.mark.timeout(120)  # it starts a process, which has 100 s
def test_a_terminal_that_knows_few_letters_gets_all_the_same(place):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    fields("run", "wash_run.json", hardware={"text": "größer ×2"})(place)
    command = [sys.executable, "-m", "hf_wash.cli", "inspect", str(place / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "") and r"gr\xf6\xdfer \xd72" in done.stdout


def test_a_card_that_is_a_fifo_tells_no_license(tmp_path):
    from hf_wash.hub.record import inherited_license

    os.mkfifo(tmp_path / "README.md")
    assert inherited_license(str(tmp_path)) is None
