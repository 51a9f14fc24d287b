"""
[`Evaluating`]: the Trainer's own evaluation of the soup, with the members and their ensemble beside it.

What becomes of their predictions is `evaluation`'s work.
"""

import copy

import torch
from torch import nn
from transformers.modeling_utils import unwrap_model
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..population.agreement import check_agreement
from . import evaluation
from .data import how_many
from .member import Member, as_member, without_a_trace
from .part import Part


logger = logging.get_logger(__name__)


class Evaluating(Part):
    """The part of a population's Trainer that evaluates and predicts."""

    _evaluating: bool
    # And the members as they are evaluated: prepared, and in the Trainer's place.
    _beside: tuple[evaluation.BesideTheSoup, list[nn.Module], list[Member]] | None

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """
        Metrics of the soup and, with `evaluate_members`, of each member and of the ensemble. Call on every process;
        every process gets the same dictionary.

        Args:
            *args, **kwargs: As in the Trainer's own `evaluate`.

        Returns:
            `dict[str, float]`: `eval_<metric>` of the soup, `eval_ensemble_<metric>` (mean of probabilities),
            `eval_member_<i>_<metric>`, and `eval_members_<metric>_mean`, `_min`, `_max`; `<metric>` includes `loss`.
        """
        with self._told_to_all(), self._as_soup():
            before, self._evaluating = self._evaluating, True
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                self._evaluating = before

    def predict(self, *args, **kwargs):
        """The soup's predictions. Call on every process."""
        with self._told_to_all(), self._as_soup():
            return super().predict(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """*Collective.* The Trainer's own loop over the soup, the members and their ensemble beside it batch by batch."""
        self._advance_streams()
        options = (description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._beside is not None or description != "Evaluation":
            return super().evaluation_loop(dataloader, *options)
        count = how_many(getattr(dataloader, "dataset", None))
        is_stream = self.population.world_size > 1 and not isinstance(count, int)
        if not self.args.evaluate_members:
            output = super().evaluation_loop(dataloader, *options)
            if is_stream:
                check_agreement(self.population, {"examples in the evaluation stream": output.num_samples})
            return output
        loss_only = prediction_loss_only if prediction_loss_only is not None else self.args.prediction_loss_only
        compute_metrics = None if loss_only else self.compute_metrics
        beside = evaluation.BesideTheSoup(
            self.population,
            self._ensemble_kind(),
            self._ensemble_loss,
            keep=compute_metrics is not None,
            preprocess=self.preprocess_logits_for_metrics,
            left_out=self.soup.left_out,
            is_stream=is_stream,
        )
        check_agreement(self.population, {"examples to evaluate on": count})
        self._beside = beside, self._members_for_evaluation(), []
        try:
            output = super().evaluation_loop(dataloader, *options)
            beside.begin_batch(0)
        finally:
            self._beside = None

        def summarize(of: evaluation.Predictions) -> dict[str, float]:
            return evaluation.summarize(
                of,
                compute_metrics,
                metric_key_prefix,
                include=self.args.include_for_metrics,
                by_batch=self.args.batch_eval_metrics,
                concatenate=self.args.eval_do_concat_batches,
                skip_non_finite_losses=self.args.logging_nan_inf_filter,
            )

        members = self.population.gather([summarize(own) for own in beside.members])
        ensemble = summarize(beside.ensemble) if beside.ensemble.batches else None
        metrics = evaluation.population_metrics(members, ensemble, self.soup.left_out)
        metrics["consensus_distance"] = self.soup.consensus_distance
        if any(each.disagreement for each in self._diagnostics):
            metrics |= beside.disagreement()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        # Rank 0's for all: a user's `compute_metrics` may be anything.
        return output._replace(metrics=self.population.broadcast(output.metrics))

    def prediction_step(self, model: nn.Module, inputs, prediction_loss_only: bool, *args, **kwargs):
        """The soup's prediction for a batch and, in an evaluation, each member's beside it."""
        self._note_size_of_last_batch(inputs)
        if self._beside is None:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        beside, models, members = self._beside
        beside.begin_batch(find_batch_size(inputs) or 1)
        result = super().prediction_step(model, copy.copy(inputs), prediction_loss_only, *args, **kwargs)
        if not members:  # a Trainer may make its measures when it first needs them, and then they are the soup's
            members += [without_a_trace(self, member) for member in self.members]
        results = []
        for member, prepared in zip(members, models, strict=True):
            with self.population.streams.use(member.index), as_member(self, member):
                self.data_collator = self.soup.member.data_collator
                own = super().prediction_step(prepared, copy.copy(inputs), not beside.needs_logits, *args, **kwargs)
            results.append(own)
        kept = None
        if "inputs" in self.args.include_for_metrics:
            kept = inputs[getattr(self.model, "main_input_name", "input_ids")]
        labels = inputs.get(self.label_names[0]) if len(self.label_names) == 1 and hasattr(inputs, "get") else None
        # As often as the Trainer's loop counts the loss of a batch, whose last may be shorter.
        count = self.args.eval_batch_size or find_batch_size(inputs) or 1
        weight = len(self.gather_function(torch.zeros(count)))
        beside.add(results, weight, kept, labels)
        return result

    def _advance_streams(self) -> None:
        # Iterating over a data loader draws its base seed from the global generator (torch 2.15), so a plain run's
        # stream moves on by one draw with each evaluation; so must the members'. After training they are at rest.
        if self._trainings and not self.is_in_train:
            return
        for index in self.population.indices:
            with self.population.streams.use(index):
                torch.empty((), dtype=torch.int64).random_()

    def _note_size_of_last_batch(self, inputs) -> None:
        # Where one process deals a stream's batches, as in a plain Trainer, accelerate (1.15) finds out how many examples
        # the last has; else its loss counts as that of a whole batch.
        state, dispatch = self.accelerator.gradient_state, self.args.accelerator_config.dispatch_batches
        if state.end_of_dataloader and state.remainder < 0 and dispatch is not False:
            state.active_dataloader.remainder = find_batch_size(inputs) or -1

    def _members_for_evaluation(self) -> list[nn.Module]:
        models = [member.prepare(self.accelerator) for member in self.members]
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            dtype = torch.float16 if self.args.fp16_full_eval else torch.bfloat16
            # Copies: the members stay as they are, since training can go on.
            models = [copy.deepcopy(model).to(dtype=dtype, device=self.args.device) for model in models]
        for model in models:
            model.eval()
        return models

    def _ensemble_kind(self) -> str | None:
        kind = evaluation.ensemble_kind(unwrap_model(self.model))
        if kind is None and not getattr(self, "_told_of_no_ensemble", False):
            self._told_of_no_ensemble = True
            logger.info(f"An ensemble of `{type(self.model).__name__}` is not defined: it is left out.")
        return kind

    def _ensemble_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of the ensemble's prediction, as a member's would be computed from its logits. A scalar."""
        labels = labels.cpu()
        if self.compute_loss_func is not None:
            return self.compute_loss_func({"logits": logits}, labels, num_items_in_batch=None)
        if self.label_smoother is not None and not labels.is_floating_point():
            return self.label_smoother({"logits": logits}, labels)
        kind = evaluation.ensemble_kind(unwrap_model(self.model))
        if kind == "regression":
            return nn.functional.mse_loss(logits.squeeze(), labels.float().squeeze())
        if kind == "multi_label_classification":
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        return nn.functional.cross_entropy(logits, labels)
