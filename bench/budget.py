"""`python bench/budget.py [PRESET] [--batch 64 256]`: what a training step has to do, counted operation by operation.

The step is the one that `fastcr train` builds, run on shapes alone (torch's fake tensors) with the fused ops as
kernels. Nothing is assumed about which operations are called: each is seen as torch dispatches it. Of each the launches
are counted, the bytes of the tensors that it takes and gives in their own dtypes, and the FLOPs at the rate of its own
dtype. The prediction is the longer of the two times, summed: a floor for this sequence of operations on one H200, with
copies at 4.3 TB/s, products of 16 bits at 780 TFLOP/s, of 32 bits at 51. A launch takes no time in it.

`fused` is the same without the elementwise operations and copies inside the encoders, which `torch.compile` joins to
their neighbours; it is on by default on a GPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # the ops then take tensors of a CPU as kernels' inputs; none is run on shapes

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `bench`, when this file is run as a script

from fastcr.config import Config, number, tyro
from fastcr.data.views import Batch
from fastcr.kernels.spec import every_op
from fastcr.method import build as method_build
from fastcr.presets import preset
from fastcr.runs.command_line import called, one_line_errors, parse
from fastcr.runs.context import Context

COPY, PRODUCTS = 4.3e12, {2: 780e12, 4: 51e12}  # bytes a second; FLOPs a second by the bytes of an element
ENCODERS = ("key forward", "query forward", "backward")  # phases whose elementwise operations are compiled
NOTHING = ("empty", "detach", "prim::", "profiler::", "promote_types", "new_empty")  # launch no kernel
HEAVY = ("convolution", "mm", "fastcr", "pool", "_fused", "_foreach")  # not joined to a neighbour


@dataclass(frozen=True)
class BudgetConfig:
    """Which step."""

    preset: tyro.conf.Positional[str] = "folder"
    """The preset whose step it is."""
    batch: tuple[int, ...] = number((64, 256), 2)
    """Images a step."""
    image_size: int = number(224, 32)
    """Side of the views, pixels."""
    json: Path | None = None
    """Also write the figures to this file."""


class Count(NamedTuple):
    """Of one operation in one phase: how often, and what it takes."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def __add__(self, other: Any) -> Count:
        return Count(*map(sum, zip(self, other, strict=True)))


class Counting(TorchDispatchMode):
    """Counts every operation of a step, by phase (`record_function`) and name."""

    def __init__(self) -> None:
        super().__init__()
        self.phases, self.found = ["other"], defaultdict[tuple[str, str], Count](Count)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on shapes, and count it."""
        out, name = func(*args, **(kwargs or {})), func.name()
        if name.startswith("profiler::_record_function_enter"):
            self.phases.append(args[0].partition("#")[0])
        elif name.startswith("profiler::_record_function_exit"):
            self.phases.pop()
        elif not func.is_view and not any(part in name for part in NOTHING):
            tensors = {id(each): each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)}
            moved = sum(each.numel() * each.element_size() for each in tensors.values())
            flops, first = self.flops(func, args, kwargs, out), next(iter(tensors.values()), None)
            rate = PRODUCTS[2 if first is not None and first.element_size() == 2 else 4]
            self.found[self.phases[-1], name] += Count(1, moved, flops, max(moved / COPY, flops / rate))
        return out

    @staticmethod
    def flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
        """FLOPs of a product or convolution, or of one of our ops as its entry says."""
        if func._overloadpacket in flop_registry:
            return flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        if func.name() in ("fastcr::relational", "fastcr::info_nce"):
            query, queue = args[0], args[2]
            sizes = {"B": len(query), "D": query.shape[1], "N": len(queue)}
            return every_op()[func.name().removeprefix("fastcr::")].flops(sizes)
        return 0


def count_step(config: Config, batch: int) -> dict[tuple[str, str], Count]:
    """The operations of a step in the middle of a training, by phase and name."""
    run = replace(config.run, kernels="triton", compile=False, cuda_graph=False)
    config = replace(config, run=run, model=replace(config.model, weights="none", batchnorm=config.model.norms))
    config = replace(config, optim=replace(config.optim, batch_size=batch))
    dtype, sides = torch.bfloat16, (config.data.image_size, config.key_size)
    made = method_build._modules(config, Context(dtype=dtype), False)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch.object(method_build, "_modules", return_value=made),  # copies of shapes alone cannot be made
        ):
            training = method_build.build(config, Context(dtype=dtype))
            training.moco.keep_frozen(dtype)
            views = [torch.empty(batch, side, side, 3, dtype=dtype).permute(0, 3, 1, 2) for side in sides]
            given = Batch(views[0], views[1], torch.zeros(batch, dtype=torch.int64))
            training.step(given)  # the optimiser makes its buffers
            with Counting() as counting:
                training.step(given)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    return dict(counting.found)


def fused(phase: str, name: str) -> bool:
    """Whether `torch.compile` joins the operation to another."""
    return phase in ENCODERS and not any(part in name for part in HEAVY)


def table(found: dict[tuple[str, str], Count], title: str) -> Table:
    """The phases' sums, and every operation of the phases that are the method's own."""
    shown = Table(title=title, title_justify="left")
    for column in ("phase", "operation", "launches", "MB", "GFLOP", "predicted, us", "fused, us"):
        left = column in ("phase", "operation")
        shown.add_column(column, justify="left" if left else "right", no_wrap=left)
    for phase in dict.fromkeys(phase for phase, _ in found):
        own = {name: count for (where, name), count in found.items() if where == phase}
        add_row(shown, phase, "", own, phase)
        for name in own if phase not in ENCODERS else ():
            add_row(shown, "", name.removeprefix("aten::"), {name: own[name]}, phase)
    return shown


def add_row(shown: Table, first: str, second: str, counts: dict[str, Count], phase: str) -> None:
    """Add the sum of some operations of a phase to the table."""
    total = sum(counts.values(), Count())
    least = sum(count.seconds for name, count in counts.items() if not fused(phase, name))
    figures = total.bytes / 1e6, total.flops / 1e9, total.seconds * 1e6, least * 1e6
    shown.add_row(first, second, str(total.launches), *(f"{figure:.1f}" for figure in figures))


def main(args: Sequence[str] | None = None) -> None:
    """Count the steps that `args` ask for."""
    with one_line_errors("bench/budget.py"):
        config = parse(BudgetConfig, args, prog=called("bench/budget.py"), description=__doc__)
        wanted, console, kept = preset(config.preset), Console(width=100), {}
        wanted = replace(wanted, data=replace(wanted.data, image_size=config.image_size))
        for batch in config.batch:
            found = count_step(wanted, batch)
            console.print(
                table(found, f"{config.preset}, {wanted.model.backbone}, {config.image_size} px, batch {batch}")
            )
            total = sum(found.values(), Count())
            least = sum(count.seconds for (phase, name), count in found.items() if not fused(phase, name))
            console.print(
                f"{total.launches} launches; predicted {total.seconds * 1e3:.2f} ms, fused {least * 1e3:.2f} ms: "
                f"{batch / total.seconds:,.0f} and {batch / least:,.0f} pairs/s\n"
            )
            operations = {f"{phase}: {name}": count._asdict() for (phase, name), count in found.items()}
            kept[batch] = total._asdict() | {"fused_seconds": least, "operations": operations}
        if config.json:
            config.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
