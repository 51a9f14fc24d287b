"""All situations, in the order of the table."""

import importlib

from reliability.tiny import TEMPLATES


FILES = (
    "options",
    "data",
    "models",
    "not_finite",
    "mixers",
    "soups",
    "damage",
    "manifests",
    "resuming",
    "interruptions",
    "publishing",
    "commands",
    "processes",
)
SITUATIONS = [s for name in FILES for s in importlib.import_module(f"reliability.{name}").SITUATIONS]

assert len({situation.id for situation in SITUATIONS}) == len(SITUATIONS), "two situations have one name"
__all__ = ["SITUATIONS", "TEMPLATES"]
