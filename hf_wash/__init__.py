"""WASH populations for Hugging Face: train models in parallel, shuffle a few of their weights, average them."""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Each public name and the module it comes from, imported when it is first asked for: a loop of one's own needs no
# transformers, and `hf-wash --help` needs no torch.
_MODULES = {
    "DilocoMixer": "mixing",
    "Ensemble": "soup",
    "MemberOverrides": "population",
    "PairAverageMixer": "mixing",
    "PapaMixer": "mixing",
    "PeriodicAverageMixer": "mixing",
    "PopulationArguments": "config",
    "PopulationDiagnostics": "report.diagnostics",
    "PopulationMixin": "trainer.mixin",
    "SpartaMixer": "mixing",
    "WashConfig": "config",
    "WashMixer": "mixing",
    "WashTrainer": "trainer.wash_trainer",
    "greedy_soup": "soup",
    "recalibrate_batch_norm": "soup",
    "uniform_soup": "soup",
}

__all__ = [
    "DilocoMixer",
    "Ensemble",
    "MemberOverrides",
    "PairAverageMixer",
    "PapaMixer",
    "PeriodicAverageMixer",
    "PopulationArguments",
    "PopulationDiagnostics",
    "PopulationMixin",
    "SpartaMixer",
    "WashConfig",
    "WashMixer",
    "WashTrainer",
    "greedy_soup",
    "recalibrate_batch_norm",
    "uniform_soup",
]

if TYPE_CHECKING:
    from .config import PopulationArguments, WashConfig
    from .mixing import (
        DilocoMixer,
        PairAverageMixer,
        PapaMixer,
        PeriodicAverageMixer,
        SpartaMixer,
        WashMixer,
    )
    from .population import MemberOverrides
    from .report.diagnostics import PopulationDiagnostics
    from .soup import Ensemble, greedy_soup, recalibrate_batch_norm, uniform_soup
    from .trainer.mixin import PopulationMixin
    from .trainer.wash_trainer import WashTrainer


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
