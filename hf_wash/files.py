"""
Files and folders as users have them: what stands where a file is expected, and what is written appearing whole.

What is in them is others' business. Needs nothing but Python.
"""

import os
from collections.abc import Callable, Iterator
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


@contextmanager
def filled_whole(folder: str | Path, is_stale: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """
    A fresh folder to write to, whose files appear in `folder` when the block ends: all at once in a new folder, else one
    by one, each whole. If the block fails there is nothing of it, and what was there stays.

    Args:
        folder (`str` or `Path`): Made if it is not there. Links in it are replaced, not followed.
        is_stale (`Callable`, *optional*): Whether a file of that name that lies there goes, unless it is replaced.

    Raises:
        ValueError: if what is to be replaced is no file.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    # Within a folder that is there: beside it may be another disk, or a place where nobody may write.
    with scratch_beside(folder if is_new else folder / "any") as scratch:
        staged = scratch / "written"
        staged.mkdir()
        yield staged
        if is_new:
            os.rename(staged, folder)
            return
        written = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if not path.is_dir()]
        for name in written:
            is_file(folder / name)
        for name in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / name, folder / name)
        for path in folder.iterdir():
            if is_stale(path.name) and path.is_file() and path.relative_to(folder) not in written:
                path.unlink()
