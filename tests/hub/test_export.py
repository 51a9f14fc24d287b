"""`export_model`: what is written, what is kept, what the check finds, and what is refused."""

import json
import random

import numpy as np
import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_wash.hub import check_export, export_model, load_model
from hf_wash.soup import uniform_soup


NAMES = ["cat", "dog", "eel"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}


def vit(seed=0, **options):
    torch.manual_seed(seed)
    config = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 32,
        "patch_size": 8,
        **LABELS,
        **options,
    }
    return ViTForImageClassification(ViTConfig(**config))


def resnet(seed=0):
    torch.manual_seed(seed)
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **LABELS))


def wrapped(architecture="test_resnet", seed=0, **model_args):
    torch.manual_seed(seed)
    config = TimmWrapperConfig(architecture=architecture, model_args=model_args or None, num_labels=3, **LABELS)
    model = TimmWrapperForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # timm starts some heads at zero
    return model


def small_timm_vit(seed=0, **options):
    return wrapped(
        "vit_tiny_patch16_224", seed, **{"img_size": 48, "depth": 1, "embed_dim": 24, "num_heads": 2, **options}
    )


def lora(backbone, **options):
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], **options}
    model = get_peft_model(backbone, LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model, images):
    with torch.no_grad():
        output = model.eval()(images)
    return output if isinstance(output, torch.Tensor) else output.logits


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))


# --- each kind --------------------------------------------------------------------------------------------------------


def test_a_transformers_model_is_taken_by_from_pretrained_and_pipeline(tmp_path):
    model = vit()
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    export_model(model, tmp_path, processing_class=processor)
    assert {file.name for file in tmp_path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    }
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    answer = pipeline("image-classification", model=str(tmp_path), device="cpu")(picture(), top_k=3)
    expected = logits(model, processor(picture(), return_tensors="pt")["pixel_values"]).softmax(-1)[0]
    assert [entry["label"] for entry in answer] == [NAMES[index] for index in expected.argsort(descending=True)]
    np.testing.assert_allclose([entry["score"] for entry in answer], expected.sort(descending=True).values, atol=1e-6)


@pytest.mark.parametrize("bare", [False, True])
def test_a_timm_model_is_taken_by_timm_and_transformers_with_its_class_names(bare, tmp_path):
    model = small_timm_vit()
    images = torch.randn(2, 3, 48, 48)
    expected = logits(model, images)
    exported = model
    if bare:
        exported = model.timm_model
        exported.pretrained_cfg["label_names"] = NAMES
    export_model(exported, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    in_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    in_transformers = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(in_timm, images), expected)
    assert torch.equal(logits(in_transformers, images), expected)
    assert list(in_timm.pretrained_cfg["label_names"]) == NAMES
    assert in_transformers.config.id2label == dict(enumerate(NAMES))


def test_a_timm_model_without_class_names_is_exported_all_the_same(tmp_path):
    torch.manual_seed(0)
    export_model(timm.create_model("test_resnet", num_classes=4), tmp_path)
    assert "label_names" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_than_three_are_kept(channels, tmp_path):
    model = wrapped("test_resnet", in_chans=channels)
    export_model(model, tmp_path)
    images = torch.randn(1, channels, 64, 64)
    assert torch.equal(
        logits(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), images), logits(model, images)
    )


def test_timm_weights_carry_no_wrapper_prefix_and_model_args_all_but_the_classes(tmp_path):
    export_model(small_timm_vit(drop_path_rate=0.1), tmp_path)
    assert all(not name.startswith("timm_model.") for name in load_file(tmp_path / "model.safetensors"))
    model_args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert "num_classes" not in model_args
    assert model_args["img_size"] == [48, 48] and model_args["depth"] == 1 and model_args["drop_path_rate"] == 0.1


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_exported_as_one_or_merged(merge, tmp_path):
    backbone_folder = export_model(vit(), tmp_path / "backbone")
    images = torch.randn(2, 3, 32, 32)
    model = lora(AutoModelForImageClassification.from_pretrained(backbone_folder))
    expected = logits(model, images)
    export_model(model, tmp_path / "out", merge_adapter=merge)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    if merge:
        assert files == {"model.safetensors", "config.json"}
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert loaded.config.id2label == dict(enumerate(NAMES))
    else:
        assert files == {"adapter_model.safetensors", "adapter_config.json", "backbone_config.json"}
        loaded = PeftModel.from_pretrained(
            AutoModelForImageClassification.from_pretrained(backbone_folder), tmp_path / "out"
        )
    torch.testing.assert_close(logits(loaded, images), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(load_model(tmp_path / "out"), images), expected, atol=1e-6, rtol=0)
    assert logits(model, images).equal(expected), "exporting changed the model"


