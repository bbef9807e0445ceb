"""The ops at given sizes, for benchmarks and tuning: inputs, a call, the same in fp64, the bytes no call avoids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import Work
from fastcr.kernels.common_weights import common_weights, common_weights_reference
from fastcr.kernels.info_nce import info_nce, info_nce_reference
from fastcr.kernels.neighbour import neighbour, neighbour_reference
from fastcr.kernels.rationale_fit import rationale_fit, rationale_fit_reference
from fastcr.kernels.rationale_pool import rationale_pool, rationale_pool_reference
from fastcr.kernels.relational import relational, relational_reference

OPS: dict[str, Callable[..., Any]] = {
    "fit": rationale_fit,
    "pool": rationale_pool,
    "common": common_weights,
    "contrast": info_nce,
    "relational": relational,
    "neighbour": neighbour,
}
REFERENCES: dict[str, Callable[..., Any]] = {
    "fit": rationale_fit_reference,
    "pool": rationale_pool_reference,
    "common": common_weights_reference,
    "contrast": info_nce_reference,
    "relational": relational_reference,
    "neighbour": neighbour_reference,
}
QUEUED = ("contrast", "relational", "neighbour")  # go over a queue of keys; the others over maps
PER_IMAGE = {"features", "gradient", "query", "key", "images"}
CHUNK = 16  # images at a time in fp64
# relative to the exact result, in the Euclidean norm: a near tie between detectors may fall the other way
TOLERANCE = {"fp32": 1e-3, "16 bits": 1e-2}

Inputs = dict[str, Tensor]


class Workload(NamedTuple):
    """One op at given sizes; `positions` is S of the maps or N, the length of the queue, `channels` C or D."""

    op: Literal["fit", "pool", "common", "contrast", "relational", "neighbour"]
    way: Literal["forward", "training"]
    """training: forward and backward; there is none of `common`."""
    batch: int
    positions: int
    channels: int
    detectors: int = 32
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.op}-{self.way}-B{self.batch}-{'N' if self.op in QUEUED else 'S'}{self.positions}"

    @property
    def input_bytes(self) -> int:
        """Of what is large: the features, or the queue."""
        images = 1 if self.op in QUEUED else self.batch
        return images * self.positions * self.channels * self.dtype.itemsize

    @property
    def floor_bytes(self) -> int:
        """Least bytes moved. Forward: features (queue) once. Backward: features read, their gradient written.

        The backward of `pool` reads the features twice: every place's gradient depends on all of them.
        """
        passes = {"fit": 3, "pool": 4}.get(self.op, 1) if self.way == "training" else 1
        return passes * self.input_bytes

    @property
    def floor(self) -> Work:
        """Least bytes moved, and FLOPs where they may take longer: of `contrast`, `4 B N D` for logits and gradient."""
        # FLOPs an image and element of the inputs: similarities and weighted sums, of queries and of keys
        each = self.batch * {"contrast": 4, "relational": 8, "neighbour": 6}.get(self.op, 0)
        return Work(self.floor_bytes, each * (self.input_bytes // self.dtype.itemsize))

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Random inputs of these sizes: channels-last features, or unit vectors."""
        random = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=random, device=device, dtype=dtype)

        if self.op in QUEUED:
            rows = {"query": self.batch, "key": self.batch, "queue": self.positions}
            units = {name: F.normalize(normal(n, self.channels), dim=1).to(self.dtype) for name, n in rows.items()}
            if self.op == "contrast":
                return units
            keys = torch.arange(self.positions, device=device)  # a queue that holds a key of every image
            return units | {"images": keys[torch.arange(self.batch) % self.positions], "queue_images": keys}
        side = next(a for a in range(round(self.positions**0.5), 0, -1) if self.positions % a == 0)
        features = normal(self.batch, side, self.positions // side, self.channels, dtype=self.dtype).relu_()
        maps, gradient = features.permute(0, 3, 1, 2), {"gradient": normal(self.batch, self.channels)}
        if self.op == "common":
            return {"features": maps} | gradient
        inputs = {
            "features": maps,
            "detectors": normal(self.detectors, self.channels) / self.channels**0.5,
            "bias": 0.1 * normal(self.detectors),  # where one detector wins everywhere, the gradient by the bias is 0
        }
        return inputs | (gradient if self.op == "fit" else {})

    def run(self, function: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, ...]:
        """Outputs of the op or its reference; in training also the gradients by features, detectors, bias or query."""
        options = {"pool_weight": 1 / self.batch} if self.op == "fit" else {}
        if self.way == "forward":
            with torch.no_grad():
                outputs = function(**inputs, **options)
            return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        wanted = ("query",) if self.op in QUEUED else ("features", "detectors", "bias")
        leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
        outputs = function(**inputs | leaves, **options)
        first = outputs if self.op == "contrast" else outputs[0]
        return first.detach(), *torch.autograd.grad(first.sum(), list(leaves.values()))

    def exact(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What `run` gives in fp64: some images at a time, what they share added up."""
        parts = list(self._exact_parts(inputs))
        of_maps = {2, 3} if self.way == "training" and self.op not in QUEUED else set()
        shared = {0} if self.op == "common" else of_maps
        columns = list(zip(*parts, strict=True))
        return tuple(
            torch.stack(column).sum(0) if i in shared else torch.cat(column) for i, column in enumerate(columns)
        )

    def _exact_parts(self, inputs: Inputs) -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, self.batch, CHUNK):
            part = {
                name: tensor[start : start + CHUNK] if name in PER_IMAGE else tensor for name, tensor in inputs.items()
            }
            part = {name: each.double() if each.is_floating_point() else each for name, each in part.items()}
            yield self.run(REFERENCES[self.op], part)

    def error(self, got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
        """Largest error of a result relative to its norm; infinite where a result is not finite."""
        return max(
            ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).nan_to_num(torch.inf).item()
            for a, b in zip(got, exact, strict=True)
        )

    @property
    def tolerance(self) -> float:
        """What `error` may come to."""
        return TOLERANCE["fp32" if self.dtype == torch.float32 else "16 bits"]
