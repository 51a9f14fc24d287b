"""What the members of a population exchange after an optimizer step. Knows torch and NumPy only."""

from .outcome import ContagionError, MixStats, PlanMismatchError
from .schedule import expected_values_moved, layer_probabilities, schedule_probabilities, shuffled_layers
from .wash import WashMixer


__all__ = [
    "ContagionError",
    "MixStats",
    "PlanMismatchError",
    "WashMixer",
    "expected_values_moved",
    "layer_probabilities",
    "schedule_probabilities",
    "shuffled_layers",
]
