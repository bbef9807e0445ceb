"""What the rationale ops share: how detectors meet features, forward and backward.

    L_b(s) = max_k(w_k . A_b(s) + c_k),   k_b(s) the detector that wins

A [B,C,S] features, w [K,C] detectors, c [K] biases. Forward, `tile_logits` is the part of a kernel that reads A once.
Backward, `spread_gradients` reads A once and writes its gradient: `dA(s) = dL(s) w_k(s) + spread(s) direction`,
`dw_k = sum dL(s) A(s)` over the positions k wins, `dc_k = sum dL(s)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcr.kernels.launch import INTERPRET, Gradients, check_tensor, fused_op
from fastcr.kernels.settings import FENCED, TABLE, Settings, map_class

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_DETECTORS = 128
MAX_POSITIONS = 4096
SPREAD: dict[str, Settings] = {
    "16 bits, K <= 32": {"BLOCK_S": 64, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3, "programs": 528},
    "16 bits, K > 32": {
        "BLOCK_S": 32, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3 if FENCED else 1, "programs": 528,
    },
    "32 bits, K <= 32": {"BLOCK_S": 32, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3, "programs": 528},
    "32 bits, K > 32": {"BLOCK_S": 32, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3, "programs": 528},
}  # fmt: skip


def attention_logits(features: Tensor, detectors: Tensor, bias: Tensor | None) -> Tensor:
    """`max_k(w_k . A_b(s) + c_k)`, `[B,S]`, from features `[B,C,S]`."""
    logits = torch.einsum("kc,bcs->bks", detectors, features)
    if bias is not None:
        logits = logits + bias[:, None]
    return logits.amax(1)


def check_maps(features: Tensor) -> None:
    """Raise `ValueError` unless features are maps that the kernels take."""
    if features.ndim != 4 or not features.is_floating_point():
        raise ValueError(f"features must be a floating-point [B,C,H,W], got {features.dtype} {list(features.shape)}")
    if not 1 <= (positions := features.shape[2] * features.shape[3]) <= MAX_POSITIONS:
        raise ValueError(f"features must have 1 to {MAX_POSITIONS} positions (H*W), got {positions}")


def check_features(features: Tensor, detectors: Tensor, bias: Tensor | None, temperature: float) -> None:
    """Raise `ValueError`, naming the argument, unless features, detectors and bias fit each other."""
    check_maps(features)
    if detectors.ndim != 2 or not 1 <= len(detectors) <= MAX_DETECTORS:
        raise ValueError(f"detectors must be [K,C] with K in 1..{MAX_DETECTORS}, got {list(detectors.shape)}")
    check_tensor("detectors", detectors, (len(detectors), features.shape[1]), features)
    if bias is not None:
        check_tensor("bias", bias, detectors.shape[:1], features)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


if triton is not None:

    @triton.jit
    def tile_logits(
        image, detectors, bias, s, S, C, K,
        BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
        HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
        gradient, WITH_SLOPE: tl.constexpr,
    ):  # fmt: skip
        """Largest logit and its detector at positions `s` of one image, NaN kept; with `gradient` `[C]`, `A . g`."""
        k = tl.arange(0, BLOCK_K)
        logits = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
        slope = tl.zeros([BLOCK_S], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            a = tl.load(image + s[:, None] * C + c[None, :], mask=(s < S)[:, None] & (c < C)[None, :], other=0.0)
            w = tl.load(detectors + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
            rounded = w.to(a.dtype)
            logits += tl.dot(a, tl.trans(rounded), input_precision=PRECISION)
            if a.dtype != tl.float32:  # what rounding took off the detectors; the product is far from the bottleneck
                rest = (w.to(tl.float32) - rounded.to(tl.float32)).to(a.dtype)
                logits += tl.dot(a, tl.trans(rest), input_precision=PRECISION)
            if WITH_SLOPE:
                g = tl.load(gradient + c, mask=c < C, other=0.0)
                slope += tl.sum(a.to(tl.float32) * g[None, :], axis=1)
        if HAS_BIAS:
            logits += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        bad = tl.sum(tl.where(logits != logits, 1, 0), axis=1) > 0
        logits = tl.where((k < K)[None, :], logits, float("-inf"))
        high, winner = tl.max(logits, axis=1, return_indices=True)
        winner = tl.minimum(winner, K - 1)  # NaN may let padding win
        # tl.max drops NaN, and an infinity would leave one position of the map finite
        finite = (high - high == 0) & (bad == 0)
        return tl.where(finite, high, float("nan")), winner, slope

    @triton.jit
    def masked_softmax(logits, inside):
        """Softmax over the entries `inside`, 0 elsewhere; NaN everywhere if one of them is NaN."""
        bad = tl.sum(tl.where(inside & (logits != logits), 1, 0), axis=0) > 0
        high = tl.max(tl.where(inside, logits, float("-inf")), axis=0)
        p = tl.where(inside, tl.exp(logits - high), 0.0)
        return tl.where(bad, float("nan"), p / tl.sum(p, axis=0))

    @triton.jit
    def _spread_kernel(
        features, detectors, winners, by_logits, spread, direction, by_features, detector_parts, bias_parts,
        B, S, C, K, images,
        BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
        WRITE_FEATURES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """Some channels of `images` images in fixed order: gradient of the features, partial sums for the detectors."""
        chunk, group = tl.program_id(0), tl.program_id(1)  # neighbours read neighbouring channels of the same rows
        c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        k = tl.arange(0, BLOCK_K)
        by_w = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
        by_bias = tl.zeros([BLOCK_K], tl.float32)
        tiles = tl.cdiv(S, BLOCK_S)
        # one loop over images and tiles: the next load is under way across images too, and fewer registers are live
        for step in range(tl.minimum(images, B - group * images) * tiles):
            b = (group * images + step // tiles).to(tl.int64)
            s = step % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
            inside = (s < S)[:, None] & (c < C)[None, :]
            at = b * S * C + s[:, None] * C + c[None, :]
            a = tl.load(features + at, mask=inside, other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
            winner = tl.load(winners + b * S + s, mask=s < S, other=0)
            by_logit = tl.load(by_logits + b * S + s, mask=s < S, other=0.0)
            chosen = tl.where(winner[:, None] == k[None, :], by_logit[:, None], 0.0)
            if chunk == 0:
                by_bias += tl.sum(chosen, axis=0)
            # into the range of 16 bits whatever the loss is scaled by; a second product adds what rounding took off
            scale = tl.max(tl.abs(by_logit), axis=0)
            scale = tl.where(scale > 0, scale, 1.0)
            chosen = chosen / scale
            rounded = chosen.to(a.dtype)
            part_w = tl.dot(tl.trans(rounded), a, input_precision=PRECISION)
            if a.dtype != tl.float32:
                rest = (chosen - rounded.to(tl.float32)).to(a.dtype)
                part_w += tl.dot(tl.trans(rest), a, input_precision=PRECISION)
            by_w += part_w * scale
            if WRITE_FEATURES:  # the winner's row comes from the cache: exact, and no second product
                w = tl.load(detectors + winner[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
                v = tl.load(direction + b * C + c, mask=c < C, other=0.0)
                share = tl.load(spread + b * S + s, mask=s < S, other=0.0)
                by_a = by_logit[:, None] * w + share[:, None] * v[None, :]
                tl.store(by_features + at, by_a.to(by_features.dtype.element_ty), mask=inside)
        part = group.to(tl.int64) * K * C
        tl.store(detector_parts + part + k[:, None] * C + c[None, :], by_w, mask=(k < K)[:, None] & (c < C)[None, :])
        if chunk == 0:
            tl.store(bias_parts + group * K + k, by_bias, mask=k < K)


def rows_of(features: Tensor) -> Tensor:
    """Features `[B,C,H,W]` as contiguous `[B,S,C]`: a view where they are channels-last, a copy otherwise."""
    return features.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def launch_settings(kernel: str, rows: Tensor, detectors: int | None = None) -> dict[str, Any]:
    """Settings of `kernel` for features `[B,S,C]`, which it multiplies with so many `detectors`, if it does.

    A tile is no longer than all positions. Features in fp32 are multiplied in fp32; those in bf16 are converted first,
    under the interpreter only.
    """
    chosen, whole = TABLE[kernel][map_class(rows.dtype, detectors)], max(triton.next_power_of_2(rows.shape[1]), 16)
    tile = {"BLOCK_S": min(chosen["BLOCK_S"], whole), "BLOCK_ALL": whole}
    settings = chosen | tile | {"UPCAST": INTERPRET and rows.dtype == torch.bfloat16}
    if detectors is None:
        return settings
    precision = "ieee" if rows.dtype == torch.float32 else "tf32"
    return settings | {"BLOCK_K": max(triton.next_power_of_2(detectors), 16), "PRECISION": precision}


@fused_op("fastcr::spread_gradients")
def spread_gradients(
    features: Tensor, detectors: Tensor, winners: Tensor, by_logits: Tensor, spread: Tensor, direction: Tensor,
    *, write: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by features `[B,C,H,W]`, detectors `[K,C]` and bias `[K]` (both fp32), from one read of the features.

    With the winning detector k of a position: `dA = by_logits w_k + spread direction`, `dw_k = sum by_logits A`. The
    sums run over groups of images in a fixed order. `write=False` leaves the features' gradient out (it is then empty).
    """
    rows, detectors = rows_of(features), detectors.contiguous()
    batch, positions, channels = rows.shape
    by_rows = torch.empty_like(rows) if write else rows.new_empty(0)
    by_features = images_of(by_rows, features) if write else by_rows
    if not batch:
        return by_features, torch.zeros_like(detectors, dtype=torch.float32), by_logits.new_zeros(len(detectors))
    settings = launch_settings("spread_gradients", rows, len(detectors))
    programs, _ = settings.pop("programs"), settings.pop("BLOCK_ALL")
    chunks = triton.cdiv(channels, settings["BLOCK_C"])
    # enough programs for the device; one partial sum an image would move more bytes than the features
    images = triton.cdiv(batch, max(min(batch, programs // chunks), 1))
    groups = triton.cdiv(batch, images)
    detector_parts = by_logits.new_empty(groups, *detectors.shape)
    bias_parts = by_logits.new_empty(groups, len(detectors))
    _spread_kernel[(chunks, groups)](
        rows, detectors, *(each.contiguous() for each in (winners, by_logits, spread, direction)), by_rows,
        detector_parts, bias_parts, batch, positions, channels, len(detectors), images,
        WRITE_FEATURES=write, **settings,
    )  # fmt: skip
    return by_features, detector_parts.sum(0), bias_parts.sum(0)


def images_of(rows: Tensor, like: Tensor) -> Tensor:
    """`[B,S,C]` back to `[B,C,H,W]` (channels-last), as `like`."""
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def new_maps(features: Tensor) -> tuple[Tensor, Tensor]:
    """Maps `[B,S]` of features `[B,C,H,W]`, not yet written: attention (fp32) and winning detectors (int32)."""
    batch, _, height, width = features.shape
    attention = features.new_empty(batch, height * width, dtype=torch.float32)
    return attention, torch.empty_like(attention, dtype=torch.int32)


def cast(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> Gradients:
    """Gradients in the dtypes of their inputs; None by an input that was not given."""
    pairs = zip(gradients, inputs, strict=True)
    return tuple(None if each is None else gradient.to(each.dtype) for gradient, each in pairs)


@spread_gradients.register_fake
def _(features: Tensor, detectors: Tensor, *unused: Any, write: bool) -> tuple[Tensor, Tensor, Tensor]:
    by_detectors = detectors.new_empty(detectors.shape, dtype=torch.float32)
    by_features = images_of(torch.empty_like(rows_of(features)), features) if write else features.new_empty(0)
    return by_features, by_detectors, by_detectors.new_empty(len(detectors))
