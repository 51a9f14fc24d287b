"""
WASH: after an optimizer step, members of a population exchange a few of their weights.

What a caller uses is [`WashMixer`]; the statistics it returns and the errors it raises are in `outcome.py`, the draw in
`plan.py`, the transport in `exchange.py`, the probabilities in `schedule.py`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .agreement import agree, architecture, check_members, processes
from .drafts import Ahead, Draft, Load
from .exchange import DeviceShipment, HostShipment, Route, route
from .memory import Plane, Selection, Views, look, planes_of
from .optimizer_state import Layout, OptimizerStates, common_layout, optimizer_name, trial_refusal
from .outcome import ContagionError, MixStats, PlanMismatchError
from .plan import PLAN_VERSION, Planner
from .schedule import SCHEDULES, check_probability, layer_probabilities, shuffled_layers
from .wire import BAD, FLAGS, MISSING, STATE_CHANGED, STEP, STOP, Wire, room_for_values


# In the place of a plan's digest when nothing is to be moved.
_NO_SHUFFLE = bytes(8)


class WashMixer:
    """
    Shuffles weights among the members of a population (WASH, https://huggingface.co/papers/2405.17517, section 3).

    After every optimizer step, each scalar coordinate of layer l is selected with probability p_l, the same
    coordinates for all members, and for each selected coordinate a uniform random permutation says which member's
    value goes to which member: θ_n[i] ← θ_{π_i(n)}[i]. A value never changes its coordinate, so the average of the
    members stays what it was. With `"decreasing"`, p_l = p·(1 − l/(L − 1)) for the layers l = 0 … L − 1.

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
            optimizers = ()
        elif not isinstance(optimizers, Sequence):
            optimizers = (optimizers,)
        group, rank, num_processes = processes(process_group)
        self._members = range(rank * len(members), (rank + 1) * len(members))
        self._num_members = num_processes * len(members)
        self._num_processes = num_processes
        self._shuffle_optimizer_state = bool(shuffle_optimizer_state)
        self._states: OptimizerStates | None = None
        self._layout: Layout = ()
        self._announced: Layout = ()
        self._refusal: str | None = None

        description: dict[str, object] = {}
        error = None
        try:
            description = self._check(members, optimizers, probability, schedule, seed)
        except ValueError as found:
            error = str(found)
        if group is not None:
            error, self._agreed = agree(group, error, description, self._announced)
        else:
            self._agreed = self._announced
        if error is not None:
            raise ValueError(error)

        self._device = self._parameters[0][0].device
        self._shipments: type[HostShipment | DeviceShipment] = (
            HostShipment if self._device.type == "cpu" else DeviceShipment
        )
        self._shapes = [parameter.shape for parameter in self._parameters[0]]
        self._broken: str | None = None
        sizes = [parameter.numel() for parameter in self._parameters[0]]
        self._expected = [p * size for p, size in zip(self._probabilities, sizes, strict=True)]
        self._planner = Planner(seed, sizes, self._probabilities, self._num_members)
        self._weights = planes_of([[(None, parameter.dtype)] for parameter in self._parameters[0]])
        self._header_words = BAD + -(-len(members) // 64)
        self._wire = None
        if group is not None:
            nccl = self._device.type == "cuda" and "nccl" in str(dist.get_backend(group))
            self._wire = Wire(group, self._device if nccl else torch.device("cpu"))
        # On a GPU the host must not wait for the shuffle: what the headers say is read at the next call.
        self._late = self._device.type == "cuda" and (self._wire is None or self._wire.device.type == "cuda")
        self._unread: tuple[torch.Tensor, torch.cuda.Event, int, bytes] | None = None
        self._stop_seen = False
        self._agree_first = self._late and self._wire is not None and self._shuffle_optimizer_state
        self._ahead: Ahead[_WashDraft] = Ahead()
        self._carried: Layout | None = None
        self._views: dict[Plane, Views] = {}
        self._carry(self._agreed)

    def _check(self, members, optimizers, probability, schedule, seed) -> dict[str, object]:
        """Checks what one process can check by itself. Returns what all of them have to agree on."""
        strange = next((each for each in optimizers if not hasattr(each, "param_groups")), None)
        if strange is not None:
            raise ValueError(f"Each optimizer must be a torch.optim.Optimizer, found a {type(strange).__name__}.")
        check_probability(probability)
        if not isinstance(schedule, Mapping) and schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a mapping, and is {schedule!r}.")
        parameters = check_members(members, self._members)
        layers = shuffled_layers(members[0])
        by_layer = layer_probabilities(members[0], probability, schedule)
        self._probabilities = [by_layer[layer] for layer, owned in layers.items() for _ in owned]
        self._names = list(parameters[0])
        self._parameters: list[list[torch.Tensor]] = [list(member.values()) for member in parameters]
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
            "architecture": architecture(members[0]),
            "number of members": len(members),
            "probability": float(probability),
            "schedule": dict(schedule) if isinstance(schedule, Mapping) else schedule,
            "seed": seed,
            "shuffle_optimizer_state": self._shuffle_optimizer_state,
            "optimizer": sorted({optimizer_name(o) for o in optimizers}) if self._shuffle_optimizer_state else None,
            "version of the plan": PLAN_VERSION,
        }

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

        stats = self._mix(step, shuffle, bool(stop_requested))
        if shuffle:
            # Last of all: the thread that draws would take the interpreter away from what this one has yet to do.
            self._ahead.expect(step, self._outline())
        return stats

    def _mix(self, step: int, shuffle: bool, stop_requested: bool) -> MixStats:
        state_changed = self._look_at_state()
        self._carry(self._agreed)
        draft = (self._ahead.take(step) or self._outline()(step)) if shuffle else None
        digest = draft.plan.digest if draft else _NO_SHUFFLE
        shipment = self._shipment(draft, self._planes)
        if self._broken is not None:
            if self._wire is None:
                raise ValueError(self._broken)
            if self._late:
                # No header is like this one, so that nothing is written anywhere.
                shipment.ship(self._header(_NO_SHUFFLE, step, 0))
                raise ValueError(self._broken)
            self._refusal, state_changed = self._broken, True
        missing = any(self._views[plane].exists is not None for plane in self._planes)
        flags = STOP * stop_requested | STATE_CHANGED * state_changed | MISSING * missing
        headers, sent, waited = shipment.ship(self._header(digest, step, flags))

        if self._late:
            # The device itself looks into the headers and writes nothing if they are not as they should be.
            assert isinstance(headers, torch.Tensor) and isinstance(shipment, DeviceShipment)
            shipment.scatter(headers)
            self._read_later(headers, step, digest)
            return self._stats([shipment], sent, self._stop_seen if self._wire else stop_requested, waited)
        shipments = [shipment]
        stop, state_changed = self._judge(headers, step, digest)
        if state_changed:
            # Nothing has been written yet. The weights are here; the state follows, laid out as all agree now.
            self._agree_on_state()
            self._carry(self._agreed)
            shipment.keep_only(len(self._weights))
            rest = self._shipment(draft, self._planes[len(self._weights) :])
            headers, more, longer = rest.ship(self._header(digest, step, 0))
            self._judge(headers, step, digest)
            shipments.append(rest)
            sent, waited = sent + more, waited + longer
        for each in shipments:
            each.scatter()
        return self._stats(shipments, sent, stop, waited)

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
        self._stop_seen, self._agree_first = self._judge(headers, step, digest)

    def prepare(self, step: int) -> None:
        """
        Draws the plan of a step and returns when it is there, so that [`WashMixer.mix`] has only to carry values.

        Not needed in a loop: [`WashMixer.mix`] has the plan of the next step drawn in a thread while the caller
        computes, going by the distance between the last two. It serves where the next step is another one.

        Args:
            step (`int`):
                The step of the next call of [`WashMixer.mix`].
        """
        if self._num_members == 1:
            return
        self._ahead.prepare(step, self._outline())

    def _look_at_state(self) -> bool:
        """Finds out which of the optimizers' state there is. Returns whether the other processes do not know yet."""
        if self._states is None:
            return False
        self._refusal = self._states.refresh()
        self._layout = self._states.layout()
        if self._wire is None:
            if self._refusal is not None:
                raise ValueError(self._refusal)
            self._agreed = self._announced = self._layout
        elif self._agree_first:
            self._agree_on_state()
        return self._refusal is not None or self._layout != self._announced

    def _agree_on_state(self) -> None:
        """Settles, by a collective of its own, which slots all members have. Rare: when an optimizer's state appears."""
        assert self._wire is not None
        found: list = [None] * self._num_processes
        dist.all_gather_object(found, (self._layout, self._refusal), group=self._wire.group)
        for process, (_, refusal) in enumerate(found):
            if refusal is not None:
                raise ValueError(refusal if refusal == self._refusal else f"Process {process}: {refusal}")
        self._announced, self._agree_first = self._layout, False
        self._agreed = common_layout([layout for layout, _ in found])

    def _carry(self, layout: Layout) -> None:
        """Settles which planes are carried from now on: the weights, and the slots of the state that all members have."""
        if layout is self._carried:
            return
        self._carried = layout
        self._planes = [*self._weights, *planes_of(layout)]
        num_local = len(self._members)
        room = 0
        for plane in self._planes:
            expected = sum(self._expected[tensor] for tensor in plane.tensors) * num_local**2 / self._num_members
            room += room_for_values(expected, num_local, plane.dtype.itemsize)
        self._load = functools.partial(self._shipments, wire=self._wire, header_words=self._header_words, room=room)
        self._look()

    def _look(self) -> None:
        """Looks where the tensors lie that are carried."""
        views = {}
        for plane in self._planes:
            shapes = [self._shapes[number] for number in plane.tensors]
            views[plane] = look(plane, self._tensors(plane), shapes, self._device, self._views.get(plane))
        self._views = views
        self._broken = self._find_broken()
        self._seen = self._states.version if self._states is not None else 0

    def _find_broken(self) -> str | None:
        """What is not as it was when all agreed on it, and cannot be carried, in a sentence."""
        for plane in self._planes:
            exists = self._views[plane].exists
            if exists is None or (plane.slot is not None and self._layout != self._announced):
                continue
            local, place = divmod(int(np.flatnonzero(~exists)[0]), len(plane.tensors))
            what = f"The parameter {self._names[plane.tensors[place]]!r} of member {self._members[local]}"
            if plane.slot is not None:
                what = f"The optimizer's {plane.slot!r} of {what[0].lower()}{what[1:]}"
            return (
                f"{what} is no longer of the shape, dtype and device that it had when the mixer was built. Nothing was "
                f"written into any member; build a new mixer after such a change."
            )
        return None

    def _tensors(self, plane: Plane) -> list[torch.Tensor | None]:
        """The tensors of a plane, member after member."""
        if plane.slot is None:
            return [member[number] for member in self._parameters for number in plane.tensors]
        assert self._states is not None  # there are no other planes without it
        states, members = self._states, range(len(self._members))
        return [tensor for local in members for tensor in states.tensors(plane.slot, local, plane.tensors)]

    def _shipment(self, draft: "_WashDraft | None", planes: Sequence[Plane]) -> HostShipment | DeviceShipment:
        """What carries these planes from where their tensors are now."""
        if draft is None:
            return self._load([], [])
        if self._states is not None and self._seen != self._states.version:
            self._look()
        shipment = draft.shipment([self._views[plane] for plane in planes], self._load)
        if shipment.stale():
            self._look()
            shipment = draft.shipment([self._views[plane] for plane in planes], self._load)
        return shipment

    def _outline(self) -> Callable[[int], "_WashDraft"]:
        """What makes a draft: nothing that refers to the mixer, so that the thread that draws cannot keep it."""
        views = [self._views[plane] for plane in self._planes]
        return functools.partial(_WashDraft, self._planner, views, self._members, self._num_processes, self._load)

    def _header(self, digest: bytes, step: int, flags: int) -> np.ndarray:
        words = np.zeros(self._header_words, dtype=np.int64)
        words[:BAD] = int.from_bytes(digest, "little", signed=True), step, flags
        return words

    def _judge(self, headers: list[list[int]] | torch.Tensor, step: int, digest: bytes) -> tuple[bool, bool]:
        """Raises what the headers of all processes give reason for. Returns whether to stop, and to agree on the state."""
        own = [int.from_bytes(digest, "little", signed=True), step]
        lines = headers if isinstance(headers, list) else headers.tolist()
        for process, header in enumerate(lines):
            if header[:FLAGS] != own:
                same = " but another plan, or without a shuffle" if header[STEP] == step else ""
                raise PlanMismatchError(
                    f"Process {process} came to this shuffle with step {header[STEP]}{same}, and this process with "
                    f"step {step}. Every process has to call mix() with the same arguments, once after every step. "
                    f"Nothing was written into any member."
                )
        num_local = len(self._members)
        bad = [
            process * num_local + local
            for process, header in enumerate(lines)
            for local in range(num_local)
            if header[BAD + local // 64] >> local % 64 & 1
        ]
        if bad:
            raise ContagionError(bad, step)
        return any(h[FLAGS] & STOP for h in lines), any(h[FLAGS] & STATE_CHANGED for h in lines)

    def _read_later(self, headers: torch.Tensor, step: int, digest: bytes) -> None:
        host = torch.empty(headers.shape, dtype=headers.dtype, pin_memory=True)
        host.copy_(headers, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(headers.device))
        self._unread = (host, event, step, digest)

    def _stats(
        self, shipments: Sequence[HostShipment | DeviceShipment], sent: int, stop: bool, waited: float
    ) -> MixStats:
        values = size = all_values = all_size = 0
        for shipment in shipments:
            for volume in shipment.volumes:
                values, size = values + volume[0], size + volume[1]
                all_values, all_size = all_values + volume[2], all_size + volume[3]
        return MixStats(values, size, sent, False, stop, all_values, all_size, waited)


class _WashDraft(Draft):
    """The plan of a step and what it means for this process."""

    def __init__(
        self, planner: Planner, views: Sequence[Views], members: range, num_processes: int, load: Load, step: int
    ):
        self.plan = planner.draw(step)
        self._members, self._num_processes = members, num_processes
        super().__init__(views, load)

    def _route(self, selection: Selection) -> Route:
        return route(self.plan, selection, self._members, self._num_processes)
