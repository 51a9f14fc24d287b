"""`hf-wash` with words that make no sense and folders that are not what they should be: one clean line each."""

import os
import shutil

import torch
from reliability.damage import sealed
from reliability.harness import Act, Situation, prepared, refused, unharmed
from reliability.soups import OF_FILES
from reliability.tiny import edit_json
from safetensors.torch import load_file, save_file


def command(*arguments, make=None):
    """`hf-wash` with arguments in which `{}` is the folder; `make` puts something in place before."""

    def do(place):
        from hf_wash.cli import main

        if make is not None:
            make(place.folder)
        prepared(place)
        words = [str(argument).replace("{}", str(place.folder)) for argument in arguments]
        main(words)

    return do


def one_line(*says: str):
    """A user's mistake: exit code 2, one printable line."""
    return refused("hf-wash: error:", *says, error="SystemExit", check=_clean)


def _clean(place, result):
    # What the command printed is in the report of its process.
    text = sorted(place.parent.glob("reports-*"))[-1].joinpath("0.txt").read_text(errors="replace")
    errors = text[text.index("hf-wash: error:") :] if "hf-wash: error:" in text else text
    if "Traceback" in text:
        return f"a traceback: {text[-300:]}"
    if errors.count("\n") != 1:
        return f"{errors.count(chr(10))} lines: {errors[:300]!r}"
    odd = [character for character in text if not character.isprintable() and character not in "\n\t"]
    return f"it prints {odd[:3]!r}" if odd else None


def _printable(place, result):
    text = sorted(place.parent.glob("reports-*"))[-1].joinpath("0.txt").read_text(errors="replace")
    odd = [character for character in text if not character.isprintable() and character not in "\n\t"]
    return f"it prints {odd[:3]!r}" if odd else None


SOUP = ("soup", "{}/model_0", "{}/model_1", "--out", "{}/soup")


def _of_1(damage):
    return lambda folder: damage(folder / "model_1")


def _config(change, name="config.json"):
    return lambda folder: edit_json(folder / "model_1" / name, change)


def _both(change, name="config.json"):
    def make(folder):
        for index in range(4):
            edit_json(folder / f"model_{index}" / name, change)

    return make


