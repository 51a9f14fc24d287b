"""One model out of many: uniform and greedy soups, BatchNorm recalibration, the ensemble they are compared with.

Knows torch and safetensors only, so that a plain training loop can use it without the Trainer.
"""

from .batch_norm import has_batch_norm, recalibrate_batch_norm
from .ensemble import Ensemble
from .greedy import GreedySoupRecord, greedy_soup
from .repair import channel_statistics, mean_statistics, repair
from .uniform import uniform_soup


__all__ = [
    "Ensemble",
    "GreedySoupRecord",
    "channel_statistics",
    "greedy_soup",
    "has_batch_norm",
    "mean_statistics",
    "recalibrate_batch_norm",
    "repair",
    "uniform_soup",
]
