"""Proving an export by loading it back with every loader that should take it. Writing it is `export.py`'s work."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from ..progress import bar_of
from .example import CannotCheck, as_inputs, guess_example, in_float
from .exported_weights import WRAPPER_PREFIX, complete_weights, copy_on_cpu, weights_for_timm
from .isolation import quiet, seed_everything, undisturbed
from .kinds import class_names_of, is_bare_timm, is_image_classifier, is_timm_processor, kind_of, loader_class_of


def check_export(
    folder: str | Path,
    model: nn.Module,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    processing_class: Any = None,
    example: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    tolerance: float = 1e-5,
    progress: bool = False,
) -> dict[str, float]:
    """
    Loads an exported folder with every loader that should take it and compares outputs with the model's own.

    Every tensor of floating point in the output is compared: logits, boxes, hidden states. Before each forward pass the
    random generators are seeded alike, for models that draw from them even in evaluation mode.

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
            Input to compare on: a tensor of shape `(batch_size, channels, height, width)`, or arguments by name, such
            as a training batch. At most two rows of it are used, and no labels. Two of noise if not given, for models
            that say what they take.
        tolerance (`float`, *optional*, defaults to 1e-5):
            The largest difference of two values, relative to the largest value where that is above one.
        progress (`bool`, *optional*, defaults to `False`):
            Show a bar where it takes longer than two seconds.

    Returns:
        `dict[str, float]`: the largest difference that each loader showed. The names are `safetensors`,
        `transformers`, `timm`, `image_processor`, `pipeline` and `peft`, as far as they apply: a model of other than
        three channels has no pipeline, which opens every image as RGB, and a model that is no image classifier has
        `transformers` or `peft` only.

    Raises:
        RuntimeError: naming the loader and what it got wrong.
        [`CannotCheck`]: if the check cannot be done: there is no telling what input the model takes, the model does
            not take the example, or it cannot be copied.
    """
    folder = Path(folder)
    kind = kind_of(model)
    weights = complete_weights(model, kind, state_dict)
    with undisturbed(), quiet(), torch.no_grad():
        check = _Check(folder, model, kind, weights, guess_example(model) if example is None else example, tolerance)
        loaders = [check.safetensors, check.peft if kind == "peft" else check.transformers]
        if kind == "timm":
            loaders.append(check.timm)
        if kind != "peft" and is_image_classifier(model) and check.takes_rgb_images():
            loaders.append(partial(check.pipeline, processing_class))
        with bar_of("loading the export back", len(loaders), quiet=not progress) as bar:
            for load in loaders:
                load()
                bar.update()
    return check.differences


class _Check:
    """One pass over the loaders: the model as it should be, and how far from it each of them comes."""

    def __init__(
        self,
        folder: Path,
        model: Any,
        kind: str,
        weights: Mapping[str, torch.Tensor],
        example: Any,
        tolerance: float,
    ):
        self.folder, self.model, self.kind, self.weights, self.tolerance = folder, model, kind, weights, tolerance
        try:
            self.reference = in_float(copy_on_cpu(model, weights)).eval()
        except Exception as error:
            raise CannotCheck(f"A {type(model).__name__} cannot be copied to check its export: {error}") from error
        self.inputs, self.expected = self.first_outputs(example)
        self.differences: dict[str, float] = {}

    def first_outputs(self, example: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        cause: Exception | None
        # A language model that classifies takes one text at a time if it has no word for padding.
        for rows in (2, 1):
            try:
                inputs = as_inputs(self.model, example, rows)
                expected = self.outputs_of(self.reference, inputs)
            except CannotCheck:
                raise
            except Exception as error:
                reason, cause = f"{type(error).__name__}: {error}", error
                continue
            if not expected:
                reason, cause = "its output holds no tensor of floating point", None
                continue
            return inputs, expected
        raise CannotCheck(
            f"The export of a {type(self.model).__name__} cannot be checked on this input, which the model itself does "
            f"not answer ({reason}): pass an `example` that it takes."
        ) from cause

    def fail(self, loader: str, what: str, cause: Exception | None = None) -> None:
        raise RuntimeError(f"The model exported to {self.folder} fails its check: {loader} {what}") from cause

    @contextmanager
    def loading(self, loader: str) -> Iterator[None]:
        # Whatever a library raises here, the message has to say whose it is.
        try:
            yield
        except Exception as error:
            self.fail(loader, f"cannot load it ({type(error).__name__}: {error}).", error)

    def outputs_of(self, model: Any, inputs: Any = None) -> dict[str, torch.Tensor]:
        """All that the model answers, by name."""
        inputs = self.inputs if inputs is None else inputs
        if is_bare_timm(model) and isinstance(inputs, dict):
            inputs = inputs["pixel_values"]
        # A model that draws at random, such as which patches to mask, has to draw the same on each side.
        seed_everything(0)
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        return dict(_floating("logits" if isinstance(output, torch.Tensor) else "", output))

    def compare_outputs(self, name: str, loader: str, model: Any) -> None:
        try:
            loaded = in_float(model).eval()
            self.round_as_the_model_is(loaded)
            actual = self.outputs_of(loaded)
        except Exception as error:
            self.fail(loader, f"gives a model that does not answer ({type(error).__name__}: {error}).", error)
        if actual.keys() != self.expected.keys():
            self.fail(loader, f"answers with {', '.join(actual)}, not with {', '.join(self.expected)}.")
        largest = 0.0
        for key, expected in self.expected.items():
            self.compare(name, loader, actual[key], expected, key)
            largest = max(largest, self.differences[name])
        self.differences[name] = largest

    def round_as_the_model_is(self, loaded: Any) -> None:
        # `model.bfloat16()` rounds buffers, too, of which some are in no file and computed anew by each loader: rotary
        # frequencies. A loader that computes them in more digits is right.
        own = {name.removeprefix(WRAPPER_PREFIX): value.dtype for name, value in self.model.named_buffers()}
        for name, value in loaded.named_buffers():
            dtype = own.get(name.removeprefix(WRAPPER_PREFIX), value.dtype)
            if value.is_floating_point() and dtype.is_floating_point and dtype.itemsize < value.dtype.itemsize:
                value.copy_(value.to(dtype))

    def compare(self, name: str, loader: str, actual: torch.Tensor, expected: torch.Tensor, unit: str) -> None:
        if actual.shape != expected.shape:
            self.fail(loader, f"gives {unit} of shape {tuple(actual.shape)}, not {tuple(expected.shape)}.")
        actual, expected = _comparable(actual), _comparable(expected)
        # A diverged model is exported like any other: the same infinity or NaN on both sides is agreement.
        same = (actual == expected) | (actual.isnan() & expected.isnan())
        difference = float(torch.where(same, 0.0, (actual - expected).abs()).max()) if actual.numel() else 0.0
        self.differences[name] = difference
        largest = float(expected.abs().nan_to_num(0.0, 0.0, 0.0).max()) if expected.numel() else 0.0
        allowed = self.tolerance * max(1.0, largest)
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
            for name, value in weights_for_timm(self.weights).items():
                if name not in written:
                    self.fail(loader, f"finds no '{name}'.")
                with safe_open(written[name], framework="pt") as content:
                    self.compare("safetensors", loader, content.get_tensor(name), value.cpu(), f"values of '{name}'")

    def transformers(self) -> None:
        loader_class = loader_class_of(self.model)
        loader = f"{loader_class.__name__}.from_pretrained"
        with self.loading(loader):
            loaded, info = loader_class.from_pretrained(self.folder, output_loading_info=True)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[what]:
                self.fail(loader, f"reports {what.replace('_', ' ')}: {sorted(info[what])[0]}.")
        self.compare_outputs("transformers", loader, loaded)
        names = class_names_of(self.model)
        found = class_names_of(loaded)
        if names is not None and found != names:
            self.fail(loader, f"has the class names {(found or [])[:3]}…, not {names[:3]}….")
        self.loaded = loaded

    def timm(self) -> None:
        import timm

        loader = 'timm.create_model("local-dir:…", pretrained=True)'
        with self.loading(loader):
            loaded: Any = timm.create_model(f"local-dir:{self.folder}", pretrained=True)
        self.compare_outputs("timm", loader, loaded)
        names = class_names_of(self.model)
        if names is not None and list(loaded.pretrained_cfg.get("label_names") or []) != names:
            self.fail(loader, f"has not the class names {names[:3]}….")

    def peft(self) -> None:
        from peft import PeftModel

        loader = "PeftModel.from_pretrained"
        backbone = copy_on_cpu(self.model, self.weights).unload()
        with self.loading(loader):
            loaded = PeftModel.from_pretrained(backbone, self.folder)
        self.compare_outputs("peft", loader, loaded)

    def takes_rgb_images(self) -> bool:
        images: Any = self.inputs.get("pixel_values") if isinstance(self.inputs, dict) else self.inputs
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
        if processing_class is not None and is_timm_processor(processing_class) == (self.kind == "timm"):
            given = processing_class(image, return_tensors="pt")["pixel_values"]
            self.compare("image_processor", loader, prepared, given, "images")
        loader = 'pipeline("image-classification")'
        config = self.loaded.config
        with self.loading(loader):
            classify = pipeline("image-classification", model=self.loaded, image_processor=processor, device="cpu")
            answers = classify(image, top_k=config.num_labels, function_to_apply="softmax")
        scores = torch.tensor([answer["score"] for answer in answers])
        inputs = prepared if self.kind == "timm" else {"pixel_values": prepared}
        expected = self.outputs_of(self.reference, inputs)["logits"].softmax(-1)[0].sort(descending=True).values
        self.compare("pipeline", loader, scores, expected, "scores")


def _floating(name: str, output: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _floating(f"{name}.{key}" if name else str(key), value)
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from _floating(f"{name or 'output'}[{index}]", value)


def _comparable(value: torch.Tensor) -> torch.Tensor:
    # In double precision, which 8-bit floats, booleans and integers lack a comparison in; complex ones as pairs.
    value = value.detach().cpu()
    return (torch.view_as_real(value) if value.is_complex() else value).double()
