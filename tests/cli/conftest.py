"""Folders of models and of a run, of which tests get copies that they may spoil."""

import shutil

import pytest


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """Two models of each kind, images and a run, of which each test gets copies."""
    import timm
    import torch
    from hub import tiny_runs
    from peft import LoraConfig, get_peft_model
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    from hf_wash.hub import export_model

    place = tmp_path_factory.mktemp("originals")
    labels = {"id2label": {0: "blue", 1: "red"}, "label2id": {"blue": 0, "red": 1}}
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = ViTForImageClassification(ViTConfig(num_attention_heads=2, **sizes, **labels))
        export_model(model, place / name, processing_class=processor, check=False)
        model.config._name_or_path = str(place / "a")
        adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        export_model(adapter, place / f"adapter_{name}", check=False)
        export_model(timm.create_model("test_vit", num_classes=2), place / f"timm_{name}", check=False)
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (place / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 24), colour).save(place / "photos" / name / f"{number}.png")
    tiny_runs.finished_run(place / "run", save_strategy="steps", save_steps=2)
    return place


@pytest.fixture
def place(originals, tmp_path):
    shutil.copytree(originals, tmp_path / "it")
    return tmp_path / "it"
