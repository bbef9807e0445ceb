"""What the ops share: which implementation serves a call, and how tensors reach a kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # other platforms: the torch references serve
    triton = None

P = ParamSpec("P")
R = TypeVar("R")
Gradients = tuple[Tensor | None, ...]
Impl = Literal["auto", "triton", "torch"]
# Triton's interpreter runs kernels on CPU tensors; it computes on the bit patterns of bf16, so kernels convert first
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def use_triton(impl: Impl, tensors: Mapping[str, Tensor | None], fits: bool = True) -> bool:
    """Whether Triton serves a call with these tensors, named as in the call; None is one that may be absent.

    auto: CUDA tensors in fp16, bf16 or fp32 whose shapes the kernels take (`fits`).
    Raises `ValueError` where `impl` is no implementation, or asks for Triton where it cannot serve.
    """
    check_choice("impl", impl, Impl)
    if impl == "torch":
        return False
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values()))
    reason = None
    if triton is None:
        reason = "Triton is not installed"
    elif first.device.type != "cuda" and not INTERPRET:
        reason = f"the tensors are on {first.device} (set TRITON_INTERPRET=1 to interpret the kernels there)"
    elif not fits:
        reason = "its kernels do not take these shapes"
    for name, tensor in given.items():
        if tensor.dtype not in KERNEL_DTYPES:
            reason = f"{name} must be fp16, bf16 or fp32, got {tensor.dtype}"
    if impl == "triton" and reason:
        raise ValueError(f"impl must be 'auto' or 'torch' here: {reason}")
    # under the interpreter auto stays with the reference: it is what a user without a GPU wants
    return reason is None and (impl == "triton" or first.device.type == "cuda")


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """`ValueError` unless `tensor` has this shape and dtype (None: any floating-point one), on the device of `like`."""
    right = tensor.dtype == dtype if dtype else tensor.is_floating_point()
    if tuple(tensor.shape) != tuple(shape) or not right or tensor.device != like.device:
        wanted = f"{dtype or 'floating-point'} {list(shape)} on {like.device}"
        raise ValueError(f"{name} must be {wanted}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}")


def check_choice(name: str, given: str, choices: object) -> None:
    """`ValueError` unless `given` is one of the `Literal` `choices`."""
    if given not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {given!r}")


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which launches kernels, with the device of its first tensor as the current one: they run there."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        with torch.cuda.device_of(first):  # nothing happens where it is not on a GPU
            return function(*args, **kwargs)

    return guarded


def fused_op(name: str) -> Callable[[Callable[..., object]], torch.library.CustomOpDef]:
    """Register the function below as the custom op `name`, run `on_its_device`; its annotations are its schema."""

    def register(function: Callable[..., object]) -> torch.library.CustomOpDef:
        schema = torch.library.infer_schema(function, mutates_args=())
        return torch.library.custom_op(name, on_its_device(function), mutates_args=(), schema=schema)

    return register


class _Final(torch.autograd.Function):
    """A gradient as it is, whose own gradient by `inputs` is an error."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.op = op
        return gradient.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(f'the kernels of {ctx.op} give no gradient of their gradient: call it with impl="torch"')


def first_order(op: str, backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """The `backward` of an op, which has saved all inputs that learn; to differentiate what it gives is an error."""

    def final(ctx: Any, *upstream: Tensor) -> Gradients:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():  # the usual case: nobody can differentiate them
            return gradients
        inputs = *upstream, *ctx.saved_tensors
        return tuple(None if each is None else _Final.apply(op, each, *inputs) for each in gradients)

    return final
