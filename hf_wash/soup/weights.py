"""Where a member's weights come from: a module, a state dict or safetensors files, read one tensor at a time.

The averages themselves are in `uniform.py` and `greedy.py`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..architecture import first_difference
from ..files import is_file


# The names of the safetensors format for the element types that torch has, too.
_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Pickles that the Trainer writes beside a model.
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")

# In the order in which the loaders of the ecosystem look for them.
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


class WeightSource:
    """
    The named tensors of one member, each read when it is asked for.

    Args:
        description (`str`):
            What the member is called in an error message.
        specs (`dict[str, tuple]`):
            For each name, in order, the tensor's shape and dtype. The value's type for what is not a tensor
            (a module's extra state).
        ties (`dict[str, str]`):
            Names whose tensor is the very memory of an earlier name, mapped to that earlier name.
    """

    def __init__(self, description: str, specs: dict[str, tuple], ties: dict[str, str]):
        self.description = description
        self.specs = specs
        self.ties = ties

    def read(self, name: str, rows: slice | None = None) -> Any:
        """The value called `name`, or these rows of it. It may be the member's own memory: not to be written to."""
        raise NotImplementedError

    def first_not_finite(self) -> str | None:
        """The name of the first tensor that holds NaN or infinite values; `None` if there is none."""
        names = (name for name in self.specs if name not in self.ties)
        return next((name for name in names if not is_finite(self.read(name))), None)

    def read_all(self) -> dict[str, Any]:
        """The whole state dict, for who needs all of it at once."""
        return {name: self.read(name) for name in self.specs}


class _StateDictSource(WeightSource):
    def __init__(self, description: str, state_dict: Mapping[str, Any]):
        self._state_dict = state_dict
        specs: dict[str, tuple] = {}
        ties: dict[str, str] = {}
        owner: dict[tuple, str] = {}
        for name, value in state_dict.items():
            if not isinstance(value, torch.Tensor):
                specs[name] = (type(value),)
                continue
            if value.is_meta:
                raise ValueError(f"'{name}' of {description} is on the meta device, so it has no values to average.")
            specs[name] = (tuple(value.shape), value.dtype)
            if value.numel() == 0:
                continue  # empty tensors all share the null address without being tied
            memory = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            if memory in owner:
                ties[name] = owner[memory]
            else:
                owner[memory] = name
        super().__init__(description, specs, ties)

    def read(self, name: str, rows: slice | None = None) -> Any:
        value = self._state_dict[name]
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach() if rows is None else value.detach()[rows]


class _SafetensorsSource(WeightSource):
    def __init__(self, description: str, files: list[Path]):
        self._file_of: dict[str, Path] = {}
        specs: dict[str, tuple] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as weights:
                    names = weights.keys()
                    for name in names:
                        part = weights.get_slice(name)
                        dtype = _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype())
                        specs[name] = (tuple(part.get_shape()), dtype)
                        self._file_of[name] = file
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read as safetensors: {error}.") from error
        if not specs:
            raise ValueError(f"{', '.join(map(str, files))} holds no tensors.")
        # A file keeps its tensors by size, its reader sorts them by name: give all files of one model one order.
        super().__init__(description, dict(sorted(specs.items())), {})

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        # Opened anew for each tensor: a file that stays open keeps every page that was ever touched resident, and a
        # soup of many members would slowly take the memory of all of them.
        file = self._file_of[name]
        try:
            with safe_open(file, framework="pt") as weights:
                return weights.get_tensor(name) if rows is None else weights.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:  # a type that this torch does not have, a file that has changed
            raise ValueError(f"'{name}' cannot be read from {file}: {error}.") from error


def find_weight_files(path: str | Path) -> list[Path]:
    """
    The safetensors files that hold the weights of a model folder.

    Args:
        path (`str` or `Path`):
            A folder with `model.safetensors`, its sharded form, `adapter_model.safetensors` or one other safetensors
            file; or such a file itself.

    Returns:
        `list[Path]`: one file, or the shards.

    Raises:
        ValueError: if nothing is there, nothing but pickles or no ordinary file, or if an index names a file outside
            of its folder.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(_not_safetensors(path, [path.name]))
        return [path]
    if not path.is_dir():
        raise ValueError(f"There is no folder or file {path}; download a repository of the Hub before averaging it.")
    for name in _WEIGHT_FILES:
        file = path / name
        if not is_file(file):
            continue
        if file.suffix == ".safetensors":
            return [file]
        return [path / shard for shard in _shards_of(file)]
    others = [file for file in sorted(path.glob("*.safetensors")) if is_file(file)]
    if len(others) == 1:
        return others
    if others:
        names = ", ".join(file.name for file in others)
        raise ValueError(
            f"{path} holds several safetensors files and no model.safetensors: {names}; name one of them."
        )
    pickles = sorted(
        file.name for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES and file.name not in _NO_WEIGHTS
    )
    if pickles:
        raise ValueError(_not_safetensors(path, pickles))
    raise ValueError(f"{path} holds no weights: expected model.safetensors in it.")


def _shards_of(index: Path) -> list[str]:
    """The files that an index of shards lists, which must lie beside it."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards: {error}.") from error
    for shard in shards or [None]:
        if not isinstance(shard, str) or "\0" in shard or shard in ("", ".", ".."):
            raise ValueError(f"{index} is not an index of safetensors shards: it lists {shard!r}.")
        # By its name: what is downloaded from the Hub lies elsewhere, and links of this folder lead to it.
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise ValueError(f"{index} lists {shard}, outside of its folder: that is not read.")
        if not is_file(index.parent / shard):
            raise ValueError(f"{index} lists {shard}, which is not there.")
    return shards


