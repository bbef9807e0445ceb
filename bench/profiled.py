"""A recorded trace taken apart: what each phase and each kernel of a step took, and the work of each kernel."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from bench.budget import PASSES, Ceilings, Count, Work, size

BETWEEN, WAITING, LOAD = "between", "waiting", "load"
MOST = 0.8  # of a time that must be accounted for, for a rate to be told
INPUTS = ("Input type", "Input Dims", "Input Strides", "Concrete Inputs")  # of a call, as the profiler names them
LAUNCHES = ("cuda_runtime", "cuda_driver")

Event = dict[str, Any]  # of a Chrome trace; times in microseconds


class Leaf(NamedTuple):
    """A kernel's run on the device; on the CPU an operator's call, less what it called in turn."""

    name: str
    time: float  # microseconds
    phase: str
    call: Event | None  # of the operator it belongs to


class Recorded(NamedTuple):
    """A trace taken apart; times are of all its steps, in microseconds."""

    cuda: bool
    steps: int
    span: float
    host: dict[str, float]
    leaves: list[Leaf]


class Row(NamedTuple):
    """A phase, or a kernel with its calls: milliseconds a step, and its work where known."""

    name: str
    host_ms: float | None
    device_ms: float
    share: float  # of the step
    work: Work | None
    timed_ms: float  # of the device's, that in which the work was done
    calls: float | None = None

    def floor_ms(self, ceilings: Ceilings) -> float | None:
        """Milliseconds the work takes at least; None where it is not known."""
        return self.work.floor(ceilings) * 1e3 if self.work and any(self.work) else None


def take_apart(events: Sequence[Event], phases: Sequence[str]) -> Recorded:
    """Steps, phases and leaves of a Chrome trace made by `record`."""
    spans = [event for event in events if event.get("ph") == "X"]
    notes = sorted((e for e in spans if e["cat"] == "user_annotation"), key=lambda e: e["ts"])
    marks = [e for e in notes if e["name"].startswith("ProfilerStep#")]
    start, end, main = marks[0]["ts"], marks[-1]["ts"] + marks[-1]["dur"], marks[0]["tid"]
    autograd = {event["tid"] for event in spans if event["name"].startswith("autograd::engine::")}
    ranges = [e for e in notes if e["tid"] == main and e["name"] in phases]
    host: dict[str, float] = defaultdict(float)
    for event in ranges:
        host[event["name"]] += event["dur"]
    kernels = [event for event in spans if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    cuda = bool(kernels)

    launches: dict[int, tuple[str, Event | None]] = {}
    leaves = []
    for event, above, own in nested(spans):
        at = event["ts"]
        if event["tid"] == main or event["tid"] in autograd:  # the main thread waits for autograd's in the phase
            phase = next((e["name"] for e in ranges if e["ts"] <= at < e["ts"] + e["dur"]), BETWEEN)
        else:
            phase = LOAD
        calls = [e for e in (*above, event) if e["name"].startswith(("aten::", "fastcr::", "triton_"))]
        call = next((e for e in calls if not is_composite(e["name"])), None)
        if event["cat"] in LAUNCHES:
            launches[event["args"].get("correlation")] = phase, call
        elif event["cat"] == "cpu_op" and not cuda and start <= at < end:
            leaves.append(Leaf(event["name"], own, phase, call))
    for event in kernels:  # what was launched before the recording began can only be the loader's
        launched = launches.get(event["args"].get("correlation"), (LOAD, None))
        leaves.append(Leaf(event["name"], event["dur"], *launched))
    return Recorded(cuda, len(marks), end - start, host, leaves)


def nested(spans: Sequence[Event]) -> Iterator[tuple[Event, list[Event], float]]:
    """Each event of the host's threads with those around it, outermost first, and its own time without those in it."""
    host = [e for e in spans if e["cat"] in ("cpu_op", "user_annotation", *LAUNCHES)]
    host.sort(key=lambda e: (str(e["tid"]), e["ts"], -e["dur"]))
    inside: dict[int, float] = defaultdict(float)
    around: list[list[Event]] = []
    stack: list[Event] = []
    for event in host:
        while stack and (stack[-1]["tid"] != event["tid"] or stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]):
            stack.pop()
        if stack:
            inside[id(stack[-1])] += event["dur"]
        around.append(list(stack))
        stack.append(event)
    for event, above in zip(host, around, strict=True):
        yield event, above, max(event["dur"] - inside[id(event)], 0.0)


