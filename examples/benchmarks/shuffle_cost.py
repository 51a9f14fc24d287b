#!/usr/bin/env python
"""
What a shuffle costs, against the floor of what it has to do and against what others do.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/benchmarks/shuffle_cost.py --json shuffle_cost.json
    python examples/benchmarks/shuffle_cost.py --device cuda       # members in one process, on a GPU

Everything is measured in one run, in rounds: each round measures each thing once, so that other work on the machine
meets all alike. The median over rounds is reported, as seen by the slowest process. In milliseconds:

- plan: `prepare()`, drawing the plan and all else that is worked out ahead. It runs beside the training step
- mix drawn: `mix()` with the plan drawn already; mix: `mix()` and the plan, one after the other
- floor: a bare all-to-all of as many bytes, with the fastest gather and scatter of as many values, tensor by tensor
- mask: a dense random mask over all parameters, which is the least that a mask costs
- SPARTA: as in its public code, a mask drawn and broadcast for each tensor and the selected values all-reduced; and
  derived, the same with masks that every process draws from a seed
- all-reduce: the whole model at once, what DDP pays each step and PAPA each tenth

And in percent of the bytes of what is shuffled, memory: the most that one `mix()` and the plan ahead take beside it.

A second table has the mixers that average: one exchange of each, a bare collective of as many bytes, and their floor,
which is this collective with one read and one write of what is averaged (of SPARTA, of as many single values). The three
are measured in turn, by the clock and as processor's time, which other work on the machine disturbs less.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from torch import nn

from hf_wash.mixing import (
    DilocoMixer,
    PairAverageMixer,
    PapaMixer,
    PeriodicAverageMixer,
    SpartaMixer,
    WashMixer,
    layer_probabilities,
    shuffled_layers,
)
from hf_wash.mixing.plan import Planner


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT-S/16": lambda: timm.create_model("vit_small_patch16_224", pretrained=False),
    "ViT-B/16": lambda: timm.create_model("vit_base_patch16_224", pretrained=False),
    # The stem of CIFAR's ResNets: 3×3 without stride, no pooling.
    "ResNet-18": lambda: timm.create_model("resnet18", pretrained=False, num_classes=100),
    "ResNet-50": lambda: timm.create_model("resnet50", pretrained=False),
}
COLUMNS = ["plan", "mix drawn", "mix", "floor", "mask", "SPARTA", "SPARTA derived", "all-reduce"]


def build(name: str) -> nn.Module:
    model = MODELS[name]()
    if name == "ResNet-18":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, started together on all processes."""
    return clocks(call, device)[0]


