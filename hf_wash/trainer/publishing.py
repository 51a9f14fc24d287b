"""
[`Publishing`]: the card, the record and the uploads of a run, in the place of the Trainer's.

What is in them is `hub`'s work; here is when they are written, and by which process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.modeling_utils import unwrap_model
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from ..hub.card import WashCard
from ..hub.describe import describe_run
from ..hub.push import (
    PushError,
    create_repository,
    explain,
    push_folder,
    push_in_background,
    remove_snapshots,
    root_files,
)
from ..hub.record import last_evaluation, write_record
from . import checkpoint as checkpoints
from . import options
from .part import Part


logger = logging.get_logger(__name__)


class Publishing(Part):
    """The part of a population's Trainer that speaks to the Hub."""

    # A script that takes `--verify_checkpoint` says so by its name and arguments, as `sys.argv` has them: the card then
    # tells how a checkpoint of the run is replayed.
    replay_command: Sequence[str] | None = None

    # The message with which Trainer's `save_model` pushes by itself (5.23).
    _PUSH_OF_SAVE_MODEL = "Model save"

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Make the repository and the branch to push to, on the main process.

        Raises:
            ValueError: if that is not possible, before anything has been trained.
        """
        if not self.is_world_process_zero():
            return
        args, repo_id = self.args, self._repository_name()
        remove_snapshots(Path(args.output_dir))
        try:
            self.hub_model_id = create_repository(
                repo_id,
                private=private if private is not None else args.hub_private_repo,
                revision=args.hub_revision,
                token=token if token is not None else args.hub_token,
            )
        except Exception as error:  # whatever it was: the network, the token, the name
            raise ValueError(
                f"`push_to_hub` is set, but `{repo_id}` cannot be written to: {explain(error)} Without `push_to_hub` "
                f"the run stays here, and `hf-wash push {args.output_dir} {repo_id}` pushes it later."
            ) from error
        self.push_in_progress = None

    def _repository_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write the model card, `README.md`, and what programs can read of it, `wash_run.json`. No process waits for
        another. What somebody else wrote in a card that is there already is kept.

        Args:
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset (*optional*):
                As in [`~transformers.Trainer.create_model_card`]. What is not given is taken from the call before,
                else from the model and the data, as far as they tell; the license from the model this one was
                fine-tuned from.
            dataset_args (*optional*):
                Not used.
        """
        if not self.is_world_process_zero():
            return
        given = {
            "language": language,
            "license": license,
            "tags": tags,
            "model_name": model_name,
            "finetuned_from": finetuned_from,
            "tasks": tasks,
            "dataset_tags": dataset_tags,
            "dataset": dataset,
        }
        self._card_options = {**self._given_for_card(), **{name: v for name, v in given.items() if v is not None}}
        write_record(self.args.output_dir, self._run_record())
        self._write_card(self.args.output_dir)

    def _given_for_card(self) -> dict[str, Any]:
        return getattr(self, "_card_options", {})

    def _write_card(self, model_folder: str, **options: Any) -> None:
        config: Any = getattr(self._described_model(), "config", None)
        known = {
            "repo_id": self.hub_model_id,
            "revision": self.args.hub_revision,
            "members": self.args.push_members if self.hub_model_id is not None else None,
            "record": self._run_record(),
            "config": config.to_dict() if hasattr(config, "to_dict") else config,
            "metrics": last_evaluation(self.state.log_history) or None,
            "log_history": self.state.log_history or None,
        }
        card = WashCard.from_folder(model_folder, **{**known, **options})
        for problem in card.write(self.args.output_dir):
            logger.warning(problem)

    def save_state(self) -> None:
        """Save `trainer_state.json` and, for programs, how the run was made: `wash_run.json`. No process waits."""
        super().save_state()
        if self.is_world_process_zero():
            # No process waits, not for the Hub either.
            write_record(self.args.output_dir, self._run_record(ask_hub=False))

    def _described_model(self):
        return unwrap_model(self.model)

    def _run_record(self, ask_hub: bool = True) -> dict[str, Any]:
        """What `wash_run.json` says, from this process's knowledge; the Hub is asked for a license where it may be."""
        return describe_run(
            run=self._run,
            args=self.args,
            state=self.state,
            model=self._described_model(),
            population=self.population,
            overrides=self._overrides,
            exchanged=(self.values_moved, self.bytes_exchanged),
            greedy=self.greedy_record,
            left_out=sorted(self.soup.left_out),
            probability=self.mixing.probability if self._mixing is not None else self.args.shuffle_probability,
            times=self.mixing.times if self._mixing is not None else None,
            ask_hub=ask_hub,
            batch_size=self.get_total_train_batch_size(self.args),
            datasets=(self.train_dataset, self.eval_dataset),
            card=self._given_for_card(),
            replay=self._how_to_replay(),
        )

    def _how_to_replay(self) -> dict[str, Any] | None:
        """How a checkpoint of this run is verified; `None` where it has kept none, or its script is not known."""
        kept = checkpoints.runs_in(self.args.output_dir).get(self._run or "", []) if self.replay_command else []
        if not self.replay_command or not kept:
            return None
        strategy = self.args.hub_strategy if self.args.push_to_hub else None
        if strategy == HubStrategy.CHECKPOINT:
            names = ["last-checkpoint"]
        else:
            names = [path.name for path in kept]
        return {
            "command": options.command_of_replay(self.replay_command, names[0]),
            "checkpoints": names,
            "published": strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS),
        }

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Upload the soup with its card and, with `push_members`, the members under `members/member_<i>/`, in one commit.

        After training no process waits for another, so that scripts may call it on the main one alone. While
        training, call it on every process.

        Args:
            commit_message, blocking, token, revision, private (*optional*):
                As in [`~transformers.Trainer.push_to_hub`]. A branch that is not there is made.
            kwargs (*optional*):
                Passed to [`~WashTrainer.create_model_card`].

        Returns:
            [`~huggingface_hub.CommitInfo`] or a `Future` of it, on the main process.

        Raises:
            PushError: if the upload fails. What is in `output_dir` is whole; the message says how to push it later.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # Before the files that are being uploaded are written anew.
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.setdefault(
            "model_name", self._given_for_card().get("model_name", self._repository_name().split("/")[-1])
        )
        self.create_model_card(**kwargs)

        def with_full_name(repo_id: str) -> None:
            self.hub_model_id = repo_id
            self.create_model_card()

        try:
            return push_folder(
                args.output_dir,
                self._repository_name(),
                members=args.push_members,
                private=private if private is not None else args.hub_private_repo,
                revision=revision if revision is not None else args.hub_revision,
                token=token if token is not None else args.hub_token,
                commit_message=commit_message or "End of training",
                prepare=with_full_name,
                blocking=blocking,
            )
        except PushError as error:
            # What comes after `save_model` in a script, the members and the metrics, must not be lost for that.
            if commit_message != self._PUSH_OF_SAVE_MODEL:
                raise
            logger.error(str(error))
            return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Upload a checkpoint's soup in the background and, as `hub_strategy` says, the checkpoint.

        Trainer's own copies the model to `output_dir` first, with a processor's file beside a timm model that must not
        have one, uploads from a folder that the next save or the rotation of checkpoints may change meanwhile, and
        does not tell when an upload has failed (5.23).
        """
        args, folder = self.args, Path(checkpoint_folder)
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        try:
            self._write_card(checkpoint_folder, pictures=False, members=False)
            output_dir = Path(args.output_dir)
            files = {name: path for name, path in root_files(output_dir).items() if path.suffix != ".safetensors"}
            files |= {name: path for name, path in root_files(folder).items() if not self._is_for_resuming(name)}
            replaced = []
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
                files |= {f"{place}/{name}": path for name, path in root_files(folder).items()}
                replaced.append(f"{place}/")
            steps = args.save_strategy == SaveStrategy.STEPS
            at = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch)}"
            job = push_in_background(
                self.hub_model_id,
                files,
                output_dir,
                replaced=replaced,
                revision=args.hub_revision,
                token=args.hub_token,
                commit_message=f"Training in progress, {at}",
            )
        except Exception as error:  # training is worth more than an upload that the next one makes up for
            logger.warning(f"`{folder}` is not pushed to {self.hub_model_id}: {explain(error)} Training goes on.")
            return
        job.add_done_callback(lambda done: self._report_push(folder, done))
        jobs = self.push_in_progress.jobs if busy and self.push_in_progress is not None else []
        self.push_in_progress = PushInProgress([*jobs, job])

    def _report_push(self, folder: Path, job) -> None:
        error = None if job.cancelled() else job.exception()
        if error is not None:
            logger.warning(
                f"Pushing `{folder}` to {self.hub_model_id} failed: {explain(error)} It is whole here, and the next "
                "save is pushed again."
            )

    @staticmethod
    def _is_for_resuming(name: str) -> bool:
        """Whether a file of a checkpoint serves to resume from it, not to use its model."""
        return name.startswith("member_") or name in (
            checkpoints.MANIFEST,
            checkpoints.FROZEN,
            checkpoints.MIXER,
            "trainer_state.json",
        )
