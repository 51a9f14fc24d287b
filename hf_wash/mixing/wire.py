"""
The one collective of a shuffle: for each pair of processes a header and, behind it, the bytes of the values that go
from members of the one to members of the other.

What the bytes are is `exchange.py`'s to say, and what follows from the headers `wash.py`'s.
"""

import math
import time
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist

# Its functions have the group of the moment in which it is imported as a default, and would keep that alive: see `Wire`.
# torch (2.15) imports it with the first optimizer, which is mostly too late.
import torch.distributed.nn.functional


# The words of a header, int64: digest of the plan, step, flags; then one bit for each member of the process, set if it
# gives a value that is not finite.
DIGEST, STEP, FLAGS, BAD = range(4)

# The bits of a header's flags: a stop is asked for; the optimizer's state is not what was announced; some of what is to
# be carried of it is missing.
STOP, STATE_CHANGED, MISSING = 1, 2, 4


class Wire:
    """
    The collective: one all-to-all of bytes, in which each pair of processes exchanges a header and values.

    Over gloo the receiver posts room for more than it expects, since a message larger than that makes gloo abort the
    process (torch 2.15), and processes whose plans differ are to find out by the header. What is sent is exactly the
    headers and the values.

    It does not keep the group alive: one that outlives `destroy_process_group` runs its threads until the interpreter
    ends, and then may abort the process (gloo in torch 2.15, when a thread frees the last collective's tensors).

    Args:
        group (`torch.distributed.ProcessGroup`):
            The processes.
        device (`torch.device`):
            Where the group's backend sends from.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self._group = weakref.ref(group)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.device = device
        self.on_host = device.type == "cpu"
        self.roomy = self.on_host and "gloo" in str(dist.get_backend(group))

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes; a `RuntimeError` once their group has been destroyed."""
        group = self._group()
        if group is None:
            raise RuntimeError("The process group of this population has been destroyed; its members cannot be mixed.")
        return group

    def exchange(
        self, received: torch.Tensor, sent: torch.Tensor, receive_sizes: list[int], send_sizes: list[int]
    ) -> float:
        """
        Sends every process its bytes, and receives the same.

        Args:
            received (`torch.Tensor`), sent (`torch.Tensor`):
                Bytes by process, uint8 of the shape of the sums of the sizes, on the wire's device.
            receive_sizes (`list[int]`), send_sizes (`list[int]`):
                How many bytes come from and go to each process; 0 for this one.

        Returns:
            `float`: The seconds spent in the collective.
        """
        before = time.perf_counter()
        dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=self.group)
        return time.perf_counter() - before


class Messages:
    """
    Where headers and values lie among the bytes that one shuffle sends and receives.

    Args:
        wire ([`Wire`]):
            The wire.
        header_bytes (`int`):
            The length of a header.
        loads (`Sequence[tuple[int, list[int], list[int]]]`):
            For each plane, the bytes of a value, and how many values go to and come from each process.
        room (`int`):
            How many bytes of values another process may send if its plan differs from this one's.

    Attributes:
        send_sizes (`list[int]`), receive_sizes (`list[int]`):
            The bytes for each process.
        headers_out (`dict[int, slice]`), headers_in (`dict[int, slice]`):
            Where the headers for and of the other processes are.
        values_out (`list[dict[int, slice]]`), values_in (`list[dict[int, slice]]`):
            For each plane, where the values for and of the other processes are.
    """

    def __init__(self, wire: Wire, header_bytes: int, loads: Sequence[tuple[int, list[int], list[int]]], room: int):
        others = [process for process in range(wire.size) if process != wire.rank]
        self.send_sizes, self.headers_out, self.values_out = self._messages(
            others, wire.size, header_bytes, [[width * n for n in sent] for width, sent, _ in loads], 0
        )
        # Eight bytes more or less are of no account, and the next message begins where its numbers can be read in place.
        enough = -(-(header_bytes + room) // 8) * 8 if wire.roomy else 0
        self.receive_sizes, self.headers_in, self.values_in = self._messages(
            others, wire.size, header_bytes, [[width * n for n in received] for width, _, received in loads], enough
        )

    @staticmethod
    def _messages(others: list[int], num_processes: int, header_bytes: int, lengths: list[list[int]], enough: int):
        sizes, headers, values = [0] * num_processes, {}, [{} for _ in lengths]
        start = 0
        for process in others:
            end = start + header_bytes
            headers[process] = slice(start, end)
            for places, by_process in zip(values, lengths, strict=True):
                places[process] = slice(end, end + by_process[process])
                end += by_process[process]
            sizes[process] = max(end - start, enough)
            start += sizes[process]
        return sizes, headers, values


def room_for_values(expected: float, num_local: int, width: int) -> int:
    """
    Bytes that hold what any plan of a run sends from one process to another.

    The number of values is a sum of independent counts of at most `num_local` each: twelve standard deviations and a
    constant for small means are more than any draw will ask for.

    Args:
        expected (`float`):
            The mean number of values.
        num_local (`int`):
            The number of members in each process.
        width (`int`):
            The bytes of a value.

    Returns:
        `int`: The room in bytes.
    """
    return width * math.ceil(expected + 12 * num_local * math.sqrt(expected) + 64 * num_local)
