"""
[`Agreeing`]: what is looked at before a run, on all processes together, so that all hear of what is wrong on one.

What is compared, and how, is the work of `population.agreement` and `population.examples`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import has_length

from ..architecture import describe_architecture
from ..population.agreement import check_together, weights_digest
from ..population.examples import check_same_examples
from ..population.failures import told_to_all
from .data import has_labels, how_many
from .member import as_member
from .part import Part


class Agreeing(Part):
    """The part of a population's Trainer that finds out what is wrong, and tells all processes."""

    # Ways of computing a loss that leave it to the model.
    _losses_of_models: tuple = (Trainer.compute_loss,)

    def _told_to_all(self) -> AbstractContextManager[None]:
        """A block whose failure on one process ends it on all, with that process's reason."""

        def where() -> str:
            in_train = getattr(self, "is_in_train", False)
            return f"step {self.state.global_step}" if in_train else "what comes before or after training"

        return told_to_all(where, self.args.ddp_timeout)

    def _check_before_training(self, resume_from_checkpoint: Any) -> None:
        """*Collective, the first of a run.* Data and options of all processes."""

        def look() -> dict[str, Any]:
            self._check_model()
            self._check_data()
            return self._what_must_agree(resume_from_checkpoint)

        check_together(self.population, look)
        check_same_examples(self.population, self.train_dataset)

    def _check_model(self) -> None:
        if self.model is None and self.model_init is not None:
            return  # a trial has ended, and the next one makes its own
        served = self.soup.member.model if self.soup.is_built else None
        if all(self.model is not known for known in (*self.population.members, served)):
            raise ValueError(
                "Another model was put into `trainer.model` after the members had been made of the first one, and would "
                "not be trained: give it to a new Trainer, or change the members, `trainer.population.members`."
            )

    def _what_must_agree(self, resume_from_checkpoint: Any) -> dict[str, Any]:
        # Where a run is written and reported may differ between machines; what is computed may not.
        local = ("output_dir", "logging_dir", "local_rank", "run_name", "report_to", "hub_token", "disable_tqdm")
        options = {name: str(value) for name, value in self.args.to_dict().items() if name not in local}
        facts: dict[str, Any] = {f"option {name}": value for name, value in options.items()}
        asked = str(resume_from_checkpoint).lower()
        facts["resuming"] = asked if asked in ("none", "false", "true", "auto") else f"from {Path(asked).name}"
        facts["architecture"] = describe_architecture(self.population.wholes[0])
        facts["overrides"] = [overrides.describe() for overrides in self._overrides]
        facts["examples to evaluate on"] = how_many(self.eval_dataset)
        facts["compute_metrics"] = self.compute_metrics is not None
        facts["preprocess_logits_for_metrics"] = self.preprocess_logits_for_metrics is not None
        facts["torch"] = torch.__version__
        return facts

    def _what_must_agree_about_steps(self, steps_per_epoch: int) -> dict[str, Any]:
        facts: dict[str, Any] = {"steps per epoch": steps_per_epoch, "steps": self._total_steps}
        facts["examples to train on"] = how_many(self.train_dataset)
        if self.args.same_init and self._trainings == 1 and self._resume is None:
            facts["initial weights"] = weights_digest(self.population.members[0])
        return facts

    def _check_data(self) -> None:
        if self._holds_out:
            data = [overrides.train_dataset for overrides in self._overrides] + [self.train_dataset]
            lengths = {len(own) if has_length(own) else None for own in data if own is not None}
            if len(lengths) > 1:
                raise ValueError(
                    "`soup='greedy'` holds out the same examples of every member's training set, by their position, "
                    f"so those must be views of one set; they have {len(lengths)} different lengths."
                )
        for index in self.population.indices:
            data = self._data_of(index)
            if data is None and self._makes_its_own_loader():
                continue
            if data is None:
                raise ValueError("Training needs a `train_dataset`.")
            if has_length(data) and len(data) == 0:
                raise ValueError(f"The training set of member {index} is empty.")
        self._check_labels()

    def _makes_its_own_loader(self) -> bool:
        own: Any = type(self)
        return own.get_train_dataloader is not Trainer.get_train_dataloader

    def _check_labels(self) -> None:
        """Find out before training that there are no labels, where the loss is the model's own and needs them."""
        if (
            type(self).compute_loss not in self._losses_of_models
            or self._makes_its_own_loader()
            or self.compute_loss_func is not None
        ):
            return
        if self.can_return_loss or not self.label_names:
            return
        streams = self.population.streams
        for member in self.members:
            if not has_length(member.train_dataset):
                continue
            before = streams.capture()
            try:
                with as_member(self, member):
                    loader = self.get_train_dataloader()
                    batch = self._batch_of(loader.dataset[0], loader.collate_fn, member.index)
            finally:
                streams.restore(before)
            if not has_labels(batch, self.label_names):
                raise ValueError(
                    f"The training set of member {member.index} has no labels: a batch has none of "
                    f"{', '.join(self.label_names)}."
                )

    @staticmethod
    def _batch_of(example: Any, collate: Callable, index: int) -> Any:
        try:
            return collate([example])
        except Exception as error:  # a collator's own words say little of where the example came from
            raise ValueError(
                f"No batch can be made of the first example of member {index}'s training set, a "
                f"`{type(example).__name__}`: {type(error).__name__}: {error}."
            ) from error
