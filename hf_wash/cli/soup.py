"""`hf-wash soup`: the average of models that are there already, as a folder like theirs."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import is_file, scratch_beside
from ..sentences import first_line
from .alike import check_alike
from .images import ImageFolder
from .terminal import note, quiet, say


# What of a model's folder describes the model, not how it was trained, beside the files of its tokenizer.
_DESCRIPTIONS = (
    *("config.json", "generation_config.json", "adapter_config.json", "backbone_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    "normalizer.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BATCH_NORM_STATISTICS = ".running_mean"
# As `WashConfig.soup_batch_norm_batches`.
_RECALIBRATION_BATCHES = 100


def soup(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of models with one architecture.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not hold anything yet.")],
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Average only those models that raise the accuracy on --eval-data.")
    ] = False,
    eval_data: Annotated[
        Path | None,
        typer.Option(help="A folder of images, one folder for each class. Held out: not what is reported on."),
    ] = None,
    recalibrate_bn: Annotated[
        bool, typer.Option("--recalibrate-bn", help="Measure BatchNorm statistics anew, on --train-data.")
    ] = False,
    train_data: Annotated[Path | None, typer.Option(help="A folder of images for --recalibrate-bn.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time, where there are images.")] = 64,
) -> None:
    """Average the weights of models into one model.

    Models are read tensor by tensor, so that a soup of many takes the memory of two.
    """
    if greedy and eval_data is None:
        raise ValueError("--greedy chooses by the accuracy on held-out images: name their folder with --eval-data.")
    if recalibrate_bn and train_data is None:
        raise ValueError("--recalibrate-bn needs training images: name their folder with --train-data.")
    if train_data is not None and not recalibrate_bn:
        raise ValueError("--train-data is for --recalibrate-bn, which is missing.")
    for option, folder in (("--eval-data", eval_data), ("--train-data", train_data)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option} must be a folder of images, and there is no folder {folder}.")
    # What a link leads to, or a rename would not do.
    target = Path(os.path.realpath(out))
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--out {out} is there already and not empty; name another folder, or remove it first.")

    quiet()
    import torch  # noqa: F401 (before the messages below, since it is what takes time)

    from ..hub.loading import check_files
    from ..soup import greedy_soup, uniform_soup
    from ..soup.weights import find_weight_files

    folders = [_find(model) for model in models]
    for folder in folders:
        find_weight_files(folder)
        check_files(folder)
    check_alike(models, folders)
    if eval_data is not None:
        _check_classifies_images(models[0], folders[0])
    if len(models) == 1:
        note(f"A soup of one: its weights are those of {models[0]}.")

    record: dict[str, Any] = {"method": "greedy" if greedy else "uniform", "ingredients": _names(models)}
    metrics = {}
    # A fresh folder: another command may be writing to the same place, and what has its name may be the user's.
    with scratch_beside(target) as scratch:
        staged = scratch / "soup"
        score: Callable[[dict], float] | None = None
        if eval_data is not None:
            images = ImageFolder(eval_data, folders[0], batch_size)
            training = (
                ImageFolder(train_data, folders[0], batch_size, shuffled=True) if train_data is not None else None
            )
            score = _score_of(scratch / "trial", folders[0], images, training)
        if greedy and score is not None:
            weights, chosen = greedy_soup(folders, score)
            record |= {"chosen": sorted(chosen.indices), "scores": list(chosen.member_scores)}
            listing = ", ".join(
                f"{name} {value:.2%}" for name, value in zip(models, chosen.member_scores, strict=True)
            )
            say(f"Held-out accuracy: {listing}.")
            say(f"In the soup: {', '.join(models[i] for i in sorted(chosen.indices))}, with {chosen.score:.2%}.")
        else:
            weights = uniform_soup(folders)
        has_batch_norm = any(name.endswith(_BATCH_NORM_STATISTICS) for name in weights)
        _write(staged, folders[0], weights)
        del weights
        if train_data is not None and has_batch_norm:
            _recalibrate(staged, ImageFolder(train_data, folders[0], batch_size, shuffled=True))
            record["batch_norm"] = "recalibrate"
        elif recalibrate_bn:
            note("--recalibrate-bn has nothing to do: the models have no BatchNorm statistics.")
        elif has_batch_norm and len(models) > 1:
            record["batch_norm"] = "average"
            note(
                "The soup's BatchNorm statistics are the models' averages, which is often wrong: --recalibrate-bn "
                "--train-data FOLDER measures them."
            )
        _check_loads(staged, models[0])
        if eval_data is not None and not greedy:
            metrics["eval_accuracy"] = _accuracy(staged, images)
            metrics["eval_samples"] = len(images)
            say(f"Accuracy of the soup on {eval_data}: {metrics['eval_accuracy']:.2%}.")
        _describe(staged, record, metrics, target.name)
        try:
            if target.is_dir():
                target.rmdir()
            os.rename(staged, target)
        except OSError as error:
            raise ValueError(
                f"--out {out} cannot be made ({error.strerror}): somebody else may have written there meanwhile."
            ) from error
    count = len(record.get("chosen", models))
    say(f"The soup of {count} model{'s' if count > 1 else ''} is in {out}.")


def _find(model: str) -> Path:
    from ..hub.loading import find_folder

    folder = find_folder(model)
    if not Path(model).is_dir() and not any(folder.glob("*.safetensors")):
        from huggingface_hub import list_repo_files

        pickles = [name for name in list_repo_files(model) if name.endswith(_PICKLES) and "/" not in name]
        if pickles:
            raise ValueError(
                f"{model} holds its weights as a pickle only ({', '.join(pickles)}), and loading a pickle can run any "
                "code in it: find a revision with safetensors, or convert it first."
            )
    return folder


def _names(models: list[str]) -> list[str]:
    # A repository is known by its id, a folder of this machine by its name: the rest is nobody else's business.
    return [Path(model).resolve().name if Path(model).is_dir() else model for model in models]


def _check_classifies_images(model: str, folder: Path) -> None:
    import transformers

    from ..hub.kinds import image_classifier_names
    from ..hub.loading import BACKBONE_CONFIG
    from ..hub.record import read_config

    file = next((folder / name for name in ("config.json", BACKBONE_CONFIG) if (folder / name).is_file()), None)
    # timm's models are all of this kind; an adapter that does not know its backbone, or a class that transformers does
    # not, is judged by what loads it.
    content = {} if file is None else read_config(file)
    names = [name for name in content.get("architectures") or [] if hasattr(transformers, name)]
    if names and "pretrained_cfg" not in content and not image_classifier_names().intersection(names):
        raise ValueError(
            f"--eval-data measures the accuracy of image classifiers, and {model} is a {names[0]}: leave it and --greedy "
            "out, or choose with `hf_wash.soup.greedy_soup` and a score of your own."
        )


def _write(folder: Path, like: Path, weights: dict[str, Any]) -> None:
    """A model's folder: these weights, and what describes the model from another folder."""
    from safetensors.torch import save_file

    from ..hub.loading import ADAPTER_CONFIG, TOKENIZER_FILES

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for pattern in (*_DESCRIPTIONS, *TOKENIZER_FILES):
        for file in filter(is_file, like.glob(pattern)):
            target = folder / file.relative_to(like)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    adapter = (like / ADAPTER_CONFIG).is_file()
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    save_file(weights, folder / name, metadata={"format": "pt"})


