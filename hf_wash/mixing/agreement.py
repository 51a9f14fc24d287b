"""What the processes of a mixer must agree on before anything moves: who they are, and what their members look like."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..architecture import describe_architecture, unlike
from .memory import aligned, overlaps
from .optimizer_state import Layout, common_layout
from .schedule import plain_name, shuffled_layers


def processes(process_group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup | None, int, int]:
    """The group, or `None` where nothing needs to be sent, this process's rank in it, and its size."""
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError("A process_group was given, and torch.distributed is not initialised in this process.")
        return None, 0, 1
    group = dist.group.WORLD if process_group is None else process_group
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("This process is not in process_group, so it cannot host members of its population.")
    size = dist.get_world_size(group)
    return (group if size > 1 else None), rank, size


def architecture(model: nn.Module) -> list[tuple]:
    """What has to be alike in all members: their parameters, however they are compiled. Buffers are not touched."""
    names = {name for name, _ in model.named_parameters()}
    return [(plain_name(name), *told) for name, *told in describe_architecture(model) if name in names]


def averaged_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    The buffers that are averaged where a method averages buffers: floating-point ones that are saved with the model, as
    BatchNorm's statistics are. What is not saved follows from the configuration, as an attention mask does.
    """
    saved, found = model.state_dict().keys(), {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in saved and buffer.is_floating_point() and not any(buffer is other for other in found.values()):
            found[name] = buffer
    return found


def alike(buffers: Sequence[dict[str, torch.Tensor]], numbers: range) -> list[tuple]:
    """Names, shapes and dtypes of the members' averaged buffers. Raises a `ValueError` where they differ."""
    listings = [[(plain_name(name), tuple(b.shape), str(b.dtype)) for name, b in own.items()] for own in buffers]
    for number, theirs in zip(numbers, listings, strict=True):
        if problem := unlike(listings[0], theirs, numbers[0], number):
            raise ValueError(problem)
    return listings[0]


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a buffer, and the buffer's name there."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def check_members(members: Sequence[nn.Module], numbers: range) -> list[dict[str, nn.Parameter]]:
    """
    Check that this process's members can exchange weights.

    Args:
        members (`Sequence[torch.nn.Module]`):
            The members that this process hosts.
        numbers (`range`):
            Their places in the population.

    Returns:
        `list[dict[str, torch.nn.Parameter]]`: For each, the parameters that are exchanged by name, in the same order.

    Raises:
        ValueError: for no members, members that differ, a model without a trainable floating-point parameter, or a
            parameter that cannot be moved value by value.
    """
    if not members:
        raise ValueError("This process was given no members; every process needs at least one.")
    strange = next((each for each in members if not isinstance(each, nn.Module)), None)
    if strange is not None:
        raise ValueError(f"Each member must be a torch.nn.Module, found a {type(strange).__name__}.")
    architectures = [architecture(member) for member in members]
    for number, theirs in zip(numbers, architectures, strict=True):
        if problem := unlike(architectures[0], theirs, numbers[0], number):
            raise ValueError(problem)
    parameters = [
        {name: parameter for layer in shuffled_layers(member).values() for name, parameter in layer.items()}
        for member in members
    ]
    if not parameters[0]:
        raise ValueError(
            f"{type(members[0]).__name__} has no trainable floating-point parameter, so there is nothing to exchange."
        )
    owners: dict[int, int] = {}
    devices: dict[torch.device, str] = {}
    for number, own in zip(numbers, parameters, strict=True):
        for name, parameter in own.items():
            if owners.setdefault(id(parameter), number) != number:
                raise ValueError(
                    f"Members {owners[id(parameter)]} and {number} share the parameter {name!r}; each member needs "
                    f"its own (copy.deepcopy(model) makes one)."
                )
            if overlaps(parameter):
                raise ValueError(
                    f"Elements of the parameter {name!r} of member {number} share memory (it was expanded); "
                    f"make it contiguous first."
                )
            if not aligned(parameter):
                raise ValueError(
                    f"The parameter {name!r} of member {number} does not start at a multiple of its elements' size "
                    f"in memory; clone it first."
                )
            if type(parameter.data) is not torch.Tensor:
                raise ValueError(
                    f"The parameter {name!r} of member {number} is a {type(parameter.data).__name__}; only plain "
                    f"tensors can be exchanged."
                )
            devices.setdefault(parameter.device, f"{name!r} of member {number}")
    if len(devices) > 1:
        (first, one), (second, other), *_ = devices.items()
        raise ValueError(f"{one} is on {first} and {other} on {second}; one process needs them on one device.")
    return parameters


def agree(group: dist.ProcessGroup, error: str | None, description: dict, layout: Layout) -> tuple[str | None, Layout]:
    """Compares what the processes were given. Returns, the same on all, what is wrong, and the slots that all have."""
    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (error, description, layout), group=group)
    for process, (text, _, _) in enumerate(found):
        if text is not None:
            return (text if text == error else f"Process {process}: {text}"), ()
    reference = found[0][1]
    for process, (_, other, _) in enumerate(found):
        for key, value in reference.items():
            if other[key] == value:
                continue
            if key in ("architecture", "buffers that are averaged"):
                first = process * reference["number of members"]
                return unlike(value, other[key], 0, first), ()
            return (
                f"Processes have to agree on the {key}: process 0 has {value!r} and process {process} {other[key]!r}.",
                (),
            )
    return None, common_layout([theirs for _, _, theirs in found])
