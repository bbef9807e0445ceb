"""Attention pooling with the rationale map.

    Q_b(s) = softmax_s(max_k(w_k . A_b(s) + c_k) / tau),   pooled_b = sum_s Q_b(s) A_b(s)

A [B,C,S] features at S = H*W positions, w [K,C] detectors, c [K] their biases, tau temperature.
Least bytes: A read once, `2 B C S` in 16 bits; the reference here reads it twice and materialises the `[B,K,S]` logits.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]
MAX_DETECTORS = 128
MAX_POSITIONS = 4096


class RationalePool(NamedTuple):
    """Result of `rationale_pool`."""

    pooled: Tensor
    """`[B,C]`, not normalised."""
    attention: Tensor
    """`[B,S]`, each row sums to 1."""


def attention_logits(features: Tensor, detectors: Tensor, bias: Tensor | None) -> Tensor:
    """`max_k(w_k . A_b(s) + c_k)`, `[B,S]`, from features `[B,C,S]`."""
    logits = torch.einsum("kc,bcs->bks", detectors, features)
    if bias is not None:
        logits = logits + bias[:, None]
    return logits.amax(1)


def rationale_pool_reference(
    features: Tensor, detectors: Tensor, bias: Tensor | None = None, *, temperature: float = 0.4
) -> RationalePool:
    """The equations above in plain torch, in fp32 (fp64 for fp64 inputs): the specification and the test oracle."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        features, detectors = features.flatten(2).to(dtype), detectors.to(dtype)
        logits = attention_logits(features, detectors, bias if bias is None else bias.to(dtype))
        attention = torch.softmax(logits / temperature, dim=1)
        return RationalePool(torch.einsum("bs,bcs->bc", attention, features), attention)


def check_features(features: Tensor, detectors: Tensor, bias: Tensor | None, temperature: float) -> None:
    """Raise `ValueError`, naming the argument, unless features, detectors and bias fit each other."""
    if features.ndim != 4 or not features.is_floating_point():
        raise ValueError(f"features must be a floating-point [B,C,H,W], got {features.dtype} {list(features.shape)}")
    channels, positions = features.shape[1], features.shape[2] * features.shape[3]
    if not 1 <= positions <= MAX_POSITIONS:
        raise ValueError(f"features must have 1 to {MAX_POSITIONS} positions (H*W), got {positions}")
    if detectors.ndim != 2 or detectors.shape[1] != channels or not 1 <= detectors.shape[0] <= MAX_DETECTORS:
        raise ValueError(f"detectors must be [K,{channels}] with K in 1..{MAX_DETECTORS}, got {list(detectors.shape)}")
    if bias is not None and bias.shape != detectors.shape[:1]:
        raise ValueError(f"bias must be [{detectors.shape[0]}] like detectors, got {list(bias.shape)}")
    for name, tensor in (("detectors", detectors), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != features.device:
            raise ValueError(f"{name} must be on {features.device} like features, got {tensor.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def rationale_pool(
    features: Tensor,
    detectors: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 0.4,
    impl: Impl = "auto",
) -> RationalePool:
    """Rationale map of each image and the features pooled with it (arXiv 2303.01669, inference).

    Args:
        features: A `[B,C,H,W]`, any strides, fp16, bf16, fp32 or fp64; `B` may be 0, `1 <= H*W <= 4096`.
        detectors: w `[K,C]`, `1 <= K <= 128`.
        bias: c `[K]`, or None for no bias.
        temperature: tau, above 0.
        impl: "auto", "torch" or "triton".

    Returns:
        `(pooled [B,C], attention [B,S])`, fp32 (fp64 for fp64 inputs), both differentiable in features,
        detectors and bias.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot serve these tensors.
    """
    check_features(features, detectors, bias, temperature)
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl must be 'auto' or 'torch' (rationale_pool has no other implementation), got {impl!r}")
    return rationale_pool_reference(features, detectors, bias, temperature=temperature)
