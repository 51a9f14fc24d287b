"""Loads models from the Hub that HF_ENDPOINT names with every loader and prints their logits as JSON."""

import json
import sys

import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_wash import Ensemble
from hf_wash.hub import load_model


def images(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def logits_of(model, side: int) -> list:
    with torch.no_grad():
        answer = model.eval()(images(side))
    return (answer if isinstance(answer, torch.Tensor) else answer.logits).tolist()


def main() -> None:
    found = {
        "transformers": logits_of(AutoModelForImageClassification.from_pretrained("user/vits"), 16),
        "load_model": logits_of(load_model("user/vits"), 16),
        "ensemble": logits_of(Ensemble.from_pretrained("user/vits"), 16),
        "branch": logits_of(AutoModelForImageClassification.from_pretrained("user/branched", revision="other"), 16),
        "timm": logits_of(timm.create_model("hf_hub:user/resnets", pretrained=True), 32),
        "timm by transformers": logits_of(AutoModelForImageClassification.from_pretrained("user/resnets"), 32),
        "timm ensemble": logits_of(Ensemble.from_pretrained("user/resnets"), 32),
    }
    picture = Image.new("RGB", (20, 30), "red")
    for name in ("user/vits", "user/resnets"):
        found[f"pipeline {name}"] = pipeline("image-classification", model=name)(picture)
        AutoImageProcessor.from_pretrained(name)
    print(json.dumps(found))


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else None
