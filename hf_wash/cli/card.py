"""`hf-wash card`: the model card of a run, written from its folder."""

from pathlib import Path
from typing import Annotated

import typer

from .terminal import say


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    repo: Annotated[str | None, typer.Option(help="The repository that the code in the card should name.")] = None,
) -> None:
    """Write the model card of a run, README.md, from what its folder holds.

    What somebody else wrote in the card is kept: only the part between the marks is replaced, and metadata that is
    missing is added.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")

    from huggingface_hub.utils import validate_repo_id

    from ..hub.card import write_card

    if repo is not None:
        validate_repo_id(repo)

    write_card(folder, repo_id=repo)
    say(f"Wrote {folder / 'README.md'}.")
