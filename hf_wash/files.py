"""
Files and folders as users have them: what stands where a file is expected, and what is written appearing whole.

What is in them is others' business. Needs nothing but Python.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


# Uploads leave out what begins with an underscore.
_SCRATCH_PREFIX = "_hf-wash-"


def is_file(path: str | Path) -> bool:
    """
    Whether there is a file.

    Raises:
        ValueError: if there is something else of that name: opening a FIFO waits for ever, and a device may never end.
    """
    path = Path(path)
    if path.is_file():
        return True
    if os.path.lexists(path):
        what = "a link to nothing" if path.is_symlink() and not path.exists() else "no ordinary file"
        raise ValueError(f"{path} is {what}.")
    return False


def require_plain_tree(folder: str | Path) -> None:
    """A `ValueError` if anything below a folder is neither a folder nor a file."""
    for path in Path(folder).rglob("*"):
        if not path.is_dir():
            is_file(path)


@contextmanager
def scratch_beside(path: str | Path) -> Iterator[Path]:
    """A fresh folder on the disk of `path`, to write to before a rename; removed with what is left in it."""
    parent = Path(path).parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=parent, prefix=_SCRATCH_PREFIX, ignore_cleanup_errors=True) as scratch:
            yield Path(scratch)
    except BaseException:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # somebody else's is in it by now
                break
        raise


def write_whole(path: str | Path, content: bytes) -> None:
    """
    Writes a file, whole or not at all. A link of that name is replaced, not followed.

    Raises:
        ValueError: if what is there is no file.
    """
    is_file(path)
    with scratch_beside(path) as scratch:
        staged = scratch / "file"
        staged.write_bytes(content)
        os.replace(staged, path)
