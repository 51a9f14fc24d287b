"""
The Python in the documentation runs: the blocks of a page in their order, in one namespace, in a folder of their own,
with a small stand-in for what the page takes for granted (a model, a data set, a run).
"""

import dataclasses
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from small_population import TEST, TRAIN, Digits, options, population, started
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import hf_wash


ROOT = Path(__file__).parents[2]

# Pages whose blocks another test runs, with more to say of them.
RUN_BY = {
    "README.md": "tests/trainer/test_readme.py",
    "docs/quick_start.md": "tests/trainer/test_readme.py",
    "docs/your_own_trainer.md": "tests/trainer/test_own_trainer_docs.py",
    "CONTRIBUTING.md": "tests/trainer/test_contributing.py",
}
# Blocks, by page and number from 0, that are only compiled, and why. All others run.
ONLY_COMPILED: dict[tuple[str, int], str] = {}


def blocks_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def pages() -> list[str]:
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found if "```python" in path.read_text())


def arguments(folder, **overrides):
    given = {"population_size": 2, "report": False, "max_steps": 2, **overrides}
    return hf_wash.WashConfig(**options(folder, **given))


# ---- What pages take for granted -----------------------------------------------------------------------------------


LENGTH = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The folder of a run: the soup, its members, two checkpoints."""
    folder = tmp_path_factory.mktemp("docs") / "run"
    trainer = population(folder, size=2, **LENGTH)
    trainer.train()
    trainer.save_model()
    trainer.save_members()
    return folder


def data(request):
    return {"model": started(), "train": TRAIN, "test": TEST, "WashTrainer": hf_wash.WashTrainer}


def training(request):
    pytest.importorskip("trl")
    return {**data(request), "args": arguments("run", population_size=4)}


def replaying(request):
    shutil.copytree(request.getfixturevalue("small_run"), "run")
    return {**data(request), "args": arguments("run", shuffle_probability=0.3, **LENGTH)}


def diagnosing(request):
    return {**data(request), "data": TRAIN, "args": arguments("run", eval_strategy="no")}


def worse(request):
    args = arguments("run", logging_steps=1, eval_steps=1)
    given = {**data(request), "train": Digits(0, 64), "args": args}
    given["trainer"] = hf_wash.WashTrainer(started(), args, train_dataset=given["train"], eval_dataset=TEST)
    given["trainer"].train()
    return given


def souping(request):
    shutil.copytree(request.getfixturevalue("small_run"), "run")
    batches = [
        {name: torch.stack([TRAIN[i][name] for i in range(start, start + 8)]) for name in ("pixel_values", "labels")}
        for start in (0, 8)
    ]
    held_out = [TEST[index] for index in range(20)]

    def correct_on(model, examples):
        images = torch.stack([example["pixel_values"] for example in examples])
        labels = torch.stack([example["labels"] for example in examples])
        return float((model(pixel_values=images).logits.argmax(-1) == labels).float().mean())

    images = batches[0]["pixel_values"]
    return {"train_dataloader": batches, "correct_on": correct_on, "held_out": held_out, "images": images}


def shuffling(request):
    members = [nn.Linear(10, 2) for _ in range(2)]
    return {
        "members": members,
        "optimizers": [torch.optim.SGD(member.parameters(), lr=0.1) for member in members],
        "batches": range(3),
    }


def adapters(request):
    peft = pytest.importorskip("peft")
    from hf_wash.hub import export_model

    small = arguments("run", eval_strategy="no")
    backbone = started()
    backbone.save_pretrained("backbone")
    backbone = type(backbone).from_pretrained("backbone")
    return {
        **data(request), "LoraConfig": peft.LoraConfig, "get_peft_model": peft.get_peft_model, "backbone": backbone,
        "WashConfig": lambda folder, **given: dataclasses.replace(small, output_dir=folder, **given),
        "export_model": export_model,
    }  # fmt: skip


def glyphs(request):
    """The preset with a few images of each class."""
    pytest.importorskip("matplotlib")
    import datasets
    import glyph_data

    patch = request.getfixturevalue("monkeypatch")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(Path.cwd() / "cache"))
    few = {"train_size": 60, "test_size": 60}
    preset = glyph_data.PRESETS["glyphs-short"]
    small = dataclasses.replace(preset, options=dataclasses.replace(preset.options, **few))
    patch.setitem(glyph_data.PRESETS, "glyphs-short", small)
    patch.setattr(glyph_data, "GlyphOptions", lambda **given: dataclasses.replace(small.options, **{**given, **few}))
    return {}


def vit_s(request):
    """ViT-S/16 with 1,000 classes, without memory."""
    shape = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}
    with torch.device("meta"):
        return {"model": ViTForImageClassification(ViTConfig(**shape))}


def nothing(request):
    return {}


SETUPS = {
    "docs/costs.md": vit_s,
    "docs/finetuning.md": adapters,
    "docs/glyphs.md": glyphs,
    "docs/gpus.md": nothing,
    "docs/peers.md": nothing,
    "docs/replay.md": replaying,
    "docs/report.md": diagnosing,
    "docs/shuffle.md": shuffling,
    "docs/soups.md": souping,
    "docs/training.md": training,
    "docs/ways_in.md": nothing,
    "docs/when_the_soup_is_worse.md": worse,
}
# What is smaller here than on the page.
SMALLER = {"docs/replay.md": [("checkpoint-400", "checkpoint-4")]}


# ---- What has to come out ------------------------------------------------------------------------------------------


def all_three_ways_end_in_a_soup(names, printed):
    loaded = ViTForImageClassification.from_pretrained("my-soup")
    members = [ViTForImageClassification.from_pretrained(f"my-soup/_members/member_{i}") for i in range(3)]
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, sum(member.state_dict()[name] for member in members) / 3)
    assert Path("my-other-soup/model.safetensors").exists()
    inputs = torch.randn(500, 10)
    assert (names["soup"](inputs).argmax(-1) == (inputs.sum(1) > 0)).float().mean() > 0.9


def a_soup_of_members_is_the_soup_of_the_run(names, printed):
    saved = ViTForImageClassification.from_pretrained("run").state_dict()
    mean = names["uniform_soup"](names["members"])
    for name, value in saved.items():
        torch.testing.assert_close(mean[name], value)
    with pytest.raises(RuntimeError, match="Missing key"):  # as the page says of paths
        names["model"].load_state_dict(names["uniform_soup"](sorted(Path("run/_members").glob("*"))))
    assert names["probabilities"].shape == (8, 10)


def the_table_of_costs_is_what_the_code_counts(names, printed):
    counted = re.findall(r"N = (\d+): ([\d,]+) values, ([\d,.]+) kB", printed)
    table = (ROOT / "docs/costs.md").read_text()
    assert len(counted) == 4
    for members, values, kilobytes in counted:
        n, parameters = int(members), 22_050_664
        kilobytes = f"{float(kilobytes):.3g}"
        state, checkpoint = (f"{round(size * parameters / 1e6):,} MB" for size in (16 * n, 4 * (1 + 3 * n)))
        assert f"| {n} | {n} | {state} | {values} | {kilobytes} kB | {checkpoint} |" in table
    assert sum(p.numel() for p in names["model"].parameters()) == 22_050_664


def as_many_fit_as_the_table_says(names, printed):
    model = nn.Linear(999, 1000)  # a million numbers
    # 16 bytes for each member and 8 for the soup; 16 with several processes.
    assert names["members_that_fit"](model, 72e6) == 4 and names["members_that_fit"](model, 71e6) == 3
    assert names["members_that_fit"](model, 80e6, processes=2) == 4
    assert names["members_that_fit"](model, 79e6, processes=2) == 3
    model.weight.requires_grad_(False)  # held once
    assert names["members_that_fit"](model, 5e6) > 50


CHECKS = {
    "docs/ways_in.md": all_three_ways_end_in_a_soup,
    "docs/soups.md": a_soup_of_members_is_the_soup_of_the_run,
    "docs/costs.md": the_table_of_costs_is_what_the_code_counts,
    "docs/gpus.md": as_many_fit_as_the_table_says,
    "docs/replay.md": lambda names, printed: printed.startswith("identical") or pytest.fail(printed),
}


# ---- The tests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", SETUPS)
def test_the_blocks_of_a_page_run(page, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("blocks_" + Path(page).stem)  # dataclasses look their module up by its name
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(SETUPS[page](request))
    capsys.readouterr()
    for number, block in enumerate(blocks_of(page)):
        for large, small in SMALLER.get(page, ()):
            assert large in block
            block = block.replace(large, small)
        code = compile(block, f"{page}, block {number}", "exec")
        if (page, number) not in ONLY_COMPILED:
            exec(code, vars(module))
    if page in CHECKS:
        CHECKS[page](vars(module), capsys.readouterr().out)


def test_every_page_with_python_is_run():
    assert set(pages()) == {*SETUPS, *RUN_BY}
    for page, test in RUN_BY.items():
        assert Path(page).name in (ROOT / test).read_text(), f"{test} does not mention {page}"
    for page, number in ONLY_COMPILED:
        assert number < len(blocks_of(page))