def clocks(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """How long a call takes, started together on all processes, and how long this process's threads compute."""
    if dist.is_initialized():
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, busy = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy


class Floor:
    """The bare transfer of as many values: nothing is checked, ordered or counted."""

    def __init__(self, tensors: Sequence[torch.Tensor], counts: list[int], device: torch.device):
        generator = np.random.default_rng(0)
        places = [np.sort(generator.choice(t.numel(), k, replace=False)) for t, k in zip(tensors, counts, strict=True)]
        used = [(t.detach().view(-1), p) for t, p in zip(tensors, places, strict=True) if len(p)]
        self.size = sum(len(p) for _, p in used)
        self.send, self.receive = (torch.zeros(self.size, device=device) for _ in range(2))
        # Its own values come back, so that the model stays what it is.
        bounds = np.cumsum([0, *(len(p) for _, p in used)])
        self.pieces: list[tuple[Any, ...]]  # NumPy's arrays or torch's
        if device.type == "cpu":
            send, receive = self.send.numpy(), self.receive.numpy()
            self.pieces = [
                (t.numpy(), p, send[a:b], receive[a:b])
                for (t, p), a, b in zip(used, bounds[:-1], bounds[1:], strict=True)
            ]
        else:
            self.pieces = [
                (t, torch.from_numpy(p).to(device), self.send[a:b], self.receive[a:b])
                for (t, p), a, b in zip(used, bounds[:-1], bounds[1:], strict=True)
            ]
        self.on_host = device.type == "cpu"

    def __call__(self):
        for tensor, places, out, _ in self.pieces:
            if self.on_host:
                tensor.take(places, out=out, mode="clip")
            else:
                torch.index_select(tensor, 0, places, out=out)
        if dist.is_initialized():
            world, rank = dist.get_world_size(), dist.get_rank()
            split = [self.size // (world - 1)] * world
            split[rank] = 0
            split[(rank + 1) % world] += self.size - sum(split)
            received = list(split)
            # Sizes have to match between each pair; the remainder goes round the ring.
            extra = self.size % (world - 1) if world > 1 else 0
            received[(rank + 1) % world] -= extra
            received[(rank - 1) % world] += extra
            dist.all_to_all_single(
                self.receive.view(torch.uint8),
                self.send.view(torch.uint8),
                [4 * n for n in received],
                [4 * n for n in split],
            )
        else:
            self.receive.copy_(self.send)
        for tensor, places, _, new in self.pieces:
            tensor[places] = new


def sparta(parameters: list[torch.Tensor], probability: float, broadcast: bool) -> None:
    """Averages a random fraction of each tensor, with a mask as large as the tensor."""
    for parameter in parameters:
        mask = torch.bernoulli(torch.full(parameter.shape, probability, device=parameter.device)).bool()
        if broadcast:
            dist.broadcast(mask, 0)
        selected = parameter.data[mask]
        dist.all_reduce(selected)
        parameter.data.masked_scatter_(mask, selected / dist.get_world_size())


def extra_memory(mixer: WashMixer, step: int, device: torch.device) -> int:
    """The peak of the bytes that a shuffle takes: on the GPU, or else in NumPy's arrays and Python's objects."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        tracemalloc.start()
    mixer.mix(step)
    mixer.prepare(step + 1)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() - before
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(name: str, probability: float, with_state: bool, rounds: int, device: torch.device, local: int) -> dict:
    torch.manual_seed(0)
    members = [build(name).to(device) for _ in range(local)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.0, weight_decay=0.0) for m in members]
    for member, optimizer in zip(members, optimizers, strict=True):
        for parameter in member.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    world = dist.get_world_size() if dist.is_initialized() else 1
    num_members = world * local
    mixer = WashMixer(members, optimizers, probability=probability, shuffle_optimizer_state=with_state)
    mixer.mix(0)

    layers, by_layer = shuffled_layers(members[0]), layer_probabilities(members[0], probability)
    tensors = [p for owned in layers.values() for p in owned.values()]
    rates = [by_layer[layer] for layer, owned in layers.items() for _ in owned]
    sizes = [t.numel() for t in tensors]
    large_population = Planner(1, sizes, rates, 10)
    counts = [round(r * s * (num_members - 1) / num_members) for r, s in zip(rates, sizes, strict=True)]
    floor_tensors = [t for m in members for owned in shuffled_layers(m).values() for t in owned.values()]
    floor_counts = counts * local
    if with_state:
        for m, optimizer in zip(members, optimizers, strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                floor_tensors += [optimizer.state[p][key] for p in m.parameters()]
                floor_counts += counts
    touched = [t.detach() for t in floor_tensors]
    flat = torch.zeros(sum(sizes), device=device)
    dense = torch.empty(sum(sizes), device=device)
    times: dict[str, list[float]] = {}

    def note(what: str, call: Callable[..., object], *arguments: object) -> None:
        # What an optimizer step does to the caches, before everything that is measured alike.
        torch._foreach_mul_(touched, 1.0)
        times.setdefault(what, []).append(seconds(lambda: call(*arguments), device))

    for step in range(10, 10 * (rounds + 1), 10):
        note("plan", mixer.prepare, step)
        if num_members == 2:
            note("plan N = 10", large_population.draw, step)
        floor = Floor(floor_tensors, floor_counts, device)
        # In turn, because the second of two similar things finds code and page tables where the first had to look.
        pair: list[tuple] = [("mix drawn", mixer.mix, step), ("floor", floor)]
        for what, *call in pair if step % 20 else reversed(pair):
            note(what, *call)
        note("mask", dense.bernoulli_, probability)
        # Another plan than the one that is asked for next: it is drawn within the call.
        mixer.prepare(step + 1)
        note("mix", mixer.mix, step + 2)
        mixer.prepare(step + 3)
        if dist.is_initialized():
            note("all-reduce", dist.all_reduce, flat)
    if dist.is_initialized() and not with_state:
        for _ in range(3):
            note("SPARTA", sparta, tensors, probability, True)
            torch.manual_seed(0)
            note("SPARTA derived", sparta, tensors, probability, False)

    medians = {what: 1000 * statistics.median(values) for what, values in times.items()}
    best = {what: 1000 * min(values) for what, values in times.items()}
    ratios = [a / b for a, b in zip(times["mix drawn"], times["floor"], strict=True)]
    medians["mix drawn / floor"], best["mix drawn / floor"] = (
        statistics.median(ratios),
        best["mix drawn"] / best["floor"],
    )
    if dist.is_initialized():
        gathered: list = [None] * world
        dist.all_gather_object(gathered, (medians, best))
        medians, best = ({k: max(g[i][k] for g in gathered) for k in medians} for i in range(2))
    stats = mixer.mix(1)
    share = 100 * extra_memory(mixer, 2, device) / sum(t.nbytes for t in touched)
    return {
        "model": name,
        "parameters": sum(sizes),
        "probability": probability,
        "optimizer_state": with_state,
        "num_members": num_members,
        "num_processes": world,
        "values_moved_per_member": stats.population_values_moved / num_members,
        "bytes_sent_by_a_process": stats.bytes_sent,
        "memory_percent": share,
        "median_ms": medians,
        "fastest_ms": best,
    }


class Bare:
    """What a mixer that averages cannot do without: a collective of as many bytes, and reading and writing members."""

    def __init__(self, what: str, tensors: list[torch.Tensor], size: int, values: int):
        self.tensors, self.pairs = tensors, what == "PAPA-2"
        self.bucket, self.incoming = (torch.zeros(max(1, size), device=tensors[0].device) for _ in range(2))
        self.split = [size * (process != dist.get_rank()) for process in range(dist.get_world_size())]
        self.few, self.values, self.generator = what == "SPARTA", values, np.random.default_rng(0)
        if self.few:
            # One array of the size of the model, on the host.
            self.flat = np.zeros(sum(tensor.numel() for tensor in tensors), dtype=np.float32)
        else:
            sizes = [tensor.numel() for tensor in tensors]
            parts = self.bucket.new_zeros(sum(sizes)).split(sizes)
            self.parts = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def begin(self) -> None:
        """Other places than the last time, which would still be in the processor's cache."""
        if self.few:
            self.flat *= 1.0
            self.places = np.sort(self.generator.integers(0, len(self.flat), self.values))

    def collective(self) -> None:
        if self.pairs:
            dist.all_to_all_single(self.incoming, self.bucket, self.split, self.split)
        else:
            dist.all_reduce(self.bucket)

    def floor(self) -> None:
        """The collective, with one read and one write of what is averaged, and nothing checked."""
        if self.few:
            values = self.bucket.numpy()[: len(self.places)]
            self.flat.take(self.places, out=values, mode="clip")
            self.collective()
            self.flat[self.places] = values
            return
        torch._foreach_copy_(self.parts, self.tensors)
        self.collective()
        torch._foreach_copy_(self.tensors, self.parts)


def measure_averaging(name: str, rounds: int, device: torch.device) -> list[dict]:
    """One exchange of each mixer that averages, beside a bare collective of as many bytes and its floor."""
    torch.manual_seed(0)
    member = build(name).to(device)
    optimizer = torch.optim.SGD(member.parameters(), lr=0.1)
    mixers = {
        "local SGD": PeriodicAverageMixer(member, interval=1),
        "PAPA": PapaMixer(member, optimizer, interval=1),
        "PAPA-2": PairAverageMixer(member, interval=1),
        "SPARTA": SpartaMixer(member, probability=0.005),
        "DiLoCo": DilocoMixer(member, interval=1),
    }
    tensors = [p.detach() for p in member.parameters()]
    world, rows = dist.get_world_size(), []
    for what, mixer in mixers.items():
        stats = mixer.mix(1)
        # A ring of W sends 2·(W − 1)/W of what is reduced.
        size = stats.bytes_sent if what == "PAPA-2" else stats.bytes_sent * world // (2 * (world - 1))
        bare = Bare(what, tensors, size // 4, stats.values_moved)
        times: dict[str, list[tuple[float, float]]] = {"collective": [], "floor": [], "exchange": []}
        ahead = []
        for step in range(2, rounds + 2):
            calls: dict[str, Callable[[], object]] = {
                "collective": bare.collective, "floor": bare.floor, "exchange": functools.partial(mixer.mix, step),
            }  # fmt: skip
            for kind in calls if step % 2 else reversed(calls):
                bare.begin()
                torch._foreach_mul_(tensors, 1.0)
                times[kind].append(clocks(calls[kind], device))
            if isinstance(mixer, SpartaMixer):
                # In training it is drawn while the members compute.
                begun = time.perf_counter()
                mixer.prepare(step + 1)
                ahead.append(1000 * (time.perf_counter() - begun))
        gathered: list = [None] * world
        dist.all_gather_object(gathered, times)
        row: dict[str, Any] = {"model": name, "mixer": what, "bytes_sent": stats.bytes_sent}
        row["drawing_ahead_ms"] = statistics.median(ahead) if ahead else None
        for kind in times:
            # As long as the slowest process takes, and the processor's time of all of them.
            every = np.array([own[kind] for own in gathered])  # process, round, clock
            for clock, found in (("wall", every[..., 0].max(axis=0)), ("cpu", every[..., 1].sum(axis=0))):
                low, quartile, median = (1000 * np.quantile(found, [0, 0.25, 0.5])).tolist()
                row[f"{kind}_{clock}_ms"] = {"fastest": low, "quartile": quartile, "median": median}
        rows.append(row)
    return rows


def print_averaging(row: dict | None) -> None:
    """A row of the second table, or its head."""
    kinds = ["collective", "floor", "exchange"]
    columns = [*kinds, "÷ collective", "÷ floor", "median: ÷ collective", "÷ floor",
               *(f"CPU: {kind}" for kind in kinds), "÷ collective", "÷ floor"]  # fmt: skip
    if row is None:
        print(
            "\nms: the lower quartile of the slowest process, and beside it the ratios of the medians. CPU: the lower "
            f"quartile of\nall processes together.\n\n| model | mixer | MB sent | {' | '.join(columns)} |\n"
            + "|---" * (3 + len(columns)) + "|"
        )  # fmt: skip
        return
    cells = [row["bytes_sent"] / 1e6]
    for clock, which, shown in (("wall", "quartile", True), ("wall", "median", False), ("cpu", "quartile", True)):
        bare, floor, exchange = (row[f"{kind}_{clock}_ms"][which] for kind in kinds)
        cells += [bare, floor, exchange] * shown + [exchange / bare, exchange / floor]
    print(f"| {row['model']} | {row['mixer']} | {' | '.join(f'{cell:.3g}' for cell in cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--probabilities", nargs="+", type=float, default=[0.001, 0.05])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--members_per_process", type=int, help="default: 1 with several processes, else 2")
    parser.add_argument("--averaging_only", action="store_true", help="only the table of the mixers that average")
    parser.add_argument("--json", help="where to write all numbers")
    args = parser.parse_args()

    distributed = "RANK" in os.environ
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    local = args.members_per_process or (1 if distributed else 2)
    results = []
    machine = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, torch {torch.__version__}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    first = not distributed or dist.get_rank() == 0
    if first and not args.averaging_only:
        print(f"{machine}; {os.environ.get('WORLD_SIZE', 1)} processes, {local} members each; medians in ms\n")
        columns = [*COLUMNS, "plan N = 10", "mix drawn / floor"]
        print("| model | p | state | " + " | ".join([*columns, "memory, %"]) + " |")
        print("|---|---|---|" + "---|" * (len(columns) + 1))
    for name in args.models if not args.averaging_only else ():
        for probability in args.probabilities:
            for with_state in (False, True):
                result = measure(name, probability, with_state, args.rounds, device, local)
                results.append(result)
                if first:
                    row = [*(result["median_ms"].get(column) for column in columns), result["memory_percent"]]
                    cells = " | ".join("" if value is None else f"{value:.3g}" for value in row)
                    print(f"| {name} | {probability} | {'Adam' if with_state else 'no'} | {cells} |", flush=True)
    averaging = []
    if distributed and local == 1:
        if first:
            print_averaging(None)
        for name in args.models:
            for found in measure_averaging(name, args.rounds, device):
                averaging.append(found)
                if first:
                    print_averaging(found)
    if first and args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "results": results, "averaging": averaging}, file, indent=2)
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
