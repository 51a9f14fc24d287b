"""Reading exported models and populations back, from a folder or the Hub, from safetensors only.

Writing them is `export.py`'s work.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..files import is_file
from ..sentences import first_line
from ..soup.weights import find_weight_files
from .record import RUN_RECORD, read_adapter_config, read_config, read_record


# Kept by an export of an adapter beside it: the backbone as the adapter was trained on it, with its head and classes.
# Not `config.json`: with a file of that name, transformers takes the folder for a complete model.
BACKBONE_CONFIG = "backbone_config.json"
ADAPTER_CONFIG = "adapter_config.json"

# What tokenizers are made of beside JSON. By name: of `*.model` and `*.txt` there are others, pickles among them.
TOKENIZER_FILES = (
    *("vocab.txt", "merges.txt", "bpe.codes", "tokenizer.model", "spiece.model", "sentencepiece.model"),
    *("sentencepiece.bpe.model", "spm.model", "source.spm", "target.spm", "chat_template.jinja"),
    "additional_chat_templates/*.jinja",
)

# For what PEFT calls a task, the head that an adapter was trained under.
_CLASS_OF_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_model(
    folder_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    base_model: nn.Module | str | Path | None = None,
) -> nn.Module:
    """
    Loads a model of whichever kind: transformers, timm or an adapter.

    Args:
        folder_or_repo (`str` or `Path`):
            A folder, or a repository of the Hub where there is no such folder.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        token (`str` or `bool`, *optional*):
            Access token for the Hub.
        base_model (`torch.nn.Module`, `str` or `Path`, *optional*):
            For an adapter: the backbone to put it on, or where that is. The one that the adapter names if not given.

    Returns:
        `torch.nn.Module`: the model on the CPU, in evaluation mode. For a transformers model the class that its
        `config.json` names under `architectures`, of whichever task; for a timm model `TimmWrapperForImageClassification` (its `timm_model` is the bare one); a `PeftModel` for an
        adapter.

    Raises:
        ValueError: if there is no such folder or repository, its weights are a pickle, or it is no model.
    """
    folder = find_folder(folder_or_repo, revision=revision, token=token)
    check_files(folder)
    if is_file(folder / ADAPTER_CONFIG):
        return _load_adapter(folder, base_model, token)
    if base_model is not None:
        raise ValueError(f"{folder_or_repo} is a whole model, not an adapter, so `base_model` has no meaning for it.")
    if not is_file(folder / "config.json"):
        find_weight_files(folder)  # a folder of pickles is told so first
        raise ValueError(f"{folder_or_repo} holds no config.json, so there is no telling what kind of model it is.")
    return _load_complete(folder).eval()


def load_members(
    folder_or_repo: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> list[nn.Module]:
    """
    Loads the members of a population, in member order.

    Args:
        folder_or_repo (`str` or `Path`):
            The folder of a run, or a repository that it was pushed to with `push_members`. Members are looked for in
            `members/member_<i>/`, then in `_members/member_<i>/`.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        token (`str` or `bool`, *optional*):
            Access token for the Hub.

    Raises:
        ValueError: if there are no members, one of them is missing, or one cannot be loaded.
    """
    folder = find_folder(folder_or_repo, revision=revision, token=token, part="members")
    for name in ("members", "_members"):
        members = {}
        for path in (folder / name).glob("member_*"):
            match = re.fullmatch(r"member_(\d+)", path.name)
            if match and path.is_dir():
                members[int(match.group(1))] = path
        if not members:
            continue
        left_out = read_record(folder).get("soup", {}).get("left_out", [])
        for index in range(max(members)):
            if index not in members and index not in left_out:
                raise ValueError(
                    f"{folder_or_repo} holds {name}/member_{max(members)} but no {name}/member_{index}: "
                    "without it the ensemble would not be that of the population."
                )
        return [load_model(members[index]) for index in sorted(members)]
    raise ValueError(
        f"{folder_or_repo} holds no members: expected members/member_0 or _members/member_0 in it. "
        "A run's folder has them after `trainer.save_members()`, a repository if it was pushed with `push_members=True`."
    )


def find_folder(
    folder_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    part: str | None = None,
) -> Path:
    """
    The local folder of a model, downloaded from the Hub where there is none of that name: weights as safetensors,
    configurations and tokenizers.

    Args:
        folder_or_repo (`str` or `Path`):
            A folder or a repository id.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        token (`str` or `bool`, *optional*):
            Access token for the Hub.
        part (`str`, *optional*):
            A folder of the repository to download instead of its root, with what the root says of the run.

    Raises:
        ValueError: if neither exists, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if not str(folder_or_repo).strip():
        raise ValueError("A model needs a name: the one given is empty.")
    if Path(folder_or_repo).is_dir():
        if revision is not None:
            raise ValueError(f"{folder_or_repo} is a folder of this machine, which has no revision {revision!r}.")
        return Path(folder_or_repo)
    if Path(folder_or_repo).exists():
        raise ValueError(f"{folder_or_repo} is a file, and a model is a folder: name the folder it is in.")
    wanted = ["*.json", "*.safetensors", *TOKENIZER_FILES]
    try:
        # `*` matches slashes too, hence the second list.
        path = snapshot_download(
            str(folder_or_repo),
            revision=revision,
            token=token,
            allow_patterns=wanted if part is None else [RUN_RECORD, *(f"{part}/*{pattern}" for pattern in wanted)],
            ignore_patterns=["members/*", "_members/*", "checkpoint-*"] if part is None else None,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        at = "" if revision is None else f" at revision {revision!r}"
        raise ValueError(
            f"There is no folder {folder_or_repo} here, and no repository of that name{at} could be downloaded: "
            f"{reason.strip()}"
        ) from error
    return Path(path)


def _load_complete(folder: Path, config: Any = None, class_name: str | None = None) -> nn.Module:
    """
    The model in `folder`, built after `config` where given; weights of other shapes are then left out. Of the class
    that it was saved from if none is given.
    """
    find_weight_files(folder)
    own_config = config is None
    if own_config:
        config = config_of(folder / "config.json")
    loader = _class_for(folder, config, class_name)
    try:
        # `False`, or transformers asks at the terminal and waits for an answer.
        return loader.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=not own_config,
            trust_remote_code=False,
        )
    except Exception as error:  # of any kind, where a configuration makes no sense
        raise ValueError(f"{folder} cannot be loaded as {loader.__name__}: {first_line(error)}") from error


