"""`hf-wash push`: a run, or any model's folder, uploaded to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from .terminal import no_bars_in_files, say


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, or of any model.")],
    repo: Annotated[str, typer.Argument(help="The repository, user/name or name. Made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If it has to be made, make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to push to. Made if it is not there.")] = None,
    members: Annotated[
        bool, typer.Option("--members", help="Push the members too, under members/member_<i>/.")
    ] = False,
    message: Annotated[str, typer.Option(help="The commit's message.")] = "Upload with hf-wash",
) -> None:
    """Upload a run to the Hub in one commit: the soup, its card and, if asked for, the members.

    Log in before with `hf auth login`, or set HF_TOKEN.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if not repo.strip():
        raise ValueError("The repository needs a name: the one given is empty.")

    from ..hub.card import write_card
    from ..hub.push import push_folder
    from ..hub.record import RUN_RECORD

    no_bars_in_files()

    def write(repo_id: str) -> None:
        # Only where a run has said what to write; any other model keeps the card it has.
        if (folder / RUN_RECORD).is_file():
            write_card(folder, repo_id=repo_id, revision=revision, members=members)

    commit = push_folder(
        folder,
        repo,
        members=members,
        private=private or None,
        revision=revision,
        commit_message=message,
        prepare=write,
    )
    say(f"Pushed {folder} to {commit.repo_url}{f' ({revision})' if revision else ''}: {commit.oid}")
