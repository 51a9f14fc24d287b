"""What the members of a population exchange after an optimizer step. Knows torch and NumPy only."""

from .averaging import DilocoMixer, PapaMixer, PeriodicAverageMixer, SpartaMixer
from .schedule import expected_values_moved, layer_probabilities, schedule_probabilities, shuffled_layers
from .wash import ContagionError, MixStats, PlanMismatchError, WashMixer


__all__ = [
    "ContagionError",
    "DilocoMixer",
    "MixStats",
    "PapaMixer",
    "PeriodicAverageMixer",
    "PlanMismatchError",
    "SpartaMixer",
    "WashMixer",
    "expected_values_moved",
    "layer_probabilities",
    "schedule_probabilities",
    "shuffled_layers",
]
