"""
WASH: after an optimizer step, members of a population exchange a few of their weights.

What a caller uses is here: [`WashMixer`], the statistics it returns and the errors it raises. The draw is in `plan.py`,
the transport in `exchange.py`, the probabilities in `schedule.py`.
"""

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from .exchange import (
    DeviceTensors,
    HostTensors,
    Plane,
    Route,
    Wire,
    non_finite,
    order,
    overlaps,
    room_for_values,
    route,
)
from .optimizer_state import Layout, OptimizerStates, common_layout, optimizer_name, trial_refusal
from .plan import PLAN_VERSION, Plan, Planner
from .schedule import SCHEDULES, check_probability, layer_probabilities, plain_name, shuffled_layers


class ContagionError(RuntimeError):
    """
    A member would have handed NaN or infinite values to others. Raised on every process, at the same step.

    Attributes:
        members (`tuple[int, ...]`):
            The members whose values were not finite.
        step (`int`):
            The step of the shuffle that was refused.
    """

    def __init__(self, members: Sequence[int], step: int):
        self.members = tuple(members)
        self.step = step
        who = f"Member {members[0]} holds" if len(members) == 1 else f"Members {', '.join(map(str, members))} hold"
        super().__init__(
            f"{who} NaN or infinite values among those to be shuffled at step {step}. The shuffle of this step was not "
            f"carried out, so no other member has got any of them. Resume from a checkpoint before this step, with a "
            f"lower learning rate or clipped gradients."
        )


class PlanMismatchError(RuntimeError):
    """
    Processes came to a shuffle with different plans, of different steps for example. Raised on every process.

    Nothing was written into any member.
    """


@dataclass(frozen=True)
class MixStats:
    """
    What an exchange moved. Values are counted once for each member that received one from another member; those of the
    optimizer's state are among them where it is shuffled.

    Attributes:
        values_moved (`int`):
            Values that members of this process received from other members.
        bytes_exchanged (`int`):
            Their bytes, whether they came from another process or not.
        bytes_sent (`int`):
            Bytes that this process put on the wire, headers included. 0 with one process.
        averaged (`bool`):
            Whether whole models were averaged, so that BatchNorm statistics need to be re-estimated.
        stop_requested (`bool`):
            Whether any process asked for a stop. The same on every process.
        population_values_moved (`int`), population_bytes_exchanged (`int`):
            `values_moved` and `bytes_exchanged` over all members, whatever the layout. The same on every process.
        wait_seconds (`float`):
            How long this process waited in the collective, in seconds.
    """

    values_moved: int
    bytes_exchanged: int
    bytes_sent: int
    averaged: bool
    stop_requested: bool
    population_values_moved: int
    population_bytes_exchanged: int
    wait_seconds: float


# Words of a header before the bits that say which members give something that is not finite.
_DIGEST, _STEP, _FLAGS, _BAD = range(4)
_STOP, _STATE_CHANGED = 1, 2


