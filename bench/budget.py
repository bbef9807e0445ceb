"""The least work of a training step, phase by phase: what a trace's times are held against.

The step itself is run on shapes alone and every operation counted by the table below: bytes as they pass between the
device's memory and a kernel, in the dtypes that autocast gives, and FLOPs by `torch.utils.flop_counter`. What stays on
the chip (statistics, running means, indices of a max-pool) is not counted. What stays in a cache from one operation to
the next can be faster than these passes: small nets on a CPU are.

    operation            reads                                          writes
    convolution          input, weight                                  output
      backward           output gradient for each gradient asked for,   the gradients asked for
                         input for the weight's, weight for the input's
    batch normalisation  input twice: statistics, application           output
      backward           input and output gradient twice                input gradient
    ReLU, cast           nothing: in the pass before                    nothing
      backward           nothing                                        nothing
    sum of two           the second: the first is in the pass before    nothing
    max-pool             input                                          output
      backward           output gradient                                input gradient
    SGD with momentum    weight, gradient, momentum                     weight, momentum
    EMA                  key's weight, query's weight                   key's weight
    queue                new keys                                       their slots
    anything else        its arguments once                             its results
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.timing import Ceilings, Work, copy_bandwidth, matmul_rate
from fastcr.config import Config
from fastcr.data.views import Batch
from fastcr.method.build import build


def size(value: Any) -> int:
    """Bytes of the tensors in an argument or result; what is expanded counts once."""
    if isinstance(value, Tensor):
        sides = zip(value.shape, value.stride(), strict=True)
        return math.prod(side for side, stride in sides if stride or not side) * value.dtype.itemsize
    return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0


def _convolution_backward(args: Any, out: Any) -> int:
    by_output, images, weight = args[:3]
    reads = [by_output, weight] * (out[0] is not None) + [by_output, images] * (out[1] is not None)
    return size(reads) + size(out[:2])


Rule = Callable[[Any, Any], int]
# bytes from the arguments and the result; by default all of both
PASSES: dict[str, Rule] = {
    "aten.convolution": lambda args, out: size(args[:2]) + size(out),
    "aten.convolution_backward": _convolution_backward,
    "aten.native_batch_norm": lambda args, out: 2 * size(args[0]) + size(out[0]),
    "aten.native_batch_norm_backward": lambda args, out: 2 * size(args[:2]) + size(out[0]),
    "aten.max_pool2d_with_indices": lambda args, out: size(args[0]) + size(out[0]),
    "aten.max_pool2d_with_indices_backward": lambda args, out: size(args[0]) + size(out),
    "aten._fused_sgd_": lambda args, out: 2 * size(args[0]) + size(args[1]) + 2 * size(args[2]),
    "aten._foreach_lerp_": lambda args, out: 2 * size(args[0]) + size(args[1]),
    "aten.index_copy_": lambda args, out: 2 * size(args[3]),
    "aten.copy_": lambda args, out: size(args[:2]),
}
for name in ("empty", "empty_like", "empty_strided", "new_empty", "detach"):
    PASSES[f"aten.{name}"] = lambda args, out: 0
PASSES["aten.cudnn_batch_norm"] = PASSES["aten.native_batch_norm"]
PASSES["aten.cudnn_batch_norm_backward"] = PASSES["aten.native_batch_norm_backward"]
# in a step these are done in passing by the kernels before; on their own they move what they take and give
IN_PASSING: dict[str, Rule] = {
    f"aten.{name}": lambda args, out: 0 for name in ("relu", "relu_", "threshold_backward", "_to_copy")
}
IN_PASSING |= {f"aten.{name}": lambda args, out: size(args[1]) for name in ("add", "add_")}


def _fit_flops(features: Tensor, detectors: Tensor) -> int:
    return 2 * features.numel() * (len(detectors) + 1)  # every detector, and the gradient for GradCAM


FLOPS: dict[str, Callable[[Any], int]] = {
    "fastcr.info_nce": lambda args: 4 * args[0].numel() * len(args[2]),  # the logits, and the gradient by the query
    "fastcr.common_weights": lambda args: 4 * args[0].numel(),
    "fastcr.relational": lambda args: 8 * args[0].numel() * len(args[2]),  # the same of queries and of keys
    "fastcr.neighbour": lambda args: 6 * args[0].numel() * len(args[2]),
    "fastcr.rationale_fit": lambda args: _fit_flops(args[0], args[2]),
    "fastcr.rationale_fit_backward": lambda args: 2 * args[1].numel(),  # only the detector that won
}


class Count(TorchDispatchMode):
    """Adds up the work of what runs under it by its outermost `record_function` range ("" outside of all)."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.rules, self.ranges = rules, [""]
        self.phases: dict[str, list[Work]] = {"": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and count it."""
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), str(func.overloadpacket)
        if name == "profiler._record_function_enter_new":
            self.ranges.append(args[0])
            if len(self.ranges) == 2 and "#" not in args[0]:  # PyTorch's own names: Optimizer.zero_grad#SGD.zero_grad
                self.phases[args[0]] = self.phases.get(args[0], [])
        elif name == "profiler._record_function_exit":
            self.ranges.pop()
        elif func.namespace in ("aten", "fastcr") and not func.is_view:
            arguments = [*args, *kwargs.values()]
            moved = self.rules[name](args, out) if name in self.rules else size(arguments) + size(out)
            if name in FLOPS:
                flops = FLOPS[name](args)
            else:
                formula = flop_registry.get(func.overloadpacket)
                flops = formula(*args, **kwargs, out_val=out) if formula else 0
            phase = self.ranges[min(1, len(self.ranges) - 1)]
            self.phases[phase if phase in self.phases else ""].append(Work(moved, flops))
        return out


def step_work(config: Config, dtype: torch.dtype) -> dict[str, Work]:
    """Least work of each phase of a step as `config` says, with the encoders in `dtype`; "" is what lies between."""
    precision: Any = "fp32" if dtype == torch.float32 else "bf16"  # fp16 is as wide, and its scaler looks at values
    run = replace(config.run, precision=precision, compile=False, cuda_graph=False, overlap_keys=False)
    training = build(replace(config, run=run), torch.device("cpu"), Console(quiet=True), initial_weights=False)
    training.hold(False)
    side = config.data.image_size
    shape = (config.optim.batch_size, side, side, 3)
    with ExitStack() as stack:
        # the fused ops, which need no kernels for shapes alone
        for op in ("common_weights", "info_nce", "relational", "neighbour", "rationale_fit"):
            stack.enter_context(mock.patch(f"fastcr.kernels.{op}.use_triton", return_value=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        views = [torch.empty(shape, dtype=dtype).permute(0, 3, 1, 2) for _ in range(2)]
        with Count(PASSES | IN_PASSING) as count:
            training.step(Batch(*views))
    return {phase: Work.total(parts) for phase, parts in count.phases.items()}


def floors(
    config: Config, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Rates of a copy and of a matrix product, measured on `device`; and each phase's least work and milliseconds.

    The phase "whole step" has the work of all of them, and of what lies between.
    """
    ceilings, work = Ceilings(copy_bandwidth(device), matmul_rate(device, dtype)), step_work(config, dtype)
    work = {name: each for name, each in work.items() if name} | {"whole step": Work.total(work.values())}
    rates = {"copy_bytes_per_second": ceilings.copy, "matmul_flops_per_second": ceilings.matmul}
    return rates, {
        name: {"GB": each.bytes / 1e9, "GFLOP": each.flops / 1e9, "floor_ms": each.floor(ceilings) * 1e3}
        for name, each in work.items()
    }
