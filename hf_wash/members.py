"""What may differ between members: [`MemberOverrides`], and PAPA's grid of recipes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class MemberOverrides:
    """
    What one member does differently from the [`WashConfig`] and the [`WashTrainer`]'s arguments. `None` keeps theirs.

    Args:
        train_dataset (`torch.utils.data.Dataset`, *optional*):
            This member's training set (another augmentation, say). It must give as many steps an epoch as the others.
        data_collator (`Callable`, *optional*):
            This member's collator. It may return soft labels of shape `(batch, num_labels)`, as timm's Mixup and
            CutMix do; the loss is then the soft cross-entropy.
        learning_rate (`float`, *optional*): This member's peak learning rate; the schedule's shape is shared.
        weight_decay (`float`, *optional*): This member's weight decay.
        label_smoothing_factor (`float`, *optional*):
            This member's label smoothing while training, in [0, 1). Evaluation uses the configuration's for all.

    Raises:
        ValueError: for a negative number, or smoothing outside [0, 1).
    """

    train_dataset: Any | None = None
    data_collator: Callable | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    label_smoothing_factor: float | None = None

    def __post_init__(self):
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` of a member must be at least 0, found {value!r}.")
        smoothing = self.label_smoothing_factor
        if smoothing is not None and not 0 <= smoothing < 1:
            raise ValueError(f"`label_smoothing_factor` of a member must be in [0, 1), found {smoothing!r}.")

    def describe(self) -> dict[str, Any]:
        """The overrides as plain values, for comparing processes, manifests and model cards."""
        return {
            "train_dataset": self.train_dataset is not None,
            "data_collator": type(self.data_collator).__name__ if self.data_collator is not None else None,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "label_smoothing_factor": self.label_smoothing_factor,
        }
