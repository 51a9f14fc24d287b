"""
`hf-wash`: soups of models that are there already, and runs inspected, described and pushed, from the command line.

What a command does is done elsewhere; here is what its words and messages are. A user's mistake is one line on stderr
and exit code 2. Nothing heavy is imported before a command needs it.
"""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer


app = typer.Typer(
    name="hf-wash",
    help="Soups of models, and population runs: make, inspect, describe and push them.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# What of a model's folder describes the model, not how it was trained.
_DESCRIPTIONS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *(
        "adapter_config.json",
        "backbone_config.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "special_tokens_map.json",
    ),
    *("added_tokens.json", "spiece.model", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    "tokenizer.model",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BATCH_NORM_STATISTICS = ".running_mean"
# As `WashConfig.soup_batch_norm_batches`.
_RECALIBRATION_BATCHES = 100


def main(arguments: list[str] | None = None) -> None:
    """The entry point of `hf-wash`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(format="hf-wash: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        code = app(arguments or ["--help"], standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own, about the words of the command
            reason = error.format_message()
        elif isinstance(error, (ValueError, OSError, RuntimeError)):
            reason = str(error) or type(error).__name__
        else:
            raise
        print(f"hf-wash: error: {' '.join(reason.split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# ---- soup ------------------------------------------------------------------------------------------------------------


@app.command()
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
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already and not empty; name another folder, or remove it first.")

    _quiet()
    import torch  # noqa: F401 (before the messages below, since it is what takes time)

    from ..soup import greedy_soup, uniform_soup
    from ..soup.weights import find_weight_files

    folders = [_find(model) for model in models]
    for folder in folders:
        find_weight_files(folder)
    _check_descriptions(models, folders)
    if len(models) == 1:
        _note(f"A soup of one: its weights are those of {models[0]}.")

    staged = out.with_name(f"_incomplete-{out.name}")
    trial = out.with_name(f"_trial-{out.name}")
    record: dict[str, Any] = {"method": "greedy" if greedy else "uniform", "ingredients": _names(models)}
    metrics = {}
    try:
        score = None
        if eval_data is not None:
            images = _Images(eval_data, folders[0], batch_size)
            training = _Images(train_data, folders[0], batch_size, shuffled=True) if train_data is not None else None
            score = _score_of(trial, folders[0], images, training)
        if greedy:
            weights, chosen = greedy_soup(folders, score)
            record |= {"chosen": sorted(chosen.indices), "scores": list(chosen.member_scores)}
            listing = ", ".join(
                f"{name} {value:.2%}" for name, value in zip(models, chosen.member_scores, strict=True)
            )
            print(f"Held-out accuracy: {listing}.")
            print(f"In the soup: {', '.join(models[i] for i in sorted(chosen.indices))}, with {chosen.score:.2%}.")
        else:
            weights = uniform_soup(folders)
        has_batch_norm = any(name.endswith(_BATCH_NORM_STATISTICS) for name in weights)
        _write(staged, folders[0], weights)
        del weights
        if recalibrate_bn and has_batch_norm:
            _recalibrate(staged, _Images(train_data, folders[0], batch_size, shuffled=True))
            record["batch_norm"] = "recalibrate"
        elif recalibrate_bn:
            _note("--recalibrate-bn has nothing to do: the models have no BatchNorm statistics.")
        elif has_batch_norm and len(models) > 1:
            record["batch_norm"] = "average"
            _note(
                "The soup's BatchNorm statistics are the models' averages, which is often wrong: --recalibrate-bn "
                "--train-data FOLDER measures them."
            )
        _check_loads(staged)
        if eval_data is not None and not greedy:
            metrics["eval_accuracy"] = _accuracy(staged, images)
            metrics["eval_samples"] = len(images)
            print(f"Accuracy of the soup on {eval_data}: {metrics['eval_accuracy']:.2%}.")
        _describe(staged, record, metrics, out.name)
        if out.is_dir():
            out.rmdir()
        os.rename(staged, out)
    finally:
        for leftover in (staged, trial):
            shutil.rmtree(leftover, ignore_errors=True)
    count = len(record.get("chosen", models))
    print(f"The soup of {count} model{'s' if count > 1 else ''} is in {out}.")


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


def _check_descriptions(models: list[str], folders: list[Path]) -> None:
    """Weights of the same shapes can mean different things: compare what the models say of themselves."""
    from ..hub.loading import ADAPTER_CONFIG, read_json

    def of(folder: Path) -> dict[str, Any]:
        adapter, complete = folder / ADAPTER_CONFIG, folder / "config.json"
        if adapter.is_file():
            content = read_json(adapter)
            names = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "fan_in_fan_out")
            return {"kind": "adapter", **{name: content.get(name) for name in names}}
        if not complete.is_file():
            raise ValueError(f"{folder} holds no config.json, so there is no telling what kind of model it is.")
        content = read_json(complete)
        labels = content.get("id2label") or content.get("label_names")
        if isinstance(labels, dict):
            labels = [labels[key] for key in sorted(labels, key=int)]
        kind = content.get("architecture") or content.get("architectures")
        return {"kind": kind, "model_type": content.get("model_type", "timm"), "classes": labels}

    first = of(folders[0])
    for model, folder in zip(models[1:], folders[1:], strict=True):
        other = of(folder)
        for name, value in first.items():
            if other.get(name) != value:
                found, expected = _shortened(other.get(name)), _shortened(value)
                raise ValueError(
                    f"{model} cannot be averaged with {models[0]}: its {name.replace('_', ' ')} is {found}, not {expected}."
                )


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _write(folder: Path, like: Path, weights: dict[str, Any]) -> None:
    """A model's folder: these weights, and what describes the model from another folder."""
    from safetensors.torch import save_file

    from ..hub.loading import ADAPTER_CONFIG

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in _DESCRIPTIONS:
        if (like / name).is_file():
            shutil.copyfile(like / name, folder / name)
    adapter = (like / ADAPTER_CONFIG).is_file()
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    save_file(weights, folder / name, metadata={"format": "pt"})


def _check_loads(folder: Path) -> None:
    """Load what was written the way a user will."""
    import transformers

    from ..hub.loading import ADAPTER_CONFIG, load_model, read_json

    if (folder / ADAPTER_CONFIG).is_file():
        load_model(folder)
        return
    config = read_json(folder / "config.json")
    names = ["TimmWrapperForImageClassification"] if "pretrained_cfg" in config else config.get("architectures") or []
    loader = getattr(transformers, names[0], None) if names else None
    if loader is None:
        load_model(folder)
        return
    _, info = loader.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
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


# ---- images ----------------------------------------------------------------------------------------------------------


class _Images:
    """A folder of images, prepared as a model's folder says, in batches: `pixel_values` and `labels`."""

    def __init__(self, folder: Path, model_folder: Path, batch_size: int, shuffled: bool = False):
        import datasets
        from transformers import AutoImageProcessor

        datasets.disable_progress_bars()
        try:
            splits = datasets.load_dataset("imagefolder", data_dir=str(folder))
        except Exception as error:  # whatever it is about: say which folder
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{folder} cannot be read as a folder of images: {reason}") from error
        wanted = ("train", "validation", "test") if shuffled else ("validation", "test", "train")
        name = next(name for name in (*wanted, *splits) if name in splits)
        self.dataset = splits[name]
        if "label" not in self.dataset.features and not shuffled:
            raise ValueError(f"{folder} has images but no classes: expected one folder of images for each class.")
        if shuffled:
            # They come class by class, and the statistics of a batch should be those of all of them.
            self.dataset = self.dataset.shuffle(seed=0)
        try:
            self.processor = AutoImageProcessor.from_pretrained(model_folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{model_folder} does not say how images are prepared for the model.") from error
        self.batch_size, self.folder = batch_size, folder

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.dataset), self.batch_size):
            batch = self.dataset[start : start + self.batch_size]
            images = [image.convert("RGB") for image in batch["image"]]
            prepared = {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
            if "label" in batch:
                prepared["classes"] = batch["label"]
            yield prepared

    def labels_for(self, model: Any) -> list[int]:
        """The model's label for each class of the folder, by name; by position where the model has no names."""
        names = self.dataset.features["label"].names
        own = {str(name): int(index) for index, name in model.config.id2label.items()}
        if all(name in own for name in names):
            return [own[name] for name in names]
        generic = all(name == f"LABEL_{index}" for name, index in own.items())
        if generic and len(names) == len(own):
            return list(range(len(names)))
        unknown = next(name for name in names if name not in own)
        raise ValueError(
            f"{self.folder} has a class {unknown!r} that the model does not know; it knows {_shortened(list(own))}."
        )


def _accuracy(model_or_folder: Any, images: _Images) -> float:
    import torch

    from ..hub.loading import load_model

    model = load_model(model_or_folder) if isinstance(model_or_folder, Path) else model_or_folder
    labels, correct = torch.tensor(images.labels_for(model)), 0
    with torch.no_grad():
        for batch in images:
            answers = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
            correct += int((answers == labels[torch.tensor(batch["classes"])]).sum())
    return correct / len(images)


def _score_of(trial: Path, like: Path, images: _Images, training: _Images | None) -> Callable[[dict], float]:
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


def _recalibrate(folder: Path, training: _Images) -> None:
    from ..hub import export_model, load_model
    from ..soup import recalibrate_batch_norm

    model = load_model(folder)
    recalibrate_batch_norm(model, _inputs(training), max_batches=_RECALIBRATION_BATCHES)
    export_model(model, folder)


def _inputs(images: _Images) -> Iterator[dict[str, Any]]:
    return ({"pixel_values": batch["pixel_values"]} for batch in images)


# ---- push and card ---------------------------------------------------------------------------------------------------


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, or of any model.")],
    repo: Annotated[str, typer.Argument(help="The repository, user/name or name. Made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If it has to be made, make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to push to. Made if it is not there.")] = None,
    members: Annotated[
        bool, typer.Option("--members", help="Push the members too, under members/member_<i>/.")
    ] = False,
    message: Annotated[str, typer.Option(help="The commit's message.")] = "Upload with hf-wash",
) -> None:
    """Upload a run to the Hub in one commit: the soup, its card and, if asked for, the members.

    Log in before with `hf auth login`, or set HF_TOKEN.
    """
    from ..hub.card import write_card
    from ..hub.push import push_folder
    from ..hub.record import RUN_RECORD

    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    _no_bars_in_files()

    def write(repo_id: str) -> None:
        # Only where a run has said what to write; any other model keeps the card it has.
        if (folder / RUN_RECORD).is_file():
            write_card(folder, repo_id=repo_id, revision=revision, members=members)

    commit = push_folder(
        folder,
        repo,
        members=members,
        private=private or None,
        revision=revision,
        commit_message=message,
        prepare=write,
    )
    print(f"Pushed {folder} to {commit.repo_url}{f' ({revision})' if revision else ''}: {commit.oid}")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    repo: Annotated[str | None, typer.Option(help="The repository that the code in the card should name.")] = None,
) -> None:
    """Write the model card of a run, README.md, from what its folder holds.

    What somebody else wrote in the card is kept: only the part between the marks is replaced, and metadata that is
    missing is added.
    """
    from ..hub.card import write_card

    write_card(folder, repo_id=repo)
    print(f"Wrote {folder / 'README.md'}.")


