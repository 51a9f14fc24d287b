"""
The model card: what a stranger, and the Hub, should know about a model that came out of a population.

[`WashCard`] knows everything that is said, filled from a run's folder alone; `card_template.md.jinja` says it. A card
that is already there keeps its own text and metadata: only the part between two marks is replaced, and metadata that
is missing is added. Needs neither torch nor transformers.
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from . import wording
from .card_merge import CARD, has_title, merge_card, own_text
from .record import (
    REPO_ID,
    RUN_RECORD,
    as_list,
    count_values,
    hub_ids,
    is_number,
    last_evaluation,
    read_json,
    read_record,
)


logger = logging.getLogger(__name__)

PAPA_INTERVAL = 10

_METHODS = {"wash": "WASH"}
# Metrics that the Hub knows by these names and shows as such.
_HUB_METRICS = ("accuracy", "f1", "precision", "recall", "roc_auc")
_NO_METRIC = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "consensus_distance")
_MAX_COLUMNS = 6


# ---- What is known ---------------------------------------------------------------------------------------------------


@dataclass
class WashCard:
    """
    Everything a model card says.

    Args:
        model_name (`str`):
            The heading.
        library (`str`):
            `"transformers"`, `"timm"` or `"peft"`: what the folder is loaded with, and the card's `library_name`.
        repo_id (`str`, *optional*):
            The repository, for the code in the card. Without one the code loads the folder it is in.
        revision (`str`, *optional*):
            The branch, where it is not the main one.
        config (`dict`, *optional*):
            The model's `config.json` (of an adapter, its `backbone_config.json`).
        record (`dict`, *optional*):
            What `wash_run.json` holds: how the model came about.
        metrics (`dict[str, float]`, *optional*):
            With the keys of `WashTrainer.evaluate`.
        pictures (`dict[str, str]`, *optional*):
            Captions and paths.
        has_members (`bool`, *optional*, defaults to `False`):
            Whether the members lie beside the soup, so that the ensemble can be loaded.
        has_processor (`bool`, *optional*, defaults to `False`):
            Whether the folder says how images are prepared.
        values (`int`, *optional*):
            Number of values in the weight files.
        adapter_base (`str`, *optional*):
            The backbone that an adapter names.
        license, language, base_model (`str`, *optional*), tags, dataset_ids, dataset_names (`list[str]`, *optional*), \
        pipeline_tag (`str`, *optional*):
            Metadata.

    Example:

    ```python
    >>> from hf_wash.hub.card import WashCard

    >>> WashCard.from_folder("soup", repo_id="user/soup").write("soup")
    ```
    """

    model_name: str
    library: str
    repo_id: str | None = None
    revision: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    has_members: bool = False
    has_processor: bool = False
    values: int | None = None
    adapter_base: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    base_model: str | list[str] | None = None
    tags: list[str] = field(default_factory=list)
    dataset_ids: list[str] = field(default_factory=list)
    dataset_names: list[str] = field(default_factory=list)
    pipeline_tag: str | None = None

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        repo_id: str | None = None,
        revision: str | None = None,
        members: bool | None = None,
        record: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        log_history: list[dict[str, Any]] | None = None,
        pictures: bool = True,
    ) -> "WashCard":
        """
        Fill a card from a run's folder: `config.json`, `wash_run.json`, `all_results.json` and `trainer_state.json`,
        as far as they are there. Draws the pictures into it.

        Args:
            folder (`str` or `Path`):
                The run's `output_dir`, or what `hf-wash soup` wrote.
            repo_id, revision (`str`, *optional*):
                Where it will be on the Hub.
            members (`bool`, *optional*):
                Whether the members will be there, too. Whether they are here, if not given.
            record, metrics, log_history (*optional*):
                In place of those in the folder.
            config (`dict`, *optional*):
                The model's configuration, for a folder that has none yet.
            pictures (`bool`, *optional*, defaults to `True`):
                Whether to draw.

        Raises:
            ValueError: if the folder holds no model, or a file in it cannot be read.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"There is no folder {folder}.")
        adapter = read_json(folder / "adapter_config.json")
        config = read_json(folder / "config.json") or read_json(folder / "backbone_config.json") or config or {}
        if not config and not adapter:
            raise ValueError(f"{folder} holds no model: expected config.json or adapter_config.json in it.")
        if adapter:
            library = "peft"
        else:
            library = "timm" if "pretrained_cfg" in config else "transformers"
        record = read_record(folder) if record is None else record
        state = read_json(folder / "trainer_state.json")
        if log_history is None:
            log_history = state.get("log_history", [])
        if metrics is None:
            metrics = read_json(folder / "all_results.json") or read_json(folder / "eval_results.json")
            if not any(key.startswith("eval_") for key in metrics):
                metrics = last_evaluation(log_history)
        options = record.get("card", {})
        name = options.get("model_name") or (repo_id.split("/")[-1] if repo_id else folder.resolve().name)
        local_members = any((folder / place / "member_0").is_dir() for place in ("_members", "members"))
        drawn = {}
        if pictures:
            from .pictures import draw_pictures

            drawn = draw_pictures(folder, log_history, metrics)
        return cls(
            model_name=name,
            library=library,
            repo_id=repo_id,
            revision=None if revision == "main" else revision,
            config=config,
            record=record,
            metrics={key: value for key, value in metrics.items() if is_number(value)},
            pictures=drawn,
            has_members=local_members if members is None else members,
            has_processor=library == "timm" or (folder / "preprocessor_config.json").is_file(),
            values=count_values(folder),
            adapter_base=adapter.get("base_model_name_or_path"),
            license=options.get("license"),
            language=options.get("language"),
            base_model=options.get("finetuned_from"),
            tags=as_list(options.get("tags")),
            dataset_ids=as_list(options.get("dataset_tags")),
            dataset_names=as_list(options.get("dataset")),
            pipeline_tag=next(iter(as_list(options.get("tasks"))), None),
        )

    # ---- Metadata ----------------------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        """The card's front matter, as the Hub reads it."""
        tags = list(dict.fromkeys([*self.tags, *(["wash"] if self.method == "wash" else []), "model-soup"]))
        if self.library == "timm":
            tags = list(dict.fromkeys([*tags, "timm", "transformers"]))
        ingredients = [name for name in self.soup.get("ingredients", []) if REPO_ID.fullmatch(name)]
        base = hub_ids(self.base_model)
        relation = "adapter" if self.library == "peft" else "finetune"
        if ingredients:
            base, relation = ingredients, "merge"
        elif not base and self.library == "peft":
            base = hub_ids(self.adapter_base)
        data = {
            "language": self.language,
            "license": self.license,
            "library_name": self.library,
            "pipeline_tag": self._pipeline_tag,
            "tags": tags,
            "base_model": base[0] if len(base) == 1 else base,
            "base_model_relation": relation if base else None,
            "datasets": self._dataset_ids,
            "metrics": [name for name in self._metric_names if name in _HUB_METRICS],
            "model-index": self._model_index(),
        }
        return {key: value for key, value in data.items() if value not in (None, [], "")}

    @property
    def _pipeline_tag(self) -> str | None:
        if self.pipeline_tag is not None:
            return self.pipeline_tag
        return "image-classification" if self.is_image_classifier else None

    @property
    def _dataset_ids(self) -> list[str]:
        named = [name for name in self.dataset_names if REPO_ID.fullmatch(name)]
        return list(dict.fromkeys([*self.dataset_ids, *named]))

    def _model_index(self) -> list[dict[str, Any]]:
        names = self._metric_names
        if not names:
            return []
        shown = self.dataset_names or self._dataset_ids
        dataset = {"name": ", ".join(shown) or "unknown", "type": next(iter(self._dataset_ids), None)}
        if dataset["type"] is None:
            dataset["type"] = re.sub(r"[^\w.-]+", "-", dataset["name"].lower()).strip("-") or "unknown"
        metrics = [
            {"type": name, "name": wording.title(name), "value": self.metrics[f"eval_{name}"]} for name in names
        ]
        task = self._pipeline_tag or "other"
        result = {"task": {"type": task, "name": wording.title(task.replace("-", "_"))}, "dataset": dataset}
        return [{"name": self.model_name, "results": [{**result, "metrics": metrics}]}]

    # ---- What the template asks for ----------------------------------------------------------------------------------

    @property
    def method(self) -> str | None:
        """The mixing of the population; `None` where it is not known that there was one."""
        return self.record.get("mixing", {}).get("method")

    @property
    def method_name(self) -> str:
        return _METHODS.get(self.method or "", "this run")

    @property
    def soup(self) -> dict[str, Any]:
        return self.record.get("soup", {})

    @property
    def size(self) -> int | None:
        """Number of members, if known."""
        size = self.record.get("population", {}).get("size")
        if size is None:
            size = sum(re.fullmatch(r"eval_member_\d+_loss", key) is not None for key in self.metrics) or None
        return size

    @property
    def is_population(self) -> bool:
        return self.size is not None

    @property
    def is_image_classifier(self) -> bool:
        names = self.config.get("architectures") or [self.record.get("model", {}).get("class") or ""]
        return "pretrained_cfg" in self.config or any(name.endswith("ForImageClassification") for name in names)

    @property
    def has_record(self) -> bool:
        return bool(self.record)

    @property
    def version(self) -> str:
        return self.record.get("versions", {}).get("hf_wash") or __version__

    @property
    def steps(self) -> int:
        return self.record.get("training", {}).get("steps") or 0

    @property
    def trainable_parameters(self) -> int:
        return self.record.get("model", {}).get("trainable_parameters") or 0

    @property
    def bytes_per_value_text(self) -> str:
        size = self.record.get("model", {}).get("trainable_bytes", 0) / max(self.trainable_parameters, 1)
        return f"{size:g}"

    @property
    def data_names(self) -> str:
        return ", ".join(wording.cell(name) for name in self.dataset_names or self._dataset_ids)

    @property
    def eval_samples_text(self) -> str:
        samples = self.metrics.get("eval_samples") or self.record.get("data", {}).get("eval_samples")
        return f"{int(samples):,}" if samples else ""

    @property
    def _metric_names(self) -> list[str]:
        """The metrics of the soup, without the prefix; accuracy first and the loss last."""
        names = []
        for key in self.metrics:
            name = key.removeprefix("eval_")
            if key == name or name in (*_NO_METRIC, "samples") or re.match(r"(ensemble|members?(_\d+)?)_", name):
                continue
            names.append(name)
        names.sort(key=lambda name: (name != "accuracy", name == "loss"))
        if len(names) > _MAX_COLUMNS and "loss" in names:
            names = [*names[: _MAX_COLUMNS - 1], "loss"]
        return names[:_MAX_COLUMNS]

    @property
    def what_it_is(self) -> str:
        kind = "an image classifier" if self.is_image_classifier else "a model"
        if self.library == "peft":
            kind = f"an adapter for {kind}"
        details = []
        architecture = self.config.get("architecture") or next(iter(self.config.get("architectures") or []), None)
        architecture = architecture or self.record.get("model", {}).get("class")
        if architecture:
            details.append(f"`{architecture}`")
        parameters = self.record.get("model", {}).get("parameters") or self.values
        if parameters:
            details.append(f"{wording.short_count(parameters)} parameters")
        classes = len(self.config.get("id2label") or self.config.get("label_names") or [])
        if self.is_image_classifier and classes:
            details.append(f"{classes} classes")
        text = f"{kind} ({', '.join(details)})" if details else kind
        base = hub_ids(self.base_model)
        if base and not self.soup.get("ingredients"):
            text += f", fine-tuned from {wording.links(base)}"
        elif self.base_model and not self.soup.get("ingredients"):
            text += f", fine-tuned from {wording.cell(Path(as_list(self.base_model)[0]).name)}"
        if self.data_names:
            text += (
                f" and trained on {self.data_names}" if base or self.base_model else f", trained on {self.data_names}"
            )
        return text + "."

    @property
    def how_it_came_about(self) -> str:
        ingredients = self.soup.get("ingredients")
        if ingredients:
            chosen = self.soup.get("chosen")
            if len(ingredients) == 1:
                return "It is a model soup of one: its weights are those of the model below."
            if chosen is not None and len(chosen) < len(ingredients):
                return (
                    f"It is a *model soup*: the average of the weights of {len(chosen)} of the {len(ingredients)} models "
                    "below, those that raised the score on held-out data. It costs as much to run as one of them."
                )
            return (
                f"It is a *model soup*: the average of the weights of the {len(ingredients)} models below. It costs as "
                "much to run as one of them."
            )
        if self.size is None:
            return "Nothing more is known about how it was trained: the folder holds no record of a run."
        if self.size == 1:
            return "It was trained as a population of one, which is ordinary training."
        if self.soup.get("method") == "greedy":
            chosen = self.soup.get("chosen")
            some = f"{len(chosen)} of {self.size}" if chosen else f"some of {self.size}"
            average = f"the average of the weights of {some} models, chosen on held-out training data, "
        else:
            average = f"the average of the weights of {self.size} models "
        text = f"It is a *model soup*: {average}that were trained at the same time, each on its own batches. "
        if self.method == "wash":
            text += (
                "While training, they kept swapping a small, randomly chosen part of their weights with one another "
                "(a method called WASH). A weight stays in its place and only changes its owner, which is meant to keep "
                "the models close enough to each other to be averaged, and different enough for that to be worth it. "
            )
        elif self.method == "independent":
            text += "They exchanged nothing while training. "
        return text + "It costs as much to run as one of them."

    @property
    def caution(self) -> str | None:
        """What is to be said where averaging has gone wrong."""
        soup, members = self.metrics.get("eval_accuracy"), self.metrics.get("eval_members_accuracy_mean")
        if soup is None or members is None or soup > members - 0.02:
            return None
        mixed = "exchanged nothing while training" if self.method == "independent" else "did not stay close enough"
        return (
            f"**The soup is {100 * (members - soup):.1f} points behind the mean of its members**, which {mixed}: their "
            "weights cannot be averaged without a loss. A member, or the ensemble, is the better model."
        )

    @property
    def where_it_runs(self) -> str:
        base = self.adapter_base
        if self.library == "peft" and base and not hub_ids(base) and not Path(base).is_absolute():
            return (
                f"These lines run where the backbone is found as `{base}`, with the path of this card's folder in place "
                "of `.`."
            )
        return "These lines run in the folder of this card."

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The table of results: its columns, and a row for each member, their mean, the ensemble and the soup."""
        names = self._metric_names
        if not names:
            return [], []
        prefixes = []
        while any(f"eval_member_{len(prefixes)}_{name}" in self.metrics for name in names):
            prefixes.append((f"member {len(prefixes)}", f"eval_member_{len(prefixes)}_{{}}"))
        prefixes += [
            ("members' mean", "eval_members_{}_mean"),
            ("ensemble", "eval_ensemble_{}"),
            ("**soup**" if prefixes else "soup", "eval_{}"),
        ]
        table = []
        for title, key in prefixes:
            cells = [wording.number(name, self.metrics.get(key.format(name))) for name in names]
            if any(cells):
                table.append([title, *cells])
        return [wording.title(name) for name in names], table

    def recipe(self) -> list[tuple[str, str]]:
        """How the run was made: names and values."""
        population, mixing, training = (self.record.get(part, {}) for part in ("population", "mixing", "training"))
        if not population:
            return []
        size, seed = population.get("size", 1), training.get("seed")
        rows: list[tuple[str, Any]] = [("population", f"{size} member{'s' if size > 1 else ''}")]
        if size > 1:
            start = "the same weights" if population.get("same_init", True) else "different weights"
            rows.append(("members start from", start))
            if mixing.get("method") == "wash":
                rows += [
                    ("mixing", f"WASH{' with optimizer state' if mixing.get('shuffle_optimizer_state') else ''}"),
                    ("probability p", f"{mixing.get('shuffle_probability'):g}"),
                    ("schedule over depth", mixing.get("shuffle_schedule")),
                    ("shuffled", wording.when_shuffled(mixing)),
                ]
            else:
                rows.append(("mixing", mixing.get("method")))
        if seed is not None:
            seeds = f"{seed} to {seed + size - 1}, one for each member" if size > 1 else f"{seed}"
            if training.get("data_seed") is not None:
                seeds += f"; data from {training['data_seed']}"
            rows.append(("seeds", seeds))
        samples = self.record.get("data", {}).get("train_samples")
        seen = "each member a part of its own" if population.get("member_data") == "shard" else ""
        data = [self.data_names, f"{samples:,} training samples" if samples else "", seen if size > 1 else ""]
        rows.append(("data", ", ".join(text for text in data if text)))
        rows += [
            (f"member {index} differs", wording.differences(override))
            for index, override in enumerate(population.get("overrides", []))
            if wording.differences(override)
        ]
        steps, epochs = training.get("steps"), training.get("epochs")
        if steps:
            rows.append(("length", f"{steps:,} optimizer steps" + (f", {epochs:g} epochs" if epochs else "")))
        batch, accumulation = training.get("batch_size"), training.get("gradient_accumulation_steps") or 1
        if batch:
            times = f" ({batch // accumulation} × {accumulation} accumulated)" if accumulation > 1 else ""
            rows.append(("batch size of a member", f"{batch}{times}"))
        rows += [
            ("optimizer", training.get("optimizer")),
            ("learning rate", wording.learning_rate(training)),
            ("weight decay", wording.plain(training.get("weight_decay"))),
            ("label smoothing", wording.plain(training.get("label_smoothing_factor") or None)),
            ("gradient norm clipped at", wording.plain(training.get("max_grad_norm") or None)),
            ("precision", training.get("precision")),
            ("soup", wording.soup_method(self.soup) if size > 1 else None),
            ("hardware", self.record.get("hardware", {}).get("text")),
            ("versions", ", ".join(f"{name} {v}" for name, v in self.record.get("versions", {}).items())),
        ]
        return [(name, wording.cell(str(value))) for name, value in rows if value not in (None, "")]

    def exchange(self) -> list[list[str]]:
        """Bytes sent in the whole run: by this one, and by DDP and PAPA had they trained the same."""
        exchanged = self.record.get("exchange", {}).get("bytes_exchanged")
        size, parameters = self.size or 1, self.record.get("model", {}).get("trainable_bytes")
        if exchanged is None or not parameters or not self.steps or size == 1:
            return []
        ddp = size * self.steps * parameters
        papa = size * (self.steps // PAPA_INTERVAL) * parameters
        rows = [[self.method_name, wording.bytes_text(exchanged), "1"]]
        for name, amount in (("PAPA", papa), ("DDP", ddp)):
            rows.append([name, wording.bytes_text(amount), f"{amount / exchanged:,.3g} ×" if exchanged else "–"])
        return rows

    def ingredients(self) -> tuple[list[list[str]], bool, bool]:
        """The models of a soup made by `hf-wash soup`; whether there are scores, and whether there was a choice."""
        names = self.soup.get("ingredients", [])
        scores, chosen = self.soup.get("scores"), self.soup.get("chosen")
        table = []
        for index, name in enumerate(names):
            row = [str(index), wording.links([name]) if REPO_ID.fullmatch(name) else wording.cell(name)]
            if scores:
                row.append(wording.number("accuracy", scores[index]))
            if chosen is not None:
                row.append("yes" if index in chosen else "no")
            table.append(row)
        return table, bool(scores), chosen is not None

    def snippets(self) -> list[tuple[str, str]]:
        """Captions and code that loads the model, and runs as it stands."""
        place = self.repo_id or "."
        revision = f', revision="{self.revision}"' if self.revision and self.repo_id else ""
        image = 'image = Image.new("RGB", (224, 224), "white")  # or Image.open("your_image.jpg").convert("RGB")'
        found: list[tuple[str, str]] = []
        if self.library == "peft":
            found.append(
                (
                    "With PEFT, on the backbone that the adapter names:",
                    f'from hf_wash.hub import load_model\n\nmodel = load_model("{place}"{revision})\nprint(model.config)',
                )
            )
            if self.adapter_base and self.is_image_classifier:
                classes = len(self.config.get("id2label") or []) or 2
                found.append(
                    (
                        "Step by step, on a backbone of your own loading:",
                        "from peft import PeftModel\nfrom transformers import AutoModelForImageClassification\n\n"
                        "backbone = AutoModelForImageClassification.from_pretrained(\n"
                        f'    "{self.adapter_base}", num_labels={classes}, ignore_mismatched_sizes=True\n)\n'
                        f'model = PeftModel.from_pretrained(backbone, "{place}"{revision})',
                    )
                )
            return found
        if self.is_image_classifier and self.has_processor and self.config.get("num_channels", 3) == 3:
            found.append(
                (
                    "With transformers:",
                    "from PIL import Image\nfrom transformers import pipeline\n\n"
                    f'classify = pipeline("image-classification", model="{place}"{revision})\n'
                    f"{image}\nprint(classify(image))",
                )
            )
            if self.library == "timm":
                where = f"hf_hub:{place}" if self.repo_id else f"local-dir:{place}"
                where += f"@{self.revision}" if revision else ""
                found.append(
                    (
                        "With timm:",
                        "import timm\nimport torch\nfrom PIL import Image\n\n"
                        f'model = timm.create_model("{where}", pretrained=True).eval()\n'
                        "prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
                        f"{image}\nwith torch.no_grad():\n"
                        "    probabilities = model(prepare(image).unsqueeze(0)).softmax(-1)[0]\n"
                        'print(dict(zip(model.pretrained_cfg["label_names"], probabilities.tolist())))'
                        if self.config.get("label_names")
                        else "import timm\nimport torch\nfrom PIL import Image\n\n"
                        f'model = timm.create_model("{where}", pretrained=True).eval()\n'
                        "prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
                        f"{image}\nwith torch.no_grad():\n"
                        "    print(model(prepare(image).unsqueeze(0)).softmax(-1)[0])",
                    )
                )
            else:
                found.append(("The probabilities of all classes:", self._by_hand("AutoModelForImageClassification")))
            if self.has_members:
                loaded = f'model = Ensemble.from_pretrained("{place}"{revision})'
                found.append(
                    (
                        "The ensemble of the members, a forward pass of each of them:",
                        "import torch\nfrom PIL import Image\nfrom transformers import AutoImageProcessor\n\n"
                        f'from hf_wash import Ensemble\n\nprocessor = AutoImageProcessor.from_pretrained("{place}"{revision})\n'
                        f"{loaded}\n{image}\nwith torch.no_grad():\n"
                        '    logits = model(**processor(image, return_tensors="pt")).logits\nprint(logits.softmax(-1)[0])',
                    )
                )
            return found
        if self.is_image_classifier:
            size = self.config.get("image_size") or 64
            height, width = (size, size) if isinstance(size, int) else size
            shape = f"1, {self.config.get('num_channels', 3)}, {height}, {width}"
            model = f'AutoModelForImageClassification.from_pretrained("{place}"{revision}).eval()'
            found.append(
                (
                    "With transformers (the folder does not say how images are prepared):",
                    f"import torch\nfrom transformers import AutoModelForImageClassification\n\nmodel = {model}\n"
                    f"images = torch.rand({shape})\nwith torch.no_grad():\n"
                    "    print(model(pixel_values=images).logits.softmax(-1))",
                )
            )
        found.append(
            (
                "With hf-wash, which knows which class to load it with:",
                f'from hf_wash.hub import load_model\n\nmodel = load_model("{place}"{revision})\nprint(model.config)',
            )
        )
        return found

    def _by_hand(self, loader: str) -> str:
        place = self.repo_id or "."
        revision = f', revision="{self.revision}"' if self.revision and self.repo_id else ""
        return (
            f"import torch\nfrom PIL import Image\nfrom transformers import AutoImageProcessor, {loader}\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{place}"{revision})\n'
            f'model = {loader}.from_pretrained("{place}"{revision}).eval()\n'
            'image = Image.new("RGB", (224, 224), "white")  # or Image.open("your_image.jpg").convert("RGB")\n'
            "with torch.no_grad():\n"
            '    probabilities = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]\n'
            "print({model.config.id2label[index]: p for index, p in enumerate(probabilities.tolist())})"
        )

    # ---- Writing -----------------------------------------------------------------------------------------------------

    def render(self, title_level: int = 1) -> str:
        """
        The card's text, without front matter.

        Args:
            title_level (`int`, *optional*, defaults to 1):
                1 for a card of its own, 2 for a part of a card that has a title already.
        """
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        columns, rows = self.rows()
        ingredients, scored, chosen = self.ingredients()
        text = environment.get_template("card_template.md.jinja").render(
            card=self,
            title_level=title_level,
            columns=columns,
            rows=rows,
            recipe=self.recipe(),
            exchange=self.exchange(),
            ingredients=ingredients,
            scored=scored,
            chosen=chosen,
            snippets=self.snippets(),
            papa_interval=PAPA_INTERVAL,
            record_file=RUN_RECORD,
        )
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

    def write(self, folder: str | Path) -> list[str]:
        """
        Write `README.md`, keeping what is somebody else's in it, see [`merge_card`].

        Args:
            folder (`str` or `Path`):
                Where to.

        Returns:
            `list[str]`: what is wrong with the card that was there and could not be taken into account; sentences.
        """
        path = Path(folder) / CARD
        existing = None
        if path.is_file():
            try:
                with open(path, encoding="utf-8", newline="") as file:
                    existing = file.read()
            except UnicodeDecodeError as error:
                return [f"{path} is left as it is: it is not UTF-8 text ({error.reason})."]
        own_title = existing is not None and has_title(own_text(existing))
        text, problems = merge_card(existing, self.metadata(), self.render(2 if own_title else 1))
        if text != existing:
            staged = path.with_name(f"_{CARD}.{os.getpid()}")
            with open(staged, "w", encoding="utf-8", newline="") as file:
                file.write(text)
            os.replace(staged, path)
        return [f"{path}: {problem}" for problem in problems]


def write_card(folder: str | Path, **options: Any) -> WashCard:
    """
    Writes the card of a run's folder from what the folder holds, and warns of what is wrong with the one before.

    Args:
        folder (`str` or `Path`):
            The run's folder.
        **options:
            As for [`WashCard.from_folder`].
    """
    card = WashCard.from_folder(folder, **options)
    for problem in card.write(folder):
        logger.warning(problem)
    return card
