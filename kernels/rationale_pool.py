"""Attention pooling with the rationale map.

    Q_b(s) = softmax_s(max_k(w_k . A_b(s) + c_k) / tau),   pooled_b = sum_s Q_b(s) A_b(s)

A [B,C,S] features at S = H*W positions, w [K,C] detectors, c [K] their biases, tau temperature.
Least bytes: A read once, `2 B C S` in 16 bits (the reference reads it twice and materialises the `[B,K,S]` logits).

One program an image: all detectors at a tile of positions in one product, their maximum in registers, the softmax over
all positions, and the pooling from an image that is still in the cache. Backward, with k the winning detector:

    dQ(s) = dpooled . A(s) + dattention(s),   dL(s) = Q(s) (dQ(s) - sum_s Q dQ) / tau
    dA(s) = Q(s) dpooled + dL(s) w_k,   dw_k = sum dL(s) A(s),   dc_k = sum dL(s)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcr.kernels.detectors import (
    SPREAD,
    attention_logits,
    cast,
    check_features,
    images_of,
    launch_settings,
    new_maps,
    rows_of,
    spread_gradients,
)
from fastcr.kernels.launch import Gradients, Impl, first_order, fused_op, use_triton
from fastcr.kernels.settings import map_class
from fastcr.kernels.spec import OTHER_MAPS, USUAL_MAPS, Example, OpSpec, Sizes, draw_detectors, draw_maps

try:
    import triton
    import triton.language as tl

    from fastcr.kernels.detectors import masked_softmax, tile_logits
except ImportError:
    triton = None


class RationalePool(NamedTuple):
    """Result of `rationale_pool`."""

    pooled: Tensor
    """`[B,C]`, not normalised."""
    attention: Tensor
    """`[B,S]`, each row sums to 1."""


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


if triton is not None:

    @triton.jit
    def _pool_kernel(
        features, detectors, bias, pooled, attention, winners, S, C, K, inverse_temperature,
        BLOCK_S: tl.constexpr, BLOCK_ALL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
        HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """One image: logits tile by tile, softmax over all positions, pooling from the cache."""
        b = tl.program_id(0).to(tl.int64)
        image, row = features + b * S * C, b * S
        everywhere = tl.arange(0, BLOCK_ALL)
        for start in range(0, S, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            high, winner, _ = tile_logits(
                image, detectors, bias, s, S, C, K, BLOCK_S, BLOCK_K, BLOCK_C, HAS_BIAS, PRECISION, UPCAST, image, False
            )
            tl.store(attention + row + s, high * inverse_temperature, mask=s < S)
            tl.store(winners + row + s, winner, mask=s < S)
        tl.debug_barrier()
        logits = tl.load(attention + row + everywhere, mask=everywhere < S, other=0.0)
        q = masked_softmax(logits, everywhere < S)
        tl.debug_barrier()
        tl.store(attention + row + everywhere, q, mask=everywhere < S)
        tl.debug_barrier()
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            sums = tl.zeros([BLOCK_C], tl.float32)
            for first in range(0, S, BLOCK_S):
                s = first + tl.arange(0, BLOCK_S)
                a = tl.load(image + s[:, None] * C + c[None, :], mask=(s < S)[:, None] & (c < C)[None, :], other=0.0)
                if UPCAST:
                    a = a.to(tl.float32)
                weight = tl.load(attention + row + s, mask=s < S, other=0.0)
                sums += tl.sum(a.to(tl.float32) * weight[:, None], axis=0)
            tl.store(pooled + b * C + c, sums, mask=c < C)

    @triton.jit
    def _attention_gradient_kernel(
        features, attention, by_pooled, by_attention, by_logits, S, C, inverse_temperature,
        BLOCK_S: tl.constexpr, BLOCK_ALL: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """One image: gradient of the largest logits from those of the pooled features and of the attention."""
        b = tl.program_id(0).to(tl.int64)
        image, row = features + b * S * C, b * S
        everywhere = tl.arange(0, BLOCK_ALL)
        for first in range(0, S, BLOCK_S):
            s = first + tl.arange(0, BLOCK_S)
            by_q = tl.load(by_attention + row + s, mask=s < S, other=0.0)
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                a = tl.load(image + s[:, None] * C + c[None, :], mask=(s < S)[:, None] & (c < C)[None, :], other=0.0)
                if UPCAST:
                    a = a.to(tl.float32)
                d = tl.load(by_pooled + b * C + c, mask=c < C, other=0.0)
                by_q += tl.sum(a.to(tl.float32) * d[None, :], axis=1)
            tl.store(by_logits + row + s, by_q, mask=s < S)
        tl.debug_barrier()
        q = tl.load(attention + row + everywhere, mask=everywhere < S, other=0.0)
        by_q = tl.load(by_logits + row + everywhere, mask=everywhere < S, other=0.0)
        tl.debug_barrier()
        by_logit = q * (by_q - tl.sum(q * by_q, axis=0)) * inverse_temperature
        tl.store(by_logits + row + everywhere, by_logit, mask=everywhere < S)


@fused_op("fastcr::rationale_pool")
def _fused(
    features: Tensor, detectors: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled `[B,C]`, attention `[B,S]` (fp32), winning detectors `[B,S]` (int32)."""
    rows, detectors, outputs = rows_of(features), detectors.contiguous(), _new_outputs(features)
    batch, positions, channels = rows.shape
    if batch:
        _pool_kernel[(batch,)](
            rows, detectors, rows if bias is None else bias.contiguous(), *outputs,
            positions, channels, len(detectors), 1 / temperature,
            HAS_BIAS=bias is not None, **launch_settings("rationale_pool", rows, len(detectors)),
        )  # fmt: skip
    return outputs


