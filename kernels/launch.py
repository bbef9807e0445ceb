"""What the ops share: which implementation serves a call, and how tensors reach a kernel."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # other platforms: the torch references serve
    triton = None

Impl = Literal["auto", "triton", "torch"]
# Triton's interpreter runs kernels on CPU tensors; it computes on the bit patterns of bf16, so kernels convert first
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def use_triton(impl: Impl, tensors: dict[str, Tensor], fits: bool = True) -> bool:
    """Whether Triton serves a call with these tensors, named as in the call.

    auto: CUDA tensors in fp16, bf16 or fp32 whose shapes the kernels take (`fits`).
    Raises `ValueError` where `impl` is no implementation, or asks for Triton where it cannot serve.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "torch":
        return False
    first = next(iter(tensors.values()))
    reason = None
    if triton is None:
        reason = "Triton is not installed"
    elif first.device.type != "cuda" and not INTERPRET:
        reason = f"the tensors are on {first.device} (set TRITON_INTERPRET=1 to interpret the kernels there)"
    elif not fits:
        reason = "its kernels do not take these shapes"
    for name, tensor in tensors.items():
        if tensor.dtype not in KERNEL_DTYPES:
            reason = f"{name} must be fp16, bf16 or fp32, got {tensor.dtype}"
    if impl == "triton" and reason:
        raise ValueError(f"impl must be 'auto' or 'torch' here: {reason}")
    # under the interpreter auto stays with the reference: it is what a user without a GPU wants
    return reason is None and (impl == "triton" or first.device.type == "cuda")
