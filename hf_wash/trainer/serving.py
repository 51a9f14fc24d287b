"""
[`Serving`]: when a population's Trainer builds its soup and hands it out as its model, and on which data a soup is
finished and scored.

What a soup is made of is `served_soup`'s and `soup`'s work.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed
from transformers.trainer_pt_utils import find_batch_size
from transformers.utils import logging

from ..hub.record import LOCAL_MEMBERS
from ..soup import has_batch_norm, recalibrate_batch_norm
from ..soup.batch_norm import forward_without_labels
from . import evaluation
from .data import hold_out
from .member import Member, MemberAccelerator, Whole, as_member, without_a_trace
from .part import Part
from .served_soup import what_becomes_of


logger = logging.get_logger(__name__)

# Seeds of what is drawn outside of the members' streams: far from those of members, `seed + k`.
RECALIBRATION_SEED_OFFSET, HOLDOUT_SEED_OFFSET = 1_000_003, 1_000_033


class Serving(Part):
    """The part of a population's Trainer that builds and serves its soup."""

    @contextlib.contextmanager
    def _as_soup(self) -> Iterator[None]:
        """*Collective unless the soup is served already.* Make the Trainer's model the soup for the length of a block."""
        soup = self.soup.member if self.soup.served else self._build_soup()
        shown = getattr(self.callback_handler, "model", None)
        self.callback_handler.model = soup.model
        try:
            with self.population.streams.use(None), as_member(self, soup):
                yield
        finally:
            self.callback_handler.model = shown

    def _serve_soup(self) -> None:
        """*Collective.* Build the soup from the members as they are and make it the Trainer's model."""
        soup = self._build_soup(final=True)
        self._become(soup.model, soup)
        self.soup.served = True

    def _build_soup(self, final: bool = False) -> Member:
        if self._mixing is not None:
            self._mixing.synchronize()
        _ = self.members  # made while the Trainer's model is still the first member
        step = self.state.global_step
        key = (self._trainings, step) if self.is_in_train else None
        before = list(self.soup.left_out)
        with self.population.streams.use(None):
            soup = self.soup.build(
                self.population,
                key,
                step=step,
                share_frozen=self.args.same_init,
                make=self._in_a_members_place,
                finish=self._finish_soup,
                score=self._held_out_score if self._holds_out and self._data_in_common() is not None else None,
            )
        left_out = self.soup.left_out
        if left_out and (final or list(left_out) != before) and self.is_world_process_zero():
            logger.warning(
                what_becomes_of(
                    left_out,
                    step,
                    "left out of the soup, the ensemble and what is reported of the members together.",
                )
            )
        return soup

    def _in_a_members_place(self, whole: nn.Module) -> Member:
        first = self.members[0]
        model, around = whole, {}
        if isinstance(whole, Whole):
            model = whole.model
            around = {
                name: whole.around[name] if isinstance(value, nn.Module) else {k: whole.around[k] for k in value}
                for name, value in first.around.items()
            }
        soup = Member(None, model, self.args, MemberAccelerator(self.accelerator), whole, around=around)
        soup.prepare(self.accelerator)
        return soup

    def _data_in_common(self) -> Any:
        return self.train_dataset if self.train_dataset is not None else self._overrides[0].train_dataset

    def _finish_soup(self, soup: Member) -> None:
        """*Collective.* The soup's arguments and data, and its BatchNorm statistics, from a stream of their own."""
        soup.args, soup.label_smoother = self.args, self.label_smoother
        common = self.train_dataset is not None
        soup.train_dataset = self.train_dataset if common else self._data_of(0)
        soup.data_collator = self.data_collator
        if not common and self._overrides[0].data_collator is not None:
            soup.data_collator = self._overrides[0].data_collator
        if soup.train_dataset is None or not self._recalibrates(soup.model):
            return
        streams = self.population.streams
        before = streams.capture()

        def measure() -> None:
            set_seed(self.args.seed + RECALIBRATION_SEED_OFFSET)
            with as_member(self, soup):
                loader = self.get_train_dataloader()
                self._recalibrate(soup.model, iter(getattr(loader, "base_dataloader", loader)))

        try:
            self.population.do_together(
                "Recalibrating the BatchNorm statistics of the soup",
                measure,
                self._keep_members,
                self._without_a_soup(),
            )
        finally:
            streams.restore(before)
        # The same batches everywhere, but a GPU's sums may differ in the last bit.
        self.population.broadcast_tensors(list(soup.model.buffers()), source=0)

    def _recalibrates(self, model: nn.Module) -> bool:
        return self.args.soup_batch_norm == "recalibrate" and self.population.size > 1 and has_batch_norm(model)

    def _recalibrate(self, model: nn.Module, batches: Iterable[Any]) -> None:
        def forward(model: nn.Module, batch: Any) -> None:
            self._forward_without_labels(model, batch, self.model_wrapped)

        recalibrate_batch_norm(model, batches, forward=forward, max_batches=self.args.soup_batch_norm_batches)

    def _forward_without_labels(self, model: nn.Module, batch: Any, call: Any = None) -> None:
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            forward_without_labels(model, inputs, self.label_names, call)

    def _keep_members(self) -> None:
        """*Collective.* What has been trained is not lost for a soup that cannot be made of it."""
        if self.is_in_train:
            self.save_members()

    def _without_a_soup(self) -> str:
        kept = f"The members are saved in `{Path(self.args.output_dir) / LOCAL_MEMBERS}`. " if self.is_in_train else ""
        return (
            f'{kept}`soup_batch_norm="average"` makes a soup without a pass over the data; '
            "`hf_wash.recalibrate_batch_norm` takes a `forward` of your own for one that was made so."
        )

    def _held_out_score(self, soup: Member) -> float:
        """*Collective.* A soup's score on held-out training data; augmentation draws the same for every soup."""
        held_out = hold_out(self._data_in_common(), self.args.soup_holdout, self.args.seed)[1]
        predictions = evaluation.Predictions()
        streams = self.population.streams
        before = streams.capture()
        soup.prepared.eval()
        try:
            set_seed(self.args.seed + HOLDOUT_SEED_OFFSET)
            with as_member(self, without_a_trace(self, soup)):
                for index, inputs in enumerate(self.get_test_dataloader(held_out)):
                    result = super().prediction_step(soup.prepared, inputs, False)
                    predictions.add(index, find_batch_size(inputs) or 1, *result)
        finally:
            streams.restore(before)
        score = evaluation.held_out_score(
            predictions,
            evaluation.ensemble_kind(soup.model),
            self.args.metric_for_best_model,
            self.args.greater_is_better,
            self.compute_metrics,
        )
        # A GPU's last bit must not make processes choose differently.
        return self.population.broadcast(score)
