"""Writing a model so that every loader of the ecosystem takes the folder.

Loading it back to prove it is `check.py`'s work; the model card and the upload are left to others.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..files import filled_whole
from .check import CannotCheck, check_export
from .exported_weights import complete_weights, copy_on_cpu, weights_for_timm, weights_for_transformers
from .isolation import quiet
from .kinds import is_image_classifier, is_timm_processor, kind_of
from .loading import ADAPTER_CONFIG, BACKBONE_CONFIG
from .timm_config import timm_config


__all__ = [
    "CannotCheck",
    "check_export",
    "export_model",
    "folder_problem",
    "is_image_classifier",
    "writing_here",
]


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

    Any model of transformers can be written; what is said here of loaders other than `from_pretrained` is for image
    classifiers.

    | model | what is written | who loads it |
    |---|---|---|
    | `PreTrainedModel` | `model.safetensors`, `config.json`, `preprocessor_config.json` | `from_pretrained`, `pipeline` |
    | `TimmWrapperForImageClassification`, timm model | `model.safetensors`, `config.json` (preprocessing in it) | these and `timm.create_model("local-dir:…", pretrained=True)` |
    | `PeftModel` | `adapter_model.safetensors`, `adapter_config.json`, `backbone_config.json` | `PeftModel.from_pretrained` |

    Class names are kept for each loader, all weights are safetensors. An existing export of the same kind is replaced
    once the new one is written; other files in the folder are left alone. What fails or is interrupted before leaves the
    folder as it was. The model is not changed: not its weights, its modes, its device, nor the
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
            Input for the check, see [`check_export`].

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: before anything is written, for a model of another kind, weights that are not the model's (the
            first difference is named), preprocessing that timm cannot express, or a folder that holds an export of
            another kind.
        RuntimeError: if the check fails; the message names the loader and the difference, the files stay.
        [`CannotCheck`]: if there is no telling whether the export is right; the files stay, too.

    Example:

    ```python
    >>> from hf_wash.hub import export_model
    >>> from hf_wash.soup import uniform_soup

    >>> export_model(members[0], "soup", state_dict=uniform_soup(members), processing_class=image_processor)
    ```
    """
    folder = Path(folder)
    kind = kind_of(model)
    if merge_adapter and kind != "peft":
        raise ValueError(f"merge_adapter is for PEFT models, and this is a {type(model).__name__}.")
    weights = complete_weights(model, kind, state_dict)
    if merge_adapter:
        merged = copy_on_cpu(model, weights).merge_and_unload()
        return export_model(merged, folder, processing_class=processing_class, check=check, example=example)
    if kind == "peft":
        _active_adapter(model)
    elif kind == "timm":
        timm_config(model, processing_class)
    elif processing_class is not None and is_timm_processor(processing_class):
        raise ValueError(
            "TimmWrapperImageProcessor keeps its settings in a timm model's config.json; this is no timm model."
        )
    problem = folder_problem(model, folder)
    if problem is not None:
        raise ValueError(problem)

    stale = {"timm": _STALE_FOR_TIMM, "peft": _NOTHING}.get(kind, _STALE_WEIGHTS)
    with filled_whole(folder, lambda name: stale.fullmatch(name) is not None) as staged:
        if kind == "timm":
            _write_timm(model, staged, weights, processing_class)
        elif kind == "peft":
            _write_peft(model, staged, weights)
        else:
            saved: Any = model
            with quiet(), writing_here(saved):
                # A dict of its own: transformers 5 renames the keys of the one it gets to those of older checkpoints.
                saved.save_pretrained(staged, state_dict=weights_for_transformers(saved, weights))
        if kind != "timm" and processing_class is not None and not is_timm_processor(processing_class):
            processing_class.save_pretrained(staged)
    if check:
        check_export(folder, model, state_dict=weights, processing_class=processing_class, example=example)
    return folder


@contextmanager
def writing_here(model: Any) -> Iterator[None]:
    """
    Lets this process write the model, whatever its rank.

    Where a process group exists, `save_pretrained` (transformers 5.17 to 5.23) writes on rank 0 alone, whoever calls
    it; but members live in different processes.

    Args:
        model:
            The model whose `save_pretrained` is called in the `with` block. Nothing is done for one that has none.
    """
    if not hasattr(model, "save_pretrained") or "should_save_on_this_rank" in vars(model):
        yield
        return
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


# What of an export before must not lie beside a new one: other weights, which loaders may take in the place of these, and
# beside timm's the preprocessing of a model of transformers, which would be taken for this one's on the Hub.
_WEIGHTS = r"model\.safetensors|model\.safetensors\.index\.json|model-\d{5}-of-\d{5}\.safetensors"
_NOTHING, _STALE_WEIGHTS = re.compile(r"(?!)"), re.compile(_WEIGHTS)
_STALE_FOR_TIMM = re.compile(rf"{_WEIGHTS}|preprocessor_config\.json")

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
    folder, kind = Path(folder), kind_of(model)
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
    config = timm_config(model, processing_class)
    save_file(weights_for_timm(weights), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


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
    save_file(weights_for_timm(adapter), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    backbone = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(backbone, "name_or_path", None) or None
    origin = None
    if config.task_type is None:
        origin = {"base_model_class": type(backbone).__name__, "parent_library": type(backbone).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=origin)
    if kind_of(backbone) == "timm":
        content = timm_config(backbone)
    else:
        content = json.loads(backbone.config.to_json_string(use_diff=False))
        content["architectures"] = [type(backbone).__name__]
    _write_json(folder / BACKBONE_CONFIG, content)