def phase_rows(recorded: Recorded, work: Mapping[str, Work], *, graph: bool) -> list[Row]:
    """A row for each phase, for the loader, for what lies between, and for the whole step."""
    device: dict[str, float] = defaultdict(float)
    for leaf in recorded.leaves:
        device[leaf.phase] += leaf.time
    between = recorded.span - sum(recorded.host.values())
    whole, scale = Work.total(work.values()), 1e3 * recorded.steps

    def row(name: str, host: float | None, took: float, least: Work | None) -> Row:
        share = (took if recorded.cuda or host is None else host) / recorded.span
        return Row(name, None if host is None else host / scale, took / scale, share, least, took / scale)

    rows = [row(name, recorded.host[name], device[name], work.get(name)) for name in recorded.host]
    if device[LOAD]:
        rows.append(row(LOAD, None, device[LOAD], None))
    rows.append(row("CUDA graph" if graph else BETWEEN, between, device[BETWEEN], whole if graph else None))
    return [*rows, row("whole step", recorded.span, sum(device.values()), whole)]


def kernel_rows(recorded: Recorded) -> list[Row]:
    """The kernels (on the CPU operators) by time; with work where that of nearly all their time is known."""
    groups: dict[str, list[Leaf]] = defaultdict(list)
    for leaf in recorded.leaves:
        groups[leaf.name].append(leaf)
    works, per_step = leaf_works(recorded.leaves), 1 / recorded.steps
    rows = []
    for name, group in groups.items():
        known = [leaf for leaf in group if id(leaf) in works]
        took, timed = (sum(leaf.time for leaf in each) for each in (group, known))
        total = Work.total(works[id(leaf)] for leaf in known)
        work = Work(*(n // recorded.steps for n in total)) if timed >= MOST * took else None
        ms = (took * per_step / 1e3, timed * per_step / 1e3)
        rows.append(Row(name, None, ms[0], took / recorded.span, work, ms[1], len(group) * per_step))
    return sorted(rows, key=lambda row: -row.device_ms)


def leaf_works(leaves: Sequence[Leaf]) -> dict[int, Work]:
    """Work by the id of a leaf: an operator's, where one of its kernels takes most of its time."""
    signatures = {id(leaf.call): signature(leaf.call) for leaf in leaves if leaf.call}
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for leaf in leaves:
        if leaf.call:
            spent[signatures[id(leaf.call)]][leaf.name] += leaf.time
    longest = {key: max(names, key=names.__getitem__) for key, names in spent.items()}
    longest = {key: name for key, name in longest.items() if spent[key][name] >= MOST * sum(spent[key].values())}
    known: dict[str, Work | None] = {}
    works: dict[int, Work] = {}
    done = set()
    for leaf in leaves:
        if not leaf.call or id(leaf.call) in done or longest.get(key := signatures[id(leaf.call)]) != leaf.name:
            continue
        done.add(id(leaf.call))
        if key not in known:
            known[key] = recorded_work(leaf.call["name"], leaf.call.get("args", {}))
        if work := known[key]:
            works[id(leaf)] = work
    return works


def signature(call: Event) -> str:
    """What decides the work of a call: operator, shapes, dtypes, settings."""
    args = call.get("args", {})
    return f"{call['name']} {[args.get(key) for key in INPUTS]}"


RECORDED = {
    "float": torch.float32,
    "c10::BFloat16": torch.bfloat16,
    "c10::Half": torch.float16,
    "double": torch.float64,
}
RECORDED |= {"long int": torch.int64, "int": torch.int32, "unsigned char": torch.uint8, "bool": torch.bool}


@cache
def is_composite(name: str) -> bool:
    """Whether the profiler's `aten::name` only calls other operators (as conv2d does, casts of autocast among them)."""
    found = getattr(torch.ops.aten, name.removeprefix("aten::"), None) if name.startswith("aten::") else None
    return found is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        getattr(found, found.overloads()[0]).name(), "CompositeImplicitAutograd"
    )


def recorded_work(name: str, recorded: Mapping[str, Any]) -> Work | None:
    """Work of a call as the profiler recorded it, by running it on shapes alone; None where that cannot be told.

    Of a kernel that torch.compile generated: each tensor it takes once, a lower bound.
    """
    try:
        inputs = zip(*(recorded[key] for key in INPUTS), strict=True)
        values = [
            torch.empty_strided(dims, strides, dtype=RECORDED[kind], device="meta")
            if kind in RECORDED
            else ast.literal_eval(text) if text else None
            for kind, dims, strides, text in inputs
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError, RuntimeError, SyntaxError):
        return None
    if name.startswith("triton_"):
        return Work(size(values))
    namespace, _, op = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), op, None)
    for overload in (getattr(packet, each) for each in (packet.overloads() if packet else ())):
        arguments = overload._schema.arguments
        if len(arguments) != len(values):
            continue
        pairs = list(zip(arguments, values, strict=True))
        try:
            with Count(PASSES) as count:
                overload(*(v for a, v in pairs if not a.kwarg_only), **{a.name: v for a, v in pairs if a.kwarg_only})
        except Exception:  # another overload's arguments, or an operator that does not run on shapes
            continue
        return count.phases[""][0] if len(count.phases[""]) == 1 else None
    return None
