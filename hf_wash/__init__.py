"""WASH populations for Hugging Face: train models in parallel, shuffle a few of their weights, average them."""

__version__ = "0.1.0"

from .config import WashConfig
from .members import MemberOverrides
from .mixing import WashMixer
from .soup import Ensemble, greedy_soup, recalibrate_batch_norm, uniform_soup
from .trainer import WashTrainer


__all__ = [
    "Ensemble",
    "MemberOverrides",
    "WashConfig",
    "WashMixer",
    "WashTrainer",
    "greedy_soup",
    "recalibrate_batch_norm",
    "uniform_soup",
]
