"""Writing a model so that every loader of the ecosystem takes the folder, and proving it by loading it back.

The model card and the upload are left to others.
"""

import copy
import json
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..soup.weights import check_alike, open_member
from .loading import ADAPTER_CONFIG, BACKBONE_CONFIG, read_json


_WRAPPER_PREFIX = "timm_model."

# `PIL.Image.Resampling` by number, as transformers writes it, to the names that timm uses.
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def export_model(
    model: nn.Module,
    folder: str | Path,
    *,
    processing_class: Any = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    merge_adapter: bool = False,
    check: bool = True,
    example: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """
    Writes a model so that each loader of the ecosystem takes the folder as it is.

    | model | what is written | who loads it |
    |---|---|---|
    | `PreTrainedModel` | `model.safetensors`, `config.json`, `preprocessor_config.json` | `from_pretrained`, `pipeline` |
    | `TimmWrapperForImageClassification`, timm model | `model.safetensors`, `config.json` (preprocessing in it) | these and `timm.create_model("local-dir:…", pretrained=True)` |
    | `PeftModel` | `adapter_model.safetensors`, `adapter_config.json`, `backbone_config.json` | `PeftModel.from_pretrained` |

    Class names are kept for each loader, all weights are safetensors. An existing export of the same kind is replaced;
    other files in the folder are left alone. The model is not changed: not its weights, its modes, its device, nor the
    state of any random generator.

    Args:
        model (`torch.nn.Module`):
            A transformers model, a timm model (wrapped for transformers or not), or a PEFT model.
        folder (`str` or `Path`):
            Where to write; made if it is not there.
        processing_class (*optional*):
            What prepared the images the model was evaluated on, so that the pipeline prepares them alike. Saved beside
            a transformers model or an adapter; for a timm model, whose `config.json` says how to prepare images, put
            into its terms.
        state_dict (`Mapping[str, torch.Tensor]`, *optional*):
            Weights to write in place of the model's own: a soup. Names, shapes and dtypes as in `model.state_dict()`;
            for a PEFT model the frozen ones may be left out.
        merge_adapter (`bool`, *optional*, defaults to `False`):
            For a PEFT model: write the backbone with the adapter merged into it, as a complete model of its own kind.
        check (`bool`, *optional*, defaults to `True`):
            Load the folder with every loader and compare, see [`check_export`].
        example (`torch.Tensor` or `Mapping[str, torch.Tensor]`, *optional*):
            Input for the check: a tensor of shape `(batch_size, channels, height, width)`, or arguments by name. Two
            images of noise in the model's input size if not given.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: before anything is written, for a model of another kind, weights that are not the model's (the
            first difference is named), preprocessing that timm cannot express, or a folder that holds an export of
            another kind.
        RuntimeError: if the check fails; the message names the loader and the difference, the files stay.

    Example:

    ```python
    >>> from hf_wash.hub import export_model
    >>> from hf_wash.soup import uniform_soup

    >>> export_model(members[0], "soup", state_dict=uniform_soup(members), processing_class=image_processor)
    ```
    """
    folder = Path(folder)
    kind = _kind(model)
    if merge_adapter and kind != "peft":
        raise ValueError(f"merge_adapter is for PEFT models, and this is a {type(model).__name__}.")
    weights = _complete_weights(model, kind, state_dict)
    if merge_adapter:
        merged = _copy_on_cpu(model, weights).merge_and_unload()
        return export_model(merged, folder, processing_class=processing_class, check=check, example=example)
    if kind == "peft":
        _active_adapter(model)
    elif kind == "timm":
        _timm_config(model, processing_class)
    elif processing_class is not None and _is_timm_processor(processing_class):
        raise ValueError(
            "TimmWrapperImageProcessor keeps its settings in a timm model's config.json; this is no timm model."
        )
    if check and example is None:
        _example_for(model, kind)
    problem = folder_problem(model, folder)
    if problem is not None:
        raise ValueError(problem)

    folder.mkdir(parents=True, exist_ok=True)
    if kind == "timm":
        _write_timm(model, folder, weights, processing_class)
    elif kind == "peft":
        _write_peft(model, folder, weights)
    else:
        saved: Any = model
        with _quiet(), _writing_here(saved):
            # A dict of its own: transformers 5 renames the keys of the one it gets to those of older checkpoints.
            saved.save_pretrained(folder, state_dict=dict(weights))
    if kind != "timm" and processing_class is not None and not _is_timm_processor(processing_class):
        processing_class.save_pretrained(folder)
    if check:
        check_export(folder, model, state_dict=weights, processing_class=processing_class, example=example)
    return folder


@contextmanager
def _writing_here(model: Any) -> Iterator[None]:
    """
    Let this process write. Where a process group exists, `save_pretrained` (transformers 5.17 to 5.23) writes on rank
    0 alone, whoever calls it; but members live in different processes.
    """
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def check_export(
    folder: str | Path,
    model: nn.Module,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    processing_class: Any = None,
    example: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    tolerance: float = 1e-5,
) -> dict[str, float]:
    """
    Loads an exported folder with every loader that should take it and compares logits with the model's own.

    All sides compute on the CPU in float32 and in evaluation mode, on copies: the model, its device and modes, and
    every random generator stay as they are. The copies take the memory of two models.

    Args:
        folder (`str` or `Path`):
            What [`export_model`] wrote.
        model (`torch.nn.Module`):
            The model that was exported.
        state_dict (`Mapping[str, torch.Tensor]`, *optional*):
            The weights that were written in place of the model's own.
        processing_class (*optional*):
            The processor that was exported with it, which the one that is loaded has to agree with.
        example (`torch.Tensor` or `Mapping[str, torch.Tensor]`, *optional*):
            Input to compare on, as for [`export_model`].
        tolerance (`float`, *optional*, defaults to 1e-5):
            The largest difference of two logits, relative to the largest logit where that is above one.

    Returns:
        `dict[str, float]`: the largest difference that each loader showed. The names are `safetensors`,
        `transformers`, `timm`, `image_processor`, `pipeline` and `peft`, as far as they apply: a model of other than
        three channels has no pipeline, which opens every image as RGB.

    Raises:
        RuntimeError: naming the loader and what it got wrong.
        ValueError: if there is no telling what input the model takes and `example` is not given.
    """
    folder = Path(folder)
    kind = _kind(model)
    weights = _complete_weights(model, kind, state_dict)
    inputs = _example_for(model, kind) if example is None else example
    with _undisturbed(), _quiet(), torch.no_grad():
        check = _Check(folder, model, kind, weights, inputs, tolerance)
        check.safetensors()
        if kind == "peft":
            check.peft()
        else:
            check.transformers()
        if kind == "timm":
            check.timm()
        if kind != "peft" and check.takes_rgb_images():
            check.pipeline(processing_class)
    return check.differences


class _Check:
    """One pass over the loaders: the model as it should be, and how far from it each of them comes."""

    def __init__(
        self,
        folder: Path,
        model: Any,
        kind: str,
        weights: Mapping[str, torch.Tensor],
        inputs: Any,
        tolerance: float,
    ):
        self.folder, self.model, self.kind, self.weights, self.tolerance = folder, model, kind, weights, tolerance
        self.inputs = {name: _to_float(value) for name, value in inputs.items()} if _named(inputs) else inputs.float()
        self.reference = _to_float(_copy_on_cpu(model, weights)).eval()
        self.expected = self.logits_of(self.reference)
        self.differences: dict[str, float] = {}

    def fail(self, loader: str, what: str, cause: Exception | None = None) -> None:
        raise RuntimeError(f"The model exported to {self.folder} fails its check: {loader} {what}") from cause

    @contextmanager
    def loading(self, loader: str):
        # Whatever a library raises here, the message has to say whose it is.
        try:
            yield
        except Exception as error:
            self.fail(loader, f"cannot load it ({type(error).__name__}: {error}).", error)

    def logits_of(self, model: Any) -> torch.Tensor:
        inputs = self.inputs
        if _is_bare_timm(model):
            inputs = inputs["pixel_values"] if _named(inputs) else inputs
        if _named(inputs):
            output = model(**inputs)
        else:
            output = model(inputs)
        return output if isinstance(output, torch.Tensor) else output.logits

    def compare(self, name: str, loader: str, actual: torch.Tensor, expected: torch.Tensor, unit: str) -> None:
        if actual.shape != expected.shape:
            self.fail(loader, f"gives {unit} of shape {tuple(actual.shape)}, not {tuple(expected.shape)}.")
        # A diverged model is exported like any other: the same infinity or NaN on both sides is agreement.
        same = (actual == expected) | (actual.isnan() & expected.isnan())
        difference = float(torch.where(same, 0.0, (actual.double() - expected.double()).abs()).max())
        self.differences[name] = difference
        allowed = self.tolerance * max(1.0, float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()))
        if not difference <= allowed:
            self.fail(loader, f"gives {unit} that differ by {difference:.3g}, and {allowed:.3g} is allowed.")

    def safetensors(self) -> None:
        loader = "safetensors.safe_open"
        written: dict[str, Path] = {}
        with self.loading(loader):
            for file in sorted(self.folder.glob("*.safetensors")):
                with safe_open(file, framework="pt") as content:
                    if (content.metadata() or {}).get("format") != "pt":
                        self.fail(loader, f"finds {file.name} without the metadata {{'format': 'pt'}}.")
                    names = content.keys()
                    written.update((name, file) for name in names)
            if self.kind != "timm":
                return  # transformers and PEFT rename and leave out by their own rules; their loaders judge
            for name, value in _timm_weights(self.weights).items():
                if name not in written:
                    self.fail(loader, f"finds no '{name}'.")
                with safe_open(written[name], framework="pt") as content:
                    self.compare("safetensors", loader, content.get_tensor(name), value.cpu(), f"values of '{name}'")

    def transformers(self) -> None:
        loader_class = _loader_class(self.model)
        loader = f"{loader_class.__name__}.from_pretrained"
        with self.loading(loader):
            loaded, info = loader_class.from_pretrained(self.folder, output_loading_info=True)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[what]:
                self.fail(loader, f"reports {what.replace('_', ' ')}: {sorted(info[what])[0]}.")
        self.compare("transformers", loader, self.logits_of(_to_float(loaded).eval()), self.expected, "logits")
        names = _class_names(self.model)
        found = [loaded.config.id2label[index] for index in sorted(loaded.config.id2label)]
        if names is not None and found != names:
            self.fail(loader, f"has the class names {found[:3]}…, not {names[:3]}….")
        self.loaded = loaded

    def timm(self) -> None:
        import timm

        loader = 'timm.create_model("local-dir:…", pretrained=True)'
        with self.loading(loader):
            loaded: Any = timm.create_model(f"local-dir:{self.folder}", pretrained=True)
        self.compare("timm", loader, self.logits_of(_to_float(loaded).eval()), self.expected, "logits")
        names = _class_names(self.model)
        if names is not None and list(loaded.pretrained_cfg.get("label_names") or []) != names:
            self.fail(loader, f"has not the class names {names[:3]}….")

    def peft(self) -> None:
        from peft import PeftModel

        loader = "PeftModel.from_pretrained"
        with self.loading(loader):
            backbone = _copy_on_cpu(self.model, self.weights).unload()
            loaded = PeftModel.from_pretrained(backbone, self.folder)
        self.compare("peft", loader, self.logits_of(_to_float(loaded).eval()), self.expected, "logits")

    def takes_rgb_images(self) -> bool:
        images: Any = self.inputs.get("pixel_values") if _named(self.inputs) else self.inputs
        has_processor = self.kind == "timm" or (self.folder / "preprocessor_config.json").is_file()
        return has_processor and images is not None and images.ndim == 4 and images.shape[1] == 3

    def pipeline(self, processing_class: Any) -> None:
        from PIL import Image
        from transformers import AutoImageProcessor, pipeline

        loader = "AutoImageProcessor.from_pretrained"
        # Not square and of no model's size, so that resizing and cropping show.
        noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        with self.loading(loader):
            processor = AutoImageProcessor.from_pretrained(self.folder)
            prepared = processor(image, return_tensors="pt")["pixel_values"]
        # A processor of transformers resizes a little differently from timm, into whose terms it was put.
        if processing_class is not None and _is_timm_processor(processing_class) == (self.kind == "timm"):
            given = processing_class(image, return_tensors="pt")["pixel_values"]
            self.compare("image_processor", loader, prepared, given, "images")
        loader = 'pipeline("image-classification")'
        config = self.loaded.config
        with self.loading(loader):
            classify = pipeline("image-classification", model=self.loaded, image_processor=processor, device="cpu")
            answers = classify(image, top_k=config.num_labels, function_to_apply="softmax")
        scores = torch.tensor([answer["score"] for answer in answers])
        self.inputs = prepared if self.kind == "timm" else {"pixel_values": prepared}
        expected = self.logits_of(self.reference).softmax(-1)[0].sort(descending=True).values
        self.compare("pipeline", loader, scores, expected, "scores")