def _text(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def _instead(name, make):
    def do(folder):
        (folder / name).unlink()
        make(folder / name)

    return do


WORDS = {
    "no such command": (("stir",), "stir"),
    "no such option": (("soup", "--stir", "--out", "x"), "--stir"),
    "no models": (("soup", "--out", "{}/soup"), "models"),
    "no folder to write": (("soup", "{}/model_0"), "--out"),
    "a batch size of 0": ((*SOUP, "--batch-size", "0"), "batch-size"),
    "a batch size that is a text": ((*SOUP, "--batch-size", "many"), "batch-size"),
    "greedy without images": ((*SOUP, "--greedy"), "--eval-data"),
    "BatchNorm without images": ((*SOUP, "--recalibrate-bn"), "--train-data"),
    "images for nothing": ((*SOUP, "--train-data", "{}"), "--recalibrate-bn"),
    "images that are not there": ((*SOUP, "--eval-data", "{}/none"), "none"),
    "images that are a file": ((*SOUP, "--eval-data", "{}/model_0/config.json"), "config.json"),
    "images that are none": ((*SOUP, "--eval-data", "{}/model_2"), "model_2"),
    "a model that is not there": (("soup", "{}/model_0", "{}/none", "--out", "{}/soup"), "none"),
    "a model that is a file": (("soup", "{}/model_0/model.safetensors", "{}/model_1", "--out", "{}/soup"), "model.safetensors"),
    "a model of the Hub, offline": (("soup", "{}/model_0", "nobody/nothing", "--out", "{}/soup"), "nobody/nothing"),
    "an empty model": (("soup", "{}/model_0", "", "--out", "{}/soup"), "model"),
    "a target that is there": (("soup", "{}/model_0", "{}/model_1", "--out", "{}/model_2"), "model_2"),
    "a target that is a file": (("soup", "{}/model_0", "{}/model_1", "--out", "{}/model_2/config.json"), "config.json"),
    "a target below a file": (("soup", "{}/model_0", "{}/model_1", "--out", "{}/model_2/config.json/soup"), "config.json"),
    "a target that nobody can make": (("soup", "{}/model_0", "{}/model_1", "--out", "/proc/1/soup"), "/proc/1"),
    "a target with a long name": (("soup", "{}/model_0", "{}/model_1", "--out", "{}/" + "x" * 300), "xxx"),
    "inspect nothing": (("inspect",), "DIR"),
    "inspect what is not there": (("inspect", "{}/none"), "no folder"),
    "inspect a file": (("inspect", "{}/model_0/config.json"), "no folder"),
    "inspect an empty folder": (("inspect", "/proc/self/map_files/none"), "no folder"),
    "card of what is not there": (("card", "{}/none"), "none"),
    "card of a file": (("card", "{}/model_0/config.json"), "config.json"),
    "push what is not there": (("push", "{}/none", "user/it"), "no folder"),
    "push to nowhere": (("push", "{}/model_0"), "REPO"),
    "push offline": (("push", "{}/model_0", "user/it"), "offline"),
    "push to a name that is none": (("push", "{}/model_0", "a/b/c/d"), "a/b/c/d"),
    "push members that are not there": (("push", "{}/model_0", "user/it", "--members"), "members"),
}  # fmt: skip

CONFIGURATIONS = {
    "no config.json": (lambda folder: (folder / "model_1" / "config.json").unlink(), "config.json"),
    "a config.json that is no JSON": (_text("model_1/config.json", "{"), "config.json"),
    "a config.json that is a list": (_text("model_1/config.json", "[]"), "config.json"),
    "a config.json of deep nesting": (_text("model_1/config.json", "[" * 100_000 + "]" * 100_000), "config.json"),
    "a config.json of bytes": (_text("model_1/config.json", b"\xff\xfe\x00"), "config.json"),
    "a config.json that is a folder": (_instead("model_1/config.json", lambda file: file.mkdir()), "config.json"),
    "a config.json that is a FIFO": (_instead("model_1/config.json", os.mkfifo), "config.json"),
    "a config.json that is a device": (_instead("model_1/config.json", lambda file: file.symlink_to("/dev/zero")), "config.json"),
    "an empty config.json": (_text("model_1/config.json", ""), "config.json"),
    "another class": (_config(lambda config: config.update(architectures=["DeiTForImageClassification"])), "DeiTForImageClassification"),
    "another activation": (_config(lambda config: config.update(hidden_act="relu")), "hidden_act"),
    "another number of heads": (_config(lambda config: config.update(num_attention_heads=4)), "num_attention_heads"),
    "another normalisation": (_config(lambda config: config.update(layer_norm_eps=0.1)), "layer_norm_eps"),
    "other classes": (_config(lambda config: config.update(id2label={"0": "x", "1": "y", "2": "z"})), "classes"),
    **{
        f"architectures that are {value!r}": (_both(lambda config, v=value: config.update(architectures=v)), "architectures")
        for value in (3, "ViT", [3], [[]], {"a": 1}, True)
    },
    **{
        f"labels that are {value!r}": (_both(lambda config, v=value: config.update(id2label=v)), "label")
        for value in ("cat", {"a": "cat"}, {"0": 3}, [1, 2], {"0": None}, 7)
    },
    "no kind of model": (_both(lambda config: config.pop("model_type") and None), "model_type"),
    "a kind that nobody knows": (_both(lambda config: config.update(model_type="nobody")), "nobody"),
    "a width that is a text": (_both(lambda config: config.update(hidden_size="wide")), "hidden_size"),
    "a width of 10⁹": (_both(lambda config: config.update(hidden_size=10**9)), "does not load"),
    "a width of -1": (_both(lambda config: config.update(hidden_size=-1)), ""),
}  # fmt: skip

RECORDS = {
    "no JSON": (_text("run/wash_run.json", "{"), "wash_run.json"),
    "a list": (_text("run/wash_run.json", "[]"), "wash_run.json"),
    "deep nesting": (_text("run/wash_run.json", "[" * 100_000 + "]" * 100_000), "wash_run.json"),
    "bytes": (_text("run/wash_run.json", b"\xff\xfe"), "wash_run.json"),
    **{
        f"`{name}` that is {value!r}": (lambda folder, n=name, v=value: edit_json(folder / "run/wash_run.json", lambda r: r.update({n: v})), "wash_run.json")
        for name in ("population", "soup", "model", "card", "training", "exchange", "versions", "hardware")
        for value in ("mine", 3, [1])
    },
}  # fmt: skip
RESULTS = {
    "no JSON": _text("run/all_results.json", "{"),
    "a list": _text("run/all_results.json", "[]"),
}


def _escape(folder):
    """Codes that colour a terminal, in every text of the record."""

    def colour(value):
        if isinstance(value, dict):
            return {name: colour(item) for name, item in value.items()}
        if isinstance(value, list):
            return [colour(item) for item in value]
        return f"\x1b[31m{value}\x07" if isinstance(value, str) else value

    edit_json(folder / "run" / "wash_run.json", colour)


def _unprintable(folder):
    shutil.copytree(folder / "model_0", folder / "mo\x1b[31mdel\n")
    edit_json(folder / "mo\x1b[31mdel\n" / "config.json", lambda config: config.update(architectures=["Other"]))


def _checkpoint(change):
    return lambda folder: change(folder / "run" / "checkpoint-4")


def _users_folders(folder):
    """The user's, with names that a program might think its own."""
    for name in ("_trial-soup", "_incomplete-soup", "soup.tmp", ".soup", "_staging-soup"):
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("mine")


def two_at_once(place):
    """Two commands that write beside each other."""
    from hf_wash.cli import main

    prepared(place)
    pids = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                main(
                    [
                        "soup",
                        f"{place.folder}/model_0",
                        f"{place.folder}/model_1",
                        "--out",
                        f"{place.folder}/soup-{number}",
                    ]
                )
            except SystemExit as ended:
                os._exit(ended.code or 0)
            finally:
                os._exit(1)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0, 0], codes
    weights = [load_file(place.folder / f"soup-{number}" / "model.safetensors") for number in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _nan(folder):
    file = folder / "model_1" / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"].fill_(float("nan"))
    save_file(tensors, file, metadata={"format": "pt"})


def without_torch(place):
    """What is not there is said before anything heavy is imported."""
    import subprocess
    import sys

    code = (
        "import sys\nfrom hf_wash.cli import main\ntry:\n    main(['inspect', 'nowhere'])\nexcept SystemExit as e:\n"
        "    assert e.code == 2\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False" and "nowhere" in done.stderr, done


def leftovers(place, result):
    """Nothing is left of the staging."""
    known = {f"model_{index}" for index in range(4)} | {"soup", "soup-0", "soup-1"}
    found = {path.name for path in place.iterdir()} - known
    found -= {"_trial-soup", "_incomplete-soup", "soup.tmp", ".soup", "_staging-soup"}
    return f"it left {found}" if found else None


KIND = "hf-wash"
SITUATIONS = [
    *(Situation(KIND, name, (Act(command(*words), one_line(says)),), template="models") for name, (words, says) in WORDS.items()),
    *(
        Situation(KIND, f"soup, {name}", (Act(command(*SOUP, make=make), one_line(says)),), template="models")
        for name, (make, says) in CONFIGURATIONS.items()
    ),
    *(
        Situation(KIND, f"soup, {name}", (Act(command(*SOUP, make=_of_1(damage)), one_line(*says)),), template="models")
        for name, (damage, says) in OF_FILES.items()
    ),
    *(
        # The kind of model is known, and that decides.
        Situation(KIND, f"soup, an architecture called {name}",
                  (Act(command(*SOUP, make=_both(lambda config, n=name: config.update(architectures=[n]))), unharmed()),), template="models")
        for name in ("AutoTokenizer", "Nobody")
    ),
    Situation(KIND, "soup, a member that is NaN", (Act(command(*SOUP, make=_nan), one_line("model_1", "NaN")),), template="models"),
    Situation(KIND, "soup, a name that does not print",
              (Act(command("soup", "{}/model_0", "{}/mo\x1b[31mdel\n", "--out", "{}/soup", make=_unprintable), one_line("Other")),),
              template="models"),
    Situation(KIND, "soup, folders of the user's beside it",
              (Act(command(*SOUP, make=_users_folders), unharmed(check=leftovers)),), template="models"),
    Situation(KIND, "soup, two commands at once", (Act(two_at_once, unharmed(check=leftovers)),), template="models"),
    *(
        Situation(KIND, f"{what}, a record with {name}",
                  (Act(command(what, "{}/run", make=make), one_line(says)),), template="finished")
        for what in ("inspect", "card")
        for name, (make, says) in RECORDS.items()
    ),
    *(
        Situation(KIND, f"inspect, results that are {name}", (Act(command("inspect", "{}/run", make=make), one_line("all_results.json")),),
                  template="finished")
        for name, make in RESULTS.items()
    ),
    Situation(KIND, "inspect, a record that colours the terminal",
              (Act(command("inspect", "{}/run", make=_escape), unharmed(check=_printable)),), template="finished"),
    *(
        Situation(KIND, f"inspect, {name}", (Act(command("inspect", "{}/run", make=make), refused("hf-wash: error:", *says, error="SystemExit")),),
                  template="finished")
        for name, (make, says) in {
            "a checkpoint with a flipped bit": (_checkpoint(lambda folder: _flip(folder / "member_0/model.safetensors")), ["SHA-256"]),
            "a checkpoint without a manifest": (_checkpoint(lambda folder: (folder / "population.json").unlink()), ["population.json"]),
            "a checkpoint whose manifest is no JSON": (_checkpoint(lambda folder: (folder / "population.json").write_text("{")), ["population.json"]),
            "a checkpoint whose manifest is nested deeply": (
                _checkpoint(lambda folder: (folder / "population.json").write_text("[" * 100_000)), ["population.json"]),
            "a checkpoint of 10⁹ members": (_checkpoint(lambda folder: _resealed(folder, population_size=10**9)), ["population"]),
            "a checkpoint whose steps are a text": (_checkpoint(lambda folder: _resealed(folder, step="\x1b[31mfour")), ["step"]),
            "a checkpoint with a FIFO": (_checkpoint(lambda folder: _fifo(folder / "config.json")), ["config.json"]),
            "a checkpoint with a missing file": (_checkpoint(lambda folder: (folder / "config.json").unlink()), ["config.json"]),
        }.items()
    ),
    Situation(KIND, "inspect what is not there, without torch", (Act(without_torch, unharmed()),)),
]  # fmt: skip


def _flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def _fifo(file):
    file.unlink()
    os.mkfifo(file)


def _resealed(folder, **values):
    sealed(lambda folder: edit_json(folder / "population.json", lambda manifest: manifest.update(values)))(folder)
