"""
What a model is made of, and how two differ: whether their weights can be exchanged or averaged. Below all rooms; knows
torch only.
"""

from collections.abc import Sequence

from torch import nn


# For each tensor its name and what is told of it, in this order; a listing may tell less.
Architecture = Sequence[tuple]
TOLD = ("shape", "dtype", "requires_grad")


def describe_architecture(model: nn.Module) -> list[tuple[str, tuple[int, ...], str, bool]]:
    """Each parameter's name, shape, dtype and whether it is trained, and each buffer's name, shape and dtype."""
    parameters = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    return parameters + [(name, tuple(b.shape), str(b.dtype), False) for name, b in model.named_buffers()]


def first_difference(
    ours: Architecture, theirs: Architecture, us: str, them: str, in_order: bool = True
) -> str | None:
    """
    The first difference of two architectures.

    Args:
        ours, theirs (`Sequence[tuple]`):
            As of [`describe_architecture`].
        us, them (`str`):
            What they are called.
        in_order (`bool`, *optional*, defaults to `True`):
            Whether the order of the tensors counts. It does where they are dealt with by their place.

    Returns:
        `str`, *optional*: A sentence without its full stop; `None` if there is no difference.
    """
    here, there = ({name: told for name, *told in listing} for listing in (ours, theirs))
    for place, (name, told) in enumerate(here.items()):
        other = theirs[place][0] if in_order and place < len(theirs) else name
        if other != name:
            return f"{other!r} of {them} stands where {us} has {name!r}"
        if name not in there:
            return f"{name!r} is missing in {them}"
        for what, own, others in zip(TOLD, told, there[name], strict=False):
            if own != others:
                return f"{name!r} has {what} {others} in {them} and {own} in {us}"
    missing = next((name for name in there if name not in here), None)
    return f"{missing!r} is missing in {us}" if missing is not None else None


def unlike(ours: Architecture, theirs: Architecture, first: int, other: int) -> str | None:
    """That two members, known by their numbers, differ, and in what: a sentence. `None` if they do not."""
    difference = first_difference(ours, theirs, f"member {first}", f"member {other}")
    return f"Member {other} does not have the architecture of member {first}: {difference}." if difference else None
