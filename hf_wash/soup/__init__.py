"""One model out of many: uniform and greedy soups, BatchNorm recalibration, the ensemble they are compared with.

Knows torch and safetensors only, so that a plain training loop can use it without the Trainer.
"""

from .batch_norm import has_batch_norm, recalibrate_batch_norm
from .ensemble import Ensemble
from .greedy import GreedySoupRecord, greedy_soup
from .uniform import uniform_soup


__all__ = [
    "Ensemble",
    "GreedySoupRecord",
    "greedy_soup",
    "has_batch_norm",
    "recalibrate_batch_norm",
    "uniform_soup",
]
