"""
[`Member`]: what belongs to one member of this process, and [`as_member`], the one place where a Trainer is made to see
a member in the place of its one model.

What a member trains on lies in `data`, how members exchange weights in `mixing_run`.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker


class MemberAccelerator:
    """
    An accelerator of a member's own processes: today one. What a Trainer gathers, reduces or deals out stays with the
    member; everything else is the real accelerator's.

    Args:
        accelerator (`accelerate.Accelerator`): The one of this process.
        data_seed (`int`, *optional*): The seed of a loader's sampler; `None` takes that of torch's global generator.
    """

    num_processes, process_index, local_process_index = 1, 0, 0
    is_main_process = is_local_main_process = is_last_process = True
    use_distributed = False

    def __init__(self, accelerator: Accelerator, data_seed: int | None = None):
        self._accelerator, self._data_seed = accelerator, data_seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Any) -> Any:
        """The member's own values: nothing is sent."""
        return tensor

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As of one process: the padding of a last batch is cut off, nothing is sent."""
        if use_gather_object:
            return input_data if isinstance(input_data, list) else [input_data]
        return Accelerator.gather_for_metrics(self, input_data)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The member's own values, scaled: nothing is sent."""
        return tensor * scale if scale != 1.0 else tensor

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """The member's own values: there is nothing to be as long as."""
        return tensor

    def wait_for_everyone(self) -> None:
        """Nobody to wait for."""

    def clip_grad_norm_(self, parameters, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        """
        The gradients' norm, clipped. They have been unscaled once for all members: accelerate's own clipping unscales
        each time, which fp16's scaler refuses (1.15).
        """
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)

    def prepare(self, *objects: Any, **options: Any) -> Any:
        """Loaders as on one process, models without DistributedDataParallel; everything else as the real one does."""
        prepared = tuple(self._prepare_one(item, **options) for item in objects)
        return prepared if len(prepared) > 1 else prepared[0]

    def _prepare_one(self, item: Any, **options: Any) -> Any:
        if isinstance(item, DataLoader):
            return self.prepare_data_loader(item)
        if isinstance(item, nn.Module):
            return self._accelerator.prepare_model(item, evaluation_mode=True)
        return self._accelerator.prepare(item, **options)

    def prepare_data_loader(self, data_loader: DataLoader, *args: Any, **options: Any) -> DataLoader:
        """A loader that gives this member all batches and shares nothing with other processes."""
        if isinstance(data_loader.worker_init_fn, partial) and data_loader.worker_init_fn.func is seed_worker:
            # Trainer seeds workers by rank; a member's workers are those of a run on one process.
            data_loader.worker_init_fn = partial(seed_worker, num_workers=data_loader.num_workers, rank=0)
        return prepare_data_loader(
            data_loader,
            num_processes=1,
            process_index=0,
            put_on_device=False,
            dispatch_batches=False,
            use_seedable_sampler=self._accelerator.use_seedable_sampler,
            data_seed=self._data_seed,
        )


def _of_one_process(arguments_class: type) -> type:
    """
    The class of a member's arguments: its own processes are one, and that one writes its files. Made anew for each: a
    cache would hold a class that was made in a function, or in a notebook's cell, with all that lives there.
    """
    own = {"process_index": 0, "local_process_index": 0, "world_size": 1, "should_save": True}
    return type(arguments_class.__name__, (arguments_class,), {**own, "_pickled_as": arguments_class})


def arguments_of_member(args: TrainingArguments, **own: Any) -> Any:
    """
    A member's own copy of the Trainer's arguments, those of a run on one process.

    Args:
        args (`transformers.TrainingArguments`): The Trainer's.
        **own: What is the member's own: its seed, its rates.
    """
    copied = copy.copy(args)
    copied.__class__ = _of_one_process(type(args))
    vars(copied).update(own)
    return copied