# ---- inspect ---------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, a checkpoint or a model.")],
) -> None:
    """Say what a run or a checkpoint holds, and check its files against their digests.

    The exit code is 2 if a checkpoint is damaged.
    """
    from ..hub.card import WashCard
    from ..trainer import checkpoint

    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if (folder / checkpoint.MANIFEST).is_file() or folder.name.startswith("checkpoint-"):
        print(_checkpoint_line(folder, checkpoint.verify(folder)))
        return
    held = False
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        held = True
        known = WashCard.from_folder(folder, pictures=False)
        print(f"{folder}: {known.what_it_is}")
        for name, value in known.recipe():
            print(f"  {name}: {value}")
        columns, rows = known.rows()
        if rows:
            print(_table([["", *columns], *([cell.strip("*") for cell in row] for row in rows)]))
        for index, name in enumerate(known.soup.get("ingredients", [])):
            print(f"  ingredient {index}: {name}")
    for place in ("_members", "members"):
        members = [path for path in (folder / place).glob("member_*") if path.is_dir()]
        if members:
            held = True
            size = sum(path.stat().st_size for member in members for path in member.glob("*.safetensors"))
            print(f"  {place}/: {len(members)} members, {size / 1e6:,.1f} MB of weights")
    damaged = []
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    for path in sorted((path for path, step in steps.items() if step.isdigit()), key=lambda path: int(steps[path])):
        held = True
        try:
            print(f"  {_checkpoint_line(path, checkpoint.verify(path))}")
        except checkpoint.InvalidCheckpoint as error:
            damaged.append(str(error))
            print(f"  {path.name}: damaged")
    for path in sorted(folder.glob(f"{checkpoint.STAGING_PREFIX}*")):
        print(f"  {path.name}: never finished, can be removed")
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}.")
    if not held:
        raise ValueError(f"{folder} holds no model, no members and no checkpoint.")


def _checkpoint_line(folder: Path, manifest: dict[str, Any]) -> str:
    files = manifest["files"]
    size = sum(record["size"] for record in files.values())
    resumable = any(name.endswith("optimizer.pt") for name in files)
    method = manifest.get("options", {}).get("mixing", "")
    total = f" of {manifest['total_steps']}" if manifest.get("total_steps") else ""
    return (
        f"{folder.name}: step {manifest['step']}{total}, {manifest['population_size']} members, {method}, seed "
        f"{manifest.get('seed')}, {len(files)} files of {size / 1e6:,.1f} MB, digests verified, "
        f"{'can be resumed from' if resumable else 'weights only'}"
    )


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _note(text: str) -> None:
    print(f"hf-wash: {text}", file=sys.stderr)


def _no_bars_in_files() -> None:
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def _quiet() -> None:
    """What loading has to say of itself is not what the user asked about."""
    import transformers

    _no_bars_in_files()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
