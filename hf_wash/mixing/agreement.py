"""What the processes of a mixer must agree on before anything moves: who they are, and what their members look like."""

import torch.distributed as dist
from torch import nn

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


def architecture(model: nn.Module) -> list[tuple[str, str]]:
    """Each parameter's name, and what there is to say of it."""
    return [
        (plain_name(name), f"shape {tuple(p.shape)}, {p.dtype}, {'trainable' if p.requires_grad else 'frozen'}")
        for name, p in model.named_parameters()
    ]


def difference(expected: list[tuple[str, str]], found: list[tuple[str, str]]) -> str | None:
    """The first difference of two architectures, in words."""
    for (name, what), (other_name, other) in zip(expected, found, strict=False):
        if name != other_name:
            return f"has the parameter {other_name!r} where the other has {name!r}"
        if what != other:
            return f"has the parameter {name!r} with {other}, and the other with {what}"
    if len(expected) != len(found):
        longer, has = (expected, "lacks") if len(expected) > len(found) else (found, "has")
        return f"{has} the parameter {longer[min(len(expected), len(found))][0]!r}, unlike the other"
    return None


def unlike(member: int, other: int, difference: str | None) -> str:
    """That two members differ, in a sentence."""
    return f"Member {member} does not have the architecture of member {other}: it {difference}."


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
                return unlike(first, 0, difference(value, other[key])), ()
            return (
                f"Processes have to agree on the {key}: process 0 has {value!r} and process {process} {other[key]!r}.",
                (),
            )
    return None, common_layout([theirs for _, _, theirs in found])
