"""`hf-wash`: what its commands do, and that a mistake is one line and exit code 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_wash.cli import main
from hf_wash.hub import export_model
from hf_wash.trainer import checkpoint


# Prints by how much a soup raises the process's own memory, not counting pages of files that the kernel can take back.
MEASURE = """
import sys, threading, time
from pathlib import Path
from hf_wash.cli import main

def anonymous():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

def soup(out, *models):
    try:
        main(["soup", *models, "--out", out])
    except SystemExit as ended:
        assert not ended.code

small, warm, out, *models = sys.argv[1:]
soup(warm, small)  # imports what any soup does
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
soup(out, *models)
done.set()
thread.join()
print(peak - before)
"""
COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def vit(seed: int, labels=("blue", "red"), **options):
    torch.manual_seed(seed)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return ViTForImageClassification(ViTConfig(num_attention_heads=2, **{**sizes, **options}, **names))


def exported(folder: Path, model, **options) -> Path:
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    return export_model(model, folder, processing_class=processor, check=False, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(place):
    """Four small ViTs, each a little away from the first."""
    start = vit(0)
    folders = []
    for index in range(4):
        member = vit(0)
        member.load_state_dict(start.state_dict())
        torch.manual_seed(index)
        with torch.no_grad():
            for parameter in member.parameters():
                parameter.add_(0.1 * index * torch.randn_like(parameter))
        folders.append(exported(place / f"model_{index}", member))
    return folders


@pytest.fixture(scope="module")
def photos(place):
    """Twelve plain images in two classes."""
    for name, colour in COLOURS.items():
        (place / "photos" / name).mkdir(parents=True)
        for index in range(6):
            shade = tuple(max(0, value - 20 * index) for value in colour)
            Image.new("RGB", (20, 24), shade).save(place / "photos" / name / f"{index}.png")
    return place / "photos"


@pytest.fixture
def hf_wash(capsys):
    """Runs the command in this process; returns its exit code, and what it printed where."""

    def run(*arguments):
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def check_mistake(result, *expected):
    code, _, err = result
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and err.startswith("hf-wash: error: "), err
    for text in expected:
        assert text in err, err


# soup


def test_a_soup_is_the_mean_and_loads_like_its_models(hf_wash, models, tmp_path):
    code, out, err = hf_wash("soup", *models[:3], "--out", tmp_path / "soup")
    assert (code, err) == (0, "") and "soup of 3 models" in out
    parts = [load_file(folder / "model.safetensors") for folder in models[:3]]
    for name, value in load_file(tmp_path / "soup" / "model.safetensors").items():
        mean = sum(part[name].double() for part in parts) / 3
        assert torch.equal(value, mean.float()), name
    assert sorted(path.name for path in (tmp_path / "soup").iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "wash_run.json")
    ]
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "average of the weights of the 3 models below" in card and "| 1 | model_1 |" in card
    assert str(models[0].parent) not in card
    assert not list(tmp_path.glob("_*"))


def test_a_timm_soup_loads_in_timm(hf_wash, tmp_path):
    import timm

    for seed in range(2):
        torch.manual_seed(seed)
        export_model(timm.create_model("test_vit", num_classes=3), tmp_path / str(seed), check=False)
    code, _, err = hf_wash("soup", tmp_path / "0", tmp_path / "1", "--out", tmp_path / "soup")
    assert (code, err) == (0, "")
    soup = timm.create_model(f"local-dir:{tmp_path / 'soup'}", pretrained=True).state_dict()
    parts = [load_file(tmp_path / name / "model.safetensors") for name in "01"]
    for name, value in soup.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2)


def test_a_soup_of_one_is_that_model_and_says_so(hf_wash, models, tmp_path):
    code, _, err = hf_wash("soup", models[2], "--out", tmp_path / "soup")
    assert code == 0 and "A soup of one" in err
    assert (tmp_path / "soup" / "model.safetensors").read_bytes() == (models[2] / "model.safetensors").read_bytes()


def test_a_greedy_soup_takes_what_helps_on_the_held_out_images(hf_wash, models, photos, tmp_path):
    knowing = vit(0)
    optimizer = torch.optim.Adam(knowing.parameters(), lr=1e-2)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    images = [Image.open(path).convert("RGB") for name in COLOURS for path in sorted((photos / name).iterdir())]
    pixels, labels = processor(images, return_tensors="pt")["pixel_values"], torch.tensor([0] * 6 + [1] * 6)
    for _ in range(40):
        optimizer.zero_grad()
        knowing(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
    wrong = vit(0)
    wrong.load_state_dict(knowing.state_dict())
    with torch.no_grad():
        wrong.classifier.weight.neg_()
        wrong.classifier.bias.neg_()
    exported(tmp_path / "knowing", knowing)
    exported(tmp_path / "wrong", wrong)
    options = ("--greedy", "--eval-data", photos, "--out", tmp_path / "soup")
    code, out, err = hf_wash("soup", tmp_path / "wrong", tmp_path / "knowing", *options)
    assert code == 0, err
    assert "100.00%" in out and re.search(r"In the soup: \S+/knowing, with", out)
    weights = load_file(tmp_path / "soup" / "model.safetensors")
    for name, value in load_file(tmp_path / "knowing" / "model.safetensors").items():
        assert torch.equal(weights[name], value)
    record = json.loads((tmp_path / "soup" / "wash_run.json").read_text())["soup"]
    assert record["chosen"] == [1] and record["scores"][1] == 1.0
    assert "| 0 | wrong | 0.00% | no |" in (tmp_path / "soup" / "README.md").read_text()
    # Labels go by name: a model that numbers its classes the other way round is not thereby wrong.
    swapped = vit(0, labels=("red", "blue"))
    swapped.load_state_dict(wrong.state_dict())
    exported(tmp_path / "swapped", swapped)
    code, out, err = hf_wash("soup", tmp_path / "swapped", "--eval-data", photos, "--out", tmp_path / "alone")
    assert code == 0 and "Accuracy of the soup" in out and "100.00%" in out, err


def test_batch_norm_statistics_are_measured_anew_or_warned_of(hf_wash, photos, tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    labels = {"id2label": {0: "blue", 1: "red"}, "label2id": {"blue": 0, "red": 1}}
    for seed in range(2):
        torch.manual_seed(seed)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", **labels)
        exported(tmp_path / f"resnet_{seed}", ResNetForImageClassification(config))
    both = (tmp_path / "resnet_0", tmp_path / "resnet_1")
    code, _, err = hf_wash("soup", *both, "--out", tmp_path / "plain")
    assert code == 0 and "--recalibrate-bn" in err
    options = ("--recalibrate-bn", "--train-data", photos, "--out", tmp_path / "measured")
    code, _, err = hf_wash("soup", *both, *options)
    assert (code, err) == (0, "")
    plain, measured = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "measured"))
    for name, value in plain.items():
        if "running_" in name:
            assert not torch.equal(measured[name], value), name
        elif "num_batches_tracked" not in name:
            assert torch.equal(measured[name], value), name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_a_soup_of_many_takes_the_memory_of_two(tmp_path):
    wide = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048}
    first = exported(tmp_path / "model_0", vit(0, **wide))
    size = (first / "model.safetensors").stat().st_size
    for index in range(1, 6):
        shutil.copytree(first, tmp_path / f"model_{index}")
    small = exported(tmp_path / "small", vit(0))
    models = [tmp_path / f"model_{index}" for index in range(6)]
    command = [sys.executable, "-c", MEASURE, small, tmp_path / "warm", tmp_path / "soup", *models]
    completed = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert completed.returncode == 0, completed.stderr[-3000:]
    used = int(completed.stdout.strip().splitlines()[-1])
    print(f"{used / size:.2f} models")
    assert used < 2.3 * size


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{m}/model_0", "{m}/model_1"], ["--out"]),
        (["{m}/model_0", "--greedy", "--out", "{t}/o"], ["--eval-data"]),
        (["{m}/model_0", "--recalibrate-bn", "--out", "{t}/o"], ["--train-data"]),
        (["{m}/model_0", "--train-data", "{m}", "--out", "{t}/o"], ["--recalibrate-bn"]),
        (["{m}/model_0", "--out", "{m}/model_1"], ["already", "model_1"]),
        (["nobody/nothing", "--out", "{t}/o"], ["nobody/nothing"]),
        (["{m}/model_0", "--eval-data", "{t}/none", "--out", "{t}/o"], ["{t}/none"]),
        (["--out", "{t}/o"], ["models"]),
    ],
)
def test_a_soup_that_cannot_be_is_refused(hf_wash, models, tmp_path, arguments, expected):
    fill = {"m": models[0].parent, "t": tmp_path}
    result = hf_wash("soup", *(argument.format(**fill) for argument in arguments))
    check_mistake(result, *(text.format(**fill) for text in expected))
    assert not list(tmp_path.iterdir())


def test_models_that_differ_are_refused_with_the_first_difference(hf_wash, models, tmp_path):
    wider = exported(tmp_path / "wider", vit(0, intermediate_size=24))
    result = hf_wash("soup", models[0], wider, "--out", tmp_path / "soup")
    check_mistake(result, "wider", "shape", "intermediate")
    others = exported(tmp_path / "others", vit(0, labels=("red", "blue")))
    check_mistake(hf_wash("soup", models[0], others, "--out", tmp_path / "soup"), "others", "classes", "'red'")
    assert not (tmp_path / "soup").exists() and not list(tmp_path.glob("_*"))


@pytest.mark.parametrize("greedy", [False, True])
def test_a_model_that_has_diverged_is_refused_by_its_name(hf_wash, models, photos, tmp_path, greedy):
    member = vit(0)
    with torch.no_grad():
        member.classifier.bias[0] = float("nan")
    diverged = exported(tmp_path / "diverged", member)
    result = hf_wash(
        "soup", *models[:2], diverged, "--out", tmp_path / "soup", *(["--greedy", "--eval-data", photos] * greedy)
    )
    check_mistake(result, str(diverged), "NaN", "'classifier.bias'")
    assert [path.name for path in tmp_path.iterdir()] == ["diverged"]


def test_a_pickle_is_refused_with_the_reason(hf_wash, models, tmp_path):
    shutil.copytree(models[0], tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "old" / "pytorch_model.bin")
    check_mistake(hf_wash("soup", models[0], tmp_path / "old", "--out", tmp_path / "soup"), "pickle", "any code")


def test_weights_that_the_model_does_not_take_are_noticed(hf_wash, models, tmp_path):
    for name in "ab":
        shutil.copytree(models[0], tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        weights["stranger.weight"] = weights.pop("classifier.weight")
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    result = hf_wash("soup", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "soup")
    check_mistake(result, "missing keys", "classifier.weight")
    assert not (tmp_path / "soup").exists()


def test_classes_that_the_model_does_not_know_are_named(hf_wash, models, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "red").rename(tmp_path / "photos" / "violet")
    options = ("--eval-data", tmp_path / "photos", "--out", tmp_path / "soup")
    check_mistake(hf_wash("soup", *models[:2], *options), "'violet'", "'red'")


# inspect, card, push


@pytest.fixture(scope="module")
def run(place):
    """A finished run with two checkpoints."""
    from hub import tiny_runs

    tiny_runs.finished_run(place / "run", save_strategy="steps", save_steps=2)
    return place / "run"


def test_inspect_says_what_a_run_holds_and_verifies_its_checkpoints(hf_wash, run):
    code, out, err = hf_wash("inspect", run)
    assert (code, err) == (0, "")
    for expected in (
        *("ViTForImageClassification", "2 members", "probability p: 0.5", "members' mean", "_members/: 2 members"),
        *("checkpoint-2: step 2 of 4, 2 members, wash, seed 42", "checkpoint-4: step 4 of 4", "digests verified"),
    ):
        assert expected in out, out
    code, out, _ = hf_wash("inspect", run / "checkpoint-2")
    assert code == 0 and "can be resumed from" in out and "checkpoint-4" not in out


def test_inspect_finds_a_changed_file(hf_wash, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint-2" / "member_1" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, out, err = hf_wash("inspect", tmp_path / "run")
    assert code == 2 and "checkpoint-2: damaged" in out and "checkpoint-4: step 4" in out
    assert "member_1/model.safetensors" in err and "SHA-256" in err and len(err.splitlines()) == 1
    check_mistake(hf_wash("inspect", tmp_path / "run" / "checkpoint-2"), "SHA-256")
    (tmp_path / "run" / "checkpoint-4" / checkpoint.MANIFEST).unlink()
    check_mistake(hf_wash("inspect", tmp_path / "run" / "checkpoint-4"), checkpoint.MANIFEST)


def test_inspect_refuses_what_holds_nothing(hf_wash, tmp_path):
    check_mistake(hf_wash("inspect", tmp_path), "holds no model")
    check_mistake(hf_wash("inspect", tmp_path / "none"), "There is no folder")


def test_card_writes_the_card_of_a_folder(hf_wash, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n")
    code, out, _ = hf_wash("card", tmp_path / "run", "--repo", "user/run")
    assert code == 0 and "README.md" in out
    text = (tmp_path / "run" / "README.md").read_text()
    assert text.startswith("---\nlicense: [mit\n---\n# Mine\n") and 'model="user/run"' in text
    check_mistake(hf_wash("card", tmp_path), "holds no model")


def test_push_refuses_before_it_asks_the_hub(hf_wash, run, tmp_path):
    check_mistake(hf_wash("push", tmp_path / "none", "user/run"), "There is no folder")
    check_mistake(hf_wash("push", tmp_path, "user/run"), "no weights")
    # This process is offline.
    check_mistake(hf_wash("push", run, "user/run"), "offline", f"hf-wash push {run} user/run")


def test_the_command_pushes_and_a_wrong_token_is_one_line(run, tmp_path):
    from hub.loopback_hub import STRANGER, WRITER, LoopbackHub

    shutil.copytree(run, tmp_path / "run")
    with LoopbackHub() as hub:

        def push(token, *options):
            environment = {**os.environ, **hub.environment(tmp_path / "home", token)}
            command = [sys.executable, "-m", "hf_wash.cli", "push", str(tmp_path / "run"), "user/it", *options]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

        refused = push(STRANGER)
        check_mistake((refused.returncode, refused.stdout, refused.stderr), "401", "hf auth login", "hf-wash push")
        pushed = push(WRITER, "--members", "--private", "--revision", "dev")
        assert (pushed.returncode, pushed.stderr) == (0, "") and f"{hub.url}/user/it (dev)" in pushed.stdout
        files = hub.files("user/it", "dev")
        assert hub.repositories["user/it"].private and "members/member_1/config.json" in files
        assert 'model="user/it", revision="dev"' in files["README.md"].decode()


# the command itself


@pytest.mark.parametrize("arguments", [["--help"], [], ["soup", "--help"]])
def test_help_and_version(hf_wash, arguments):
    code, out, err = hf_wash(*arguments)
    assert (code, err) == (0, "")
    expected = ("--greedy", "--recalibrate-bn") if "soup" in arguments else ("soup", "push", "card", "inspect")
    assert all(text in out for text in expected)


def test_the_package_run_as_a_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "hf_wash"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert shown.returncode == 0 and all(
        name in shown.stdout for name in ("soup", "push", "card", "inspect", "report")
    )
    wrong = subprocess.run([*command, "stir"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert wrong.returncode == 2 and "stir" in wrong.stderr and not wrong.stdout


def test_a_word_that_is_no_command_is_a_mistake(hf_wash):
    check_mistake(hf_wash("stir"), "stir")
    check_mistake(hf_wash("soup", "--no-such-option"), "--no-such-option")


def test_the_commands_import_nothing_heavy_before_they_run():
    code = (
        "import importlib, pkgutil, sys, hf_wash.cli as cli\n"
        "for module in pkgutil.iter_modules(cli.__path__):\n"
        "    if module.name != '__main__': importlib.import_module(f'hf_wash.cli.{module.name}')\n"
        "print([name for name in ('torch', 'transformers', 'timm', 'datasets', 'huggingface_hub', 'PIL')"
        " if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
