"""Population runs small enough to train in a second, for what comes after training."""

from pathlib import Path

import timm
import torch
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_wash import WashConfig, WashTrainer


NAMES = ["ant", "bee", "cat"]


class Noise(torch.utils.data.Dataset):
    """Images of nothing, with a class each."""

    def __init__(self, size: int, side: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(size, 3, side, side, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": index % len(NAMES)}


def labels():
    return {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}


def vit():
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        **labels(),
    )  # fmt: skip
    return ViTForImageClassification(config), ViTImageProcessor(size={"height": 16, "width": 16})


def timm_resnet():
    cfg = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    config = TimmWrapperConfig(architecture="test_resnet", pretrained_cfg=cfg, **labels())
    model = TimmWrapperForImageClassification(config)
    model.timm_model = timm.create_model("test_resnet", num_classes=len(NAMES))
    return model, None


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(folder: Path | str, kind: str = "vit", callbacks=None, **options) -> WashTrainer:
    torch.manual_seed(0)
    model, processor = {"vit": vit, "timm": timm_resnet}[kind]()
    side = 16 if kind == "vit" else 32
    defaults = {
        "population_size": 2, "max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1, "use_cpu": True,
        "shuffle_probability": 0.5, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "eval_strategy": "steps", "eval_steps": 2, "dataloader_pin_memory": False, "report": False,
    }  # fmt: skip
    return WashTrainer(
        model,
        WashConfig(str(folder), **{**defaults, **options}),
        train_dataset=Noise(16, side),
        eval_dataset=Noise(6, side),
        compute_metrics=accuracy,
        processing_class=processor,
        callbacks=callbacks,
    )


def finished_run(folder: Path | str, kind: str = "vit", **options) -> WashTrainer:
    """As a user's script leaves it: soup, members, metrics, state and card."""
    run = trainer(folder, kind, **options)
    trained = run.train()
    run.save_model()
    run.save_members()
    run.save_metrics("all", {**trained.metrics, **run.evaluate()})
    run.save_state()
    run.create_model_card(dataset="noise")
    return run
