"""
Each member's own view of the training data.

A member's loader yields, batch for batch and draw for draw, what a plain one-process Trainer's would. What is done
with a batch is the trainer's business.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderShard, SeedableRandomSampler, skip_first_batches
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, Subset
from transformers.trainer_utils import has_length

from ..population import Population


class MemberLoader:
    """
    Iterates over one member's data loader as the Trainer does over its own: one batch ahead where the loader is
    Accelerate's, which reads ahead, batch by batch where it is another. With augmentation and dropout drawing from one
    stream, another order of draws would be another run.

    All methods are called with the member's streams active.

    Args:
        dataloader (`DataLoader`): What the Trainer would train on.
        member (`int`): The member's index.
        population ([`Population`]): Whose streams batches are drawn from.
        non_blocking (`bool`, *optional*, defaults to `False`): How batches are copied to the device.
    """

    def __init__(self, dataloader: Any, member: int, population: Population, non_blocking: bool = False):
        self.dataloader = dataloader
        self.member = member
        self._streams = population.streams
        self._device = population.device
        self._non_blocking = non_blocking
        self._reads_ahead = isinstance(dataloader, DataLoaderShard)
        self._iterator: Iterator = iter(())
        self._upcoming: Any = None
        self._is_drawn = False
        # Where the streams stood when the epoch began, and before the batch that waits was drawn: what it takes to
        # draw that batch again.
        self._epoch_start: dict | None = None
        self._before_upcoming: dict | None = None
        self._ended = False

    def start(self, epoch: int) -> None:
        """Begin an epoch and, where the loader reads ahead, draw its first batch."""
        self._epoch_start = self._streams.capture()
        self._iterator = self.iterate(self.dataloader, epoch)
        self._forget()
        if self._reads_ahead:
            self._draw()

    def resume(self, epoch: int, position: int, state: dict) -> None:
        """
        Go on in the middle of an epoch.

        Args:
            epoch (`int`): The epoch.
            position (`int`): Batches of it that have been trained on.
            state (`dict`): From [`state`], at that position.
        """
        self._streams.restore(state["epoch_start"])
        self._epoch_start = state["epoch_start"]
        replay = not self._can_skip()
        loader = self.dataloader if replay else skip_first_batches(self.dataloader, position)
        self._iterator = self.iterate(loader, epoch)
        if replay:
            # What depends on all that has been drawn before is drawn again.
            for _ in range(position):
                next(self._iterator)
        self._forget()
        if state["before_upcoming"] is not None:
            self._streams.restore(state["before_upcoming"])
            self._draw()

    def _can_skip(self) -> bool:
        """Whether batches can be passed over: workers draw from streams of their own, some samplers from the member's."""
        if not self._reads_ahead or isinstance(self.dataloader.dataset, IterableDataset):
            return False
        sampler = self.dataloader.get_sampler()
        return self.dataloader.num_workers == 0 and isinstance(sampler, (SeedableRandomSampler, SequentialSampler))

    @staticmethod
    def iterate(dataloader: Any, epoch: int) -> Iterator:
        """An iterator over a loader, in the order of an epoch, that does not read ahead."""
        if hasattr(dataloader, "set_epoch"):
            dataloader.set_epoch(epoch)
        return MemberLoader.iterate_beside(dataloader, epoch)

    @staticmethod
    def iterate_beside(dataloader: Any, epoch: int) -> Iterator:
        """As `iterate`, for a loader that is made beside the one in use: the data set, which is the same, is told nothing."""
        # As Trainer does: Accelerate's `set_epoch` does not reach the sampler of a wrapped batch sampler.
        sampler: Any = getattr(getattr(dataloader, "batch_sampler", None), "batch_sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        # The base loader: Accelerate's own iteration would read ahead a second time.
        return iter(getattr(dataloader, "base_dataloader", dataloader))

    def _forget(self) -> None:
        self._upcoming, self._is_drawn, self._ended, self._before_upcoming = None, False, False, None

    def _draw(self) -> None:
        if self._reads_ahead:
            self._before_upcoming = self._streams.capture()
        try:
            self._upcoming = next(self._iterator)
        except StopIteration:
            self._upcoming, self._ended = None, True
        self._is_drawn = True

    @property
    def exhausted(self) -> bool:
        """Whether the epoch has no further batch."""
        if not self._is_drawn:
            self._draw()
        return self._ended

    def next(self) -> Any:
        """The next batch, on the device. Only if not `exhausted`."""
        batch = send_to_device(self._upcoming, self._device, non_blocking=self._non_blocking)
        self._upcoming, self._is_drawn = None, False
        if self._reads_ahead:
            self._draw()
        return batch

    def state(self) -> dict:
        """What [`resume`] needs, beside the position."""
        return {"epoch_start": self._epoch_start, "before_upcoming": self._before_upcoming}


class MembersLoader(DataLoader):
    """The loader the Trainer iterates over: a list of batches at a time, one for each local member."""

    dataset: "MemberBatches"

    @property
    def total_batch_size(self) -> int | None:
        """Examples in a batch of one member, as Accelerate's loaders have it."""
        loader = self.dataset.loaders[0].dataloader
        return getattr(loader, "total_batch_size", getattr(loader, "batch_size", None))


class MemberBatches(IterableDataset):
    """
    The batches of all of this process's members: each item is a list with one batch for each local member.

    The Trainer gets it as the data set of a plain [`~torch.utils.data.DataLoader`], because that is what the Trainer
    can skip batches of when it resumes: it discards as many items as have been trained on, which are placeholders
    here, since what the members resume with is theirs to know.

    Args:
        loaders (`list[MemberLoader]`): One for each local member.
        population ([`Population`]): The members.
    """

    def __init__(self, loaders: list[MemberLoader], population: Population):
        self.loaders = loaders
        self.population = population
        self.epoch = 0
        self.position = 0
        self._resume: dict | None = None
        self._epochs_before = 0

    @property
    def sized(self) -> bool:
        """Whether the number of batches in an epoch is known."""
        return all(has_length(loader.dataloader) for loader in self.loaders)

    def __len__(self) -> int:
        # TypeError, from the loader, for a stream: that is how `has_length` finds out.
        return min(len(loader.dataloader) for loader in self.loaders)

    def set_epoch(self, epoch: int) -> None:
        """The Trainer's count of epochs, for the next iteration."""
        self.epoch = epoch + self._epochs_before

    def resume_at(self, trainer_epoch: int, placeholders: int, saved: dict, states: list[dict]) -> None:
        """
        Make the next iteration go on where a checkpoint was written.

        Args:
            trainer_epoch (`int`): The epoch the Trainer believes it is in. It counts a stream that has been read
                several times as one epoch.
            placeholders (`int`): Items the Trainer will discard.
            saved (`dict`): `epoch` and `position` of these batches when the checkpoint was written.
            states (`list[dict]`): For each local member, its loader's state (`loader`) and its streams' (`streams`).
        """
        self._epochs_before = saved["epoch"] - trainer_epoch if saved["position"] and placeholders else 0
        self._resume = {"placeholders": placeholders, "position": saved["position"], "states": states}

    def as_dataloader(self) -> MembersLoader:
        """The loader the Trainer iterates over. Its own generator keeps its seed draw out of the members' streams."""
        return MembersLoader(self, batch_size=None, collate_fn=_unchanged, generator=torch.Generator())

    def __iter__(self) -> Iterator[list | None]:
        streams = self.population.streams
        resume, self._resume = self._resume, None
        midway = resume if resume is not None and resume["placeholders"] > 0 else None
        self.position = midway["position"] if midway is not None else 0
        for slot, loader in enumerate(self.loaders):
            streams.activate(loader.member)
            if midway is not None:
                loader.resume(self.epoch, self.position, midway["states"][slot]["loader"])
            if resume is not None:
                streams.restore(resume["states"][slot]["streams"])
            if midway is None:
                loader.start(self.epoch)
        if midway is not None:
            yield from itertools.repeat(None, midway["placeholders"])
        while not self._any_exhausted():
            batches = []
            for loader in self.loaders:
                streams.activate(loader.member)
                batches.append(loader.next())
            self.position += 1
            yield batches

    def _any_exhausted(self) -> bool:
        exhausted = False
        for loader in self.loaders:
            self.population.streams.activate(loader.member)
            exhausted = loader.exhausted or exhausted
        if self.sized or self.population.world_size == 1:
            return exhausted
        # Streams may end at different steps on different processes. An epoch ends for all when it ends for one, or
        # the others would wait for it at the next shuffle.
        flag = torch.tensor([float(exhausted)], device=self.population.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def _unchanged(batches: list) -> list:
    return batches


def shard_for_member(dataset: Any, member: int, size: int) -> Any:
    """
    The part of `dataset` that member `member` of `size` trains on with `member_data="shard"`: every `size`-th example,
    the same number for each member (up to `size` − 1 examples are left out), so that all take the same steps.

    Raises:
        ValueError: for a stream that cannot be split evenly, or fewer examples than members.
    """
    if isinstance(dataset, IterableDataset):
        shards: int = getattr(dataset, "num_shards", 0) or getattr(dataset, "n_shards", 1)
        if not hasattr(dataset, "shard") or shards % size:
            raise ValueError(
                f'`member_data="shard"` splits a stream by its shards, and {shards} shard(s) do not divide among '
                f"{size} members. Give each member its own stream with `MemberOverrides(train_dataset=...)`."
            )
        return dataset.shard(num_shards=size, index=member)
    count = len(dataset) // size
    if count == 0:
        raise ValueError(f'`member_data="shard"`: {len(dataset)} examples cannot be dealt to {size} members.')
    return _choose(dataset, range(member, member + count * size, size))


def hold_out(dataset: Any, part: float, seed: int) -> tuple[Any, Any]:
    """
    Split a training set in two by a random choice of examples, the same on every process.

    Args:
        dataset: Indexable, with a length: of torch, of `datasets`, a list.
        part (`float`): The part that is held out, in (0, 1); at least one example.
        seed (`int`): Of the choice.

    Returns:
        `tuple`: What is left to train on, and what is held out.

    Raises:
        ValueError: for a stream, and if nothing would be left.
    """
    if isinstance(dataset, IterableDataset) or not has_length(dataset):
        raise ValueError("A part of a stream cannot be held out: `soup='greedy'` needs a training set with a length.")
    count = max(1, round(part * len(dataset)))
    if count >= len(dataset):
        raise ValueError(f"Holding out {count} of {len(dataset)} examples leaves none to train on.")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return _choose(dataset, sorted(order[count:])), _choose(dataset, sorted(order[:count]))


def _choose(dataset: Any, indices: Sequence[int]) -> Any:
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)


def has_labels(batch: Any, names: list[str]) -> bool:
    """Whether a batch has labels, as far as that can be told."""
    return any(batch.get(name) is not None for name in names) if hasattr(batch, "get") else True


def how_many(data: Any) -> Any:
    """The number of examples, by name where there are several sets."""
    if isinstance(data, Mapping):
        return {name: how_many(part) for name, part in data.items()}
    if data is None:
        return "no data set"
    return len(data) if has_length(data) else "a stream"