def _check_loads(folder: Path, model: str) -> None:
    """Load what was written the way a user will."""
    from ..hub.loading import ADAPTER_CONFIG, load_model, transformers_class
    from ..hub.record import read_config

    config = read_config(folder / "config.json")
    names = ["TimmWrapperForImageClassification"] if "pretrained_cfg" in config else config.get("architectures", [])
    loader = transformers_class(names)
    try:
        if (folder / ADAPTER_CONFIG).is_file() or loader is None:
            load_model(folder)
            return
        _, info = loader.from_pretrained(
            folder,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are told
            trust_remote_code=False,
        )
    except Exception as error:  # of any kind, where a configuration makes no sense
        raise ValueError(
            f"The soup, with the configuration of {model}, does not load: {first_line(error)} So does that model."
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(
                f"The soup does not load as a {names[0]}: {what.replace('_', ' ')}, {sorted(map(str, info[what]))[0]} first. "
                "So do the models it was made of."
            )


def _describe(folder: Path, record: dict[str, Any], metrics: dict[str, float], name: str) -> None:
    import json
    from importlib.metadata import version

    from .. import __version__
    from ..hub.card import WashCard
    from ..hub.record import write_record

    if metrics:
        (folder / "all_results.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    versions = {"hf_wash": __version__, **{package: version(package) for package in ("torch", "transformers", "timm")}}
    write_record(folder, {"soup": record, "versions": versions, "card": {"model_name": name}})
    WashCard.from_folder(folder).write(folder)


def _accuracy(model_or_folder: Any, images: ImageFolder) -> float:
    import torch

    from ..hub.loading import load_model

    model = load_model(model_or_folder) if isinstance(model_or_folder, Path) else model_or_folder
    labels, correct = torch.tensor(images.labels_for(model)), 0
    with torch.no_grad():
        for batch in images:
            try:
                answers = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
            except Exception as error:  # of any kind: images of another size, a configuration that makes no sense
                raise ValueError(
                    f"The model does not take the images of {images.folder}, prepared as {images.model_folder} says: "
                    f"{first_line(error)}"
                ) from error
            correct += int((answers == labels[torch.tensor(batch["classes"])]).sum())
    return correct / len(images)


def _score_of(trial: Path, like: Path, images: ImageFolder, training: ImageFolder | None) -> Callable[[dict], float]:
    """A score for `greedy_soup`: through a folder, so that weights are named as the models' origin names them."""
    from ..hub.loading import load_model
    from ..soup import recalibrate_batch_norm

    def score(weights: dict[str, Any]) -> float:
        _write(trial, like, weights)
        model = load_model(trial)
        if training is not None:
            recalibrate_batch_norm(model, _inputs(training), max_batches=_RECALIBRATION_BATCHES)
        return _accuracy(model, images)

    return score


def _recalibrate(folder: Path, training: ImageFolder) -> None:
    from ..hub import export_model, load_model
    from ..soup import recalibrate_batch_norm

    model = load_model(folder)
    recalibrate_batch_norm(model, _inputs(training), max_batches=_RECALIBRATION_BATCHES)
    export_model(model, folder)


def _inputs(images: ImageFolder) -> Iterator[dict[str, Any]]:
    return ({"pixel_values": batch["pixel_values"]} for batch in images)