@_fused.register_fake
def _new_outputs(features: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    return features.new_empty(features.shape[:2], dtype=torch.float32), *new_maps(features)


@fused_op("fastcr::attention_gradient")
def _by_logits(
    by_pooled: Tensor, by_attention: Tensor, features: Tensor, attention: Tensor, temperature: float
) -> Tensor:
    """Gradient by the largest logits `[B,S]`."""
    rows, by_logits = rows_of(features), torch.empty_like(attention)
    batch, positions, channels = rows.shape
    if batch:
        _attention_gradient_kernel[(batch,)](
            rows, attention, by_pooled.contiguous(), by_attention.contiguous(), by_logits, positions, channels,
            1 / temperature, **launch_settings("attention_gradient", rows),
        )  # fmt: skip
    return by_logits


@_by_logits.register_fake
def _(by_pooled: Tensor, by_attention: Tensor, features: Tensor, attention: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(attention)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.temperature = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, by_pooled: Tensor, by_attention: Tensor, unused: Any) -> Gradients:
    features, detectors, bias, attention, winners = ctx.saved_tensors
    features = images_of(rows_of(features), features)  # a copy, if there has to be one, serves both kernels
    by_logits = _by_logits(by_pooled, by_attention, features, attention, ctx.temperature)
    by_features, *by_branch = spread_gradients(
        features, detectors, winners, by_logits, attention, by_pooled, write=True
    )
    return by_features, *cast(by_branch, (detectors, bias)), None


_fused.register_autograd(first_order("rationale_pool", _backward), setup_context=_save)


def rationale_pool(
    features: Tensor, detectors: Tensor, bias: Tensor | None = None, *, temperature: float = 0.4, impl: Impl = "auto"
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
    if not use_triton(impl, {"features": features, "detectors": detectors, "bias": bias}):
        return rationale_pool_reference(features, detectors, bias, temperature=temperature)
    pooled, attention, _ = _fused(features, detectors, bias, temperature)
    return RationalePool(pooled, attention)


def _rows(sizes: Sizes, dtype: torch.dtype) -> dict[str, str]:
    multiplying = dict.fromkeys(("rationale_pool", "spread_gradients"), map_class(dtype, sizes["K"]))
    return multiplying | {"attention_gradient": map_class(dtype)}


SPEC = OpSpec(
    rationale_pool,
    rationale_pool_reference,
    inputs=lambda z, dtype, normal: {"features": draw_maps(z, dtype, normal)["features"]} | draw_detectors(z, normal),
    learns=("features", "detectors", "bias"),
    usual=tuple(map(Example, USUAL_MAPS)),
    others=tuple(map(Example, OTHER_MAPS)),
    # backward: the gradient at a position depends on all of them, so the features are read twice
    bytes=lambda z, width, backward: (4 if backward else 1) * width * z["B"] * z["C"] * z["S"],
    rows=_rows,
    kernels={
        "spread_gradients": SPREAD,
        "rationale_pool": {
            "16 bits, K <= 32": {"BLOCK_S": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3},
            "16 bits, K > 32": {"BLOCK_S": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 3},
            "32 bits, K <= 32": {"BLOCK_S": 16, "BLOCK_C": 32, "num_warps": 4, "num_stages": 3},
            "32 bits, K > 32": {"BLOCK_S": 16, "BLOCK_C": 32, "num_warps": 8, "num_stages": 2},
        },
        "attention_gradient": {
            "16 bits": {"BLOCK_S": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3},
            "32 bits": {"BLOCK_S": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3},
        },
    },
)
