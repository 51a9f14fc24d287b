"""The bar that shows how far something of several parts is: only where it takes long."""

from tqdm.auto import tqdm


PATIENCE = 2.0
"""Seconds after which somebody who waits wants to see that something happens."""


def bar_of(what: str, total: int, quiet: bool = False) -> tqdm:
    """
    A progress bar that does not appear before [`PATIENCE`] is over, and then with the next part that is done. It leaves
    nothing behind.

    Args:
        what (`str`): What is done.
        total (`int`): In how many parts; `update()` after each.
        quiet (`bool`, *optional*, defaults to `False`): Never show it.
    """
    return tqdm(desc=what, total=total, disable=quiet, delay=PATIENCE, leave=False)
