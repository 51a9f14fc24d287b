"""[`RandomStreams`]: each member's own random numbers, swapped into the libraries' global generators."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class RandomStreams:
    """
    One set of random streams (Python's, NumPy's, torch's on the CPU and on the accelerator) for each local member,
    and one for everything else the process does.

    The libraries know global generators only, so a member's streams are swapped in when the member computes. They stay
    in until something else is asked for: a process with one member pays nothing while it trains.

    Args:
        device (`torch.device`): The device whose generator belongs to the streams, beside the CPU's.
    """

    def __init__(self, device: torch.device):
        self._accelerator = torch.get_device_module(device) if device.type not in ("cpu", "mps") else None
        self._saved: dict[int | None, dict] = {}
        self._active: int | None = None

    def capture(self) -> dict:
        """The state of the global generators, whosever they are at the moment."""
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        if self._accelerator is not None:
            state["accelerator"] = self._accelerator.get_rng_state()
        return state

    def restore(self, state: dict) -> None:
        """Put a captured state into the global generators."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])
        if self._accelerator is not None and "accelerator" in state:
            self._accelerator.set_rng_state(state["accelerator"])

    def check(self, state: Any) -> None:
        """
        Find out whether a state can be put into the global generators. These stay as they are.

        Raises:
            ValueError: if it is none that [`capture`] gives.
        """
        before = self.capture()
        try:
            name, words, position = state["numpy"][:3]
            # NumPy (2.4) would read beyond its words.
            if name != "MT19937" or words.shape != (624,) or not 0 <= position <= 624:
                raise ValueError("NumPy's state is none of its generator")
            self.restore(state)
        except Exception as error:  # each library has its own
            raise ValueError(f"what stands for a random state is none: {error!r}") from error
        finally:
            self.restore(before)

    def activate(self, owner: int | None) -> None:
        """Make `owner`'s streams the global ones: a member's index, or `None` for the process's own."""
        if owner != self._active:
            self._saved[self._active] = self.capture()
            self.restore(self._saved.pop(owner))
            self._active = owner

    @contextlib.contextmanager
    def use(self, owner: int | None) -> Iterator[None]:
        """[`activate`] for the length of a block."""
        before = self._active
        self.activate(owner)
        try:
            yield
        finally:
            self.activate(before)

    def state(self, owner: int | None) -> dict:
        """The state `owner`'s streams are in."""
        return self.capture() if owner == self._active else self._saved[owner]

    def set_state(self, owner: int | None, state: dict) -> None:
        """Set `owner`'s streams to a captured state."""
        if owner == self._active:
            self.restore(state)
        else:
            self._saved[owner] = state
