"""
[`Reporting`]: when a population's Trainer measures its members for the report, and when it writes one.

What is measured is `report.survey`'s work, what is drawn `report.page`'s. A report that fails costs no run: all
processes hear of it, it is said in a sentence, and training ends as it would have.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..population import grow_buffers
from ..report.diagnostics import PopulationDiagnostics
from ..report.page import can_draw, write_report
from ..report.survey import EXAMPLES, Answers, choose_examples, survey
from ..sentences import first_line
from ..soup import has_batch_norm, recalibrate_batch_norm
from . import evaluation
from .member import Member, as_member, without_a_trace
from .part import Part
from .served_soup import copy_unprepared


logger = logging.get_logger(__name__)

# Far from the members' `seed + k`, as those in `serving`.
SURVEY_SEED_OFFSET = 1_000_081
RECALIBRATION_BATCHES = 8


class Reporting(Part):
    """The part of a population's Trainer that reports on it."""

    _surveyed: dict[str, Any] | None = None
    _reports = False

    def _report_at_the_end(self) -> None:
        """*Collective.* The report of the run that has just been trained."""
        if not self.args.report or self.population.size == 1 or self.hp_search_backend is not None:
            return
        # Process 0 alone draws, but all measure, or none.
        if not self.population.broadcast(can_draw()):
            if self.is_world_process_zero():
                logger.warning(
                    "There is no report of this run, since matplotlib is not installed: "
                    f'`pip install "hf-wash[report]"`, then `hf-wash report {self.args.output_dir}` makes it.'
                )
            return
        self._reports = True
        try:
            self._surveyed = self._survey(plane=any(each.plane for each in self._diagnostics))
        except Exception as error:  # on every process alike
            self._say_what_is_missing("has no lines between members and no calibration", error)
        self._write_report()

    def _write_report(self) -> None:
        """On process 0, from what is known by now. No process waits."""
        if not self._reports or not self.is_world_process_zero():
            return
        try:
            write_report(
                self.args.output_dir,
                surveyed=self._surveyed,
                record=self._run_record(ask_hub=False),
                log_history=self.state.log_history,
            )
        except Exception as error:  # a disk that is full, a value that cannot be drawn
            self._say_what_is_missing("is not written", error)

    def _say_what_is_missing(self, what: str, error: Exception) -> None:
        if self.is_world_process_zero():
            logger.warning(
                f"The report of this run {what} ({first_line(error)}). The run itself is whole; `hf-wash report "
                f"{self.args.output_dir}` tries again from its folder."
            )

    def save_state(self) -> None:
        """Save `trainer_state.json` and what programs can read of the run; its report then has all that was logged."""
        super().save_state()
        self._write_report()

    # ---- While it trains ---------------------------------------------------------------------------------------------

    @property
    def _diagnostics(self) -> list[PopulationDiagnostics]:
        return [each for each in self.callback_handler.callbacks if isinstance(each, PopulationDiagnostics)]

    def _attach_diagnostics(self) -> None:
        for each in self._diagnostics:
            each.attach(self.population, self._log_beside_the_terminal, self._survey_or_nothing)

    def _log_beside_the_terminal(self, values: dict[str, float]) -> None:
        """As `log`, but not to the terminal, where a value for each layer would drown all others."""
        handler = self.callback_handler
        everyone = handler.callbacks
        handler.callbacks = [each for each in everyone if not isinstance(each, PrinterCallback | ProgressCallback)]
        try:
            self.log(values)
        finally:
            handler.callbacks = everyone

    def _survey_or_nothing(self) -> dict[str, Any]:
        """*Collective.* As `_survey`; empty, and said why, where that failed."""
        try:
            return self._survey()
        except Exception as error:  # on every process alike
            if self.is_world_process_zero():
                logger.warning(f"The barrier between members could not be measured ({first_line(error)}).")
            return {}

    # ---- What is measured --------------------------------------------------------------------------------------------

    def _survey(self, plane: bool = False) -> dict[str, Any]:
        """
        *Collective.* Measure the population on a fixed number of evaluation examples; the soup has been built.

        Args:
            plane (`bool`, *optional*, defaults to `False`): Whether the plane through three members is looked at, too.

        Raises:
            RuntimeError: on every process, if it failed on any.
        """
        streams = self.population.streams
        with streams.use(None):
            before = streams.capture()
            modes = [[(module, module.training) for module in whole.modules()] for whole in self._all_wholes()]
            try:
                set_seed(self.args.seed + SURVEY_SEED_OFFSET)
                return self._survey_now(plane)
            finally:
                for own in modes:
                    for module, training in own:
                        module.training = training
                streams.restore(before)

    def _all_wholes(self) -> list[nn.Module]:
        return [*self.population.wholes, self.soup.member.whole]

    def _survey_now(self, plane: bool) -> dict[str, Any]:
        soup, shared = self.soup.member, set()
        if self.args.same_init:
            shared = {name for name, p in soup.whole.named_parameters() if not p.requires_grad}
        examples: list[Any] = []
        training: list[Any] = []
        scratch: list[Member] = []

        def prepare() -> None:
            examples.extend(self._examples_for_survey(soup))
            if examples:
                if has_batch_norm(soup.model) and soup.train_dataset is not None:
                    training.extend(self._training_batches(soup))
                made = self._in_a_members_place(copy_unprepared(self.population.wholes[0], self.args.same_init))
                made.args, made.data_collator = soup.args, soup.data_collator
                scratch.append(made)

        self.population.do_together("Preparing the report", prepare)
        about = {
            "examples": sum(find_batch_size(batch) or 0 for batch in examples),
            "data": "the evaluation data, evenly spaced"
            if self._sized(self._data_to_survey())
            else "the evaluation data",
            "batch_norm": self._said_of_batch_norm(soup, training),
        }
        if not examples:
            del about["data"]
            return survey(
                self.population, step=self.state.global_step, soup_weights=None, answer_at=None, as_they_are=[],
                soup_as_it_is=None, left_out=self.soup.left_out, about=about,
            )  # fmt: skip

        def answer_at(weights: Mapping[str, torch.Tensor]) -> Answers:
            (member,) = scratch
            grow_buffers(member.whole, dict(weights))
            member.whole.load_state_dict(weights, strict=False)
            if training:
                with as_member(self, member):
                    recalibrate_batch_norm(member.model, training)
            return self._answers_of(member, examples)

        return survey(
            self.population,
            step=self.state.global_step,
            soup_weights=soup.whole.state_dict(),
            answer_at=answer_at,
            as_they_are=[functools.partial(self._answers_of, member, examples) for member in self.members],
            soup_as_it_is=functools.partial(self._answers_of, soup, examples),
            exclude=shared,
            left_out=self.soup.left_out,
            about=about,
            plane=plane,
        )

    def _data_to_survey(self) -> Any:
        data = self.eval_dataset
        return next(iter(data.values()), None) if isinstance(data, dict) else data

    @staticmethod
    def _sized(data: Any) -> bool:
        return data is not None and has_length(data) and hasattr(data, "__getitem__")

    def _examples_for_survey(self, soup: Member) -> list[Any]:
        data = self._data_to_survey()
        if data is None:
            return []
        if self._sized(data):
            chosen = choose_examples(len(data))
            data = data.select(chosen) if hasattr(data, "select") else Subset(data, chosen)
        batches, count = [], 0
        with as_member(self, without_a_trace(self, soup)):
            for batch in self.get_test_dataloader(data):
                batches.append(batch)
                count += find_batch_size(batch) or 1
                if count >= EXAMPLES:
                    break
        return batches

    def _training_batches(self, soup: Member) -> list[Any]:
        batches = []
        with as_member(self, soup):
            loader = self.get_train_dataloader()
            for batch in getattr(loader, "base_dataloader", loader):
                if batches and (find_batch_size(batch) or 0) < (find_batch_size(batches[0]) or 0):
                    break  # the last one, perhaps of a single example, which has no variance
                batches.append(batch)
                if len(batches) == RECALIBRATION_BATCHES:
                    break
        return batches

    def _said_of_batch_norm(self, soup: Member, training: list[Any]) -> str | None:
        if not has_batch_norm(soup.model):
            return None
        if training:
            return (
                f"re-estimated at every point of a line on the same {len(training)} training batches of "
                f"{find_batch_size(training[0]) or 'some'} examples"
            )
        return "mixed as the weights are, since there was no training data at hand"

    def _answers_of(self, member: Member, examples: list[Any]) -> Answers:
        kind = evaluation.ensemble_kind(member.model)
        classes = kind == "single_label_classification"
        predictions = evaluation.Predictions()
        member.prepared.eval()
        placed = without_a_trace(self, member)
        placed.data_collator = self.soup.member.data_collator
        with torch.no_grad(), as_member(self, placed):
            for index, batch in enumerate(examples):
                result = self.prediction_step(member.prepared, copy.copy(batch), not classes)
                predictions.add(index, find_batch_size(batch) or 1, *result)
        losses = predictions.losses()
        if losses is None:
            raise ValueError(f"`{type(member.model).__name__}` gives no loss for the evaluation data")
        loss = float(losses.mean())
        logits, labels = predictions.arrays("logits"), predictions.arrays("labels")
        if not classes or logits is None or labels is None or getattr(labels, "ndim", 0) != 1:
            return Answers(loss)
        return Answers(loss, torch.from_numpy(logits).float(), torch.from_numpy(labels).long())
