"""One entry for each fused op, in the op's own file: how it is launched, called on examples, and counted.

Tests and benchmarks go over `every_op()`, so an op with an entry is tuned, compiled for all targets and timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastcr.kernels.settings import TABLE, Settings

Sizes = Mapping[str, int]  # by the letters of the op's docstring
Normal = Callable[..., Tensor]  # `normal(*shape, dtype=torch.float32)` gives random numbers, wherever they are wanted
OPS: dict[str, OpSpec] = {}


@dataclass(frozen=True)
class Example:
    """A call of an op: its sizes, and options that it gets by name."""

    sizes: Sizes
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpSpec:
    """What tests and benchmarks have to know of an op."""

    op: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Sizes, torch.dtype, Normal], dict[str, Any]]
    """Example arguments by name; what is large is in the dtype."""
    usual: tuple[Example, ...]
    """Calls of a training with ResNet-50: they are timed, and compiled first."""
    bytes: Callable[[Sizes, int, bool], int]
    """Least bytes moved, from the bytes of an element and whether the backward follows."""
    flops: Callable[[Sizes], int] = lambda sizes: 0
    """FLOPs of the equation, where they may take longer than the bytes."""
    learns: tuple[str, ...] = ()
    """Inputs that get gradients, from the first result and others that carry one."""
    others: tuple[Example, ...] = ()
    """Further calls to compile: with `usual` they use every row of the launch settings and every branch of a kernel."""
    kernels: Mapping[str, dict[str, Settings]] = field(default_factory=dict)
    """Launch settings by kernel and class of shape."""
    rows: Callable[[Sizes, torch.dtype], dict[str, str]] = lambda sizes, dtype: {}
    """The class that a call, forward and backward, has in each of `kernels`."""

    def __post_init__(self) -> None:
        TABLE.update(self.kernels)
        OPS[self.op.__name__] = self


def every_op() -> dict[str, OpSpec]:
    """The entries of all ops, by name."""
    for file in sorted(Path(__file__).parent.glob("*.py")):
        import_module(f"fastcr.kernels.{file.stem}")
    return OPS


def draw_maps(sizes: Sizes, dtype: torch.dtype, normal: Normal) -> dict[str, Tensor]:
    """Channels-last features `[B,C,H,W]`, `S = H W` as square as it goes, and a gradient `[B,C]` in fp32."""
    positions = sizes["S"]
    height = next(side for side in range(round(positions**0.5), 0, -1) if positions % side == 0)
    features = normal(sizes["B"], height, positions // height, sizes["C"], dtype=dtype).permute(0, 3, 1, 2)
    return {"features": features, "gradient": normal(sizes["B"], sizes["C"])}


def draw_detectors(sizes: Sizes, normal: Normal) -> dict[str, Tensor]:
    """Detectors `[K,C]` that give logits of about 1, and their bias, in fp32 as in training."""
    weights = normal(sizes["K"], sizes["C"]).div_(sizes["C"] ** 0.5)
    return {"detectors": weights, "bias": normal(sizes["K"]).mul_(0.1)}


def draw_units(sizes: Sizes, dtype: torch.dtype, normal: Normal) -> dict[str, Tensor]:
    """Queries and keys `[B,D]` and a queue `[N,D]` of unit length."""
    rows = {"query": sizes["B"], "key": sizes["B"], "queue": sizes["N"]}
    return {name: normalize(normal(n, sizes["D"]), dim=1).to(dtype) for name, n in rows.items()}


# sizes of the ops with detectors: ResNet-50 at 224 and 448 px; and for every other class of shape
USUAL_MAPS = tuple({"B": 256, "C": 2048, "S": positions, "K": 32} for positions in (49, 196))
OTHER_MAPS = tuple(
    {"B": batch, "C": 2048, "S": positions, "K": detectors}
    for batch, positions, detectors in ((256, 196, 64), (64, 784, 32), (64, 1600, 128), (64, 4096, 5))
)