def test_a_soup_of_adapters_over_one_backbone_is_an_adapter(tmp_path):
    backbone_folder = export_model(vit(), tmp_path / "backbone")
    members = [lora(AutoModelForImageClassification.from_pretrained(backbone_folder)) for _ in range(3)]
    adapters = [
        {name: value for name, value in member.state_dict().items() if "lora_" in name or "modules_to_save" in name}
        for member in members
    ]
    soup = uniform_soup(adapters)
    export_model(members[0], tmp_path / "soup", state_dict=soup)
    loaded = PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(backbone_folder), tmp_path / "soup"
    )
    for name, value in soup.items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # The adapters of the members, read from disk, give the same soup as a file.
    for index, member in enumerate(members):
        export_model(member, tmp_path / f"member_{index}", check=False)
    from_disk = uniform_soup([tmp_path / f"member_{index}" for index in range(3)])
    written = load_file(tmp_path / "soup" / "adapter_model.safetensors")
    assert from_disk.keys() == written.keys() and all(torch.equal(from_disk[name], written[name]) for name in written)


def test_an_adapter_with_a_new_head_is_loaded_over_a_backbone_with_another_number_of_classes(tmp_path):
    backbone_folder = export_model(vit(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}), tmp_path / "backbone")
    backbone = AutoModelForImageClassification.from_pretrained(backbone_folder, ignore_mismatched_sizes=True, **LABELS)
    model = lora(backbone)
    images = torch.randn(2, 3, 32, 32)
    export_model(model, tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, images), logits(model, images))
    assert loaded.get_base_model().config.id2label == dict(enumerate(NAMES))


def test_an_adapter_on_a_wrapped_timm_backbone(tmp_path):
    backbone_folder = export_model(small_timm_vit(), tmp_path / "backbone")
    backbone = AutoModelForImageClassification.from_pretrained(backbone_folder)
    model = lora(backbone, target_modules=["qkv"], modules_to_save=["head"])
    images = torch.randn(2, 3, 48, 48)
    export_model(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_model(tmp_path / "adapter"), images), logits(model, images))
    export_model(model, tmp_path / "merged", merge_adapter=True)
    merged = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True)
    torch.testing.assert_close(logits(merged, images), logits(model, images), atol=1e-5, rtol=1e-5)


# --- the soup's weights in place of the model's own -------------------------------------------------------------------


