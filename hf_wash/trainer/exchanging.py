"""
[`Exchanging`]: when in a step the members of a population's Trainer exchange weights, and what has to be done around it.

What is exchanged, and what it comes to, is `mixing_run`'s business; how activations are rescaled, `soup.repair`'s.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import set_seed
from transformers.utils import logging

from ..population.failures import known_to_all
from ..soup import has_batch_norm
from ..soup.repair import ChannelStatistics, channel_statistics, mean_statistics, repair
from . import checkpoint as checkpoints
from .data import MemberLoader
from .member import Member, as_member
from .mixing_run import MixingRun
from .part import Part


logger = logging.get_logger(__name__)

# The seeds of the batches on which averages are repaired: far from those of members, `seed + k`, and of the soup.
REPAIR_SEED_OFFSET = 1_000_037
# As PAPA's published code has it.
REPAIR_BATCHES = 5


class Exchanging(Part):
    """The part of a population's Trainer in which members exchange weights."""

    # The step whose exchange waits for the scheduler.
    _waiting: int | None = None

    def _check_times(self) -> None:
        """Refuse, on every process, an interval that does not fit into the run; all know its length by now."""
        if self.population.size == 1:
            return
        try:
            self.args.average_times(self._total_steps, self._steps_per_epoch)
        except ValueError as error:
            raise known_to_all(error) from None

    def _note_base_rates(self) -> None:
        """What PAPA's pull is relative to. Not every scheduler notes it, and a checkpoint brings it along."""
        if self.args.mixing == "papa":
            for group in self.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    def _begin_exchanges(self, model: Any) -> None:
        """*Collective.* Make the mixer, and hang its exchange on each step."""
        resumed = self._resume["manifest"] if self._resume is not None else {}
        probability = resumed.get("probability")
        another = resumed.get("options", {}).get("mixing", self.args.mixing) != self.args.mixing
        if probability is None or another or self.args.shuffle_probability is not None:
            probability = self.args.probability_for(self._total_steps)
        self.mixing = MixingRun(
            self.args,
            self.population,
            self.optimizer,
            self._total_steps,
            self._steps_per_epoch,
            probability,
        )
        if resumed and not another:
            folder = Path(self._resuming["folder"])
            checkpoints.checked(self.population, lambda: self.mixing.load(checkpoints.read_mixer(folder)))
        if self.is_world_process_zero():
            self.mixing.say_what_is_exchanged()
        # The exchange is a part of the step, whatever callbacks there are, and happens when fp16's scaler skips it, too.
        own_step, after_schedule = self.optimizer.step, self.mixing.after_schedule
        self._waiting = None

        @functools.wraps(own_step)  # with the mark by which a scheduler knows that it counts the steps
        def step_and_mix(*args, **kwargs):
            result = own_step(*args, **kwargs)
            if after_schedule:
                self._waiting = self.state.global_step + 1
            else:
                self.mixing.mix(self.state.global_step + 1)
            return result

        vars(step_and_mix)["mixes"] = True
        self.optimizer.step = step_and_mix
        if after_schedule:
            # The loop clears the gradients in every step, right after the scheduler's turn, whether that took it or not.
            model.after_zero_grad = self._exchange_what_waits

    def _end_exchanges(self) -> None:
        if hasattr(getattr(self.optimizer, "step", None), "mixes"):
            del self.optimizer.step

    def _exchange_what_waits(self) -> None:
        """*Collective.* The exchange of the optimizer's step that has just been made, if there was one."""
        step, self._waiting = self._waiting, None
        if step is None:
            return
        if not (self.mixing.repairs(step) and self._can_be_repaired()):
            self.mixing.mix(step)
            return
        batches = [self._batches_to_repair_on(member, step) for member in self.members]
        targets = self._targets(batches, step)
        self.mixing.mix(step)
        for member, own, target in zip(self.members, batches, targets, strict=True):
            with as_member(self, member):
                # Not compiled, since activations are looked at on the way.
                repair(member.model, target, own, forward=self._forward_without_labels)

    def _can_be_repaired(self) -> bool:
        """Whether a model has what is rescaled or measured anew; the same on every process."""
        model = self.population.members[0]
        return has_batch_norm(model) or any(_is_trained_convolution(module) for module in model.modules())

    # ---- What an average of whole models needs -----------------------------------------------------------------------

    def _batches_to_repair_on(self, member: Member, step: int) -> list:
        """A few batches of a member's own data, drawn from a stream of their own."""
        streams = self.population.streams
        with streams.use(None):
            before = streams.capture()
            try:
                offset = REPAIR_SEED_OFFSET + step * self.population.size + member.index
                set_seed((self.args.seed + offset) % 2**32)
                with as_member(self, member):
                    loader = MemberLoader.iterate_beside(self.get_train_dataloader(), step)
                    return list(itertools.islice(loader, REPAIR_BATCHES))
            finally:
                streams.restore(before)

    def _targets(self, batches: list[list], step: int) -> list[ChannelStatistics]:
        """*Collective.* For each local member the activations that the average which it becomes is to have."""
        found = []
        for member, own in zip(self.members, batches, strict=True):
            with as_member(self, member):
                measured = channel_statistics(member.model, own, forward=self._forward_without_labels)
            # What is frozen is shared among members, and the same in their average.
            trained = {name for name, module in member.model.named_modules() if _is_trained_convolution(module)}
            found.append(
                {name: tuple(part.cpu() for part in two) for name, two in measured.items() if name in trained}
            )
        everyone = self.population.gather(found)
        targets = []
        for index in self.population.indices:
            mean = mean_statistics([everyone[parent] for parent in self.mixing.parents(step, index)])
            targets.append(
                {name: (two[0].to(self.args.device), two[1].to(self.args.device)) for name, two in mean.items()}
            )
        return targets


def _is_trained_convolution(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.weight.requires_grad
