"""The ops at given sizes, for benchmarks and tuning: inputs, a call, the same in fp64, the work no call avoids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.timing import Work
from fastcr.kernels.spec import Normal, OpSpec, Sizes, every_op

# relative to the exact result, in the Euclidean norm: a near tie between detectors may fall the other way
TOLERANCE = {"fp32": 1e-3, "16 bits": 1e-2}
OPS = every_op()
Inputs = dict[str, Any]


class Workload(NamedTuple):
    """One op at given sizes; in `training` its backward follows."""

    op: str
    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16
    training: bool = False
    options: Mapping[str, Any] = {}

    def __str__(self) -> str:
        sizes = "-".join(f"{letter}{size}" for letter, size in self.sizes.items() if letter not in "CDK")
        stopped = "-stopped" if self.options.get("stop_gradient") else ""
        dtype = "-fp32" if self.dtype == torch.float32 else ""
        return f"{self.op}-{'training' if self.training else 'forward'}-{sizes}{stopped}{dtype}"

    @property
    def spec(self) -> OpSpec:
        """The op's entry."""
        return OPS[self.op]

    @property
    def input_bytes(self) -> int:
        """Of what is large: the features, or the queue; the forward reads it once."""
        return self.spec.bytes(self.sizes, self.dtype.itemsize, False)

    @property
    def floor(self) -> Work:
        """Least bytes moved, and FLOPs where they may take longer."""
        return Work(self.spec.bytes(self.sizes, self.dtype.itemsize, self.training), self.spec.flops(self.sizes))

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Random inputs of these sizes."""
        random = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=random, device=device, dtype=dtype)

        return self.drawn(normal)

    def drawn(self, normal: Normal) -> Inputs:
        """Inputs of these sizes out of what `normal` gives."""
        return self.spec.inputs(self.sizes, self.dtype, normal)

    def run(self, function: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, ...]:
        """Outputs of the op or its reference; in training also the gradients by what learns."""
        leaves = {name: inputs[name].detach().requires_grad_(self.training) for name in self.spec.learns}
        outputs = function(**inputs | leaves, **self.options)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        if not self.training:
            return outputs
        by = torch.autograd.grad(outputs[0].sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        return *(output.detach() for output in outputs), *by

    def exact(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What `run` gives in fp64."""
        return self.run(self.spec.reference, {name: _wide(value) for name, value in inputs.items()})

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


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
