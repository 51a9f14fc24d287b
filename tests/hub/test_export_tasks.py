"""`export_model` and its check beyond images: any task of transformers, any batch, and what users add to a model."""

import copy
import inspect
import json

import pytest
import timm
import torch
from hub import tiny_models
from safetensors import safe_open
from torch import nn
from transformers import (
    BertForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from hf_wash.hub import CannotCheck, check_export, export_model, is_image_classifier, load_model, writing_here
from hf_wash.soup import uniform_soup


def timm_model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3)


def wrapped():
    torch.manual_seed(0)
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=3))


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_a_model_of_any_task_is_exported_checked_and_loaded_by_its_class(name, tmp_path):
    members = [tiny_models.tiny(name, seed) for seed in range(2)]
    soup = uniform_soup(members)
    export_model(members[0], tmp_path, state_dict=soup)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(members[0]) and not loaded.training
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, soup[key]), key
    with pytest.raises(RuntimeError, match="from_pretrained gives"):
        check_export(tmp_path, members[1])


@pytest.mark.parametrize("knows_backbone", [True, False])
def test_an_adapter_of_another_task_is_loaded_onto_the_class_it_was_trained_on(knows_backbone, tmp_path):
    from peft import LoraConfig, get_peft_model

    export_model(tiny_models.tiny("BertForMaskedLM"), tmp_path / "backbone")
    backbone = BertForQuestionAnswering.from_pretrained(tmp_path / "backbone")
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["qa_outputs"], task_type="QUESTION_ANS")
    model = get_peft_model(backbone, config)
    export_model(model, tmp_path / "adapter")
    if not knows_backbone:  # as PEFT saves it
        (tmp_path / "adapter" / "backbone_config.json").unlink()
    loaded = load_model(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is BertForQuestionAnswering
    words = torch.arange(1, 11).reshape(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(loaded(words).start_logits, model.eval()(words).start_logits)


def test_models_that_classify_images_are_told_from_others():
    from peft import LoraConfig, get_peft_model

    class Mine(type(tiny_models.tiny("ViTForImageClassification"))):
        pass

    vit = tiny_models.tiny("ViTForImageClassification")
    adapter = get_peft_model(copy.deepcopy(vit), LoraConfig(r=2, target_modules=["q_proj"]))
    text = tiny_models.tiny("BertForMaskedLM")
    for model in (vit, Mine(vit.config), adapter, timm_model(), wrapped()):
        assert is_image_classifier(model)
    for name in ("BertForSequenceClassification", "YolosForObjectDetection", "ViTMAEForPreTraining"):
        assert not is_image_classifier(tiny_models.tiny(name))
    assert not is_image_classifier(get_peft_model(text, LoraConfig(r=2, target_modules=["query"])))
    assert not is_image_classifier(nn.Linear(2, 2))


# --- the check --------------------------------------------------------------------------------------------------------


def test_equal_weights_answer_equally_wherever_a_file_puts_them(tmp_path):
    # 128 values wide and one label of four bytes: what follows it in the file lies where no kernel wants it.
    changes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 2}
    model = tiny_models.tiny("ViTForImageClassification", num_labels=1, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    export_model(model, tmp_path, check=False)
    assert check_export(tmp_path, model, tolerance=0.0) == {"transformers": 0.0}


def test_positions_that_a_cast_has_rounded_are_no_fault_of_the_export(tmp_path):
    # `model.bfloat16()` rounds frequencies that are in no file, and that a loader computes anew in float32.
    model = tiny_models.tiny("LlamaForCausalLM")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    export_model(model.bfloat16(), tmp_path)
    # Other frequencies are.
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="gives logits that differ"):
        check_export(tmp_path, model)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        (
            "BertForQuestionAnswering",
            {
                "input_ids": torch.arange(1, 25, dtype=torch.int32).reshape(4, 6),
                "attention_mask": torch.ones(4, 6, dtype=torch.bool),
                "start_positions": torch.tensor([99] * 4),
                "end_positions": torch.tensor([99] * 4),
            },
        ),
        (
            "T5ForConditionalGeneration",
            {
                "input_ids": torch.arange(1, 31).reshape(5, 6),
                "labels": torch.arange(2, 22).reshape(5, 4),
                "length": torch.tensor([6] * 5),
            },
        ),
        (
            "YolosForObjectDetection",
            {
                "pixel_values": torch.randint(0, 255, (3, 3, 32, 40), dtype=torch.uint8),
                "labels": [{"class_labels": torch.tensor([0]), "boxes": torch.zeros(1, 4)}] * 3,
            },
        ),
        ("ViTForImageClassification", {"pixel_values": torch.randn(6, 3, 32, 32).half(), "labels": torch.ones(6, 2)}),
    ],
)
def test_a_training_batch_serves_as_the_example_without_its_labels_and_two_rows_of_it(name, batch, tmp_path):
    model = tiny_models.tiny(name)
    seen = []

    class Watched(type(model)):
        def forward(self, **kwargs):
            seen.append(kwargs)
            return super().forward(**kwargs)

        forward.__signature__ = inspect.signature(type(model).forward)

    export_model(model, tmp_path, check=False)
    model.__class__ = Watched
    check_export(tmp_path, model, example=batch)
    assert len(seen) == 2
    for inputs in seen:
        assert not {"labels", "start_positions", "end_positions", "length"} & inputs.keys()
        assert {len(value) for value in inputs.values()} == {2}
        assert {value.dtype for value in inputs.values() if value.is_floating_point()} <= {torch.float32}


