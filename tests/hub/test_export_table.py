"""
The table of `docs/hub_compatibility.md`: populations of many families, trained, exported and loaded by every loader in
a fresh process. `HF_WASH_WRITE_TABLE=1 pytest tests/hub/test_export_table.py` writes the table into the page.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    ConvNextImageProcessor,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_wash import WashConfig, WashTrainer
from hf_wash.hub import export_model
from hf_wash.soup import uniform_soup


pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "hub_compatibility.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
TOLERANCE = 1e-5
NAMES = ["ant", "bee", "cat", "dog"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}


def in_timm(architecture, size=64, channels=3, **model_args):
    def make():
        config = TimmWrapperConfig(architecture=architecture, model_args=model_args or None, **LABELS)
        # How images are prepared for it, as a user who trains at this size would say.
        config.pretrained_cfg = {"input_size": [channels, size, size]}
        return TimmWrapperForImageClassification(config)

    return make, size, channels, None


def in_transformers(model_class, config_class, processor, size=32, **options):
    return lambda: model_class(config_class(**options, **LABELS)), size, 3, processor


SQUARE = ViTImageProcessor(size={"height": 32, "width": 32})
TINY = {"depth": 2, "embed_dim": 24, "num_heads": 2}

# Row of the table: (library, family, what is special), the model.
FAMILIES = {
    ("timm", "ResNet", "`resnet10t`, BatchNorm"): in_timm("resnet10t"),
    ("timm", "ResNet", "`test_resnet`, one channel (`in_chans=1`)"): in_timm("test_resnet", channels=1, in_chans=1),
    ("timm", "ConvNeXt", "`test_convnext`"): in_timm("test_convnext"),
    ("timm", "EfficientNet", "`test_efficientnet`, BatchNorm with activation"): in_timm("test_efficientnet"),
    ("timm", "MobileNetV3", "`mobilenetv3_small_050`"): in_timm("mobilenetv3_small_050"),
    ("timm", "ViT", "`vit_tiny_patch16_224` at `img_size=64`"): in_timm("vit_tiny_patch16_224", img_size=64, **TINY),
    ("timm", "ViT", "`vit_small_patch16_rope_224`, rotary positions in non-persistent buffers"): in_timm(
        "vit_small_patch16_rope_224", img_size=64, depth=2, embed_dim=48, num_heads=2
    ),
    ("timm", "EVA-02", "`eva02_tiny_patch14_224`, rotary positions in non-persistent buffers"): in_timm(
        "eva02_tiny_patch14_224", size=56, img_size=56, depth=2
    ),
    ("timm", "BEiT", "`beit_base_patch16_224`, relative positions in non-persistent buffers"): in_timm(
        "beit_base_patch16_224", img_size=64, **TINY
    ),
    ("timm", "Swin", "`swin_tiny_patch4_window7_224` at `img_size=64`, windows of 4"): in_timm(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 2, 2],
    ),
    ("timm", "MobileViT", "`mobilevit_xxs`"): in_timm("mobilevit_xxs"),
    ("transformers", "ViT", ""): in_transformers(
        ViTForImageClassification,
        ViTConfig,
        SQUARE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    ),
    ("transformers", "ResNet", "BatchNorm"): in_transformers(
        ResNetForImageClassification, ResNetConfig, SQUARE, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]
    ),
    ("transformers", "ConvNextV2", ""): in_transformers(
        ConvNextV2ForImageClassification,
        ConvNextV2Config,
        ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875),
        size=64,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
    ),
    ("transformers", "Swinv2", "relative positions in non-persistent buffers"): in_transformers(
        Swinv2ForImageClassification,
        Swinv2Config,
        SQUARE,
        image_size=32,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
}

# Runs where nothing of this library is imported: just the loaders, as a stranger has them.
LOAD = """
import json, sys
import timm, torch
from PIL import Image
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline
from transformers.utils import logging

logging.set_verbosity_error(); logging.disable_progress_bar()
torch.set_num_threads(1)
results = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected, row = load_file(folder.parent.parent / "expected" / (folder.name + ".safetensors")), {}
    images = expected["images"]

    def differs(model, inputs=None, wanted="logits"):
        with torch.no_grad():
            output = model.eval()(images if inputs is None else inputs)
        output = output if isinstance(output, torch.Tensor) else output.logits
        return float((output - expected[wanted]).abs().max())

    with safe_open(folder / "model.safetensors", "pt") as weights:
        row["safe_open"] = weights.metadata()["format"]
    model = AutoModelForImageClassification.from_pretrained(folder)
    row["from_pretrained"] = differs(model)
    row["names"] = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if "pretrained_cfg" in json.loads((folder / "config.json").read_text()):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        row["create_model"] = differs(model)
        assert list(model.pretrained_cfg["label_names"]) == row["names"]
    if images.shape[1] == 3:
        answers = pipeline("image-classification", model=str(folder), device="cpu")(
            Image.open(folder.parent.parent / "picture.png"), top_k=len(row["names"])
        )
        scores = {answer["label"]: answer["score"] for answer in answers}
        wanted = expected["scores"]
        row["pipeline"] = max(abs(scores[name] - float(wanted[i])) for i, name in enumerate(row["names"]))
    results[folder.name] = row
