"""The forward of `rationale_fit` for small maps in 16 bits, two images a program; and how both forwards end.

With the detectors w and each image's gradient g, scaled to 1, split into what 16 bits hold and the rest, the logits
`w . A(s)` and the slopes `g . A(s)` are two matrix products of one tile of features, which goes from memory to the
tensor cores through no register. The split is made once a call: it is `4 C (K + B)` bytes beside `2 B C S`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcr.kernels.detectors import upcast
from fastcr.kernels.launch import on_its_device
from fastcr.kernels.settings import FENCED, TABLE, map_class

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

POSITIONS, DETECTORS = 64, 32  # the most it takes

if triton is not None:

    @triton.jit
    def distributions(logits, cam, inside, S, inverse_temperature, SUM: tl.constexpr):
        """Target P and log Q, `[N,S]`, and KL `[N]`, from attention logits and signed slopes; NaN fills its image."""
        # relu would hide an infinity of the other sign; sums keep NaN where maxima drop it
        cam = tl.where(cam - cam == 0, tl.where(cam > 0, cam, 0.0), float("nan"))
        if SUM:
            mass = tl.sum(tl.where(inside, cam, 0.0), axis=1, keep_dims=True)
            p = tl.where(mass == 0, 1.0 / S, cam / tl.where(mass == 0, 1.0, mass))
        else:
            peak = tl.max(tl.where(inside, cam, 0.0), axis=1, keep_dims=True)
            cam = cam / tl.where(peak == 0, 1.0, peak) - tl.where(peak == 0, 0.0, 1.0)
            p = tl.where(inside, tl.exp(cam * inverse_temperature), 0.0)
            p = p / tl.sum(p, axis=1, keep_dims=True)
        high = tl.max(tl.where(inside, logits, float("-inf")), axis=1, keep_dims=True)
        mass = tl.sum(tl.where(inside, tl.exp(logits - high), 0.0), axis=1, keep_dims=True)
        log_q = logits - high - tl.log(mass)
        log_p = tl.log(tl.where(p > 0, p, 1.0))
        return p, log_q, tl.sum(tl.where(inside, p * (log_p - log_q), 0.0), axis=1)

    @triton.jit
    def _split_kernel(detectors, gradient, split, C, K, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
        """A detector, or an image's gradient over its largest entry, as two rows: rounded, and what that took off."""
        row = tl.program_id(0)
        image = row - BLOCK_K
        weights = detectors + row * C
        slopes = gradient + image.to(tl.int64) * C
        high = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            high = tl.maximum(high, tl.abs(tl.load(slopes + c, mask=(image >= 0) & (c < C), other=0.0)))
        scale = tl.max(high, axis=0)
        scale = tl.where(scale > 0, scale, 1.0)
        first = split + tl.where(image < 0, row, 2 * row).to(tl.int64) * C  # gradients come in pairs of rows
        second = first + tl.where(image < 0, BLOCK_K, 1) * C
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            w = tl.load(weights + c, mask=(row < K) & (c < C), other=0.0).to(tl.float32)
            g = tl.load(slopes + c, mask=(image >= 0) & (c < C), other=0.0)
            x = w + g / scale
            rounded = x.to(split.dtype.element_ty)
            tl.store(first + c, rounded, mask=c < C)
            tl.store(second + c, (x - rounded.to(tl.float32)).to(split.dtype.element_ty), mask=c < C)

    @triton.jit
    def _pairs_kernel(
        features, split, bias, divergence, attention, target, winners, B, S, C, K, inverse_temperature, sign,
        BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
        HAS_BIAS: tl.constexpr, SUM: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """Two images: logits and slopes from one read, then both distributions and their divergence in registers."""
        pair = tl.program_id(0).to(tl.int64) * 2
        r = tl.arange(0, 2 * BLOCK_S)
        image, s = pair + r // BLOCK_S, r % BLOCK_S
        there = (s < S) & (image < B)
        rows = features + (image * S + s) * C
        k2 = tl.arange(0, 2 * BLOCK_K)
        j = tl.arange(0, 16)  # the fewest columns of a product: of the first image, of the second, and 12 of zeros
        slope_rows = split + (2 * BLOCK_K + pair * 2 + j) * C
        has_slope = (j < 4) & (pair * 2 + j < 2 * B)
        products = tl.zeros([2 * BLOCK_S, 2 * BLOCK_K], tl.float32)
        slopes = tl.zeros([2 * BLOCK_S, 16], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            a = tl.load(rows[:, None] + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
            w = tl.load(split + k2[:, None] * C + c[None, :], mask=(c < C)[None, :], other=0.0)
            g = tl.load(slope_rows[:, None] + c[None, :], mask=has_slope[:, None] & (c < C)[None, :], other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
            products = tl.dot(a, tl.trans(w), products)
            slopes = tl.dot(a, tl.trans(g), slopes)
        rounded, rest = tl.split(tl.permute(tl.reshape(products, [2 * BLOCK_S, 2, BLOCK_K]), [0, 2, 1]))
        logits = rounded + rest
        k = tl.arange(0, BLOCK_K)
        if HAS_BIAS:
            logits += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        bad = tl.sum(tl.where(logits != logits, 1, 0), axis=1) > 0
        high, winner = tl.max(tl.where((k < K)[None, :], logits, float("-inf")), axis=1, return_indices=True)
        tl.store(winners + image * S + s, tl.minimum(winner, K - 1), mask=there)  # NaN may let padding win
        high = tl.where((high - high == 0) & (bad == 0), high, float("nan"))
        # the other image's columns hold its NaN, and are dropped before the sum
        mine = j[None, :] // 2 == (r // BLOCK_S)[:, None]
        slope = tl.sum(tl.where(mine, slopes, 0.0), axis=1)

        high = tl.reshape(high, [2, BLOCK_S]) * inverse_temperature
        b, s = pair + tl.arange(0, 2), tl.arange(0, BLOCK_S)[None, :]
        cam = tl.reshape(slope, [2, BLOCK_S]) * sign
        p, log_q, kl = distributions(high, cam, s < S, S, inverse_temperature, SUM)
        inside = (s < S) & (b < B)[:, None]
        tl.store(attention + b[:, None] * S + s, tl.exp(log_q), mask=inside)
        tl.store(target + b[:, None] * S + s, p, mask=inside)
        tl.store(divergence + b, kl, mask=b < B)


def takes_pairs(rows: Tensor, detectors: int) -> bool:
    """Whether features `[B,S,C]` and so many detectors are served two images a program."""
    return FENCED and rows.dtype.itemsize == 2 and rows.shape[1] <= POSITIONS and detectors <= DETECTORS


@on_its_device
def launch_pairs(
    rows: Tensor, gradient: Tensor, detectors: Tensor, bias: Tensor | None, outputs: tuple[Tensor, ...],
    temperature: float, sign: float, by_sum: bool,
) -> None:  # fmt: skip
    """Fill `outputs`: KL `[B]`, attention and target `[B,S]` (fp32), winning detectors `[B,S]` (int32)."""
    batch, positions, channels = rows.shape
    dtype = torch.float32 if upcast(rows) else rows.dtype
    split = torch.empty(2 * (DETECTORS + batch), channels, device=rows.device, dtype=dtype)
    _split_kernel[(DETECTORS + batch,)](
        detectors, gradient, split, channels, len(detectors), BLOCK_K=DETECTORS, BLOCK_C=1024
    )
    _pairs_kernel[(triton.cdiv(batch, 2),)](
        rows, split, rows if bias is None else bias, *outputs,
        batch, positions, channels, len(detectors), 1 / temperature, sign,
        BLOCK_S=POSITIONS, BLOCK_K=DETECTORS, HAS_BIAS=bias is not None, SUM=by_sum, UPCAST=upcast(rows),
        **TABLE["fit_pairs"][map_class(rows.dtype, len(detectors))],
    )  # fmt: skip
