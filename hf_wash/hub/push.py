"""
Uploading a run to the Hub: the soup at the repository's root, the members under `members/`, everything in one commit.

The Trainer and `hf-wash push` both go through here. What is in the files is others' work (`export.py`, `card.py`).
"""

import functools
import logging
import os
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from ..soup.weights import find_weight_files
from .card_merge import front_matter_problem
from .loading import check_files
from .record import LOCAL_MEMBERS, PUSHED_MEMBERS, read_record


logger = logging.getLogger(__name__)

# As Trainer's uploads leave out: checkpoints, and what a run keeps for itself (`_members`, unfinished checkpoints).
_LEFT_OUT = ["_*", "checkpoint-*", "report/*", *DEFAULT_IGNORE_PATTERNS]
# With the machine and the process that it is for.
_SNAPSHOT_PREFIX = f"_pushing-{platform.node()}-"


class PushError(RuntimeError):
    """An upload that did not happen; the message says why, and how to do it later."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    members: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload with hf-wash",
    prepare: Callable[[str], None] | None = None,
    blocking: bool = True,
) -> Any:
    """
    Uploads a run's folder in one commit, so that the repository never holds the soup of one run beside the members of
    another.

    Checkpoints and everything whose name begins with an underscore stay here, but for the members if they are asked
    for. A card whose front matter cannot be read is left out, with a warning, since the Hub would refuse the whole
    commit for it. The folder is not changed.

    Args:
        folder (`str` or `Path`):
            The folder of a run, or of any model that is saved as safetensors.
        repo_id (`str`):
            The repository, `user/name` or just `name`. Made if it is not there.
        members (`bool`, *optional*, defaults to `False`):
            Whether to upload the members, from `_members/member_<i>/` to `members/member_<i>/`, so that
            `Ensemble.from_pretrained(repo_id)` rebuilds the ensemble. Those that an earlier run left in the
            repository are removed.
        private (`bool`, *optional*):
            Whether a repository that has to be made is private. The account's default if not given.
        revision (`str`, *optional*):
            The branch to commit to, made if it is not there. The main one if not given.
        token (`str` or `bool`, *optional*):
            Access token with the right to write. The one of `hf auth login` if not given.
        commit_message (`str`, *optional*, defaults to `"Upload with hf-wash"`):
            The commit's message.
        prepare (`Callable[[str], None]`, *optional*):
            Called with the repository's full name, `user/name`, once it is there: the last chance to write the card.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait for the upload.

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit; or a `Future` of it with `blocking=False`.

    Raises:
        ValueError: before anything is sent, for a folder without a model or without the members asked for.
        PushError: if the upload fails. The folder is as it was, and pushing it again resumes.
    """
    folder = Path(folder)
    find_weight_files(folder)
    check_files(folder)
    # A folder that was trained into before may hold members of a larger population, too.
    record = read_record(folder)
    size, left_out = record.get("population", {}).get("size"), record.get("soup", {}).get("left_out", [])
    beside = member_files(folder, size, left_out) if members else {}
    command = ["hf-wash", "push", str(folder), repo_id, *["--members"] * members, *["--private"] * bool(private)]
    command += [] if revision is None else ["--revision", revision]
    failing = functools.partial(_failing_clearly, f"Pushing {folder} to {repo_id} failed", shlex.join(command))
    with failing():
        repo_id = create_repository(repo_id, private=private, revision=revision, token=token)
    if prepare is not None:
        prepare(repo_id)

    def upload(files: Mapping[str, Path]) -> Any:
        with failing():
            return push_files(
                repo_id,
                files,
                replaced=[f"{PUSHED_MEMBERS}/"] if members else [],
                revision=revision,
                token=token,
                commit_message=commit_message,
            )

    files = root_files(folder) | beside
    return upload(files) if blocking else _in_background(upload, files)


def _in_background(function: Callable[..., Any], *arguments: Any) -> Any:
    """A `Future` of the call, made by Trainer's own client, whose uploads are done one after the other."""
    from transformers.utils.hub import hf_api

    return hf_api().run_as_future(function, *arguments)


@contextmanager
def _failing_clearly(what: str, command: str) -> Iterator[None]:
    """Turns whatever goes wrong in a block into a [`PushError`] with the command that does it later."""
    try:
        yield
    except Exception as error:  # whatever it was, the user must hear that nothing is lost and what to do
        raise PushError(
            f"{what}: {explain(error)} Nothing in the folder is lost; push it later with `{command}`."
        ) from error


