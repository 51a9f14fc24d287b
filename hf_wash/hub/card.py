"""
The model card: what a stranger, and the Hub, should know about a model that came out of a population.

[`WashCard`] is what is known, filled from a run's folder alone; `card_template.md.jinja` says it. A card that is
already there keeps its own text and metadata, see `card_merge.py`. Needs neither torch nor transformers.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..files import is_file, write_whole
from ..methods import METHODS, OUTER_MOMENTUM, Method
from ..sentences import all_printable, printable
from . import wording
from .card_merge import CARD, has_title, merge_card, own_text
from .record import (
    LOCAL_MEMBERS,
    PUSHED_MEMBERS,
    REPO_ID,
    RUN_RECORD,
    as_list,
    count_values,
    hub_ids,
    is_number,
    last_evaluation,
    read_adapter_config,
    read_config,
    read_json,
    read_log,
    read_record,
)
from .tasks import Task, task_of
from .traffic import PAPA_INTERVAL, others_send


logger = logging.getLogger(__name__)

# Metrics that the Hub knows by these names and shows as such.
_HUB_METRICS = ("accuracy", "f1", "precision", "recall", "roc_auc")
# What an evaluation reports that is no score of the soup.
_NO_SCORE = re.compile(
    r"(ensemble|members?(_\d+)?)_|(runtime|samples|(samples|steps)_per_second|jit_compilation_time|consensus_distance)$"
)
_MAX_COLUMNS = 6


@dataclass
class WashCard:
    """
    Everything a model card says.

    Args:
        model_name (`str`):
            The heading.
        library (`str`):
            `"transformers"`, `"timm"`, `"peft"` or `"sentence-transformers"`: what the folder is loaded with.
        repo_id, revision (`str`, *optional*):
            The repository and the branch, for the code in the card. Without them the code loads the folder it is in.
        config (`dict`, *optional*):
            The model's `config.json` (of an adapter, its `backbone_config.json`).
        record (`dict`, *optional*):
            What `wash_run.json` holds: how the model came about.
        metrics (`dict[str, float]`, *optional*):
            With the keys of `WashTrainer.evaluate`.
        pictures (`dict[str, str]`, *optional*):
            Captions and paths.
        has_members, has_processor, has_tokenizer (`bool`, *optional*, defaults to `False`):
            Whether the members lie beside the soup, and whether the folder says how images, and texts, are prepared.
        values (`int`, *optional*):
            Number of values in the weight files.
        adapter_base (`str`, *optional*):
            The backbone that an adapter names.
        license, language, base_model, tags, dataset_ids, dataset_names, pipeline_tag (*optional*):
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
    has_tokenizer: bool = False
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
        Fill a card from a run's folder, or what `hf-wash soup` wrote: from `config.json`, `wash_run.json`,
        `all_results.json` and `trainer_state.json`, as far as they are there. Draws the pictures into it.

        Args:
            folder (`str` or `Path`):
                The folder.
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
        adapter = read_adapter_config(folder)
        config = read_config(folder / "config.json") or read_config(folder / "backbone_config.json") or config or {}
        if not config and not adapter:
            raise ValueError(f"{folder} holds no model: expected config.json or adapter_config.json in it.")
        library = "timm" if "pretrained_cfg" in config else "transformers"
        if adapter:
            library = "peft"
        elif is_file(folder / "modules.json"):
            library = "sentence-transformers"
        record = read_record(folder) if record is None else record
        if log_history is None:
            log_history = read_log(folder)
        if metrics is None:
            metrics = read_json(folder / "all_results.json") or read_json(folder / "eval_results.json")
            if not any(key.startswith("eval_") for key in metrics):
                metrics = last_evaluation(log_history)
        if members is None:
            members = any(any((folder / place).glob("member_*/")) for place in (LOCAL_MEMBERS, PUSHED_MEMBERS))
        options = record.get("card", {})
        name = options.get("model_name") or (repo_id.split("/")[-1] if repo_id else folder.resolve().name)
        card = cls(
            model_name=" ".join(name.split()),
            library=library,
            repo_id=repo_id,
            revision=None if revision == "main" else revision,
            config=config,
            record=record,
            metrics={key: value for key, value in metrics.items() if is_number(value)},
            has_members=members,
            has_processor=library == "timm" or is_file(folder / "preprocessor_config.json"),
            has_tokenizer=is_file(folder / "tokenizer_config.json"),
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
        if pictures:
            from .pictures import draw_pictures

            # Last: what is wrong with the folder has been said by now.
            card.pictures = draw_pictures(folder, log_history, metrics)
        return card

    # ---- Metadata ----------------------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        """The card's front matter, as the Hub reads it."""
        return all_printable(self._card_data().to_dict())

    def _card_data(self) -> ModelCardData:
        base, relation = hub_ids(self.base_model), "adapter" if self.library == "peft" else "finetune"
        ingredients = [name for name in self.soup.get("ingredients") or [] if REPO_ID.fullmatch(name)]
        if ingredients:
            base, relation = ingredients, "merge"
        elif not base and self.library == "peft":
            base = hub_ids(self.adapter_base)
        tags = [*self.tags, *(["wash"] if self.method == "wash" else []), "model-soup"]
        results = self._eval_results()
        known: dict[str, Any] = {
            "language": self.language,
            "license": self.license,
            "library_name": self.library,
            "pipeline_tag": self.pipeline_tag or self.task.tag,
            "tags": [*tags, "timm", "transformers"] if self.library == "timm" else tags,
            "base_model": base[0] if len(base) == 1 else base,
            "base_model_relation": relation if base else None,
            "datasets": self._dataset_ids,
            "metrics": [name for name in self._metric_names if name in _HUB_METRICS],
            "eval_results": results,
            "model_name": self.model_name if results else None,
        }
        return ModelCardData(**{name: value for name, value in known.items() if value not in (None, [], "")})

    def _eval_results(self) -> list[EvalResult]:
        task = self.pipeline_tag or self.task.tag or "other"
        dataset = ", ".join(self.dataset_names or self._dataset_ids) or "unknown"
        slug = re.sub(r"[^\w.-]+", "-", dataset.lower()).strip("-") or "unknown"
        return [
            EvalResult(
                task_type=task,
                task_name=wording.title(task.replace("-", "_")),
                dataset_type=next(iter(self._dataset_ids), slug),
                dataset_name=dataset,
                metric_type=name,
                metric_name=wording.title(name),
                metric_value=self.metrics[f"eval_{name}"],
            )
            for name in self._metric_names
        ]

    @property
    def _dataset_ids(self) -> list[str]:
        return list(dict.fromkeys([*self.dataset_ids, *filter(REPO_ID.fullmatch, self.dataset_names)]))

    # ---- What the template asks for ----------------------------------------------------------------------------------

    @property
    def task(self) -> Task:
        """What the model does, as its class tells."""
        if self.library == "sentence-transformers":
            return Task("sentence-similarity", None, "a sentence embedding model")
        return task_of("ForImageClassification" if "pretrained_cfg" in self.config else self._class, self.config)

    @property
    def _class(self) -> str:
        return next(iter(self.config.get("architectures") or []), self.record.get("model", {}).get("class")) or ""

    @property
    def method(self) -> str | None:
        """The mixing of the population; `None` where it is not known that there was one."""
        return self.record.get("mixing", {}).get("method")

    @property
    def method_name(self) -> str:
        return self.exchanging.title if self.exchanging is not None else "this run"

    @property
    def exchanging(self) -> Method | None:
        """What is known of the method by which the members exchanged weights, if they did by one that is known."""
        return METHODS.get(self.method or "") if self.method != "independent" else None

    @property
    def soup(self) -> dict[str, Any]:
        return self.record.get("soup", {})

    @property
    def size(self) -> int | None:
        """Number of members, if known."""
        evaluated = sum(re.fullmatch(r"eval_member_\d+_loss", key) is not None for key in self.metrics)
        return self.record.get("population", {}).get("size") or evaluated or None

    @property
    def data_names(self) -> str:
        return ", ".join(wording.cell(name) for name in self.dataset_names or self._dataset_ids)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width of images that the model takes; 64 where it does not say."""
        size = self.config.get("image_size")
        sides = list(size.values()) if isinstance(size, Mapping) else as_list(size)
        if not sides or not all(isinstance(side, int) for side in sides):
            sides = [64]
        return sides[0], sides[-1]

    @property
    def needs_local_backbone(self) -> bool:
        base = self.adapter_base if self.library == "peft" else None
        return bool(base and not hub_ids(base) and not Path(base).is_absolute())

    @property
    def _metric_names(self) -> list[str]:
        """The metrics of the soup, without the prefix; accuracy first and the loss last."""
        names = [key.removeprefix("eval_") for key in self.metrics if key.startswith("eval_")]
        names = [name for name in names if not _NO_SCORE.match(name)]
        names.sort(key=lambda name: (name != "accuracy", name == "loss"))
        if len(names) > _MAX_COLUMNS and "loss" in names:
            names = [*names[: _MAX_COLUMNS - 1], "loss"]
        return names[:_MAX_COLUMNS]

    @property
    def what_it_is(self) -> str:
        kind = f"an adapter for {self.task.kind}" if self.library == "peft" else self.task.kind
        details = []
        architecture = self.config.get("architecture") or self._class
        if architecture:
            details.append(f"`{architecture}`")
        parameters = self.record.get("model", {}).get("parameters") or self.values
        if parameters:
            details.append(f"{wording.short(parameters)} parameters")
        classes = self.config.get("id2label") or self.config.get("label_names")
        if classes and (self.task.tag or "").endswith("-classification"):
            details.append(f"{len(classes)} classes")
        text = f"{kind} ({', '.join(details)})" if details else kind
        origin = "" if self.soup.get("ingredients") else ", ".join(map(wording.link, hub_ids(self.base_model)))
        if not origin and self.base_model and not self.soup.get("ingredients"):
            origin = wording.cell(Path(as_list(self.base_model)[0]).name)
        if origin:
            text += f", fine-tuned from {origin}"
        if self.data_names:
            text += f"{' and' if self.base_model else ','} trained on {self.data_names}"
        return text + "."

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The table of results: its columns, and a row for each member, their mean, the ensemble and the soup."""
        names = self._metric_names
        keys: dict[str, str] = {}
        while any(f"eval_member_{len(keys)}_{name}" in self.metrics for name in names):
            keys[f"member {len(keys)}"] = f"eval_member_{len(keys)}_{{}}"
        soup = "**soup**" if keys else "soup"
        keys |= {"members' mean": "eval_members_{}_mean", "ensemble": "eval_ensemble_{}", soup: "eval_{}"}
        table = [
            [title, *(wording.number(name, self.metrics.get(key.format(name))) for name in names)]
            for title, key in keys.items()
        ]
        return [wording.title(name) for name in names], [row for row in table if any(row[1:])]

    def recipe(self) -> list[tuple[str, str]]:
        """How the run was made: names and values."""
        population, mixing, training = (self.record.get(part, {}) for part in ("population", "mixing", "training"))
        if not population:
            return []
        size, seed = population.get("size") or 1, training.get("seed")
        overrides = population.get("overrides") or []
        many, wash, shard = size > 1, self.method == "wash", population.get("member_data") == "shard"
        start = "the same weights" if population.get("same_init", True) else "different weights"
        known = self.exchanging
        method = known.title if known is not None else mixing.get("method")
        if wash and mixing.get("shuffle_optimizer_state"):
            method = "WASH with optimizer state"
        some = many and (wash or self.method == "sparta")
        rate = known.rate_is if known is not None and mixing.get("average_rate") is not None else ""
        samples = self.record.get("data", {}).get("train_samples")
        steps, epochs, batch = (training.get(name) for name in ("steps", "epochs", "batch_size"))
        accumulated = training.get("gradient_accumulation_steps") or 1
        times = f" ({(batch or 0) // accumulated} × {accumulated} accumulated)" if accumulated > 1 else ""
        own = "each member a part of its own" if many and shard else None
        data = [self.data_names, samples and f"{samples:,} training samples", own]
        seeds = [f"{seed} to {seed + size - 1}, one for each member" if many else seed] if seed is not None else []
        if seeds and training.get("data_seed") is not None:
            seeds.append(f"data from {training['data_seed']}")
        rows = [
            ("population", f"{size} member{'s' if many else ''}"),
            ("members start from", many and start),
            ("mixing", many and method),
            ("probability p", some and (wording.plain(mixing.get("shuffle_probability")) or "not recorded")),
            ("schedule over depth", many and wash and mixing.get("shuffle_schedule")),
            ("shuffled" if wash else "averaged", some and wording.when_shuffled(mixing)),
            (
                "pulled together" if self.method == "papa" else "averaged",
                many and not some and wording.when_averaged(mixing),
            ),
            (rate, many and rate and wording.plain(mixing.get("average_rate"))),
            ("outer momentum", many and self.method == "diloco" and f"{OUTER_MOMENTUM:g}, Nesterov's"),
            ("seeds", "; ".join(map(str, seeds))),
            ("data", ", ".join(filter(None, data))),
            *((f"member {index} differs", wording.differences(each)) for index, each in enumerate(overrides)),
            ("length", steps and f"{steps:,} optimizer steps" + (f", {epochs:g} epochs" if epochs else "")),
            ("batch size of a member", batch and f"{batch}{times}"),
            ("optimizer", training.get("optimizer")),
            ("learning rate", wording.learning_rate(training)),
            ("weight decay", wording.plain(training.get("weight_decay"))),
            ("label smoothing", wording.plain(training.get("label_smoothing_factor") or None)),
            ("gradient norm clipped at", wording.plain(training.get("max_grad_norm") or None)),
            ("precision", training.get("precision")),
            ("soup", many and wording.soup_method(self.soup)),
            ("hardware", self.record.get("hardware", {}).get("text")),
            ("versions", ", ".join(f"{name} {v}" for name, v in self.record.get("versions", {}).items())),
        ]
        return [(name, wording.cell(str(value))) for name, value in rows if value]

    def replayed_names(self) -> str:
        """The run's checkpoints, the newest first; the first of many."""
        names = [wording.cell(name) for name in self.record["replay"]["checkpoints"] if name]
        more = len(names) - _MAX_COLUMNS
        return ", ".join(names[:_MAX_COLUMNS]) + (f" and {more} more" if more > 0 else "")

    def exchange(self) -> list[list[str]]:
        """Bytes sent in the whole run: by this one, and by DDP and PAPA had they trained the same."""
        exchanged = self.record.get("exchange", {}).get("bytes_exchanged")
        model = self.record.get("model", {}).get("trainable_bytes")
        steps, size = self.record.get("training", {}).get("steps"), self.size or 1
        if exchanged is None or not model or not steps or size == 1:
            return []
        rows = [[self.method_name, wording.bytes_text(exchanged), "1"]]
        for name, amount in others_send(size, steps, model).items():
            if name == self.method_name:
                continue
            rows.append([name, wording.bytes_text(amount), f"{amount / exchanged:,.3g} ×" if exchanged else "–"])
        return rows

    # ---- Writing -----------------------------------------------------------------------------------------------------

    def render(self, title_level: int = 1) -> str:
        """
        The card's text, without front matter.

        Args:
            title_level (`int`, *optional*, defaults to 1):
                1 for a card of its own, 2 for a part of a card that has a title already.
        """
        columns, rows = self.rows()
        card = ModelCard.from_template(
            self._card_data(),
            template_path=str(Path(__file__).with_name("card_template.md.jinja")),
            card=self,
            title_level=title_level,
            columns=columns,
            rows=rows,
            wording=wording,
            papa_interval=PAPA_INTERVAL,
            version=__version__,
            record_file=RUN_RECORD,
        )
        return re.sub(r"\n{3,}", "\n\n", printable(card.text)).strip() + "\n"

    def write(self, folder: str | Path) -> list[str]:
        """
        Write `README.md`, keeping what is somebody else's in it, see [`merge_card`].

        Returns:
            `list[str]`: what is wrong with the card that was there and could not be taken into account; sentences.
        """
        path = Path(folder) / CARD
        existing = None
        if is_file(path):
            try:
                existing = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                return [f"{path} is left as it is: it is not UTF-8 text ({error.reason})."]
        own_title = existing is not None and has_title(own_text(existing))
        text, problems = merge_card(existing, self.metadata(), self.render(2 if own_title else 1))
        if text != existing:
            write_whole(path, text.encode("utf-8"))
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
    is_file(Path(folder) / CARD)
    card = WashCard.from_folder(folder, **options)
    for problem in card.write(folder):
        logger.warning(problem)
    return card
