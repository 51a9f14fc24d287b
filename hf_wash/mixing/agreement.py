"""What the processes of a mixer must agree on before anything moves: who they are, and what their members look like."""

import torch.distributed as dist
from torch import nn

from ..architecture import describe_architecture, unlike
from .optimizer_state import Layout, common_layout
from .schedule import plain_name


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
            if key == "architecture":
                first = process * reference["number of members"]
                return unlike(value, other[key], 0, first), ()
            return (
                f"Processes have to agree on the {key}: process 0 has {value!r} and process {process} {other[key]!r}.",
                (),
            )
    return None, common_layout([theirs for _, _, theirs in found])
