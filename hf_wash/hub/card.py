"""
The model card: what a stranger, and the Hub, should know about a model that came out of a population.

[`WashCard`] knows everything that is said, filled from a run's folder alone; `card_template.md.jinja` says it. A card
that is already there keeps its own text and metadata: only the part between two marks is replaced, and metadata that
is missing is added. Needs neither torch nor transformers.
"""

import hashlib
import json
import logging
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

CARD = "README.md"
# What a program can read about a run: the card's own source, written beside it by the Trainer and by `hf-wash soup`.
RUN_RECORD = "wash_run.json"
RECORD_FORMAT = 1
PAPA_INTERVAL = 10

_METHODS = {"wash": "WASH"}
# Metrics that the Hub knows by these names and shows as such.
_HUB_METRICS = ("accuracy", "f1", "precision", "recall", "roc_auc")
_PERCENT = ("accuracy", "top5_accuracy", "f1", "precision", "recall")
_NO_METRIC = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "consensus_distance")
_MAX_COLUMNS = 6
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
        adapter = _read(folder / "adapter_config.json")
        config = _read(folder / "config.json") or _read(folder / "backbone_config.json") or config or {}
        if not config and not adapter:
            raise ValueError(f"{folder} holds no model: expected config.json or adapter_config.json in it.")
        if adapter:
            library = "peft"
        else:
            library = "timm" if "pretrained_cfg" in config else "transformers"
        record = read_record(folder) if record is None else record
        state = _read(folder / "trainer_state.json")
        if log_history is None:
            log_history = state.get("log_history", [])
        if metrics is None:
            metrics = _read(folder / "all_results.json") or _read(folder / "eval_results.json")
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
            metrics={key: value for key, value in metrics.items() if _is_number(value)},
            pictures=drawn,
            has_members=local_members if members is None else members,
            has_processor=library == "timm" or (folder / "preprocessor_config.json").is_file(),
            values=_count_values(folder),
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
        ingredients = [name for name in self.soup.get("ingredients", []) if _REPO_ID.fullmatch(name)]
        base = _hub_ids(self.base_model)
        relation = "adapter" if self.library == "peft" else "finetune"
        if ingredients:
            base, relation = ingredients, "merge"
        elif not base and self.library == "peft":
            base = _hub_ids(self.adapter_base)
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
        named = [name for name in self.dataset_names if _REPO_ID.fullmatch(name)]
        return list(dict.fromkeys([*self.dataset_ids, *named]))

    def _model_index(self) -> list[dict[str, Any]]:
        names = self._metric_names
        if not names:
            return []
        shown = self.dataset_names or self._dataset_ids
        dataset = {"name": ", ".join(shown) or "unknown", "type": next(iter(self._dataset_ids), None)}
        if dataset["type"] is None:
            dataset["type"] = re.sub(r"[^\w.-]+", "-", dataset["name"].lower()).strip("-") or "unknown"
        metrics = [{"type": name, "name": _title(name), "value": self.metrics[f"eval_{name}"]} for name in names]
        task = self._pipeline_tag or "other"
        result = {"task": {"type": task, "name": _title(task.replace("-", "_"))}, "dataset": dataset}
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
        return self.record.get("versions", {}).get("hf_wash") or _own_version()

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
        return ", ".join(_cell(name) for name in self.dataset_names or self._dataset_ids)

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
            details.append(f"{_short(parameters)} parameters")
        classes = len(self.config.get("id2label") or self.config.get("label_names") or [])
        if self.is_image_classifier and classes:
            details.append(f"{classes} classes")
        text = f"{kind} ({', '.join(details)})" if details else kind
        base = _hub_ids(self.base_model)
        if base and not self.soup.get("ingredients"):
            text += f", fine-tuned from {_links(base)}"
        elif self.base_model and not self.soup.get("ingredients"):
            text += f", fine-tuned from {_cell(Path(as_list(self.base_model)[0]).name)}"
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
            cells = [_number(name, self.metrics.get(key.format(name))) for name in names]
            if any(cells):
                table.append([title, *cells])
        return [_title(name) for name in names], table

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
                    ("shuffled", _when(mixing)),
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
            (f"member {index} differs", _override(override))
            for index, override in enumerate(population.get("overrides", []))
            if _override(override)
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
            ("learning rate", _rate(training)),
            ("weight decay", _plain(training.get("weight_decay"))),
            ("label smoothing", _plain(training.get("label_smoothing_factor") or None)),
            ("gradient norm clipped at", _plain(training.get("max_grad_norm") or None)),
            ("precision", training.get("precision")),
            ("soup", _soup_text(self.soup) if size > 1 else None),
            ("hardware", self.record.get("hardware", {}).get("text")),
            ("versions", ", ".join(f"{name} {v}" for name, v in self.record.get("versions", {}).items())),
        ]
        return [(name, _cell(str(value))) for name, value in rows if value not in (None, "")]

    def exchange(self) -> list[list[str]]:
        """Bytes sent in the whole run: by this one, and by DDP and PAPA had they trained the same."""
        exchanged = self.record.get("exchange", {}).get("bytes_exchanged")
        size, parameters = self.size or 1, self.record.get("model", {}).get("trainable_bytes")
        if exchanged is None or not parameters or not self.steps or size == 1:
            return []
        ddp = size * self.steps * parameters
        papa = size * (self.steps // PAPA_INTERVAL) * parameters
        rows = [[self.method_name, _bytes(exchanged), "1"]]
        for name, amount in (("PAPA", papa), ("DDP", ddp)):
            rows.append([name, _bytes(amount), f"{amount / exchanged:,.3g} ×" if exchanged else "–"])
        return rows

    def ingredients(self) -> tuple[list[list[str]], bool, bool]:
        """The models of a soup made by `hf-wash soup`; whether there are scores, and whether there was a choice."""
        names = self.soup.get("ingredients", [])
        scores, chosen = self.soup.get("scores"), self.soup.get("chosen")
        table = []
        for index, name in enumerate(names):
            row = [str(index), _links([name]) if _REPO_ID.fullmatch(name) else _cell(name)]
            if scores:
                row.append(_number("accuracy", scores[index]))
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
        own_title = existing is not None and _has_title(_outside(existing))
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


# ---- A card that is there already ------------------------------------------------------------------------------------

_FRONT_MATTER = re.compile(r"\A(\ufeff?\s*---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
_OPENED = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n")
_BEGIN = re.compile(r"<!-- hf-wash:begin (\{.*?\}) [^>]*-->")
_END = "<!-- hf-wash:end -->"
_BLOCK = re.compile(_BEGIN.pattern + r".*?" + re.escape(_END), re.DOTALL)


def merge_card(existing: str | None, metadata: Mapping[str, Any], body: str) -> tuple[str, list[str]]:
    """
    Puts generated text and metadata into a card without touching what is not ours.

    The generated text stands between two marks; where they are not there yet, it goes to the end. Metadata are added
    where the card has none of that name. Those that were added before are recognized, by a digest kept in the mark,
    and brought up to date unless somebody has changed them since.

    Args:
        existing (`str`, *optional*):
            The card so far.
        metadata (`Mapping[str, Any]`):
            What the front matter should say.
        body (`str`):
            The generated text.

    Returns:
        `tuple[str, list[str]]`: the new card, and what could not be done, in sentences.
    """
    if existing is None or not existing.strip():
        front = _dump(metadata)
        return f"---\n{front}---\n\n{_block(_digests(metadata), body)}\n", []
    newline = "\r\n" if "\r\n" in existing else "\n"
    problems = []
    begin = _BEGIN.search(existing)
    if begin is not None and _BLOCK.search(existing) is None:
        return existing, [f"it is left as it is, since the mark `{_END}` that ended its generated part is gone."]
    try:
        before = json.loads(begin.group(1)) if begin else {}
    except ValueError:
        before = {}

    problem = _front_matter_problem(existing)
    ours = dict(before)
    text = existing
    if problem is not None:
        problems.append(f"{problem} The front matter is kept as it is, and no metadata was added.")
    else:
        text, ours = _merge_front_matter(existing, metadata, before, newline)
    block = _block(ours, body).replace("\n", newline)
    if begin is not None:
        # A function, since a backslash in a replacement string has a meaning.
        return _BLOCK.sub(lambda _: block, text, count=1), problems
    separator = newline if text.endswith(("\n", "\r")) else 2 * newline
    return f"{text}{separator}{block}{newline}", problems


def front_matter_problem(path: str | Path) -> str | None:
    """
    What is wrong with the front matter of a card, in a sentence; `None` if nothing is.

    Args:
        path (`str` or `Path`):
            The card.
    """
    try:
        return _front_matter_problem(Path(path).read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 text ({error.reason})."


def _front_matter_problem(text: str) -> str | None:
    import yaml

    match = _FRONT_MATTER.match(text)
    if match is None:
        return "its front matter begins with `---` and never ends." if _OPENED.match(text) else None
    try:
        content = yaml.safe_load(match.group(2))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # The line in the file: the first one is `---`.
        line = f" in line {mark.line + 1 + match.group(1).count(chr(10))}" if mark is not None else ""
        return f"its front matter is not valid YAML{line} ({getattr(error, 'problem', None) or error})."
    if content is not None and not isinstance(content, dict):
        return f"its front matter is a {type(content).__name__} where names and values are expected."
    return None


def _merge_front_matter(
    text: str, metadata: Mapping[str, Any], before: Mapping[str, str], newline: str
) -> tuple[str, dict[str, str]]:
    """The text with its front matter completed, and digests of what in it is ours."""
    import yaml

    match = _FRONT_MATTER.match(text)
    if match is None:
        front = _dump(metadata).replace("\n", newline)
        return f"---{newline}{front}---{newline}{newline}{text}", _digests(metadata)
    opening, content, closing = match.groups()
    values = yaml.safe_load(content) or {}
    still_ours = {key for key, digest in before.items() if key in values and _digest(values[key]) == digest}
    if still_ours:
        # Line by line, so that the rest stays as it was written, comments and order included.
        lines = content.splitlines(keepends=True)
        keys = [(node.value, node.start_mark.line) for node, _ in yaml.compose(content, Loader=yaml.SafeLoader).value]
        ends = [line for _, line in keys[1:]] + [len(lines)]
        removed = set()
        for (key, start), end in zip(keys, ends, strict=True):
            if key in still_ours:
                removed |= {line for line in range(start, end) if not lines[line].lstrip().startswith("#")}
        content = "".join(line for number, line in enumerate(lines) if number not in removed)
        values = {key: value for key, value in values.items() if key not in still_ours}
    added = {key: value for key, value in metadata.items() if key not in values}
    if "base_model_relation" in added and "base_model" not in added:
        del added["base_model_relation"]  # of the base model that somebody else named, we know nothing
    if content and not content.endswith("\n"):
        content += newline
    content += _dump(added).replace("\n", newline) if added else ""
    return opening + content + closing + text[match.end() :], _digests(added)


def _dump(metadata: Mapping[str, Any]) -> str:
    import yaml

    if not metadata:
        return ""
    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=10_000)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _digests(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {key: _digest(value) for key, value in metadata.items()}


def _block(digests: Mapping[str, str], body: str) -> str:
    note = f"<!-- hf-wash:begin {json.dumps(dict(digests))} What stands between these marks is written anew with the card. -->"
    return f"{note}\n{body}{_END}"


def _outside(text: str) -> str:
    match = _FRONT_MATTER.match(text)
    return _BLOCK.sub("", text[match.end() :] if match else text)


def _has_title(text: str) -> bool:
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.search(r"^(# |<h1)|^[^\n]+\n===+\s*$", without_code, flags=re.MULTILINE) is not None


# ---- Reading a folder ------------------------------------------------------------------------------------------------


def read_record(folder: str | Path) -> dict[str, Any]:
    """A folder's `wash_run.json`; empty if it has none."""
    return _read(Path(folder) / RUN_RECORD)


def write_record(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Writes `wash_run.json`, whole or not at all."""
    path = Path(folder) / RUN_RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"_{RUN_RECORD}.{os.getpid()}")
    staged.write_text(json.dumps({"format": RECORD_FORMAT, **record}, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(staged, path)


def last_evaluation(log_history: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of the last evaluation in a run's log."""
    for entry in reversed(log_history):
        metrics = {key: value for key, value in entry.items() if key.startswith("eval_")}
        if metrics:
            return metrics
    return {}


def inherited_license(base_model: str | None, timeout: float = 10.0) -> str | None:
    """
    The license of the model that another one was made from.

    Args:
        base_model (`str`, *optional*):
            A folder, whose card is read, or a repository of the Hub, which is asked.
        timeout (`float`, *optional*, defaults to 10.0):
            Seconds to wait for the Hub. Whatever goes wrong there, the license is not known then.
    """
    import yaml

    if not base_model:
        return None
    card = Path(base_model) / CARD
    if card.is_file() and front_matter_problem(card) is None:
        match = _FRONT_MATTER.match(card.read_text(encoding="utf-8"))
        found = (yaml.safe_load(match.group(2)) or {}).get("license") if match else None
        return found if isinstance(found, str) else None
    if Path(base_model).exists() or not _hub_ids(base_model):
        return None
    from huggingface_hub import HfApi

    try:
        data = HfApi().model_info(base_model, timeout=timeout).card_data
        found = data.get("license") if data is not None else None
    except Exception:  # no network, no such repository, not for us: a card can do without
        return None
    return found if isinstance(found, str) else None


def dataset_repositories(*datasets: Any) -> list[str]:
    """The repositories of the Hub that data sets of the `datasets` library were loaded from."""
    found = []
    for dataset in datasets:
        checksums = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
        found += [
            match.group(1) for url in checksums if (match := re.match(r"hf://datasets/([^/]+/[^/@]+)@", str(url)))
        ]
    return list(dict.fromkeys(found))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object is expected.")
    return content


def _count_values(folder: Path) -> int | None:
    """Number of values in a folder's weight files, from their headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        try:
            with open(file, "rb") as content:
                length = struct.unpack("<Q", content.read(8))[0]
                header = json.loads(content.read(min(length, 100_000_000)))
        except (OSError, ValueError, struct.error):
            return None
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for dimension in tensor["shape"]:
                    count *= dimension
                total += count
    return total or None


# ---- Words and numbers -----------------------------------------------------------------------------------------------


def as_list(value: Any) -> list:
    """A value or a list of them, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _own_version() -> str:
    from .. import __version__

    return __version__


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _hub_ids(names: Any) -> list[str]:
    return [name for name in as_list(names) if _REPO_ID.fullmatch(name) and not Path(name).exists()]


def _links(names: list[str]) -> str:
    return ", ".join(f"[{name}](https://hf.co/{name})" for name in names)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _title(name: str) -> str:
    known = {"ece": "ECE", "f1": "F1", "top5_accuracy": "Top-5 accuracy"}
    return known.get(name, name.replace("_", " ").capitalize())


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if name in _PERCENT and -1 <= value <= 1 else f"{value:.4f}"


def _plain(value: Any) -> str | None:
    return None if value is None else f"{value:g}"


def _short(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _bytes(count: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g} bytes"


def _when(mixing: Mapping[str, Any]) -> str:
    interval = mixing.get("shuffle_interval", 1)
    text = "after every optimizer step" if interval == 1 else f"after every {interval} optimizer steps"
    start, stop = mixing.get("shuffle_start", 0.0), mixing.get("shuffle_stop", 1.0)
    return text if (start, stop) == (0.0, 1.0) else f"{text}, from {start:.0%} to {stop:.0%} of the run"


def _rate(training: Mapping[str, Any]) -> str | None:
    if training.get("learning_rate") is None:
        return None
    parts = [f"{training['learning_rate']:g}"]
    if training.get("lr_scheduler"):
        parts.append(f"{training['lr_scheduler']} schedule")
    warmup = training.get("warmup_steps")
    if warmup:
        parts.append(f"warm-up over {warmup:.0%} of the steps" if warmup < 1 else f"warm-up over {warmup:g} steps")
    return ", ".join(parts)


def _override(override: Mapping[str, Any]) -> str:
    parts = []
    for name, value in override.items():
        if isinstance(value, Mapping):
            parts.append(_override(value))
            continue
        if value in (None, False):
            continue
        words = name.replace("_", " ")
        parts.append(
            f"its own {words}" if value is True else f"{words} {value:g}" if _is_number(value) else f"{words} {value}"
        )
    return ", ".join(part for part in parts if part)


def _soup_text(soup: Mapping[str, Any]) -> str | None:
    if not soup.get("method"):
        return None
    text = soup["method"]
    if soup.get("batch_norm"):
        text += {
            "recalibrate": ", BatchNorm statistics measured anew on training batches",
            "average": ", BatchNorm statistics averaged",
        }.get(soup["batch_norm"], "")
    return text