class LocalMembers(nn.Module):
    """
    What the Trainer's loop takes for the model: this process's members. It is never called.

    Args:
        members (`list[nn.Module]`): The members.

    Attributes:
        after_zero_grad (`Callable`, *optional*): Called when the loop has cleared the gradients: once before the first
            step, and in every step after the optimizer's and the scheduler's.
    """

    def __init__(self, members: list[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.after_zero_grad: Callable[[], None] | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all members."""
        super().zero_grad(set_to_none)
        if self.after_zero_grad is not None:
            self.after_zero_grad()


class Whole(nn.Module):
    """
    A member's model and what the Trainer has built around it that learns, too: a loss with parameters of its own, say.

    Args:
        model (`nn.Module`): The model.
        around (`dict[str, nn.Module]`): Modules that hold the model.
    """

    def __init__(self, model: nn.Module, around: dict[str, nn.Module]):
        super().__init__()
        self.model = model
        self.around = nn.ModuleDict(around)


@dataclass
class Member:
    """
    A member of this process, or the soup in a member's place.

    Args:
        place (`int`, *optional*): Its index in the population; `None` for the soup.
        model (`nn.Module`): The model.
        args: Its own copy of the Trainer's arguments: its seed, its rates.
        accelerator ([`MemberAccelerator`]): Of its own processes.
        whole (`nn.Module`): All that learns; the model itself where nothing is built around it.
        train_dataset (*optional*): What it trains on.
        data_collator (`Callable`, *optional*): What makes its batches.
        label_smoother (`Callable`, *optional*): Its loss while training, where labels are smoothed.
        around (`dict[str, Any]`): Attributes of the Trainer that hold the model (modules and dictionaries of them).
    """

    place: int | None
    model: nn.Module
    args: Any
    accelerator: MemberAccelerator
    whole: nn.Module
    train_dataset: Any = None
    data_collator: Callable | None = None
    label_smoother: Any = None
    around: dict[str, Any] = field(default_factory=dict)
    _prepared: nn.Module | None = field(default=None, init=False)

    @property
    def index(self) -> int:
        """Its place in the population, which the soup has not."""
        if self.place is None:
            raise RuntimeError("The soup is not a member of the population, so it has no index.")
        return self.place

    @property
    def prepared(self) -> nn.Module:
        """The model as accelerate has prepared it; as it is until then."""
        return self._prepared if self._prepared is not None else self.model

    def prepare(self, accelerator: Accelerator) -> nn.Module:
        """The model, prepared once: autocast and compilation, and no DistributedDataParallel."""
        if self._prepared is None:
            self._prepared = accelerator.prepare_model(self.model, evaluation_mode=True)
        return self._prepared


def find_around(trainer: Any, model: nn.Module) -> dict[str, Any]:
    """The attributes of a Trainer that hold its model: modules, or dictionaries of modules, built around it."""

    def holds(value: Any) -> bool:
        return isinstance(value, nn.Module) and any(module is model for module in value.modules())

    found = {}
    for name, value in vars(trainer).items():
        if name in ("model", "model_wrapped") or value is model:
            continue
        if holds(value) or (isinstance(value, dict) and any(holds(item) for item in value.values())):
            found[name] = value
    return found


def around_another(around: dict[str, Any], model: nn.Module, other: nn.Module) -> dict[str, Any]:
    """Copies of what is built around `model`, around `other`."""
    return {name: copy.deepcopy(value, {id(model): other}) for name, value in around.items()}


def whole_of(model: nn.Module, around: dict[str, Any]) -> nn.Module:
    """All that learns of a member: the model, or a [`Whole`]."""
    modules = {}
    for name, value in around.items():
        modules |= value if isinstance(value, dict) else {name: value}
    modules = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
    return Whole(model, modules) if modules else model


def without_a_trace(trainer: Any, member: Member) -> Member:
    """
    The member, such that what it counts while it is in place is dropped: numbers that a Trainer keeps as attributes of
    its own, scalar tensors, and lists and dictionaries of them. What it then counts is the soup's alone.
    """
    counted = {name: _copy_of_counted(value) for name, value in vars(trainer).items() if _is_counted(value)}
    return replace(member, around={**counted, **member.around})


def _is_counted(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_counted(item) for item in value.values())
    return all(_is_number(item) for item in value) if isinstance(value, list) else _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def _copy_of_counted(value: Any) -> Any:
    copied = value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)
    if isinstance(copied, dict):
        copied.update({name: _copy_of_counted(item) for name, item in value.items()})
    return copied


# What `as_member` puts in place beside the modules around the model; `None` for the smoother means none.
_SWAPPED = ("args", "accelerator", "gather_function", "train_dataset", "data_collator", "label_smoother")


@contextlib.contextmanager
def as_member(trainer: Any, member: Member, training: bool = False) -> Iterator[None]:
    """
    Let the Trainer's own methods see a member: its model, arguments, data, collator, accelerator, and what is built
    around its model. Random streams are the population's to activate, since they stay in while a member computes.

    Args:
        trainer (`transformers.Trainer`): The Trainer.
        member ([`Member`]): The member, or the soup.
        training (`bool`, *optional*, defaults to `False`): Whether the member's own label smoothing counts, too.
            Evaluation is the same for all.
    """
    own = vars(trainer)
    names = (*_SWAPPED, "model", "model_wrapped", *member.around)
    before = {name: own[name] for name in names if name in own}
    own.update(
        member.around,
        model=member.model,
        model_wrapped=member.prepared,
        args=member.args,
        accelerator=member.accelerator,
        gather_function=partial(
            member.accelerator.gather_for_metrics, use_gather_object=member.args.eval_use_gather_object
        ),
        train_dataset=member.train_dataset,
        data_collator=member.data_collator,
    )
    if training:
        own["label_smoother"] = member.label_smoother
    try:
        yield
    finally:
        own.update(before)
