"""One `config.json` from which timm and transformers build the same model, with the same preprocessing."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .isolation import quiet
from .kinds import class_names_of, is_timm_processor, wrapped_timm
from .record import read_json


# `PIL.Image.Resampling` by number, as transformers writes it, to the names that timm uses.
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def timm_config(model: Any, processing_class: Any = None) -> dict[str, Any]:
    """A `config.json` from which timm and transformers build the same model, with the same preprocessing."""
    # Not public in timm 1.0.31, but its public callers write their own weights, too.
    from timm.models._hub import save_config_for_hf

    bare = wrapped_timm(model)
    model_config: dict[str, Any] = {}
    model_args = None
    if bare is None:
        bare = model
    else:
        # What the wrapper's configuration says was said about this model; what timm knows is about the architecture.
        model_config["pretrained_cfg"] = dict(getattr(model.config, "pretrained_cfg", None) or {})
        model_args = {name: value for name, value in (model.config.model_args or {}).items() if value is not None}
    names = class_names_of(model)
    if names is not None:
        model_config["label_names"] = names
    with TemporaryDirectory() as scratch, quiet():
        file = Path(scratch) / "config.json"
        save_config_for_hf(bare, str(file), model_config=model_config, model_args=model_args)
        config = read_json(file)
    # The wrapper passes the number of classes by itself, and fails if it finds it here again. timm takes it from the
    # root. The rest has to stay: without `img_size` both build another model.
    config.get("model_args", {}).pop("num_classes", None)
    preprocessing = config["pretrained_cfg"]
    if processing_class is not None:
        given = timm_preprocessing(processing_class, preprocessing["input_size"])
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


def timm_preprocessing(processing_class: Any, input_size: list[int]) -> dict[str, Any]:
    """A processor's settings in the terms of timm's `pretrained_cfg`, or a `ValueError` if they have none."""
    if is_timm_processor(processing_class):
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