def root_files(folder: Path) -> dict[str, Path]:
    """What of a run's folder an upload takes without being asked: files by their path in the repository."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    files = {path: folder / path for path in filter_repo_objects(paths, ignore_patterns=_LEFT_OUT)}
    for path in files.values():
        if not path.is_file():  # a link to nothing, a FIFO
            logger.warning(f"{path} is no ordinary file, and is not uploaded.")
    return {name: path for name, path in files.items() if path.is_file()}


def member_files(folder: Path, count: int | None = None, left_out: Collection[int] = ()) -> dict[str, Path]:
    """
    The files of a run's members, by their path in the repository. A `ValueError` if there are none, or one is missing
    of the `count` that there must be (as many as there are, if not given), but for those that were `left_out`.
    """
    local = folder / LOCAL_MEMBERS
    if not local.is_dir() and (folder / PUSHED_MEMBERS).is_dir():
        return {}  # a repository's layout already: they are among the root's files
    found = {path.name for path in local.glob("member_*") if path.is_dir()}
    # No more than could be there and one: a record may claim any number.
    most = len(found) + len(left_out) + 1
    size = len(found) if count is None else min(count, most)
    wanted = [f"member_{index}" for index in range(size) if index not in left_out]
    missing = next((name for name in wanted if name not in found), None)
    if not wanted or missing is not None:
        raise ValueError(
            f"{folder} holds no members to push: expected them in {LOCAL_MEMBERS}/member_0 and so on"
            f"{f', and {missing} is missing' if missing and found else ''}. `WashTrainer.save_members` writes them."
        )
    files = {}
    for name in wanted:
        find_weight_files(local / name)
        for path in sorted(local.joinpath(name).rglob("*")):
            # Each member is a model; who trained it how is said once, at the root.
            if path.is_file() and path.name != "training_args.bin":
                files[f"{PUSHED_MEMBERS}/{path.relative_to(local).as_posix()}"] = path
    return files


def create_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | bool | None = None
) -> str:
    """Makes a repository, and a branch in it, unless they are there. Returns its full name, `user/name`."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and revision != "main" and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def push_files(
    repo_id: str,
    files: Mapping[str, Path],
    *,
    replaced: Sequence[str] = (),
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str,
) -> Any:
    """
    Uploads files in one commit.

    Args:
        repo_id (`str`):
            A repository that exists.
        files (`Mapping[str, Path]`):
            The files by their path in the repository.
        replaced (`Sequence[str]`, *optional*):
            Prefixes of paths in the repository, such as `"members/"`, under which nothing else may remain.
        revision, token, commit_message:
            As for [`push_folder`].
    """
    # `upload_folder` takes one folder, under the names it has; here members change the name of theirs.
    api, files = HfApi(token=token), dict(files)
    card = files.get("README.md")
    problem = front_matter_problem(card) if card is not None else None
    if problem is not None:
        logger.warning(f"The model card {card} is not uploaded, since the Hub would refuse it: {problem}")
        del files["README.md"]
    operations: list[Any] = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=files[name]) for name in files]
    if replaced:
        there = api.list_repo_files(repo_id, revision=revision)
        stale = [path for path in there if path.startswith(tuple(replaced)) and path not in files]
        operations += [CommitOperationDelete(path_in_repo=path) for path in stale]
    return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


def push_in_background(repo_id: str, files: Mapping[str, Path], workspace: Path, **options: Any) -> Any:
    """
    Uploads a checkpoint's files (and small others) as they are now, while training goes on, changes or removes them.

    Args:
        repo_id (`str`):
            A repository that exists.
        files (`Mapping[str, Path]`):
            The files by their path in the repository.
        workspace (`Path`):
            A folder on the files' disk, to keep them in until they are sent.
        **options:
            As for [`push_files`].

    Returns:
        `concurrent.futures.Future`: of the commit. Uploads are done one after the other.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    snapshot = Path(tempfile.mkdtemp(dir=workspace, prefix=f"{_SNAPSHOT_PREFIX}{os.getpid()}-"))
    kept = {name: snapshot / f"{number}{path.suffix}" for number, (name, path) in enumerate(files.items())}
    try:
        for name, path in files.items():
            _keep(path, kept[name])
    except BaseException:
        shutil.rmtree(snapshot, ignore_errors=True)
        raise

    def upload() -> Any:
        try:
            return push_files(repo_id, kept, **options)
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    return _in_background(upload)


def remove_snapshots(workspace: Path) -> None:
    """Removes what uploads of this machine that were killed have left behind."""
    if not workspace.is_dir():
        return
    for path in workspace.iterdir():
        match = re.fullmatch(re.escape(_SNAPSHOT_PREFIX) + r"(\d+)-\w{8}", path.name)
        if match and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _keep(path: Path, copy: Path) -> None:
    # A checkpoint's files are never written to again, so another name for one keeps what it holds, for free, also when
    # the checkpoint is removed. Everything else is small and may change in place.
    if path.suffix in (".safetensors", ".pt"):
        try:
            os.link(path, copy)
            return
        except OSError:  # a disk without links
            pass
    shutil.copyfile(path, copy)


_ADVICE = {
    401: "Log in with `hf auth login`, or pass a token that may write to the repository.",
    402: "The account's plan does not allow it.",
    403: "The token may not write there, or the account's storage is full.",
    404: "There is no such repository, branch or namespace, or the token may not see it.",
    413: "The Hub takes no files of this size from this account.",
    429: "The Hub asks to slow down.",
}


def explain(error: BaseException) -> str:
    """Why a request to the Hub failed, in a sentence or two."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "this process is offline (HF_HUB_OFFLINE is set)."
    for cause in causes:
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            said = " ".join((cause.server_message or "").split()) or cause.response.reason_phrase
            return f"the Hub answered {status}, “{said.rstrip('.')}”. {_ADVICE.get(status, '')}".rstrip()
    # The last cause is the connection's own; what is above it says what was being done.
    text = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2]) or type(error).__name__
    below = causes[-1]
    if below is not error and str(below) and str(below) not in text:
        text = f"{text.rstrip('.')} ({type(below).__name__}: {str(below).splitlines()[0]})"
    return text if text.endswith((".", "!", "?")) else text + "."
