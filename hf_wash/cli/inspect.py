"""`hf-wash inspect`: what a folder holds, and whether its checkpoints are whole."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import say


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, a checkpoint or a model.")],
) -> None:
    """Say what a run or a checkpoint holds, and check its files against their digests.

    The exit code is 2 if a checkpoint is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")

    from ..files import is_file
    from ..hub.card import WashCard
    from ..trainer import checkpoint

    if is_file(folder / checkpoint.MANIFEST) or folder.name.startswith("checkpoint-"):
        say(_checkpoint_line(folder, checkpoint.verify(folder)))
        return
    held = False
    if is_file(folder / "config.json") or is_file(folder / "adapter_config.json"):
        held = True
        known = WashCard.from_folder(folder, pictures=False)
        say(f"{folder}: {known.what_it_is}")
        for name, value in known.recipe():
            say(f"  {name}: {value}")
        columns, rows = known.rows()
        if rows:
            say(_table([["", *columns], *([cell.strip("*") for cell in row] for row in rows)]))
        for index, name in enumerate(known.soup.get("ingredients") or []):
            say(f"  ingredient {index}: {name}")
    for place in ("_members", "members"):
        members = [path for path in (folder / place).glob("member_*") if path.is_dir()]
        if members:
            held = True
            size = sum(
                path.stat().st_size for member in members for path in member.glob("*.safetensors") if is_file(path)
            )
            say(f"  {place}/: {len(members)} members, {size / 1e6:,.1f} MB of weights")
    damaged = []
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    for path in sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path])):
        held = True
        try:
            say(f"  {_checkpoint_line(path, checkpoint.verify(path))}")
        except checkpoint.InvalidCheckpoint as error:
            damaged.append(str(error))
            say(f"  {path.name}: damaged")
    for path in sorted(folder.glob(f"{checkpoint.STAGING_PREFIX}checkpoint-*")):
        say(f"  {path.name}: never finished, can be removed")
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}.")
    if not held:
        raise ValueError(f"{folder} holds no model, no members and no checkpoint.")


def _checkpoint_line(folder: Path, manifest: dict[str, Any]) -> str:
    files = manifest["files"]
    size = sum(record["size"] for record in files.values())
    resumable = any(name.endswith("optimizer.pt") for name in files)
    options = manifest.get("options")
    method = options.get("mixing", "") if isinstance(options, dict) else ""
    total = f" of {manifest['total_steps']}" if manifest.get("total_steps") else ""
    return (
        f"{folder.name}: step {manifest['step']}{total}, {manifest['population_size']} members, {method}, seed "
        f"{manifest.get('seed')}, {len(files)} files of {size / 1e6:,.1f} MB, digests verified, "
        f"{'can be resumed from' if resumable else 'weights only'}"
    )


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
