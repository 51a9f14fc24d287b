"""Whether models are of one kind, beyond the shapes of their weights: what `hf-wash soup` compares before it averages."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import is_file
from ..sentences import shortened


# What of a configuration says how a model was trained, saved or is to be run, and not what its weights compute.
_NOT_THE_MODEL = re.compile(
    r"_.*|.*drop.*|(torch_)?dtype|transformers_version|architectures|model_type|id2label|label2id|num_labels|label_names"
    r"|use_cache|output_(attentions|hidden_states)|return_dict|gradient_checkpointing|initializer_.*|init_.*|.*_init|layer_scale_init_value"
    r"|problem_type|finetuning_task|task_specific_params|auto_map|.*loss.*|mask_(time|feature)_.*|apply_spec_augment"
    r"|chunk_size_feed_forward|(attn|experts)_implementation|tokenizer_class|pad_token_id"
)
_NOT_THE_ADAPTER = re.compile(
    r"auto_mapping|inference_mode|revision|task_type|peft_version|.*dropout|init_.*|loftq_config|.*_config"
)
_SETS = ("target_modules", "modules_to_save", "exclude_modules")  # written as lists in any order
# How images become numbers. Not their size: it may have been another for each model.
_IMAGE_VALUES = ("do_normalize", "image_mean", "image_std", "do_rescale", "rescale_factor")
_KIND = ("kind", "model type", "classes")


def check_alike(models: list[str], folders: list[Path]) -> None:
    """
    Compares what models say of themselves with what the first one says.

    Args:
        models (`list[str]`):
            What the user calls them.
        folders (`list[Path]`):
            Where they are.

    Raises:
        ValueError: naming the first difference in kind, classes, tensors, configuration, values of images or tokenizer;
            or a file that cannot be read.
    """
    from ..soup.weights import check_alike as check_tensors
    from ..soup.weights import open_member

    first, *others = map(_description, folders)
    reference = open_member(folders[0], 0)
    for index, other in enumerate(others, start=1):
        beginning = f"{models[index]} cannot be averaged with {models[0]}: its"
        _compare(first, other, _KIND, beginning)
        # What a shape shows is said of the tensor.
        check_tensors(reference, open_member(folders[index], index))
        _compare(first, other, dict.fromkeys((*first, *other)), beginning)
    _check_tokenizers(models, folders)


def _compare(first: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str], beginning: str) -> None:
    for name in names:
        # Not every folder says how images are prepared.
        if name in _IMAGE_VALUES and (name not in first or name not in other):
            continue
        if first.get(name) != other.get(name):
            found, expected = shortened(other.get(name)), shortened(first.get(name))
            verb = "are" if name == "classes" else "is"
            raise ValueError(f"{beginning} {name} {verb} {found}, not {expected}.")


def _description(folder: Path) -> dict[str, Any]:
    """Names, as they can stand in a sentence, and values; `None` is as good as nothing."""
    from ..hub.loading import ADAPTER_CONFIG, BACKBONE_CONFIG, adapter_config_of, config_of
    from ..hub.record import read_config, read_json

    if is_file(folder / ADAPTER_CONFIG):
        found = {"kind": "adapter", **dict(_fields(adapter_config_of(folder).to_dict(), _NOT_THE_ADAPTER))}
        file = folder / BACKBONE_CONFIG
        if not is_file(file):
            return found
    else:
        file, found = folder / "config.json", {}
        if not is_file(file):
            raise ValueError(f"{folder} holds no config.json, so there is no telling what kind of model it is.")
    content = read_config(file)
    labels = content.get("id2label") or content.get("label_names")
    if isinstance(labels, dict):
        labels = [labels[key] for key in sorted(labels, key=int)]
    is_timm = "pretrained_cfg" in content
    found = {
        "kind": content.get("architecture") or content.get("architectures"),
        "model type": content.get("model_type", "timm"),
        "classes": labels,
        **found,
    }
    config = config_of(file)  # says, too, if there is no building a model after it
    if is_timm:
        # Beside the classes, which may be written as a number or as names.
        content = {name: content.get(name) for name in ("model_args", "global_pool")}
        content |= {name: config.pretrained_cfg.get(name) for name in ("mean", "std")}
    else:
        content = config.to_dict()
    prepared = read_json(folder / "preprocessor_config.json")
    content |= {name: prepared[name] for name in _IMAGE_VALUES if name in prepared}
    return found | dict(_fields(content, _NOT_THE_MODEL))


def _fields(content: Mapping[str, Any], left_out: re.Pattern, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a configuration and of those inside it, by their path."""
    for name, value in content.items():
        if left_out.fullmatch(str(name)):
            continue
        if isinstance(value, Mapping):
            yield from _fields(value, left_out, f"{prefix}{name}.")
        elif isinstance(value, set) or (name in _SETS and isinstance(value, list)):
            yield f"{prefix}{name}", sorted(map(str, value))
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _check_tokenizers(models: list[str], folders: list[Path]) -> None:
    """Equal rows of two embeddings have to stand for equal words."""
    from ..hub.loading import TOKENIZER_FILES
    from ..hub.record import read_json

    def words(file: Path) -> Any:
        if file.name != "tokenizer.json":
            return file.read_bytes()
        # Not all of it: how a tokenizer last padded is in it, too.
        model = read_json(file).get("model", {})
        if not isinstance(model, dict):
            raise ValueError(f"{file} has {shortened(model)} as model, where an object is expected.")
        return model.get("vocab"), model.get("merges")

    for name in ("tokenizer.json", "vocab.json", *(name for name in TOKENIZER_FILES if not name.endswith(".jinja"))):
        if not is_file(folders[0] / name):
            continue
        first = words(folders[0] / name)
        for model, folder in zip(models[1:], folders[1:], strict=True):
            if is_file(folder / name) and words(folder / name) != first:
                raise ValueError(
                    f"{model} cannot be averaged with {models[0]}: its {name} numbers other words than that one's."
                )