def _class_for(folder: Path, config: Any, name: str | None) -> Any:
    """The class of that name, or that `config` names; an image classifier where transformers has neither."""
    from transformers import AutoModelForImageClassification

    names = config.architectures or []
    found = transformers_class([name, *names])
    if found is not None:
        return found
    if type(config) in AutoModelForImageClassification._model_mapping:
        return AutoModelForImageClassification
    raise ValueError(
        f"{folder} holds a model of type '{config.model_type}' ({', '.join(names) or 'no architecture named'}), "
        "which transformers has no image classifier or other class for."
    )


def transformers_class(names: Iterable[str | None]) -> Any:
    """The first of these classes that transformers has for models, as its own or as an auto class; else `None`."""
    import transformers

    for name in filter(None, names):
        found = getattr(transformers, name, None)
        if isinstance(found, type) and (
            name.startswith("AutoModel") or issubclass(found, transformers.PreTrainedModel)
        ):
            return found
    return None


def check_files(folder: Path) -> None:
    """A `ValueError` if something in a model's folder has the name of a file that loaders open and is none."""
    for pattern in ("*.json", "*.safetensors", *TOKENIZER_FILES):
        for file in folder.glob(pattern):
            is_file(file)


def config_of(file: Path) -> Any:
    """
    The configuration in a file, with all defaults.

    Raises:
        ValueError: naming the file, if it is none that transformers takes.
    """
    from transformers import AutoConfig, TimmWrapperConfig

    content = read_config(file)
    if "pretrained_cfg" not in content and "model_type" not in content:
        raise ValueError(f"{file} has neither `model_type` (transformers) nor `pretrained_cfg` (timm).")
    try:
        if "pretrained_cfg" not in content:
            return AutoConfig.from_pretrained(file, trust_remote_code=False)
        # timm's own `save_for_hf` names the number of classes once more here, which the wrapper passes twice.
        content.get("model_args", {}).pop("num_classes", None)
        return TimmWrapperConfig.from_dict(content)
    except Exception as error:  # of any kind, as the fields of configurations are
        raise ValueError(f"{file} is no configuration that transformers takes: {first_line(error)}") from error


def adapter_config_of(folder: Path) -> Any:
    """An adapter's configuration, with all defaults. A `ValueError` as from [`config_of`]."""
    from peft import PeftConfig

    read_adapter_config(folder)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # of any kind, as the fields of configurations are
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} is no configuration that PEFT takes: {first_line(error)}"
        ) from error


def _load_adapter(folder: Path, base_model: nn.Module | str | Path | None, token: str | bool | None) -> nn.Module:
    from peft import PeftModel

    find_weight_files(folder)
    if not isinstance(base_model, nn.Module):
        adapter = read_adapter_config(folder)
        named = base_model or adapter.get("base_model_name_or_path")
        if not named:
            raise ValueError(
                f"The adapter in {folder} does not say which backbone it belongs to: pass it as `base_model`."
            )
        base_folder = find_folder(named, token=token)
        if is_file(folder / BACKBONE_CONFIG):
            base_model = _load_complete(base_folder, config_of(folder / BACKBONE_CONFIG))
        else:
            base_model = _load_complete(base_folder, class_name=_backbone_class(adapter))
    try:
        return PeftModel.from_pretrained(base_model, folder).eval()
    except Exception as error:  # of any kind, where a configuration makes no sense
        raise ValueError(f"{folder} cannot be loaded as an adapter: {first_line(error)}") from error


def _backbone_class(adapter: dict[str, Any]) -> str | None:
    # A backbone was often saved with another head, or none, than the adapter was trained under.
    named = (adapter.get("auto_mapping") or {}).get("base_model_class")
    return named or _CLASS_OF_TASK.get(str(adapter.get("task_type")))