def _not_safetensors(path: Path, names: list[str]) -> str:
    return (
        f"{path} holds its weights as a pickle only ({', '.join(names)}), and loading a pickle can run any code in it: "
        "save the model as safetensors first."
    )


def check_modules_finite(members: Sequence[nn.Module]) -> None:
    """As [`check_finite`], of models whose weights may lie where they cannot be read: those are passed over."""
    states = (
        {name: v for name, v in member.state_dict().items() if not getattr(v, "is_meta", False)} for member in members
    )
    check_finite(open_member(state, index) for index, state in enumerate(states))


def open_member(member: "nn.Module | Mapping[str, Any] | str | Path", index: int) -> WeightSource:
    """
    Opens a member without reading its values.

    Args:
        member (`torch.nn.Module`, `Mapping` or path):
            A model, a state dict, or the path of a model folder or safetensors file.
        index (`int`):
            Its place among the members, for error messages.

    Raises:
        ValueError: if it is none of these, or the path holds no safetensors.
    """
    if isinstance(member, nn.Module):
        return _StateDictSource(f"member {index}", member.state_dict())
    if isinstance(member, Mapping):
        return _StateDictSource(f"member {index}", member)
    if isinstance(member, (str, Path)):
        return _SafetensorsSource(f"member {index} ({member})", find_weight_files(member))
    raise ValueError(
        f"Member {index} is a {type(member).__name__}; expected a torch.nn.Module, a state dict, or the path of a "
        "folder or safetensors file."
    )


def check_alike(reference: WeightSource, other: WeightSource, prefix: str | None = None) -> None:
    """
    Checks that two members have the same tensors.

    Args:
        reference, other ([`WeightSource`]):
            What is compared.
        prefix (`str`, *optional*):
            How the error begins. That the two cannot be averaged, if not given.

    Raises:
        ValueError: naming the first tensor whose presence, shape or dtype differs.
    """
    if prefix is None:
        prefix = f"{other.description} cannot be averaged with {reference.description}:"
        prefix = prefix[0].upper() + prefix[1:]
    ours, theirs = ([(name, *spec) for name, spec in source.specs.items()] for source in (reference, other))
    difference = first_difference(ours, theirs, reference.description, other.description, in_order=False)
    if difference is not None:
        raise ValueError(f"{prefix} {difference}.")


def is_finite(value: Any) -> bool:
    """
    Whether a tensor holds neither NaN nor infinite values, in one pass that takes no memory. What has no floating-point
    values is finite; so is a causal mask, as some models keep it in a buffer, which is made of 0 and -inf alone.
    """
    if not isinstance(value, torch.Tensor) or not value.numel():
        return True
    value = value.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if not value.is_floating_point():
        return True
    if value.element_size() == 1:
        value = value.float()  # torch has no minimum of 8-bit floats (2.15)
    low, high = torch.stack(torch.aminmax(value)).tolist()
    if math.isfinite(low) and math.isfinite(high):
        return True
    return (low, high) == (-math.inf, 0.0) and bool(((value == 0) | (value == low)).all())


def check_finite(sources: Iterable[WeightSource]) -> None:
    """
    Raises:
        ValueError: naming the members that hold NaN or infinite values, and for each the first such tensor.
    """
    found = [(source.description, name) for source in sources if (name := source.first_not_finite()) is not None]
    if found:
        raise ValueError(not_finite(found))


def not_finite(found: Sequence[tuple[str, str]]) -> str:
    """The error for members (their descriptions, and a tensor of each) that cannot be in a soup."""
    listing = ", ".join(f"{description} holds NaN or infinite values in '{name}'" for description, name in found)
    return f"{listing[0].upper()}{listing[1:]}, and so would their average: leave {'it' if len(found) == 1 else 'them'} out."


def check_is_a_collection(members: Any) -> None:
    """
    Refuses what can be iterated over but is one model, not several.

    Raises:
        ValueError: if `members` is a path, a state dict, a tensor or a model.
    """
    one_model = isinstance(members, (str, Path, Mapping, torch.Tensor)) or (
        isinstance(members, nn.Module) and not isinstance(members, nn.ModuleList)
    )
    if one_model or not hasattr(members, "__iter__"):
        raise ValueError(f"A soup is made of several members: pass a list of them, not one {type(members).__name__}.")
