"""`examples/finetune_backbone.py`: its parts, and the command from a backbone to what loads the soup."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_population import StopAt
from transformers import AutoModelForImageClassification, pipeline


EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "finetune_backbone.py"
A_FEW_STEPS = (
    *("--population_size", "2", "--max_steps", "4", "--per_device_train_batch_size", "16", "--head_only", "0.5"),
    *("--max_train_samples", "64", "--max_eval_samples", "40", "--use_cpu"),
)


@pytest.fixture(scope="module")
def finetune(train_vit):
    """The script, imported."""
    spec = importlib.util.spec_from_file_location("finetune_backbone", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Before it runs: its dataclasses look their module up by name.
    sys.modules["finetune_backbone"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backbone(finetune, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "backbone"
    finetune.pretrain_backbone(folder, epochs=1)
    return folder


@pytest.fixture(scope="module")
def timm_backbone(train_vit, finetune, tmp_path_factory):
    """A timm model with BatchNorm, saved as our library saves it."""
    folder = tmp_path_factory.mktemp("timm")
    recipe = train_vit.timm_recipe("test_resnet", ["a", "b"], 32, whole_image=True)
    finetune.export_model(recipe.model_init(), folder, processing_class=recipe.processor)
    return folder


@pytest.fixture(scope="module")
def run_here(finetune, tmp_path_factory):
    """Runs the script in this process; returns its output folder and what it printed."""

    def run(*flags, folder=None):
        folder = folder or tmp_path_factory.mktemp("run")
        printed = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["finetune_backbone.py", "--output_dir", str(folder), *A_FEW_STEPS, *flags])
            patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
            patch.setattr(finetune, "pretrain_backbone", partial(finetune.pretrain_backbone, epochs=1))
            finetune.main()
        return folder, "\n".join(printed)

    return run


@pytest.fixture(scope="module")
def plain_run(run_here):
    return run_here()


@pytest.fixture(scope="module")
def adapter_run(run_here):
    return run_here("--lora_rank", "2", "--merge", "--same_init", "False")


def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))


def scores(classify):
    return {answer["label"]: answer["score"] for answer in classify(image(), top_k=5)}


def run_what_was_printed(printed):
    """The pipeline that the printed lines make."""
    lines = printed.split("To use it:")[1].split("Merged into")[0].replace('("your_image.png")', "")
    scope: dict = {}
    exec("\n".join(map(str.strip, lines.splitlines())).replace("\npipeline(", "\nmade = pipeline("), scope)
    return scope["made"]


def test_without_a_network_it_pretrains_a_backbone_and_fine_tunes_it_on_other_classes(plain_run):
    folder, printed = plain_run
    pretrained = AutoModelForImageClassification.from_pretrained(folder / "backbone")
    soup = AutoModelForImageClassification.from_pretrained(folder)
    assert list(pretrained.config.id2label.values()) == ["0", "1", "2", "3", "4"]
    assert list(soup.config.id2label.values()) == ["5", "6", "7", "8", "9"]
    rows = [line[:14].strip() for line in printed.splitlines()]
    for row in ("member 0", "member 1", "members' mean", "ensemble", "soup"):
        assert row in rows
    assert scores(pipeline("image-classification", model=str(folder))).keys() == {"5", "6", "7", "8", "9"}


def test_a_soup_of_adapters_and_the_merged_backbone_answer_alike(adapter_run):
    folder, printed = adapter_run
    assert not (folder / "model.safetensors").exists()
    adapted = run_what_was_printed(printed)
    merged = pipeline("image-classification", model=str(folder / "merged"))
    assert scores(adapted) == pytest.approx(scores(merged), abs=1e-5)


def test_what_averaging_the_two_matrices_apart_leaves_out_is_measured(adapter_run, finetune, tmp_path):
    folder, printed = adapter_run
    error = json.loads((folder / "all_results.json").read_text())["lora_averaging_error"]
    # Different A, so far off.
    assert 0.05 < error < 2 and f"{error:.1%}" in printed
    for index, (a, b) in enumerate([(1.0, 2.0), (3.0, 6.0)]):
        member = tmp_path / "_members" / f"member_{index}"
        member.mkdir(parents=True)
        matrices = {"x.lora_A.weight": torch.full((1, 3), a), "x.lora_B.weight": torch.full((2, 1), b)}
        save_file(matrices, member / "adapter_model.safetensors")
    # mean(B)·mean(A) = 4·2 and mean(B·A) = (2 + 18) / 2.
    assert finetune.averaging_error(tmp_path, 2) == pytest.approx((10 - 8) / 10)


def trainer_of(finetune, folder, backbone, *flags):
    arguments = ["--model_name_or_path", str(backbone), "--output_dir", str(folder), *A_FEW_STEPS, *flags]
    return finetune.prepare(arguments)[0]


@pytest.mark.parametrize("flags", [(), ("--lora_rank", "2")], ids=["whole", "adapters"])
def test_only_the_head_learns_at_first_and_then_everything_does(finetune, backbone, tmp_path, flags):
    trainer = trainer_of(finetune, tmp_path, backbone, "--warmup_steps", "0", *flags)
    start = {name: p.detach().clone() for name, p in trainer.population.members[1].named_parameters()}
    trainer.add_callback(StopAt(2))
    trainer.train()
    after = dict(trainer.population.members[1].named_parameters())
    changed = {name for name, p in after.items() if not torch.equal(p, start[name])}
    assert changed and all("classifier" in name for name in changed)

    trainer = trainer_of(finetune, tmp_path, backbone, "--warmup_steps", "0", *flags)
    trainer.train()
    for member in trainer.population.members:
        changed = [not torch.equal(p, start[name]) for name, p in member.named_parameters() if p.requires_grad]
        # Of the adapters A moves once B has left zero.
        assert sum(changed) > 0.9 * len(changed)


def test_each_block_has_its_rate_and_each_group_its_member(finetune, backbone, tmp_path):
    trainer = trainer_of(finetune, tmp_path, backbone, "--layer_decay", "0.5", "--learning_rate", "0.01")
    optimizer = trainer.create_optimizer()
    names = {p: (index, name) for index, member in trainer.population for name, p in member.named_parameters()}
    rates = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            index, name = names.pop(parameter)
            assert index == group["member"]
            rates[name] = group["lr"]
    assert not names
    last = max(int(name.split(".")[2]) for name in rates if ".layers." in name)
    assert rates["classifier.weight"] == 0.01
    assert rates["vit.layernorm.weight"] == pytest.approx(0.01 / 2)
    for number in range(last + 1):
        own = {value for name, value in rates.items() if f".layers.{number}." in name}
        assert list(own) == pytest.approx([0.01 / 2 ** (2 + last - number)])
    assert rates["vit.embeddings.cls_token"] == pytest.approx(0.01 / 2 ** (3 + last))


def test_stopping_while_only_the_head_learns_and_resuming_changes_nothing(finetune, backbone, tmp_path):
    undisturbed = trainer_of(finetune, tmp_path / "whole", backbone)
    undisturbed.train()
    stopped = trainer_of(finetune, tmp_path / "parts", backbone, "--save_strategy", "steps", "--save_steps", "1")
    stopped.add_callback(StopAt(1))
    stopped.train()
    resumed = trainer_of(finetune, tmp_path / "parts", backbone)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-1"))
    for name, value in undisturbed.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_members_may_start_with_a_head_of_their_own_on_one_backbone(finetune, backbone, tmp_path):
    first, second = trainer_of(finetune, tmp_path, backbone, "--same_init", "False").population.members
    equal = {
        name: torch.equal(p, q) for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True)
    }
    assert [name for name, same in equal.items() if not same] == ["classifier.weight"]


@pytest.mark.parametrize(
    ("architecture", "head"), [("test_vit", "head"), ("test_convnext", "head.fc"), ("test_efficientnet", "classifier")]
)
def test_the_head_of_a_timm_model_is_found(finetune, train_vit, architecture, head):
    model = train_vit.timm_recipe(architecture, ["a", "b"], None, whole_image=True).model_init()
    heads = finetune.head_names(model)
    assert heads == [f"timm_model.{head}"]
    blocks = finetune.blocks_to_head([name for name, _ in model.named_parameters()], heads)
    assert {name for name, depth in blocks.items() if depth == 0} == {f"{heads[0]}.weight", f"{heads[0]}.bias"}
    depths = list(dict.fromkeys(depth for depth in blocks.values() if depth))
    assert depths == sorted(depths, reverse=True) and len(depths) > 3


def test_a_timm_backbone_with_batch_norm_becomes_a_soup_that_timm_loads(run_here, timm_backbone):
    folder, _ = run_here("--model_name_or_path", str(timm_backbone))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        in_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
        in_transformers = AutoModelForImageClassification.from_pretrained(folder).eval()(images).logits
    assert in_timm.shape == (2, 10)
    torch.testing.assert_close(in_timm, in_transformers)
    assert any("running_mean" in name for name in load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer_decay", "0"], "--layer_decay must be above 0"),
        (["--head_only", "1"], "--head_only must be a part of the run"),
        (["--head_only", "0.8"], "must be at most --shuffle_stop"),
        (["--lora_rank", "0"], "--lora_rank must be at least 1"),
        (["--merge"], "--merge goes with --lora_rank"),
        (["--data_dir", "photos"], "needs --model_name_or_path"),
        (["--model_name_or_path", "no/such-model"], "Could not load an image classifier from 'no/such-model'"),
    ],
)
def test_a_users_mistake_is_one_line_and_a_failed_exit(finetune, monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr(
        sys, "argv", ["finetune_backbone.py", "--use_cpu", "--output_dir", str(tmp_path / "x"), *flags]
    )
    with pytest.raises(SystemExit) as ended:
        finetune.main()
    line = ended.value.code
    assert line.startswith("finetune_backbone.py: error: ") and message in line and "\n" not in line
    assert not (tmp_path / "x").exists()


def test_adapters_of_a_timm_backbone_run_as_printed(run_here, train_vit, finetune, tmp_path):
    recipe = train_vit.timm_recipe("test_vit", ["a", "b"], None, whole_image=True)
    finetune.export_model(recipe.model_init(), tmp_path / "vit", processing_class=recipe.processor)
    _, printed = run_here("--model_name_or_path", str(tmp_path / "vit"), "--lora_rank", "2")
    assert len(scores(run_what_was_printed(printed))) == 5


def test_adapters_are_refused_where_batch_norm_would_change_under_them(run_here, timm_backbone):
    with pytest.raises(SystemExit, match=r"--lora_rank does not go with .* BatchNorm"):
        run_here("--model_name_or_path", str(timm_backbone), "--lora_rank", "2")


def test_a_schedule_that_watches_the_loss_has_no_phase_for_the_head(run_here, backbone, tmp_path):
    flags = ("--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch")
    with pytest.raises(SystemExit, match="--head_only does not go with --lr_scheduler_type"):
        run_here("--model_name_or_path", str(backbone), *flags, "--metric_for_best_model", "loss")


def test_help_lists_every_option_with_its_group(finetune):
    groups = [finetune.BackboneArguments, finetune.DataArguments, finetune.FinetuneConfig]
    shown = finetune.CommandLine(groups, finetune.__doc__).format_help()
    for expected in ("--layer_decay", "--head_only", "--lora_rank", "--shuffle_schedule", "--learning_rate"):
        assert expected in shown
    titles = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert [title.split()[0].strip(":,") for title in titles] == [
        *("options", "backbone", "data", "population", "training", "saving", "all")
    ]


@pytest.mark.parametrize("flags", [(), ("--lora_rank", "2")], ids=["whole", "adapters"])
def test_a_dry_run_says_what_the_run_costs_and_stops(run_here, backbone, flags):
    folder, printed = run_here("--model_name_or_path", str(backbone), *flags, "--dry_run")
    assert list(folder.iterdir()) == []
    assert "2 members × 4 steps of 16 samples, 1 process" in printed and "loaded back by" in printed
