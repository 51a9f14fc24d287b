"""[`WashTrainer`]: the population of a plain Trainer, and what image classifiers need beside."""

import os
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.modeling_utils import unwrap_model
from transformers.utils import logging

from ..config import WashConfig
from ..hub.export import check_export, export_model, folder_problem, is_image_classifier
from .mixin import PopulationMixin


logger = logging.get_logger(__name__)


class WashTrainer(PopulationMixin, Trainer):
    """
    Trains a population of models that exchange a small random part of their weights after every optimizer step, as in
    [WASH](https://hf.co/papers/2405.17517), and averages them into one *soup*. See [`PopulationMixin`] for what a
    member is, and what the Trainer's model is when.

    For image classifiers it knows more than for other models: soft labels of shape `(batch, num_labels)`, where the
    collator says by an attribute `soft_labels` that it makes them, get the soft cross-entropy; and what it saves is
    loadable by transformers and, for a timm model, by timm.

    Args:
        model ([`~transformers.PreTrainedModel`] or `torch.nn.Module`, *optional*):
            The model all members start as. Pass this or `model_init`. A timm model goes in as
            [`~transformers.TimmWrapperForImageClassification`].
        args ([`WashConfig`], *optional*):
            The options. Batch size, learning rate, epochs and so on are those of one member.
        members (`list[MemberOverrides]`, *optional*):
            For each of the N members, what it does differently.
        *further, **named:
            As in [`~transformers.Trainer`], in its order.

    Example:

    ```python
    >>> from hf_wash import WashConfig, WashTrainer

    >>> args = WashConfig("soup", population_size=4, num_train_epochs=20)
    >>> trainer = WashTrainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    >>> trainer.train()
    >>> trainer.save_model()  # the soup; AutoModelForImageClassification.from_pretrained("soup") loads it
    ```
    """

    def __init__(self, model=None, args: WashConfig | None = None, *further, **named):
        if model is not None and not isinstance(model, nn.Module):
            found = f"the class `{model.__name__}`" if isinstance(model, type) else f"a `{type(model).__name__}`"
            raise ValueError(f"`model` must be a `torch.nn.Module`, found {found}.")
        super().__init__(model, args if args is not None else WashConfig(output_dir="tmp_trainer"), *further, **named)

    _example: dict[str, Any] | None = None

    def training_step(self, model: nn.Module, inputs: list, *args, **kwargs):
        """As [`PopulationMixin`]'s; two examples are remembered, to compare what is saved on."""
        if self._example is None and hasattr(inputs[0], "items"):
            self._example = {name: value[:2] for name, value in inputs[0].items() if isinstance(value, torch.Tensor)}
        return super().training_step(model, inputs, *args, **kwargs)

    def _has_soft_labels(self, inputs) -> bool:
        labels = inputs.get("labels") if hasattr(inputs, "get") else None
        makes_them = getattr(self.data_collator, "soft_labels", False)
        return makes_them and isinstance(labels, torch.Tensor) and labels.is_floating_point()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        # An example with soft labels is one item, not one for each class.
        counted = [
            {**batch, "labels": batch["labels"].new_zeros(len(batch["labels"]), dtype=torch.long)}
            if self._has_soft_labels(batch)
            else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """
        The Trainer's loss; the soft labels of a collator that says so get the soft cross-entropy.

        transformers (5.23) would take floating-point labels for a multi-label task, use another loss and write that
        `problem_type` into the model's configuration.
        """
        if self.compute_loss_func is not None or not self._has_soft_labels(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        smoothing = self.label_smoother.epsilon if self.label_smoother is not None else 0.0
        losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
        items = (
            num_items_in_batch if self.model_accepts_loss_kwargs and num_items_in_batch is not None else len(labels)
        )
        loss = losses.sum() / items
        return (loss, outputs) if return_outputs else loss

    def _check_export_folder(self) -> None:
        member, folder = unwrap_model(self.population.members[0]), self.args.output_dir
        problem = folder_problem(member, folder) if self.args.should_save and is_image_classifier(member) else None
        for found in self.population.gather_processes(problem):
            if found is not None:
                raise ValueError(found)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = unwrap_model(self.model)
        if not is_image_classifier(model):
            super()._save(output_dir, state_dict)
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        if self.args.should_save:
            try:
                export_model(model, folder, processing_class=self.processing_class, state_dict=state_dict, check=False)
            except ValueError as problem:  # before anything was written; a checkpoint is worth more than its loaders
                logger.warning(f"`{folder}` is saved as the Trainer saves it, for transformers alone: {problem}")
                super()._save(output_dir, state_dict)
                return
            torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the soup; the final one, of an image classifier, is loaded back with every loader and compared, once."""
        super().save_model(output_dir, _internal_call)
        model = unwrap_model(self.model)
        if not (self.args.should_save and self.soup.served and is_image_classifier(model)) or self.soup.is_checked:
            return
        self.soup.is_checked = True
        folder = output_dir if output_dir is not None else self.args.output_dir
        try:
            check_export(
                folder,
                model,
                processing_class=self.processing_class,
                example=self._example,
                progress=not self._quiet,
            )
        except (RuntimeError, ValueError) as problem:
            logger.warning(f"The soup is saved, but its folder could not be shown to load everywhere: {problem}")


WashTrainer._losses_of_models = (Trainer.compute_loss, WashTrainer.compute_loss)