# --- what kind of model it is -----------------------------------------------------------------------------------------


def _kind(model: Any) -> str:
    from transformers import PreTrainedModel

    if _is_peft(model):
        return "peft"
    if _wrapped_timm(model) is not None or _is_bare_timm(model):
        return "timm"
    if isinstance(model, PreTrainedModel):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "The model has adapters added with `add_adapter`, which mixes them with its own weights: "
                "use `peft.get_peft_model` instead."
            )
        return "transformers"
    raise ValueError(
        f"A {type(model).__name__} cannot be exported: expected a transformers PreTrainedModel, a timm model or a "
        "PeftModel."
    )


def _is_peft(model: Any) -> bool:
    try:
        from peft import PeftModel
    except ImportError:
        return False
    return isinstance(model, PeftModel)


def _wrapped_timm(model: Any) -> Any:
    from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

    return model.timm_model if isinstance(model, TimmWrapperPreTrainedModel) else None


def _is_bare_timm(model: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(getattr(model, "pretrained_cfg", None), dict) and not isinstance(model, PreTrainedModel)


def _is_timm_processor(processing_class: Any) -> bool:
    return type(processing_class).__name__ == "TimmWrapperImageProcessor"


def _loader_class(model: Any) -> Any:
    from transformers import AutoModelForImageClassification

    if _is_bare_timm(model):
        return AutoModelForImageClassification
    mapped = AutoModelForImageClassification._model_mapping.get(type(model.config), None)
    classes = mapped if isinstance(mapped, (tuple, list)) else (mapped,)
    return AutoModelForImageClassification if type(model) in classes else type(model)


def _class_names(model: Any) -> list[str] | None:
    """Class names by index, or None where the model has none (a bare timm model that was not told)."""
    if _is_bare_timm(model):
        names = model.pretrained_cfg.get("label_names")
        return list(names) if names and len(names) == model.num_classes else None
    return [model.config.id2label[index] for index in sorted(model.config.id2label)]


# --- weights ----------------------------------------------------------------------------------------------------------


def _complete_weights(model: Any, kind: str, state_dict: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    own = model.state_dict()
    if state_dict is None:
        return own
    weights = dict(state_dict)
    if kind == "peft":
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        weights = {**{name: value for name, value in own.items() if name not in trainable}, **weights}
    reference, given = open_member(own, 0), open_member(weights, 0)
    reference.description, given.description = "the model", "the state dict"
    check_alike(reference, given, "The weights cannot be written as this model's:")
    return weights


def _copy_on_cpu(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """A copy of `model` with `weights`, made without a second copy of the weights on the model's own device."""
    memo: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        value = weights.get(name, tensor).detach().to("cpu", copy=True)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    duplicate = copy.deepcopy(model, memo)
    # Mixed precision (accelerate 1.15) replaces `forward` on the instance by a closure over the original model, which
    # a deep copy keeps: the copy would compute with the original's weights, under autocast.
    duplicate.__dict__.pop("forward", None)
    return duplicate


def _timm_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As timm has them: without the wrapper's prefix, and tied ones each by itself, since timm loads every name."""
    result, seen = {}, set()
    for name, value in weights.items():
        value = value.detach()
        if value.numel() and value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        result[name.removeprefix(_WRAPPER_PREFIX)] = value.contiguous()
    return result


# --- writing ----------------------------------------------------------------------------------------------------------


# What makes loaders take a folder for a complete model.
_COMPLETE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def folder_problem(model: nn.Module, folder: str | Path) -> str | None:
    """
    Why a model cannot be exported to a folder, in a sentence; `None` if it can.

    Args:
        model (`torch.nn.Module`):
            The model.
        folder (`str` or `Path`):
            The folder, which need not exist.
    """
    folder, kind = Path(folder), _kind(model)
    if folder.is_file():
        return f"{folder} is a file; a model is exported to a folder."
    if kind != "peft" and (folder / ADAPTER_CONFIG).exists():
        return (
            f"{folder} holds an adapter, which transformers would put on top of any complete model written there: "
            "export to another folder."
        )
    if kind == "peft" and any((folder / name).exists() for name in _COMPLETE):
        return (
            f"{folder} holds a complete model, which loaders would take in place of an adapter written there: export to "
            "another folder."
        )
    return None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_timm(model: Any, folder: Path, weights: Mapping[str, torch.Tensor], processing_class: Any) -> None:
    config = _timm_config(model, processing_class)
    save_file(_timm_weights(weights), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    # Left by an earlier model of transformers, it would be taken for this one's preprocessing on the Hub.
    (folder / "preprocessor_config.json").unlink(missing_ok=True)


def _timm_config(model: Any, processing_class: Any = None) -> dict[str, Any]:
    """A `config.json` from which timm and transformers build the same model, with the same preprocessing."""
    # Not public in timm 1.0.31, but its public callers write their own weights, too.
    from timm.models._hub import save_config_for_hf

    bare = _wrapped_timm(model)
    model_config: dict[str, Any] = {}
    model_args = None
    if bare is None:
        bare = model
    else:
        # What the wrapper's configuration says was said about this model; what timm knows is about the architecture.
        model_config["pretrained_cfg"] = dict(getattr(model.config, "pretrained_cfg", None) or {})
        model_args = {name: value for name, value in (model.config.model_args or {}).items() if value is not None}
    names = _class_names(model)
    if names is not None:
        model_config["label_names"] = names
    with TemporaryDirectory() as scratch, _quiet():
        file = Path(scratch) / "config.json"
        save_config_for_hf(bare, str(file), model_config=model_config, model_args=model_args)
        config = read_json(file)
    # The wrapper passes the number of classes by itself, and fails if it finds it here again. timm takes it from the
    # root. The rest has to stay: without `img_size` both build another model.
    config.get("model_args", {}).pop("num_classes", None)
    preprocessing = config["pretrained_cfg"]
    if processing_class is not None:
        given = _timm_preprocessing(processing_class, preprocessing["input_size"])
        if preprocessing.get("fixed_input_size") and given["input_size"] != preprocessing["input_size"]:
            raise ValueError(
                f"The processor makes images of {given['input_size'][1:]} pixels, and the model takes "
                f"{preprocessing['input_size'][1:]} only."
            )
        preprocessing.update(given)
        # Recommendations for another size than the one evaluated at.
        for name in ("test_input_size", "test_crop_pct", "test_pool_size"):
            preprocessing.pop(name, None)
    return config


def _timm_preprocessing(processing_class: Any, input_size: list[int]) -> dict[str, Any]:
    """A processor's settings in the terms of timm's `pretrained_cfg`, or a `ValueError` if they have none."""
    if _is_timm_processor(processing_class):
        given = {name: value for name, value in processing_class.data_config.items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    settings = processing_class.to_dict()

    def refuse(what: str) -> None:
        raise ValueError(
            f"The preprocessing of {type(processing_class).__name__} cannot be put into a timm model's config.json: "
            f"{what}."
        )

    channels, *model_size = input_size
    if settings.get("do_rescale", True) and abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        refuse(f"it rescales by {settings['rescale_factor']} and timm by 1/255")
    if not settings.get("do_rescale", True):
        refuse("it does not rescale and timm does, by 1/255")
    normalizes = settings.get("do_normalize", False)
    mean = settings.get("image_mean") if normalizes else [0.0] * channels
    std = settings.get("image_std") if normalizes else [1.0] * channels
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    crops = settings.get("do_center_crop", False)
    if not settings.get("do_resize", False):
        # timm always resizes, which changes nothing for images that have the model's size already.
        target, fraction, mode = model_size, 1.0, "squash"
    elif "height" in size and not crops:
        target, fraction, mode = [size["height"], size["width"]], 1.0, "squash"
    elif "shortest_edge" in size and crops and "height" in crop:
        target, mode = [crop["height"], crop["width"]], "center"
        fraction = crop["height"] / size["shortest_edge"]
    elif "shortest_edge" in size and settings.get("crop_pct"):
        # ConvNextImageProcessor: from 384 pixels on it squashes, below it crops.
        edge = size["shortest_edge"]
        target = [edge, edge]
        fraction, mode = (1.0, "squash") if edge >= 384 else (settings["crop_pct"], "center")
    else:
        refuse(f"it resizes to {dict(size)}{f' and crops to {dict(crop)}' if crops else ''}")
    resample = settings.get("resample")
    return {
        "input_size": [channels, *target],
        "crop_pct": fraction,
        "crop_mode": mode,
        "interpolation": _INTERPOLATIONS[2 if resample is None else int(resample)],
        "mean": list(mean),
        "std": list(std),
    }


def _active_adapter(model: Any) -> str:
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"One adapter is exported at a time, and the model has {len(active)} active ones: {active}.")
    return active[0]


def _write_peft(model: Any, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    # Not `save_pretrained`: it writes over the model card, and puts an adapter with a name of its own in a subfolder.
    from peft import get_peft_model_state_dict

    name = _active_adapter(model)
    adapter = get_peft_model_state_dict(model, state_dict=dict(weights), adapter_name=name)
    save_file(_timm_weights(adapter), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    backbone = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(backbone, "name_or_path", None) or None
    origin = None
    if config.task_type is None:
        origin = {"base_model_class": type(backbone).__name__, "parent_library": type(backbone).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=origin)
    if _kind(backbone) == "timm":
        content = _timm_config(backbone)
    else:
        content = json.loads(backbone.config.to_json_string(use_diff=False))
        content["architectures"] = [type(backbone).__name__]
    _write_json(folder / BACKBONE_CONFIG, content)


# --- checking ---------------------------------------------------------------------------------------------------------


def _example_for(model: Any, kind: str) -> torch.Tensor | dict[str, torch.Tensor]:
    """Two inputs of noise, from a generator of their own."""
    if kind == "peft":
        model = model.get_base_model()
        kind = _kind(model)
    generator = torch.Generator().manual_seed(0)
    if kind == "timm":
        shape = _timm_config(model)["pretrained_cfg"]["input_size"]
        return torch.randn(2, *shape, generator=generator)
    config = model.config
    if model.main_input_name == "pixel_values":
        # Convolutional models take any size and often name none; the deepest of them divide it by 32.
        size = getattr(config, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", None) or 3
        return {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.randint(0, config.vocab_size, (2, 8), generator=generator)}
    raise ValueError(
        f"There is no telling what a {type(model).__name__} takes as '{model.main_input_name}': pass `example`, or "
        "`check=False`."
    )


def _named(inputs: Any) -> bool:
    return isinstance(inputs, Mapping)


def _to_float(value: Any) -> Any:
    """On the CPU and in float32, where half-precision weights are exact and differ between loaders by nothing."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
    return value.float() if isinstance(value, nn.Module) else value


@contextmanager
def _undisturbed():
    """Leaves every random generator as it was: building a model draws from them."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _quiet():
    """Without the progress bars and reports of loading: a check is not what the user is watching."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    timm_logger = logging.getLogger("timm")
    timm_level = timm_logger.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    timm_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        timm_logger.setLevel(timm_level)
        if bars:
            transformers_logging.enable_progress_bar()


writing_here = _writing_here


def is_image_classifier(model) -> bool:
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return type(model).__name__.endswith("ForImageClassification") or _is_bare_timm(model)