assert not [name for name in sys.modules if name.startswith("hf_wash")]
print(json.dumps(results))
"""


class Noise(Dataset):
    def __init__(self, size, channels):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(24, channels, size, size, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": index % len(NAMES)}


def train_two_steps(make, size, channels, folder):
    """A population of two, two steps of WASH each; the soup and the members."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        # Some timm heads start at zero: two steps would leave logits too small to show a difference.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    args = WashConfig(
        str(folder),
        population_size=2,
        shuffle_probability=0.5,
        max_steps=2,
        per_device_train_batch_size=6,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = WashTrainer(model, args, train_dataset=Noise(size, channels))
    trainer.train()
    return trainer.model, trainer.population.members


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For each row what each loader showed, in one fresh process."""
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import AutoImageProcessor

    root = tmp_path_factory.mktemp("table")
    (root / "expected").mkdir()
    picture = Image.effect_noise((80, 60), 90).convert("RGB")
    picture.save(root / "picture.png")
    rows = {}
    for number, (key, (make, size, channels, processor)) in enumerate(FAMILIES.items()):
        soup, members = train_two_steps(make, size, channels, root / "runs" / str(number))
        average = uniform_soup(members)
        assert any(not torch.equal(average[name], value) for name, value in members[0].state_dict().items()), (
            f"the members of {key} do not differ"
        )
        folder = export_model(soup, root / "exports" / f"{number:02d}", processing_class=processor, check=False)
        images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
        expected = {"images": images}
        with torch.no_grad():
            soup.eval()
            expected["logits"] = soup(images).logits
            if channels == 3:
                # What the images become is the processor's affair; what the model makes of them is the soup's.
                prepared = (processor or AutoImageProcessor.from_pretrained(folder))(picture, return_tensors="pt")
                assert prepared["pixel_values"].shape[-2:] == (size, size)
                expected["scores"] = soup(prepared["pixel_values"]).logits.softmax(-1)[0]
        save_file(expected, root / "expected" / f"{folder.name}.safetensors")
        rows[folder.name] = key
    completed = subprocess.run(
        [sys.executable, "-c", LOAD, str(root / "exports")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,  # not where this library could be imported from by accident
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    shown = json.loads(completed.stdout.splitlines()[-1])
    return {rows[name]: row for name, row in shown.items()}


def table(results) -> str:
    lines = [
        "| library | family | model | `safe_open` | `from_pretrained` | `pipeline` | `timm.create_model` |",
        "|---|---|---|---|---|---|---|",
    ]
    for (library, family, special), row in results.items():
        equal = [
            "equal" if row.get(loader, 1.0) <= TOLERANCE else "**differs**" if loader in row else "—"
            for loader in ("from_pretrained", "pipeline", "create_model")
        ]
        opened = "yes" if row["safe_open"] == "pt" else "no"
        lines.append(f"| {library} | {family} | {special} | {opened} | {' | '.join(equal)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("key", FAMILIES, ids=lambda key: " ".join(part for part in key[:3] if part))
def test_every_loader_gives_the_soups_logits_and_class_names(key, results):
    row = results[key]
    assert row["safe_open"] == "pt"
    assert row["names"] == NAMES
    assert row["from_pretrained"] <= TOLERANCE
    if key[0] == "timm":
        assert row["create_model"] <= TOLERANCE
    if "in_chans" not in key[2]:
        assert row["pipeline"] <= TOLERANCE


def test_the_table_covers_what_is_claimed():
    families = {library: {family for other, family, _ in FAMILIES if other == library} for library, *_ in FAMILIES}
    assert len(families["timm"]) >= 6 and len(families["transformers"]) >= 4


def test_the_page_shows_the_table(results):
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    shown, _, after = rest.partition(END)
    current = table(results)
    if os.environ.get("HF_WASH_WRITE_TABLE"):
        PAGE.write_text(f"{before}{BEGIN}\n{current}\n{END}{after}", encoding="utf-8")
    else:
        assert shown.strip() == current, "run this file with HF_WASH_WRITE_TABLE=1"