def test_an_example_for_a_bare_timm_model_may_be_a_batch(tmp_path):
    batch = {"pixel_values": torch.randn(5, 3, 64, 64), "labels": torch.zeros(5, dtype=torch.long)}
    assert export_model(timm_model(), tmp_path, example=batch)
    with pytest.raises(CannotCheck, match="no `pixel_values`, only labels"):
        check_export(tmp_path, timm_model(), example={"labels": batch["labels"]})


def test_a_check_that_cannot_be_done_says_so_and_the_files_stay(tmp_path):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**vision, "vocab_size": 40, "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8})
    with pytest.raises(CannotCheck, match="CLIPModel cannot be checked on this input"):
        export_model(CLIPModel(config), tmp_path / "clip")
    assert type(load_model(tmp_path / "clip")) is CLIPModel
    with pytest.raises(CannotCheck, match=r"does not answer \(.*: pass an `example`"):
        check_export(tmp_path / "clip", CLIPModel(config), example={"input_ids": torch.zeros(2, 4, dtype=torch.long)})
    assert issubclass(CannotCheck, ValueError)
    strange = tiny_models.tiny("ViTForImageClassification")
    strange.main_input_name = "input_ids"  # of which its configuration knows nothing
    with pytest.raises(CannotCheck, match="no telling what a ViTForImageClassification takes as 'input_ids'"):
        export_model(strange, tmp_path / "strange")
    with pytest.raises(CannotCheck, match="not a list"):
        check_export(tmp_path / "strange", strange, example=[1])


# --- what users add ---------------------------------------------------------------------------------------------------


def head(model):
    model = getattr(model, "timm_model", model)
    return model.classifier if hasattr(model, "classifier") else model.fc


class Remembers(nn.Module):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def add_views(model):
    whole = torch.randn(10)
    for name, part in (("first", whole[:6]), ("second", whole[4:]), ("same", whole[:6])):
        model.register_buffer(name, part)


ADDITIONS = {
    "scalar": lambda model: model.register_parameter("temperature", nn.Parameter(torch.tensor(1.5))),
    "integer": lambda model: model.register_buffer("steps", torch.tensor(3)),
    "integers": lambda model: model.register_parameter("ids", nn.Parameter(torch.arange(3), requires_grad=False)),
    "unused": lambda model: model.add_module("extra", nn.Linear(4, 4)),
    "old weight_norm": lambda model: nn.utils.weight_norm(head(model)),
    "weight_norm": lambda model: nn.utils.parametrizations.weight_norm(head(model)),
    "mixed": lambda model: head(model).bfloat16(),
    "double": lambda model: head(model).double(),
    "not saved": lambda model: model.register_buffer("table", torch.ones(3), persistent=False),
    "views": add_views,
    "transposed": lambda model: model.register_buffer("turned", torch.randn(4, 6).t()),
    "tied": lambda model: head(model).register_parameter("again", head(model).bias),
    "complex": lambda model: model.register_buffer("phase", torch.randn(3, dtype=torch.complex64)),
    "empty": lambda model: model.register_buffer("nothing", torch.zeros(0)),
    "boolean": lambda model: model.register_buffer("mask", torch.ones(3, dtype=torch.bool)),
    "8 bits": lambda model: model.register_buffer("small", torch.ones(3).to(torch.float8_e4m3fn)),
    "extra state": lambda model: model.add_module("remembers", Remembers()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("make", [lambda: tiny_models.tiny("ViTForImageClassification"), timm_model, wrapped])
@pytest.mark.parametrize("addition", ADDITIONS)
def test_what_was_added_to_a_model_is_written_and_the_check_may_object(make, addition, tmp_path):
    model = make()
    ADDITIONS[addition](model)
    export_model(model, tmp_path, check=False)
    # Names that transformers knows it may write as older checkpoints have them.
    added = model.state_dict().keys() - make().state_dict().keys()
    with safe_open(tmp_path / "model.safetensors", "pt") as written:
        for name in added - {"remembers._extra_state"}:
            assert torch.equal(written.get_tensor(name.removeprefix("timm_model.")), model.state_dict()[name]), name
    try:
        check_export(tmp_path, model)
    except (RuntimeError, CannotCheck) as error:
        assert str(tmp_path) in str(error) or isinstance(error, CannotCheck)  # a sentence of ours, not of torch
        assert addition not in ("mixed", "double", "not saved", "extra state")


def test_ties_that_a_model_declares_are_written_once(tmp_path):
    model = tiny_models.tiny("GPT2LMHeadModel")
    export_model(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as written:
        assert "lm_head.weight" not in written.keys()  # noqa: SIM118
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


# --- writing on a rank of one's own -----------------------------------------------------------------------------------


def test_this_process_writes_its_model_and_nothing_is_left_on_it(monkeypatch):
    model = tiny_models.tiny("ViTForImageClassification")
    # What transformers says on any rank but the first.
    monkeypatch.setattr(PreTrainedModel, "should_save_on_this_rank", lambda self, is_main_process: False)
    assert not model.should_save_on_this_rank(True)
    with writing_here(model):
        with writing_here(model):
            assert model.should_save_on_this_rank(True) and not model.should_save_on_this_rank(False)
        assert model.should_save_on_this_rank(True)
    assert not model.should_save_on_this_rank(True) and "should_save_on_this_rank" not in vars(model)
    plain = nn.Linear(2, 2)
    with writing_here(plain):
        assert "should_save_on_this_rank" not in vars(plain)
