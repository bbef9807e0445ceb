"""Example arguments of any op, a call with gradients, and the measure of its exactness."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcr.kernels.spec import every_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NAN, INF = float("nan"), float("inf")
# by the dtype of the inputs: what results in fp32, and what those in that dtype, may lose beyond the reference in the
# same dtype, over the largest entry; 2^-7 is one unit in the last place of bf16, which the interpreter truncates when
# it stores
TOLERANCE = {F32: (5e-6, 1e-5), F16: (1e-5, 2e-3), BF16: (5e-5, 2**-7)}
DTYPES = list(TOLERANCE)
OPS = every_op()
LEARNS = {name: spec.learns for name, spec in OPS.items()} | {"info_nce": ("query", "key")}
# the terms of the bias sum to 0; a loss over a queue is a difference of logits, and the common weights one of means
FLOORS = {("relational", 0): 1.0, ("common_weights", 0): 1.0, ("rationale_pool", "bias"): 1.0}
FLOORS |= {("rationale_fit", "bias"): 1.0}
# a few images, odd sizes
SMALL = {
    "rationale_fit": {"B": 3, "C": 70, "S": 20, "K": 5},
    "rationale_pool": {"B": 3, "C": 70, "S": 20, "K": 5},
    "common_weights": {"B": 3, "C": 70, "S": 20},
    "info_nce": {"B": 3, "D": 24, "N": 100},
    "relational": {"B": 3, "D": 24, "N": 100},
}
Arguments = dict[str, Any]
Results = tuple[list[Tensor], dict[str, Tensor]]


def pairwise(**factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few cases in which every two values of different factors meet: at each step the case with the most new pairs."""

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    every = list(itertools.product(*(range(len(values)) for values in factors.values())))
    wanted, cases = set().union(*map(pairs, every)), []
    while wanted:
        best = max(every, key=lambda case: len(pairs(case) & wanted))
        wanted -= pairs(best)
        cases.append(tuple(values[i] for values, i in zip(factors.values(), best, strict=True)))
    return cases


def draw(op: str, dtype: torch.dtype = F32, **sizes: int) -> Arguments:
    """Arguments in `dtype`, but for what stays in fp32; of the sizes `SMALL` where none are given."""
    sizes = SMALL[op] | sizes
    random = torch.Generator().manual_seed(sum(sizes.values()))

    def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=F64).to(DEVICE, dtype)

    arguments = OPS[op].inputs(sizes, dtype, normal)
    if "queue_images" in arguments:  # about every third key is of an image of the batch
        keys = torch.randint(0, 3 * max(sizes["B"], 1), (sizes["N"],), generator=random)
        arguments |= {"images": torch.arange(sizes["B"], device=DEVICE), "queue_images": keys.to(DEVICE)}
    return fresh(op, arguments)


def fresh(op: str, arguments: Arguments, convert: Callable[[Tensor], Tensor] = Tensor.clone) -> Arguments:
    """New leaves; what is floating-point converted."""
    return {
        name: convert(each.detach()).requires_grad_(name in LEARNS[op])
        if isinstance(each, Tensor) and each.is_floating_point()
        else each
        for name, each in arguments.items()
    }


def call(op: str, arguments: Arguments, function: Callable[..., Any] | None = None, **options: Any) -> list[Tensor]:
    """All outputs of the op, or of `function` in its place."""
    outputs = (function or OPS[op].op)(**arguments, **options)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def upstream_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for each output that carries one, the same for equal shapes."""
    random = torch.Generator().manual_seed(1)
    return [torch.randn(each.shape, generator=random).to(each) for each in outputs if each.requires_grad]


def run(op: str, arguments: Arguments, scale: float = 1.0, **options: Any) -> Results:
    """Outputs, and the gradient by each argument that wants one."""
    outputs = call(op, arguments, **options)
    leaves = {name: each for name, each in arguments.items() if isinstance(each, Tensor) and each.requires_grad}
    if not leaves:
        return outputs, {}
    by = torch.autograd.grad(
        [output for output in outputs if output.requires_grad], list(leaves.values()),
        [scale * each for each in upstream_of(outputs)], allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return [output.detach() for output in outputs], dict(zip(leaves, by, strict=True))


def error(got: Tensor, exact: Tensor, floor: float = 1e-3) -> float:
    """The largest error over the largest entry, or over `floor` where all are small; NaN where one is."""
    if not got.numel():
        return 0.0
    return (got.double() - exact.double()).abs().max().item() / max(exact.abs().max().item(), floor)


def assert_as_exact_as_torch(op: str, arguments: Arguments, dtype: torch.dtype, **options: Any) -> None:
    """Values and gradients of the kernels err from fp64 as the reference in the same dtype does, or hardly more."""
    values, gradients = run(op, arguments, impl="triton", **options)
    plain_values, plain_gradients = run(op, arguments, impl="torch", **options)
    exact_values, exact_gradients = run(op, fresh(op, arguments, Tensor.double), impl="torch", **options)
    assert gradients.keys() == plain_gradients.keys() == exact_gradients.keys()
    got, plain, exact = (
        dict(enumerate(each)) | dict(by)
        for each, by in ((values, gradients), (plain_values, plain_gradients), (exact_values, exact_gradients))
    )
    for name in exact:
        assert (got[name].dtype, got[name].shape) == (plain[name].dtype, plain[name].shape), name
        floor = FLOORS.get((op, name), 1e-3)
        allowed = TOLERANCE[dtype][isinstance(name, str) or got[name].dtype != F32]
        assert error(got[name], exact[name], floor) <= error(plain[name], exact[name], floor) + allowed, name
