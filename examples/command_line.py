"""
What the training examples share of a command line: flags in groups, what is wrong in one line, and an interruption in
one line. What the flags are, and what is done with them, each script says itself.
"""

import argparse
import copy
import dataclasses
import difflib
import functools
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import TrainOutput

from hf_wash import PopulationArguments
from hf_wash.trainer.manifest import runs_in


# Of the 150 flags those that a run is likely to be given, in this order. A name that this version of the Trainer does
# not have is passed over.
TRAINING = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim"),
    *("label_smoothing_factor", "max_grad_norm", "seed", "data_seed", "bf16", "fp16", "activation_checkpointing"),
    *("torch_compile", "dataloader_num_workers", "use_cpu"),
)
SAVING = (
    *("output_dir", "resume_from_checkpoint", "save_strategy", "save_steps", "save_total_limit", "eval_strategy"),
    *("eval_steps", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "logging_strategy"),
    *("logging_steps", "report", "report_to", "run_name", "push_to_hub", "push_members", "hub_model_id"),
    *("hub_private_repo", "hub_strategy", "hub_token", "hub_revision"),
)
# What a script does in the place of training.
INSTEAD = ("dry_run", "verify_checkpoint")

# What comes of it when an option that is on is turned off, where that is more than its absence.
TURNED_OFF = {
    "same_init": "each member starts from weights of its own.",
    "evaluate_members": "the soup alone is evaluated, without members and ensemble.",
    "report": "no report is written at the end of training.",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One line for each option: not its spelling with hyphens too, and no default where that is None."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.option_strings and action.dest != "help":
            action = copy.copy(action)
            action.option_strings = action.option_strings[:1]
        return super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or _turns_off(action):
            return action.help
        return super()._get_help_string(action)


def _turns_off(action: argparse.Action) -> bool:
    return action.nargs == 0 and action.const is False


class CommandLine(HfArgumentParser):
    """
    The flags of dataclasses, in groups.

    Args:
        groups (`list[type]`):
            Dataclasses of options. Those of each make a group, named by its `_argument_group_name`; those of the last, if
            it is a [`PopulationArguments`], make several: what is likely to be set first, then all else.
        text (`str`):
            The script's own, of which the first paragraph is shown.
    """

    def __init__(self, groups: list[type], text: str | None):
        super().__init__(
            groups,
            description=(text or "").split("\n\n")[0].strip(),
            usage="%(prog)s [--flag value ...]",
            formatter_class=HelpFormatter,
        )
        for action in self._actions:
            if _turns_off(action):
                # The parser repeats what the option says that is turned off (transformers 5.24).
                action.help = f"Turns --{action.dest} off" + (
                    f": {TURNED_OFF[action.dest]}" if action.dest in TURNED_OFF else "."
                )
        if issubclass(groups[-1], PopulationArguments):
            self._group_training(groups[-1])

    def _group_training(self, config: type) -> None:
        """Part the well over a hundred flags of a configuration, which the parser leaves among the `options`."""
        of_config = {option.name for option in dataclasses.fields(config)}
        flags = [action for action in self._optionals._group_actions if action.dest in of_config]
        population = {option.name for option in dataclasses.fields(PopulationArguments)}
        inherited = {option.name for option in dataclasses.fields(TrainingArguments)}
        instead: list[argparse.Action] = []
        parts: dict[str, list[argparse.Action]] = {
            "population and mixing": [],
            "training, of each member": [],
            "saving, Hub and report": [],
            "of this Trainer": [],
            "all else that a Trainer has (TrainingArguments)": [],
        }
        mixing, training, saving, besides, rest = parts.values()
        for action in flags:
            name = action.dest
            if name in INSTEAD:
                instead.append(action)
            elif name in TRAINING:
                training.append(action)
            elif name in SAVING:
                saving.append(action)
            elif name in population:
                mixing.append(action)
            else:
                (rest if name in inherited else besides).append(action)
        training.sort(key=lambda action: TRAINING.index(action.dest))
        saving.sort(key=lambda action: SAVING.index(action.dest))
        # The list is argparse's own, shared by all that are not in a group by name.
        self._optionals._group_actions = [
            *(action for action in self._optionals._group_actions if action.dest not in of_config),
            *instead,
        ]
        for title, actions in parts.items():
            if actions:
                self.add_argument_group(title)._group_actions += actions

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but a flag that there is not ends it, before any option is looked at."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(self._unknown(left))
        return found, left

    def _unknown(self, left: list[str]) -> str:
        flag = next((word for word in left if word.startswith("-")), None)
        if flag is None:
            return f"{left[0]!r} belongs to no flag; `--help` lists the flags."
        flag = flag.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(flag, known, n=1)
        return f"there is no flag {flag}; " + (f"the closest is {close[0]}." if close else "`--help` lists the flags.")

    def error(self, message: str) -> NoReturn:
        """End with one line on stderr and exit code 2."""
        print(f"{self.prog}: error{_which_process()}: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def _which_process() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" (process {rank})"


def refuse(error: Exception) -> NoReturn:
    """End with one line on stderr and exit code 1."""
    sys.exit(f"{_script()}: error{_which_process()}: {error}")


def _script() -> str:
    return os.path.basename(sys.argv[0])


def name_report(folder: str) -> None:
    """A line on where the report of a run is, if it has one."""
    page = os.path.join(folder, "report", "index.html")
    if os.path.exists(page):
        print(f"\nHow the run went: {page}")


# ---- In the place of training ----------------------------------------------------------------------------------------


# What the flags below stand in front of, as types have it.
if TYPE_CHECKING:
    from transformers import TrainingArguments as Configuration
else:
    Configuration = object


@dataclass
class InsteadOfTraining(Configuration):
    """The flags for it, in front of a configuration, which is told what a CPU has no use for."""

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Try everything out, say what the run would cost, and stop: data, labels, the loss of a batch, saving "
            "the untrained model and loading it back, disk space for the checkpoints. Nothing is trained or uploaded."
        },
    )
    verify_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint of a run with the same flags: train once more from the checkpoint before it, or from the "
            "beginning, compare all weights, optimizer states and random streams bit by bit, and stop. Says `identical` "
            "(exit code 0) or what differs first (exit code 1). Nothing is saved or uploaded."
        },
    )

    def __post_init__(self):
        if self.dry_run and self.resume_from_checkpoint:
            raise ValueError("--dry_run tries out a run from its beginning; leave --resume_from_checkpoint out.")
        if self.verify_checkpoint and (self.dry_run or self.resume_from_checkpoint):
            raise ValueError(
                "--verify_checkpoint trains nothing new; leave --dry_run and --resume_from_checkpoint out."
            )
        if self.dry_run or self.verify_checkpoint:
            # Pushing would make a repository before anything is tried.
            self.push_to_hub = False
        super().__post_init__()
        if self.device.type == "cpu":
            # Pinning is for copies to an accelerator; without one torch warns at every loader.
            self.dataloader_pin_memory = False


