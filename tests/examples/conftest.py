"""The example scripts as modules: they are not part of the package."""

import importlib.util
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def train_vit():
    """`examples/train_vit.py`, imported."""
    spec = importlib.util.spec_from_file_location("train_vit", EXAMPLES / "train_vit.py")
    module = importlib.util.module_from_spec(spec)
    # Before it runs: its dataclasses look their module up by name.
    sys.modules["train_vit"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def train_vit_script() -> Path:
    """Where `examples/train_vit.py` lies."""
    return EXAMPLES / "train_vit.py"
