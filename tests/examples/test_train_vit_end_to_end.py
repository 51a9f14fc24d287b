"""`examples/train_vit.py` from the command to what loads its soup: in one process, in two, with a timm model."""

import json
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from altered_checkpoints import change, flip_weight
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline


A_FEW_STEPS = (
    *("--population_size", "2", "--max_steps", "4", "--per_device_train_batch_size", "16"),
    *("--max_train_samples", "128", "--max_eval_samples", "40", "--use_cpu"),
)
METRICS = ("accuracy", "loss", "ece", "top5_accuracy")
ROWS = ("member 0", "member 1", "members' mean", "ensemble", "soup")


@pytest.fixture(scope="module")
def run_here(train_vit, tmp_path_factory):
    """Runs the script in this process; returns its output folder and what it printed."""

    def run(*flags):
        folder = tmp_path_factory.mktemp("run")
        printed = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train_vit.py", "--output_dir", str(folder), *A_FEW_STEPS, *flags])
            patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
            train_vit.main()
        return folder, "\n".join(printed)

    return run


@pytest.fixture(scope="module")
def digits_run(run_here):
    return run_here()


@pytest.fixture(scope="module")
def timm_run(run_here):
    return run_here("--timm_architecture", "test_resnet")


def test_the_folder_holds_what_the_contract_says(digits_run):
    folder, _ = digits_run
    for name in (
        *("model.safetensors", "config.json", "preprocessor_config.json", "README.md"),
        *("all_results.json", "trainer_state.json"),
        *(
            "_members/member_0/model.safetensors",
            "_members/member_1/model.safetensors",
            "_members/member_1/config.json",
        ),
    ):
        assert (folder / name).is_file(), name
    results = json.loads((folder / "all_results.json").read_text())
    for metric in METRICS:
        for key in ("", "ensemble_", "member_0_", "member_1_"):
            assert f"eval_{key}{metric}" in results
        for suffix in ("mean", "min", "max"):
            assert f"eval_members_{metric}_{suffix}" in results


def test_a_person_reads_the_table_and_the_two_lines_that_load_the_soup(digits_run):
    folder, printed = digits_run
    rows = [line[:14].strip() for line in printed.splitlines()]
    assert [row for row in rows if row in ROWS] == list(ROWS)
    assert f"The soup is saved in {folder}" in printed
    lines = [line.strip() for line in printed.splitlines() if "pipeline" in line]
    scope: dict = {}
    exec(lines[0] + "\nclassify = " + lines[1].removesuffix('("your_image.png")'), scope)
    assert scope["classify"].task == "image-classification"


def test_trainable_parameters_of_the_soup_are_the_members_mean(digits_run):
    folder, _ = digits_run
    soup = load_file(folder / "model.safetensors")
    members = [load_file(folder / "_members" / f"member_{index}" / "model.safetensors") for index in range(2)]
    for name, value in soup.items():
        torch.testing.assert_close(value, (members[0][name] + members[1][name]) / 2, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(members[0][name], members[1][name]) for name in soup)


def test_what_loads_the_soup_scores_what_was_reported(digits_run, train_vit):
    folder, _ = digits_run
    data = train_vit.load_data(train_vit.DataArguments(max_train_samples=128, max_eval_samples=40))
    images, labels = data.eval["image"][:], np.array(data.eval["label"][:])
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    rgb = [image.convert("RGB") for image in images]
    with torch.no_grad():
        logits = model(**processor(images=rgb, return_tensors="pt")).logits
    results = json.loads((folder / "all_results.json").read_text())
    assert (logits.argmax(1).numpy() == labels).mean() == pytest.approx(results["eval_accuracy"])
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()
    assert loss == pytest.approx(results["eval_loss"], abs=1e-4)
    answers = pipeline("image-classification", model=str(folder), top_k=1)(images)
    assert [int(answer[0]["label"]) for answer in answers] == logits.argmax(1).tolist()


@pytest.mark.distributed
def test_two_processes_give_the_soup_of_one(digits_run, launch, train_vit_script, tmp_path):
    here, _ = digits_run
    completed = launch(train_vit_script, "--output_dir", tmp_path / "run", *A_FEW_STEPS, timeout=180)
    assert completed.stdout.count("members' mean") == 1
    assert (tmp_path / "run/model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()
    for metric in METRICS:
        key = f"eval_ensemble_{metric}"
        there, ours = (
            json.loads((folder / "all_results.json").read_text())[key] for folder in (tmp_path / "run", here)
        )
        assert there == ours


@pytest.mark.distributed
def test_processes_without_a_gpu_find_each_other_without_a_flag(launch, train_vit_script, tmp_path):
    flags = [flag for flag in A_FEW_STEPS if flag not in ("--use_cpu", "--population_size", "2")]
    completed = launch(train_vit_script, "--output_dir", tmp_path / "run", *flags, timeout=180)
    rows = [line[:14].strip() for line in completed.stdout.splitlines()]
    assert [row for row in rows if row in ROWS] == list(ROWS)


@pytest.mark.distributed
def test_a_users_mistake_ends_all_processes(launch, train_vit_script, tmp_path):
    completed = launch(
        train_vit_script, "--output_dir", tmp_path / "run", *A_FEW_STEPS, "--population_size", "3", check=False
    )
    assert completed.returncode != 0
    assert "train_vit.py: error: " in completed.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_there_is_one_line_too(run_here):
    with pytest.raises(SystemExit, match=r"train_vit\.py: error: .*nowhere"):
        run_here("--resume_from_checkpoint", "nowhere")


def test_a_dry_run_says_what_the_run_costs_and_stops(run_here, digits_run):
    folder, printed = run_here("--dry_run", "--save_strategy", "steps", "--save_steps", "2", "--push_to_hub")
    assert list(folder.iterdir()) == []
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in printed.splitlines() if "  " in line}
    assert rows["run"] == "2 members × 4 steps of 16 samples, 1 process"
    assert rows["data"] == "128 samples for a member"
    assert "loaded back by" in rows["saved model"] and "pipeline" in rows["saved model"]
    assert rows["checkpoints"].startswith("2 of ") and rows["disk"].endswith(str(folder))
    assert float(rows["loss"].split(" ")[0]) == pytest.approx(np.log(10), abs=0.5)
    assert printed.endswith("Nothing was trained: this was a dry run.")
    # As the run then moves: it lasts four steps, so its p is 0.5.
    record = json.loads((digits_run[0] / "wash_run.json").read_text())["exchange"]
    value, unit, *_ = rows["exchange"].split(" ")
    assert float(value) * {"k": 1e3, "M": 1e6}[unit] == pytest.approx(record["values_moved"], rel=0.02)


