"""
[`Population`]: which member lives in which process, and the collectives over members.

Knows torch and NumPy; it does not know how members are trained, mixed or evaluated.
"""

import copy
import functools
import types
from collections.abc import Callable, Collection, ItemsView, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .failures import known_to_all
from .streams import RandomStreams


class Population:
    """
    The members of a run and where they live. N members are dealt to W processes in blocks: process r holds the
    members r·N/W to (r + 1)·N/W − 1.

    Every method that says *collective* must be called on every process.

    Args:
        size (`int`): Number of members N.
        device (`torch.device`): Where the members compute.
        rank (`int`, *optional*, defaults to 0): This process.
        world_size (`int`, *optional*, defaults to 1): Number of processes W.

    Attributes:
        members (`list[nn.Module]`): This process's members.
        indices (`range`): Their indices in the population.
        streams ([`RandomStreams`]): Their random streams.

    Raises:
        ValueError: if N does not divide among the processes; the message lists what would.
    """

    def __init__(self, size: int, device: torch.device, rank: int = 0, world_size: int = 1):
        if size % world_size:
            divisors = [n for n in range(1, size + 1) if size % n == 0]
            raise ValueError(
                f"A population of {size} does not divide among {world_size} processes: each process hosts equally many "
                f"members. With {world_size} processes, use a population of "
                f"{', '.join(str(world_size * n) for n in (1, 2, 3))}, ...; for a population of {size}, launch "
                f"{', '.join(map(str, divisors))} processes."
            )
        self.size = size
        self.device = device
        self.rank = rank
        self.world_size = world_size
        self.per_process = size // world_size
        self.indices = range(rank * self.per_process, (rank + 1) * self.per_process)
        self.members: list[nn.Module] = []
        self._wholes: list[nn.Module] | None = None
        self.streams = RandomStreams(device)

    def owner(self, index: int) -> int:
        """The process that hosts member `index`."""
        return index // self.per_process

    def add(self, member: nn.Module, stream: dict) -> None:
        """Append the next local member, with the state its random streams start in."""
        self.streams.set_state(self.indices[len(self.members)], stream)
        self.members.append(member)

    @property
    def wholes(self) -> list[nn.Module]:
        """All that learns of each local member: its model, and what else was said to learn with it."""
        return self.members if self._wholes is None else self._wholes

    @wholes.setter
    def wholes(self, wholes: list[nn.Module]) -> None:
        self._wholes = wholes

    def __iter__(self) -> Iterator[tuple[int, nn.Module]]:
        """This process's members with their indices in the population."""
        return zip(self.indices, self.members, strict=True)

    # ---- Collectives -------------------------------------------------------------------------------------------

    def gather(self, local: Sequence) -> list:
        """
        *Collective.* One object for each member, on every process.

        Args:
            local (`Sequence`): One object for each of this process's members, in order. Small: they are pickled.

        Returns:
            `list`: N objects, in member order.
        """
        return [item for part in self.gather_processes(list(local)) for item in part]

    def gather_processes(self, value) -> list:
        """*Collective.* `value` of every process, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        parts: list = [None] * self.world_size
        dist.all_gather_object(parts, value)
        return parts

    def try_together(
        self, work: Callable[[], Any], tell: Callable[[Exception], Any]
    ) -> tuple[list[tuple[Any, Any]], Exception | None]:
        """
        *Collective.* Try what may fail on one process alone.

        Args:
            work (`Callable`): What this process has to do.
            tell (`Callable`): What the others hear of its error.

        Returns:
            `tuple`: For each process, in the order of their ranks, what its `work` returned and what it tells of its
            error, `None` for either; and this process's error, if any.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # whatever it was, the others must hear of it instead of waiting
            error = caught
        return self.gather_processes((result, None if error is None else tell(error))), error

    def do_together(
        self, what: str, work: Callable[[], Any], clean_up: Callable[[], None] = lambda: None, advice: str = ""
    ) -> list:
        """
        *Collective.* Do what may fail on one process alone, so that no other one waits for it.

        Args:
            what (`str`): What is done, for the message.
            work (`Callable`): What this process has to do.
            clean_up (`Callable`, *optional*): Called on every process before the error is raised.
            advice (`str`, *optional*): What to do then, for the message.

        Returns:
            `list`: What each process's `work` returned, in the order of their ranks. Small: it is pickled.

        Raises:
            RuntimeError: on every process, if it failed on any, with that process's reason.
        """
        outcomes, error = self.try_together(work, lambda error: f"{type(error).__name__}: {error}")
        failures = [f"process {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text is not None]
        if failures:
            clean_up()
            said = f"{what} failed ({'; '.join(failures)}). {advice}".rstrip()
            raise known_to_all(RuntimeError(said)) from error
        return [value for value, _ in outcomes]

    def broadcast(self, value, source: int = 0):
        """*Collective.* Process `source`'s `value` (a small object), on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, device=self.device if dist.get_backend() == "nccl" else None)
        return box[0]

    def gather_tensors(self, local: torch.Tensor) -> torch.Tensor:
        """
        *Collective.* A tensor for each member, on every process.

        Args:
            local (`torch.Tensor` of shape `(members of this process, ...)`): Equal shapes on all processes.

        Returns:
            `torch.Tensor` of shape `(N, ...)`, in member order.
        """
        if self.world_size == 1:
            return local
        local = local.contiguous()
        parts = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(parts, local)
        return torch.cat(parts)

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor], source: int = 0) -> None:
        """*Collective.* Overwrite `tensors` on every process with those of process `source`."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            # A non-contiguous tensor would be received into a copy.
            flat = tensor.contiguous()
            dist.broadcast(flat, src=source)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat)

    def state_dicts(
        self, exclude: Collection[str] = (), indices: Iterable[int] | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """
        *Collective.* Each member's state dict on every process, one after the other in member order, so that a sum
        over members is the same on every layout. What one step yields is overwritten by the next.

        Args:
            exclude (`Collection[str]`, *optional*): Names to leave out, because all members share them.
            indices (`Iterable[int]`, *optional*): Of which members. Of all, if not given.
        """

        def tensors_of(member: nn.Module) -> dict[str, torch.Tensor]:
            return {name: value for name, value in member.state_dict().items() if name not in exclude}

        template = tensors_of(self.wholes[0])
        received: dict[str, torch.Tensor] | None = None
        for index in indices if indices is not None else range(self.size):
            source = self.owner(index)
            if source == self.rank:
                state = tensors_of(self.wholes[index - self.indices[0]])
                self.broadcast_tensors(list(state.values()), source)
            else:
                if received is None:
                    received = {name: torch.empty_like(value) for name, value in template.items()}
                self.broadcast_tensors(list(received.values()), source)
                state = received
            yield state

    def weights_of(self, index: int, exclude: Collection[str] = ()) -> "MemberWeights":
        """Member `index`'s state dict on every process, tensor by tensor as it is read: see [`MemberWeights`]."""
        return MemberWeights(self, index, exclude)


class MemberWeights(Mapping[str, torch.Tensor]):
    """
    A member's state dict that any process can read. *Reading a value is collective*: all processes must read the same
    names of the same member in the same order, which they do when they run the same function. Nothing is kept, so
    members of other processes cost no memory.
    """

    def __init__(self, population: Population, index: int, exclude: Collection[str] = ()):
        self._population, self._source = population, population.owner(index)
        local = population.wholes[index - population.indices[0]] if index in population.indices else None
        template = (local if local is not None else population.wholes[0]).state_dict()
        self._is_local = local is not None
        self._tensors = {name: value for name, value in template.items() if name not in exclude}

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._tensors[name]
        if self._population.world_size == 1:
            return value
        value = value if self._is_local else torch.empty_like(value)
        self._population.broadcast_tensors([value], self._source)
        return value

    def items(self) -> ItemsView[str, torch.Tensor]:
        """
        Names, shapes, dtypes and ties, without communication: where the member lives elsewhere the values are those of
        a local one.
        """
        return self._tensors.items()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def copy_member(model: nn.Module, share: bool = True) -> nn.Module:
    """
    A member of its own that shares what is frozen: N heads or N adapters then cost one backbone.

    Only parameters are shared; a frozen BatchNorm still has running statistics that its member updates. A forward that
    somebody has put in the place of the class's, and that calls the original's, calls the copy's.

    Args:
        model (`nn.Module`): The model.
        share (`bool`, *optional*, defaults to `True`): Whether frozen parameters are shared, or copied as well.

    Raises:
        ValueError: for a model that holds what cannot be copied, such as a lock or an open file.
    """
    copies: dict[int, Any] = {id(p): p for p in model.parameters() if share and not p.requires_grad}
    made = _deep_copy(model, copies)
    for module in made.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, (types.MethodType, types.FunctionType)):
                vars(module)[name] = _of_the_copy(value, copies)
    return made


