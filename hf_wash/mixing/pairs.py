"""[`PairAverageMixer`]: at some steps each member becomes the mean of two random ones."""

import hashlib
import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .averaging import PeriodicAverageMixer
from .outcome import MixStats


class PairAverageMixer(PeriodicAverageMixer):
    """
    Each member becomes the mean of two random members, θ_n ← (θ_a + θ_b)/2, every so many steps: PAPA-2
    (Jolicoeur-Martineau et al. 2023, https://huggingface.co/papers/2304.03094, section 3).

    For each child a pair of different members is drawn, uniformly among all pairs, from (seed, step), the same on every
    process. (The published code draws among the first N pairs in lexicographic order only, so that of five children
    four have member 0 as a parent.) A process gets the parents that it needs, each once, and no others.

    Args:
        members (`torch.nn.Module` or `list[torch.nn.Module]`):
            As in [`AveragingMixer`].
        interval (`int`), first (`int`, *optional*), last (`int`, *optional*):
            As in [`PeriodicAverageMixer`].
        seed (`int`, *optional*, defaults to 0):
            Of the pairs.
        buffers (`bool`, *optional*, defaults to `True`):
            Whether floating-point buffers that are saved with the model are averaged, too.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            As in [`AveragingMixer`].

    Raises:
        ValueError: as [`PeriodicAverageMixer`].
    """

    def __init__(
        self,
        members: nn.Module | Sequence[nn.Module],
        *,
        interval: int,
        first: int | None = None,
        last: int | None = None,
        seed: int = 0,
        buffers: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ):
        self.seed = seed
        super().__init__(
            members, interval=interval, first=first, last=last, buffers=buffers, process_group=process_group
        )

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "seed": self.seed}

    def pairs(self, step: int) -> list[tuple[int, int]]:
        """
        The parents of each member.

        Args:
            step (`int`): The step of the exchange, from 1.

        Returns:
            `list[tuple[int, int]]`: For each of the N members a pair of different ones, the smaller index first.
        """
        every = list(itertools.combinations(range(self._num_members), 2))
        words = (hashlib.sha256(f"{self.seed} {step} {child}".encode()).digest() for child in range(self._num_members))
        return [every[int.from_bytes(word, "big") % len(every)] for word in words]

    def _exchange(self, step: int, stop: bool) -> MixStats:
        num_local, length = len(self._members), sum(self._sizes)
        problem, sizes = self._look_up(), self._sizes
        pairs, rank = self.pairs(step), self._members.start // num_local
        needed = [
            sorted({parent for pair in pairs[first : first + num_local] for parent in pair})
            for first in range(0, self._num_members, num_local)
        ]
        # The members as they were, own ones first and then those that come.
        coming = [parent for parent in needed[rank] if parent not in self._members]
        rows = [*self._members, *coming]
        room = self._bucket(len(rows) * length).view(len(rows), length)
        flat, fine = dict(zip(rows, room, strict=True)), []
        for row, own in zip(room, self._tensors if problem is None else (), strict=False):
            extremes = [room.new_zeros(())]
            for block in self._blocks(row):
                torch._foreach_copy_(block.parts, own[block.tensors])
                extremes += torch.aminmax(block.values)
            fine.append(not self._too_large(extremes))
        # Before anything travels, since with other steps other parents would.
        trailer = self._trailer(step, stop, torch.float64)
        trailer[-1] = problem is not None or not all(fine)
        trailer = trailer.to(self._device)
        waited = self._wait([self._reduce(trailer)])
        stop = self._judge(trailer, step, lambda: problem or self._finite())
        sent = self._sent(trailer)
        if self._group is not None:
            leaving = [
                [parent for parent in parents if parent in self._members and process != rank]
                for process, parents in enumerate(needed)
            ]
            rows_out = [flat[parent] for parents in leaving for parent in parents]
            outgoing = rows_out[0] if len(rows_out) == 1 else torch.cat([*rows_out, room.new_empty(0)])
            senders = [parent // num_local for parent in coming]
            began = time.perf_counter()
            dist.all_to_all_single(
                room[num_local:].view(-1),
                outgoing,
                [length * senders.count(process) for process in range(self._num_processes)],
                [length * len(parents) for parents in leaving],
                group=self._group,
            )
            waited += time.perf_counter() - began
            sent += outgoing.nbytes
        for index, own in zip(self._members, self._tensors, strict=True):
            parents = [flat[parent].split(sizes) for parent in pairs[index]]
            for tensor, *values in zip(own, *parents, strict=True):
                one, other = (part.view_as(tensor) for part in values)
                if tensor.dtype != self._dtype:
                    tensor.copy_(one.lerp(other, 0.5))
                elif index in pairs[index]:
                    tensor.lerp_(one if index == pairs[index][1] else other, 0.5)  # less memory to read
                else:
                    torch.lerp(one, other, 0.5, out=tensor)
        nbytes = sum(tensor.nbytes for own in self._tensors for tensor in own)
        return self._stats(length * num_local, nbytes, sent, stop, waited)
