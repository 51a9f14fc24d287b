"""The classifiers that are compared: torchvision's layers in the shapes that the papers use for small images."""

import timm
import torch
from glyph_data import GlyphRecipe
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import vgg16_bn

from .setting import Setting


class Classifier(nn.Module):
    """
    A body that makes logits, as the Trainer wants it.

    Args:
        body (`nn.Module`):
            Images of shape `(batch, 3, height, width)` to logits of shape `(batch, num_labels)`, or to what has such.
    """

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        output = self.body(pixel_values)
        logits = getattr(output, "logits", output)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def resnet(width: int, depths: tuple[int, ...], num_labels: int) -> nn.Sequential:
    """A ResNet for small images: a 3×3 convolution, then stages of which each halves the sides and doubles the width."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    channels = width
    for stage, depth in enumerate(depths):
        out = width * 2**stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            shortcut = None
            if stride != 1 or channels != out:
                shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            layers.append(BasicBlock(channels, out, stride, shortcut))
            channels = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_labels)]
    body = nn.Sequential(*layers)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body


def make_model(setting: Setting, label_names: list[str]) -> Classifier:
    """The setting's model, with weights drawn from torch's global generator."""
    num_labels = len(label_names)
    if setting.model == "small":
        return Classifier(GlyphRecipe(steps=1).build_model(label_names))
    if setting.model == "resnet18":
        return Classifier(resnet(setting.width, (2, 2, 2, 2), num_labels))
    if setting.model == "vgg16":
        body = [vgg16_bn().features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_labels)]
        return Classifier(nn.Sequential(*body))
    return Classifier(timm.create_model("resnet50", num_classes=num_labels))