def test_a_dry_run_of_what_would_fail_is_one_line(run_here, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 5, 5))
    with pytest.raises(SystemExit, match=r"train_vit\.py: error: .*where 5 bytes are free"):
        run_here("--dry_run")
    with pytest.raises(SystemExit, match="leave --resume_from_checkpoint out"):
        run_here("--dry_run", "--resume_from_checkpoint", "auto")


@pytest.mark.distributed
def test_a_dry_run_of_two_processes_says_it_once(launch, train_vit_script, tmp_path):
    completed = launch(train_vit_script, "--output_dir", tmp_path / "run", *A_FEW_STEPS, "--dry_run", timeout=180)
    assert completed.stdout.count("2 members × 4 steps of 16 samples, 2 processes") == 1


def test_a_checkpoint_is_verified_or_what_differs_is_named(run_here, tmp_path):
    kept = ("--save_strategy", "steps", "--save_steps", "2")
    folder, _ = run_here(*kept)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    change(other / "checkpoint-2", "member_1/model.safetensors", flip_weight)
    verdicts = {}
    for code, run in ((0, folder), (1, other)):
        printed = []
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(
                sys.modules["command_line"], "print", lambda *parts, to=printed: to.extend(parts), raising=False
            )
            run_here(*kept, "--verify_checkpoint", str(run / "checkpoint-2"), "--push_to_hub")
        assert ended.value.code == code
        verdicts[code] = "\n".join(printed)
    assert "identical: replayed from the beginning of the run to step 2" in verdicts[0]
    assert all(word in verdicts[1] for word in ("at step 2", "member 1", "vit.layernorm.weight"))
    with pytest.raises(SystemExit, match=r"Cannot replay: .* other options: learning_rate was 0\.001 and is 0\.1"):
        run_here(*kept, "--learning_rate", "0.1", "--verify_checkpoint", str(folder / "checkpoint-2"))
    with pytest.raises(SystemExit, match=r"train_vit\.py: error: Cannot replay: there is no folder `nowhere`"):
        run_here("--verify_checkpoint", "nowhere")
    with pytest.raises(SystemExit, match="leave --dry_run and --resume_from_checkpoint out"):
        run_here("--verify_checkpoint", "nowhere", "--dry_run")
    # The card says how, as far as that is everybody's business.
    card = (folder / "README.md").read_text()
    command = next(line for line in card.splitlines() if "--verify_checkpoint" in line)
    assert command == (
        "python examples/train_vit.py --population_size 2 --max_steps 4 --per_device_train_batch_size 16 "
        "--max_train_samples 128 --max_eval_samples 40 --use_cpu --save_steps 2 --verify_checkpoint checkpoint-4"
    )
    plain, _ = run_here()
    assert "--verify_checkpoint" not in (plain / "README.md").read_text()


def test_independent_members_start_apart(run_here, train_vit):
    folder, printed = run_here("--mixing", "independent", "--same_init", "False")
    assert "mixing: independent" in printed
    members = [load_file(folder / "_members" / f"member_{index}" / "model.safetensors") for index in range(2)]
    key = "vit.embeddings.cls_token"
    key = key if key in members[0] else next(name for name in members[0] if name.endswith("weight"))
    assert (members[0][key] - members[1][key]).abs().max() > 0.01


def test_a_timm_soup_loads_in_timm_and_in_transformers_alike(timm_run):
    folder, _ = timm_run
    assert not (folder / "preprocessor_config.json").exists()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        in_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
        in_transformers = AutoModelForImageClassification.from_pretrained(folder).eval()(images).logits
    assert in_timm.shape == (2, 10)
    torch.testing.assert_close(in_timm, in_transformers)


@pytest.mark.parametrize("pretrained", ["digits_run", "timm_run"])
def test_an_image_folder_and_a_pretrained_model_make_a_soup(run_here, pretrained, request, tmp_path):
    from PIL import Image

    for colour in ("red", "blue"):
        (tmp_path / "photos" / colour).mkdir(parents=True)
        for index in range(20):
            Image.new("RGB", (20, 30), colour).save(tmp_path / "photos" / colour / f"{index}.png")
    folder, printed = run_here(
        "--data_dir", str(tmp_path / "photos"), "--model_name_or_path", str(request.getfixturevalue(pretrained)[0])
    )
    assert "held-out images of photos" in printed
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label == {0: "blue", 1: "red"}