def check_can_be_copied(model: nn.Module) -> None:
    """
    Find out early, at no cost in memory, that [`copy_member`] will not work.

    Raises:
        ValueError: as [`copy_member`].
    """
    _deep_copy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _deep_copy(model: nn.Module, copies: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, copies)
    except Exception as error:  # whatever an attribute does
        raise ValueError(
            f"`{type(model).__name__}` cannot be copied, as the soup and members have to be: {error}."
        ) from error


def _of_the_copy(value: Any, copies: dict[int, Any]) -> Any:
    """A function whose closure holds the copies in the place of the originals, which `deepcopy` leaves in it."""
    if isinstance(value, types.MethodType):
        own = copies.get(id(value.__self__), value.__self__)
        return types.MethodType(_of_the_copy(value.__func__, copies), own)
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if not isinstance(value, types.FunctionType) or not value.__closure__:
        return value
    cells, changed = [], False
    for cell in value.__closure__:
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            cells.append(cell)
            continue
        own = content if content is value else _of_the_copy(content, copies)
        changed = changed or (own is not content and own != content)
        cells.append(types.CellType(own))
    if not changed:
        return value
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
    made.__kwdefaults__ = value.__kwdefaults__
    return functools.update_wrapper(made, value, updated=("__dict__",))


def grow_buffers(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give `model` buffers of the shapes that `tensors` have: some grow while training."""
    for name, buffer in list(model.named_buffers()):
        value = tensors.get(name)
        if value is not None and value.shape != buffer.shape:
            module, _, last = name.rpartition(".")
            setattr(model.get_submodule(module), last, value.to(buffer.device, buffer.dtype, copy=True))


def share_frozen(member: nn.Module, first: nn.Module) -> None:
    """Make `member` use `first`'s frozen parameters where the values are equal."""
    theirs = dict(first.named_parameters())
    for module_name, module in member.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.requires_grad:
                continue
            other = theirs.get(f"{module_name}.{name}" if module_name else name)
            if other is not None and not other.requires_grad and torch.equal(other, parameter):
                module._parameters[name] = other