def done_instead(trainer: Any) -> bool:
    """Do what is asked for in the place of training, if anything is."""
    if trainer.args.dry_run:
        try_out(trainer)
        return True
    if trainer.args.verify_checkpoint:
        verify(trainer)
    return False


def try_out(trainer: Any) -> None:
    """What `--dry_run` does in the place of training."""
    report = trainer.check()
    if trainer.is_world_process_zero():
        print(f"\n{report}\n\nNothing was trained: this was a dry run.")
        trainer._made_folders.remove_empty()
    trainer.accelerator.end_training()


def verify(trainer: Any) -> NoReturn:
    """What `--verify_checkpoint` does in the place of training: ends with 0 if the checkpoint is the run's, else with 1."""
    replay = trainer.verify_checkpoint(trainer.args.verify_checkpoint)
    if trainer.is_world_process_zero():
        print(f"\n{replay}")
    trainer.accelerator.end_training()
    sys.exit(0 if replay.identical else 1)


# ---- Training --------------------------------------------------------------------------------------------------------


def trained(trainer: Any) -> TrainOutput:
    """Train, from the checkpoint that was named, if one was. What is wrong with the input ends the script with a line."""
    try:
        return trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except ValueError as error:
        if trainer.state.global_step > 0:
            raise
        # Before the first step it is still the input that is wrong: no such checkpoint, say.
        refuse(error)


# ---- Interruptions ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What a script is at, for the line that says what was interrupted."""

    trainer: Any = None


def interruptible(main: Callable[[Run], None]) -> Callable[[], None]:
    """
    A script's `main` that ends, when it is interrupted (Ctrl-C), with one line on stderr and exit code 130.

    Args:
        main (`Callable`): Is given a [`Run`], in which it puts its trainer.
    """

    @functools.wraps(main)
    def ends_in_a_line() -> None:
        run = Run()
        try:
            main(run)
        except KeyboardInterrupt:
            # A launcher sends it once more, in the middle of what follows.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if os.environ.get("RANK", "0") == "0":
                print(f"\n{_script()}: interrupted {what_was_interrupted(run.trainer)}", file=sys.stderr, flush=True)
            sys.exit(130)

    return ends_in_a_line


def what_was_interrupted(trainer: Any) -> str:
    """
    How far a run has come, and the flag by which it goes on.

    Args:
        trainer (`Trainer`, *optional*): With a population; `None` before it was made.
    """
    if trainer is None or trainer.args.dry_run or trainer.args.verify_checkpoint or trainer._run is None:
        return "before training: nothing is lost."
    step, steps = trainer.state.global_step, trainer.state.max_steps
    where = f"at step {step} of {steps}" if step < steps else f"after the last step, {steps}, before all was saved"
    begun_from = str(trainer.args.resume_from_checkpoint)
    found = [
        *runs_in(trainer.args.output_dir).get(trainer._run, []),
        *([begun_from] if os.path.isdir(begun_from) else []),
    ]
    if not found:
        return f"{where}: no checkpoint was saved (--save_strategy), so the run has to begin anew."
    return f"{where}: the same command goes on with --resume_from_checkpoint {found[0]}"


def exits(main: Callable[[], int]) -> NoReturn:
    """Run the `main` of a script of many runs, which says itself what is left of them when it is interrupted."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        sys.exit(f"error: {error}")