class WashMixer:
    """
    Shuffles weights among the members of a population (WASH, https://huggingface.co/papers/2405.17517, section 3).

    After every optimizer step, each scalar coordinate of layer l is selected with probability p_l, the same coordinates
    for all members, and for each selected coordinate a uniform random permutation says which member's value goes to
    which member. A value never changes its coordinate, so the average of the members stays what it was.

    Members may live in one process, in one process each, or several in each of several processes, and the result is
    the same, bit for bit. Every process derives the plan from (seed, step); what is sent is the values that change
    process and one small header for each peer, in one collective.

    Args:
        members (`torch.nn.Module` or `list[torch.nn.Module]`):
            The members that this process hosts. Process r of W hosts members r·n to (r + 1)·n − 1, where n is the
            length of the list, the same on every process. They may be compiled. Trainable floating-point parameters
            are shuffled, a tied one once; frozen ones and buffers stay.
        optimizers (`torch.optim.Optimizer` or `list[torch.optim.Optimizer]`, *optional*):
            The optimizers of these members, one for all or several, as they are or prepared by Accelerate. Needed with
            `shuffle_optimizer_state` only; the members' parameters are looked for in them in any case.
        probability (`float`, *optional*, defaults to 0.001):
            The base probability p, in [0, 1]. A run of few steps needs a larger one: what counts is p × steps.
        schedule (`str` or `Mapping[str, float]`, *optional*, defaults to `"decreasing"`):
            How p depends on the depth of a layer: `"decreasing"`, `"constant"`, `"increasing"`, or probabilities by
            module name; see [`~hf_wash.mixing.schedule.layer_probabilities`].
        seed (`int`, *optional*, defaults to 0):
            The seed of the plans, in [0, 2^64). Global random states are neither read nor written.
        shuffle_optimizer_state (`bool`, *optional*, defaults to `False`):
            WASH+Opt: apply the same permutations to the tensors of the optimizer's state that have the parameter's
            shape (momentum, both moments of Adam). Step counters stay. A parameter's state is moved from the step on
            at which all members have it.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            The processes that host the population. `None`: all processes if `torch.distributed` is initialised, else
            this one.

    Raises:
        ValueError: on every process, before anything has moved: for a probability outside [0, 1], an unknown schedule
            or a seed outside its range; for members or processes that differ in anything that they have to agree on,
            naming it; for a model without a trainable floating-point parameter, a parameter whose elements share
            memory or that belongs to two members; for an optimizer that lacks a parameter or whose state cannot be
            shuffled; for a process outside of `process_group`.

    Example:

    ```python
    import torch
    from hf_wash.mixing import WashMixer

    members = [torch.nn.Linear(10, 2) for _ in range(3)]
    optimizers = [torch.optim.SGD(member.parameters(), lr=0.1) for member in members]
    mixer = WashMixer(members, optimizers, probability=0.1)
    for step in range(100):
        for member, optimizer in zip(members, optimizers):
            optimizer.zero_grad()
            member(torch.randn(8, 10)).square().mean().backward()
            optimizer.step()
        mixer.mix(step)
    ```
    """

    def __init__(
        self,
        members: nn.Module | Sequence[nn.Module],
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        *,
        probability: float = 0.001,
        schedule: str | Mapping[str, float] = "decreasing",
        seed: int = 0,
        shuffle_optimizer_state: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ):
        members = [members] if isinstance(members, nn.Module) else list(members)
        if optimizers is None:
            optimizers = []
        elif not isinstance(optimizers, (list, tuple)):
            optimizers = [optimizers]
        group, rank, num_processes = _processes(process_group)
        self._members = range(rank * len(members), (rank + 1) * len(members))
        self._num_members = num_processes * len(members)
        self._num_processes = num_processes
        self._shuffle_optimizer_state = bool(shuffle_optimizer_state)
        self._states: OptimizerStates | None = None
        self._announced: Layout = ()

        description: dict[str, object] = {}
        error = None
        try:
            description = self._check(members, optimizers, probability, schedule, seed)
        except ValueError as found:
            error = str(found)
        if group is not None:
            error, self._agreed = _agree(group, error, description, self._announced)
        else:
            self._agreed = self._announced
        if error is not None:
            raise ValueError(error)

        self._device = self._parameters[0][0].device
        if self._device.type == "cpu":
            self._tensors: HostTensors | DeviceTensors = HostTensors(self._tensor)
        else:
            self._tensors = DeviceTensors(self._tensor, self._device)
        sizes = [parameter.numel() for parameter in self._parameters[0]]
        self._expected = [p * size for p, size in zip(self._probabilities, sizes, strict=True)]
        self._planner = Planner(seed, sizes, self._probabilities, self._num_members)
        self._weights = self._planes_of([[(None, parameter.dtype)] for parameter in self._parameters[0]])
        self._header_words = _BAD + -(-len(members) // 64)
        self._wire = None
        if group is not None:
            nccl = self._device.type == "cuda" and "nccl" in str(dist.get_backend(group))
            self._wire = Wire(group, self._device if nccl else torch.device("cpu"), self._header_words)
        # On a GPU the host must not wait for the shuffle: what the headers say is read at the next call.
        self._late = self._device.type == "cuda" and (self._wire is None or self._wire.device.type == "cuda")
        self._unread: tuple[torch.Tensor, torch.cuda.Event, int, bytes] | None = None
        self._stop_seen = False
        self._agree_again = self._late and self._wire is not None and self._shuffle_optimizer_state
        self._last_step: int | None = None
        self._interval = 1
        self._ahead: tuple[int, Future] | None = None
        self._executor: ThreadPoolExecutor | None = None

    def _check(self, members, optimizers, probability, schedule, seed) -> dict[str, object]:
        """Checks what one process can check by itself. Returns what all of them have to agree on."""
        if not members:
            raise ValueError("This process was given no members; every process needs at least one.")
        check_probability(probability)
        if not isinstance(schedule, Mapping) and schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a mapping, and is {schedule!r}.")
        architectures = [_architecture(member) for member in members]
        for number, architecture in zip(self._members, architectures, strict=True):
            difference = _difference(architectures[0], architecture)
            if difference:
                raise ValueError(_unlike(number, self._members[0], difference))
        parameters = [
            {name: parameter for layer in shuffled_layers(member).values() for name, parameter in layer.items()}
            for member in members
        ]
        if not parameters[0]:
            raise ValueError(
                f"{type(members[0]).__name__} has no trainable floating-point parameter, so there is nothing to shuffle."
            )
        owners: dict[int, int] = {}
        devices: dict[torch.device, str] = {}
        for number, members_parameters in zip(self._members, parameters, strict=True):
            for name, parameter in members_parameters.items():
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
                if type(parameter.data) is not torch.Tensor:
                    raise ValueError(
                        f"The parameter {name!r} of member {number} is a {type(parameter.data).__name__}; only plain "
                        f"tensors can be shuffled."
                    )
                devices.setdefault(parameter.device, f"{name!r} of member {number}")
        if len(devices) > 1:
            (first, one), (second, other), *_ = devices.items()
            raise ValueError(f"{one} is on {first} and {other} on {second}; one process needs them on one device.")
        layers = shuffled_layers(members[0])
        by_layer = layer_probabilities(members[0], probability, schedule)
        self._probabilities = [by_layer[layer] for layer, owned in layers.items() for _ in owned]
        self._parameters = [list(member.values()) for member in parameters]
        Planner(seed, [], [], 1)  # its own check of the seed

        if self._shuffle_optimizer_state and not optimizers:
            raise ValueError("shuffle_optimizer_state needs the members' optimizers, and none were given.")
        if optimizers:
            states = OptimizerStates(optimizers, parameters, self._members[0])
            if self._shuffle_optimizer_state:
                for optimizer in optimizers:
                    if refusal := trial_refusal(optimizer):
                        raise ValueError(refusal)
                if refusal := states.refresh():
                    raise ValueError(refusal)
                self._states = states
                self._announced = states.layout()
        return {
            "architecture": architectures[0],
            "number of members": len(members),
            "probability": float(probability),
            "schedule": dict(schedule) if isinstance(schedule, Mapping) else schedule,
            "seed": seed,
            "shuffle_optimizer_state": self._shuffle_optimizer_state,
            "optimizer": sorted({optimizer_name(o) for o in optimizers}) if self._shuffle_optimizer_state else None,
            "version of the plan": PLAN_VERSION,
        }

    def _tensor(self, slot: str | None, member: int, number: int) -> torch.Tensor | None:
        if slot is None:
            return self._parameters[member][number]
        return self._states.tensor(slot, member, number)

    def _planes_of(self, layout: Sequence[Sequence[tuple[str | None, torch.dtype]]]) -> list[Plane]:
        tensors: dict[tuple[str | None, torch.dtype], list[int]] = {}
        for number, slots in enumerate(layout):
            for slot in slots:
                tensors.setdefault(slot, []).append(number)
        # What never moves need not be looked at: most models have a last layer with probability 0.
        return [
            Plane(slot, dtype, tuple(numbers))
            for (slot, dtype), numbers in sorted(tensors.items(), key=lambda item: (str(item[0][0]), str(item[0][1])))
        ]

    @torch.no_grad()
    def mix(self, step: int, *, shuffle: bool = True, stop_requested: bool = False) -> MixStats:
        """
        Shuffles once. To be called on every process, after every optimizer step, with the same `step`.

        Args:
            step (`int`):
                The number of the step, in [0, 2^63). It determines the plan; steps may be skipped.
            shuffle (`bool`, *optional*, defaults to `True`):
                With `False` nothing is moved, and only the headers are exchanged. The same on every process.
            stop_requested (`bool`, *optional*, defaults to `False`):
                Whether this process wants all processes to stop.

        Returns:
            [`MixStats`]: What was moved, and whether any process asked for a stop.

        Raises:
            ContagionError: on every process, when a value to be moved is NaN or infinite. No member has changed. On a
                GPU it comes at the next call, or from [`WashMixer.synchronize`]; members have not changed either.
            PlanMismatchError: on every process, when they disagree on the step or the plan. No member has changed.
            ValueError: when the step is no such integer, or, on every process, when a state has appeared in an
                optimizer that cannot be shuffled.
            RuntimeError: when the process group lost a process or ran into its timeout.
        """
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**63:
            raise ValueError(f"step must be an integer from 0 to 2**63 - 1, and is {step!r}.")
        self.synchronize()
        if self._num_members == 1:
            return MixStats(0, 0, 0, False, bool(stop_requested), 0, 0, 0.0)

        refusal = None if self._states is None else self._states.refresh()
        layout = () if self._states is None else self._states.layout()
        changed = refusal is not None or layout != self._announced
        if self._wire is None:
            if refusal is not None:
                raise ValueError(refusal)
            self._agreed = self._announced = layout
        elif self._agree_again:
            self._agree_on_state(layout, refusal)
            changed = False

        planes = [*self._weights, *self._planes_of(self._agreed)]
        plan, routes = self._plan(step, planes) if shuffle else (None, {})
        digest = plan.digest if plan else hashlib.blake2b(b"no shuffle", digest_size=8).digest()
        moved = planes if shuffle else []
        gathered = self._gather(moved, routes)
        sent, waited = 0, 0.0
        if self._wire is None:
            bad = self._bad(moved, routes, gathered)
            arrived = self._hand_over(moved, routes, gathered)
            stop = bool(stop_requested)
            if self._late:
                arrived = [torch.where(bad.any(), old, new) for old, new in zip(gathered, arrived, strict=True)]
                self._read_later(bad[None].to(torch.int64), step, digest)
            elif bad.any():
                raise ContagionError([self._members[i] for i in bad.nonzero().flatten().tolist()], step)
        else:
            flags = _STOP * bool(stop_requested) | _STATE_CHANGED * changed
            headers, arrived, sent, waited = self._send(moved, routes, gathered, planes, step, digest, flags)
            if self._late:
                own = headers[self._wire.rank, _DIGEST]
                fine = (headers[:, _DIGEST] == own).all() & (headers[:, _BAD:] == 0).all()
                arrived = [torch.where(fine, new, old) for old, new in zip(gathered, arrived, strict=True)]
                stop = self._stop_seen
                self._read_later(headers, step, digest)
            else:
                stop, agree_again = self._judge(headers, step, digest)
                if agree_again:
                    self._agree_on_state(layout, refusal)
                    planes = [*self._weights, *self._planes_of(self._agreed)]
                    if shuffle and len(planes) > len(self._weights):
                        # The weights are here already. The state follows, laid out as all have just agreed.
                        states = planes[len(self._weights) :]
                        routes = self._complete(plan, routes, planes)
                        gathered = self._gather(states, routes)
                        headers, states_arrived, more, waited_more = self._send(
                            states, routes, gathered, states, step, digest, 0
                        )
                        self._judge(headers, step, digest)
                        arrived = [*arrived[: len(self._weights)], *states_arrived]
                        sent, waited = sent + more, waited + waited_more
                    moved = planes if shuffle else []
        for plane, values in zip(moved, arrived, strict=True):
            self._tensors.scatter(plane, routes[plane.tensors], values)
        if shuffle:
            self._draw_ahead(step, planes)
        return self._stats(plan, moved, routes, sent, stop, waited)

    def synchronize(self) -> None:
        """
        Waits for the last shuffle on a GPU and raises what it would have raised. Elsewhere there is nothing to wait for.

        Every call of [`WashMixer.mix`] does this for the call before. Call it after the last one of a run, on every
        process.

        Raises:
            ContagionError, PlanMismatchError: as [`WashMixer.mix`].
        """
        if self._unread is None:
            return
        headers, event, step, digest = self._unread
        self._unread = None
        event.synchronize()
        if self._wire is None:
            if headers.any():
                raise ContagionError([self._members[i] for i in headers[0].nonzero().flatten().tolist()], step)
            return
        self._stop_seen, self._agree_again = self._judge(headers, step, digest)

    def _plan(self, step: int, planes: Sequence[Plane]) -> tuple[Plan, dict[tuple[int, ...], Route]]:
        if self._ahead is not None and self._ahead[0] == step:
            plan, routes = self._ahead[1].result()
            self._ahead = None
            return plan, self._complete(plan, routes, planes)
        return _prepare(self._planner, step, _selections(planes), self._members, self._num_processes)

    def _complete(self, plan: Plan, routes: dict, planes: Sequence[Plane]) -> dict[tuple[int, ...], Route]:
        missing = [tensors for tensors in _selections(planes) if tensors not in routes]
        return routes | {tensors: route(plan, tensors, self._members, self._num_processes) for tensors in missing}

    def _draw_ahead(self, step: int, planes: Sequence[Plane]) -> None:
        """Has the plan drawn that the next call will probably need, while the caller computes."""
        if self._last_step is not None and step > self._last_step:
            self._interval = step - self._last_step
        self._last_step = step
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf_wash-plan")
            weakref.finalize(self, self._executor.shutdown, wait=False, cancel_futures=True)
        if self._ahead is not None:
            self._ahead[1].cancel()
        # The thread gets no reference to the mixer, so that it cannot keep members alive.
        arguments = (self._planner, step + self._interval, _selections(planes), self._members, self._num_processes)
        self._ahead = (step + self._interval, self._executor.submit(_prepare, *arguments))

    def _gather(self, planes: Sequence[Plane], routes: dict) -> list[torch.Tensor]:
        return [self._tensors.gather(plane, routes[plane.tensors]) for plane in planes]

    def _bad(self, planes: Sequence[Plane], routes: dict, gathered: Sequence[torch.Tensor]) -> torch.Tensor:
        bad = torch.zeros(len(self._members), dtype=torch.bool, device=self._device)
        for plane, values in zip(planes, gathered, strict=True):
            bad |= non_finite(plane, routes[plane.tensors], values)
        return bad

    def _hand_over(
        self, planes: Sequence[Plane], routes: dict, gathered: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        paths = [routes[plane.tensors] for plane in planes]
        return [order(order(v, p.send_order), p.arrival_order) for v, p in zip(gathered, paths, strict=True)]

    def _send(self, moved, routes, gathered, planes, step, digest, flags):
        """Sends what leaves and returns the headers, what arrived for each plane in its order, bytes and seconds."""
        wire = self._wire
        words = [int.from_bytes(digest, "little", signed=True), step, flags]
        bad = self._bad(moved, routes, gathered).to(wire.device)
        header = torch.zeros(self._header_words, dtype=torch.int64)
        header[:_BAD] = torch.tensor(words, dtype=torch.int64)
        header = header.to(wire.device, non_blocking=True)
        bits = bad.to(torch.int64) << (torch.arange(len(bad), device=wire.device) % 64)
        header[_BAD:] = nn.functional.pad(bits, (0, -len(bits) % 64)).view(-1, 64).sum(dim=1)
        paths = [routes[plane.tensors] for plane in moved]
        outgoing = [
            (order(values, path.send_order).to(wire.device), path)
            for values, path in zip(gathered, paths, strict=True)
        ]
        num_local = len(self._members)
        room = sum(
            room_for_values(
                sum(self._expected[t] for t in plane.tensors) * num_local**2 / self._num_members,
                num_local,
                plane.dtype.itemsize,
            )
            for plane in planes
        )
        headers, arrived, sent, waited = wire.exchange(header, outgoing, room)
        arrived = [
            order(values.to(self._device), path.arrival_order) for values, path in zip(arrived, paths, strict=True)
        ]
        return headers, arrived, sent, waited

    def _judge(self, headers: torch.Tensor, step: int, digest: bytes) -> tuple[bool, bool]:
        """Raises what the headers of all processes give reason for. Returns whether to stop and to agree on the state."""
        headers = headers.tolist()
        digest = int.from_bytes(digest, "little", signed=True)
        for process, header in enumerate(headers):
            if header[_DIGEST] != digest or header[_STEP] != step:
                raise PlanMismatchError(
                    f"Process {process} came to this shuffle with step {header[_STEP]}, and process {self._wire.rank} "
                    f"with step {step}"
                    + (" but another plan, or without a shuffle" if header[_STEP] == step else "")
                    + ". Every process has to call mix() with the same arguments after every step. Nothing was written."
                )
        num_local = len(self._members)
        bad = [
            process * num_local + local
            for process, header in enumerate(headers)
            for local in range(num_local)
            if header[_BAD + local // 64] >> local % 64 & 1
        ]
        if bad:
            raise ContagionError(bad, step)
        flags = [header[_FLAGS] for header in headers]
        return any(f & _STOP for f in flags), any(f & _STATE_CHANGED for f in flags)

    def _read_later(self, headers: torch.Tensor, step: int, digest: bytes) -> None:
        host = torch.empty(headers.shape, dtype=headers.dtype, pin_memory=True)
        host.copy_(headers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread = (host, event, step, digest)

    def _agree_on_state(self, layout: Layout, refusal: str | None) -> None:
        """Settles, by a collective of its own, which slots all members have. Rare: when an optimizer's state appears."""
        found: list = [None] * self._num_processes
        dist.all_gather_object(found, (layout, refusal), group=self._wire.group)
        refusals = [text for _, text in found if text is not None]
        if refusals:
            raise ValueError(refusals[0])
        self._announced = layout
        self._agreed = common_layout([theirs for theirs, _ in found])
        self._agree_again = False

    def _stats(self, plan, planes, routes, sent, stop, waited) -> MixStats:
        values = size = all_values = all_size = 0
        for plane in planes:
            here = routes[plane.tensors].bounds[-1]
            everywhere = int(plan.values_moved_by_tensor[list(plane.tensors)].sum())
            values, size = values + here, size + here * plane.dtype.itemsize
            all_values, all_size = all_values + everywhere, all_size + everywhere * plane.dtype.itemsize
        return MixStats(values, size, sent, False, stop, all_values, all_size, waited)


def _selections(planes: Sequence[Plane]) -> tuple[tuple[int, ...], ...]:
    return tuple(dict.fromkeys(plane.tensors for plane in planes))


def _prepare(
    planner: Planner, step: int, selections: Sequence[tuple[int, ...]], members: range, num_processes: int
) -> tuple[Plan, dict[tuple[int, ...], Route]]:
    plan = planner.draw(step)
    _ = plan.values_moved_by_tensor  # computed once, and here rather than while everybody waits
    return plan, {tensors: route(plan, tensors, members, num_processes) for tensors in selections}


def _processes(process_group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup | None, int, int]:
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


def _architecture(model: nn.Module) -> list[tuple[str, str]]:
    return [
        (plain_name(name), f"shape {tuple(p.shape)}, {p.dtype}, {'trainable' if p.requires_grad else 'frozen'}")
        for name, p in model.named_parameters()
    ]


def _difference(expected: list[tuple[str, str]], found: list[tuple[str, str]]) -> str | None:
    for (name, what), (other_name, other) in zip(expected, found, strict=False):
        if name != other_name:
            return f"has the parameter {other_name!r} where the other has {name!r}"
        if what != other:
            return f"has the parameter {name!r} with {other}, and the other with {what}"
    if len(expected) != len(found):
        longer, has = (expected, "lacks") if len(expected) > len(found) else (found, "has")
        return f"{has} the parameter {longer[min(len(expected), len(found))][0]!r}, unlike the other"
    return None


def _unlike(member: int, other: int, difference: str) -> str:
    return f"Member {member} does not have the architecture of member {other}: it {difference}."


def _agree(
    group: dist.ProcessGroup, error: str | None, description: dict, layout: Layout
) -> tuple[str | None, Layout]:
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
                return _unlike(first, 0, _difference(value, other[key])), ()
            return (
                f"Processes have to agree on the {key}: process 0 has {value!r} and process {process} {other[key]!r}.",
                (),
            )
    return None, common_layout([theirs for _, _, theirs in found])
