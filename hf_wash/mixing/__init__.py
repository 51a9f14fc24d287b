"""What the members of a population exchange after an optimizer step. Knows torch and NumPy only."""

from .averaging import PapaMixer, PeriodicAverageMixer
from .diloco import DilocoMixer
from .outcome import ContagionError, MixStats, PlanMismatchError
from .pairs import PairAverageMixer
from .schedule import expected_values_moved, layer_probabilities, schedule_probabilities, shuffled_layers
from .sparta import SpartaMixer
from .wash import WashMixer


__all__ = [
    "ContagionError",
    "DilocoMixer",
    "MixStats",
    "PairAverageMixer",
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
