"""Work on a model that the user neither sees nor finds traces of: no progress bars, no random numbers drawn."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves every random generator as it was: building a model draws from them."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and reports of loading: a check is not what the user is watching."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    timm_logger = logging.getLogger("timm")
    timm_level = timm_logger.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    timm_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        timm_logger.setLevel(timm_level)
        if bars:
            transformers_logging.enable_progress_bar()


def seed_everything(seed: int) -> None:
    """Seeds what [`undisturbed`] restores, on the CPU."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