@pytest.mark.parametrize("make", [vit, resnet, wrapped, small_timm_vit])
def test_given_weights_are_written_and_the_model_is_left_alone(make, tmp_path):
    members = [make(seed=seed) for seed in range(2)]
    soup = uniform_soup(members)
    model = members[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.config.problem_type = None
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    export_model(model, tmp_path, state_dict=soup)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all() and torch.equal(torch.get_rng_state(), states[2])
    assert all(module.training for module in model.modules())
    assert soup.keys() == before.keys(), "the given dictionary was changed"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = load_model(tmp_path)
    model.load_state_dict(soup)
    images = torch.randn(2, 3, 48 if make is small_timm_vit else 32, 48 if make is small_timm_vit else 32)
    torch.testing.assert_close(logits(loaded, images), logits(model, images))


def test_tied_weights_are_written_in_full_for_timm(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    first, second = model.layer1[0].bn1, model.layer1[0].bn2
    second.bias = first.bias
    model(torch.randn(4, 3, 64, 64))
    export_model(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(loaded.layer1[0].bn2.bias, first.bias)


@pytest.mark.parametrize("make", [vit, wrapped])
def test_half_precision_is_kept_and_passes_the_check(make, tmp_path):
    export_model(make().bfloat16(), tmp_path)
    assert {
        value.dtype for value in load_file(tmp_path / "model.safetensors").values() if value.is_floating_point()
    } == {torch.bfloat16}


def test_a_forward_that_mixed_precision_has_wrapped_does_not_fool_the_check(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    members = [vit(seed) for seed in range(2)]
    # One state for the whole process: another test's must not decide the precision of this one.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare_model(members[0], evaluation_mode=True)
    assert "forward" in vars(model)
    folder = export_model(model, tmp_path, state_dict=uniform_soup(members), check=False)
    differences = check_export(folder, model, state_dict=uniform_soup(members))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert differences["transformers"] <= 1e-6


def test_exporting_again_replaces_the_export_and_nothing_else(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    export_model(resnet(0), tmp_path, processing_class=ViTImageProcessor(size={"height": 32, "width": 32}))
    export_model(wrapped(seed=1), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    # A processor of the model that was there before would prepare images for the wrong one.
    assert not (tmp_path / "preprocessor_config.json").exists()
    export_model(resnet(2), tmp_path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(logits(load_model(tmp_path), images), logits(resnet(2), images))


# --- preprocessing of timm models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "processor, expected",
    [
        (
            ViTImageProcessor(size={"height": 40, "width": 48}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]),
            {"input_size": [3, 40, 48], "crop_mode": "squash", "crop_pct": 1.0, "mean": [0.1, 0.2, 0.3]},
        ),
        (
            ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.8, resample=3),
            {"input_size": [3, 64, 64], "crop_mode": "center", "crop_pct": 0.8, "interpolation": "bicubic"},
        ),
        (
            ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
            {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
        ),
        (
            TimmWrapperImageProcessor(
                {"input_size": (3, 96, 96), "mean": (0.1,) * 3, "std": (0.2,) * 3, "crop_pct": 0.7}
            ),
            {"input_size": [3, 96, 96], "crop_pct": 0.7, "mean": [0.1] * 3, "std": [0.2] * 3},
        ),
    ],
    ids=["squash", "crop", "unnormalised", "timm"],
)
def test_a_processor_is_put_into_the_terms_of_timm(processor, expected, tmp_path):
    export_model(wrapped(), tmp_path, processing_class=processor)
    written = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert {name: written[name] for name in expected} == expected
    assert "test_input_size" not in written
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    # A smooth image: the two ways to resize differ in the last bits of noise.
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64, 1).repeat(3, 2).astype(np.uint8)
    ours = loaded(Image.fromarray(ramp), return_tensors="pt")["pixel_values"]
    theirs = processor(Image.fromarray(ramp), return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 0.05


def test_the_configuration_of_the_wrapper_says_how_images_are_prepared(tmp_path):
    model = wrapped()
    model.config.pretrained_cfg = {"mean": [0.1] * 3, "std": [0.9] * 3, "input_size": [3, 56, 56], "crop_pct": 1.0}
    export_model(model, tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert tuple(loaded.data_config["mean"]) == (0.1,) * 3
    assert loaded(picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, 56, 56)


@pytest.mark.parametrize(
    "processor, message",
    [
        (ViTImageProcessor(do_rescale=False), "does not rescale"),
        (ViTImageProcessor(rescale_factor=1.0), "rescales by 1.0"),
        (ViTImageProcessor(size={"shortest_edge": 32}), "resizes to"),
        (ViTImageProcessor(size={"height": 64, "width": 64}), "takes .48, 48. only"),
    ],
)
def test_preprocessing_that_timm_cannot_express_is_refused_before_anything_is_written(processor, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(small_timm_vit(), tmp_path / "out", processing_class=processor)
    assert not (tmp_path / "out").exists()


# --- the check --------------------------------------------------------------------------------------------------------


def change_config(folder, change):
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_the_check_names_every_loader_it_tried(tmp_path):
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    export_model(vit(), tmp_path / "hf", processing_class=processor)
    assert check_export(tmp_path / "hf", vit(), processing_class=processor).keys() == {
        "transformers",
        "image_processor",
        "pipeline",
    }
    export_model(wrapped(), tmp_path / "timm")
    assert check_export(tmp_path / "timm", wrapped()).keys() == {"safetensors", "transformers", "timm", "pipeline"}


@pytest.mark.parametrize(
    "break_it, loader",
    [
        (lambda content: content["model_args"].pop("img_size"), "from_pretrained"),
        (lambda content: content["model_args"].update(num_classes=3), "from_pretrained cannot load it"),
        (lambda content: content.update(architecture="no_such_model"), "from_pretrained cannot load it"),
        (lambda content: content.update(label_names=["x", "y", "z"]), r"class names \['x', 'y', 'z'\]"),
        (lambda content: content["model_args"].update(num_heads=4), "from_pretrained gives logits that differ by"),
    ],
)
def test_a_broken_timm_export_fails_loudly(break_it, loader, tmp_path):
    model = small_timm_vit()
    export_model(model, tmp_path)
    change_config(tmp_path, break_it)
    with pytest.raises(RuntimeError, match=loader):
        check_export(tmp_path, model)


def test_wrong_weights_fail_loudly(tmp_path):
    model = wrapped()
    export_model(model, tmp_path / "timm")
    weights = load_file(tmp_path / "timm" / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1e-3}, tmp_path / "timm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=f"safe_open gives values of '{name}' that differ by 0.001"):
        check_export(tmp_path / "timm", model)
    save_file(weights, tmp_path / "timm" / "model.safetensors")
    with pytest.raises(RuntimeError, match="without the metadata"):
        check_export(tmp_path / "timm", model)
    export_model(vit(0), tmp_path / "hf")
    with pytest.raises(
        RuntimeError, match=r"AutoModelForImageClassification\.from_pretrained gives logits that differ"
    ):
        check_export(tmp_path / "hf", vit(1))
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights.pop("classifier.bias")
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"missing keys: classifier\.bias"):
        check_export(tmp_path / "hf", vit(0))


def test_a_wrong_processor_fails_loudly(tmp_path):
    export_model(vit(), tmp_path, processing_class=ViTImageProcessor(size={"height": 32, "width": 32}))
    other = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.0, 0.0, 0.0])
    with pytest.raises(RuntimeError, match=r"AutoImageProcessor\.from_pretrained gives images that differ"):
        check_export(tmp_path, vit(), processing_class=other)


def test_a_wrong_adapter_fails_loudly(tmp_path):
    model = lora(vit())
    export_model(model, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name: value * 1.5 for name, value in weights.items()},
        tmp_path / "adapter_model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(RuntimeError, match=r"PeftModel.from_pretrained gives logits that differ"):
        check_export(tmp_path, model)


def test_a_diverged_model_is_exported_like_any_other(tmp_path):
    for make in (vit, wrapped):
        model = make()
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        export_model(model, tmp_path / make.__name__)


def test_an_example_takes_the_place_of_the_noise(tmp_path):
    seen = []

    class Watched(ViTForImageClassification):
        def forward(self, pixel_values=None, **kwargs):
            seen.append(tuple(pixel_values.shape))
            return super().forward(pixel_values, **kwargs)

    torch.manual_seed(0)
    model = Watched(vit().config)
    export_model(model, tmp_path, example={"pixel_values": torch.zeros(5, 3, 32, 32)})
    assert seen and set(seen) == {(2, 3, 32, 32)}


def test_a_model_of_another_modality_is_checked_too(tmp_path):
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    model = BertForSequenceClassification(config)
    folder = export_model(model, tmp_path)
    assert check_export(folder, model).keys() == {"transformers"}
    assert type(load_model(folder)) is BertForSequenceClassification


# --- what is refused --------------------------------------------------------------------------------------------------


def test_models_of_no_known_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="A Linear cannot be exported"):
        export_model(nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(ValueError, match="merge_adapter is for PEFT models"):
        export_model(vit(), tmp_path / "out", merge_adapter=True)
    with pytest.raises(ValueError, match=r"use `peft\.get_peft_model`"):
        # As the model's `add_adapter` does, which from transformers 5.24 on wants a later PEFT than there is.
        model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), vit())
        model._hf_peft_config_loaded = True
        export_model(model, tmp_path / "out")
    with pytest.raises(ValueError, match="no timm model"):
        export_model(vit(), tmp_path / "out", processing_class=TimmWrapperImageProcessor({"input_size": (3, 32, 32)}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [vit, wrapped, lambda: lora(vit())], ids=["transformers", "timm", "peft"])
def test_weights_of_another_model_are_refused_and_the_first_difference_named(make, tmp_path):
    model = make()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    weights = model.state_dict()
    for change, message in (
        ({trainable[1]: torch.zeros(1)}, rf"'{trainable[1]}' has shape \(1,\) in the state dict"),
        ({"extra": torch.zeros(1)}, "'extra' is missing in the model"),
        ({trainable[0]: None}, f"'{trainable[0]}' is missing in the state dict"),
    ):
        changed = {name: value for name, value in {**weights, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            export_model(model, tmp_path / "out", state_dict=changed)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written_to_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export_model(vit(), tmp_path / "file")
    export_model(lora(vit()), tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter"):
        export_model(vit(), tmp_path / "adapter")


def test_several_active_adapters_are_refused(tmp_path):
    model = lora(vit())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="One adapter is exported at a time"):
        export_model(model, tmp_path / "out")


# --- loading ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded_is_told_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no folder nobody/nothing here, and no repository"):
        load_model("nobody/nothing")
    with pytest.raises(ValueError, match="There is no folder"):
        load_model(tmp_path / "not" / "there")
    with pytest.raises(ValueError, match="has no revision 'main'"):
        load_model(tmp_path, revision="main")
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(tmp_path)
    torch.save(vit().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle only"):
        load_model(tmp_path)
    vit().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pickle only"):
        load_model(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="neither `model_type`"):
        load_model(tmp_path)


def test_an_adapter_that_names_no_backbone_needs_one(tmp_path):
    model, images = lora(vit()), torch.randn(2, 3, 32, 32)
    export_model(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="pass it as `base_model`"):
        load_model(tmp_path / "adapter")
    torch.testing.assert_close(
        logits(load_model(tmp_path / "adapter", base_model=vit()), images), logits(model, images)
    )
    with pytest.raises(ValueError, match="`base_model` has no meaning"):
        load_model(export_model(vit(), tmp_path / "whole"), base_model=vit())


def test_a_folder_that_timm_saved_by_itself_is_loaded(tmp_path):
    from timm.models import save_for_hf

    model = small_timm_vit().timm_model
    save_for_hf(model, tmp_path, safe_serialization=True)
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(logits(load_model(tmp_path), images), logits(model, images))
