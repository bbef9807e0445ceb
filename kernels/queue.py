"""What the ops over a queue of keys share: attention of rows to its keys.

    logsumexp_b = log sum_n exp(r_b . k_n / T),   mean_b = sum_n softmax_n(r_b . k_n / T) k_n

r [B,D] rows, k [N,D] the queue's keys, T temperature. A row's own earlier keys may be left out.
One online-softmax pass over the queue gives both (the `[B,N]` similarities are never stored). The queue is split over
programs, and the parts are combined in a fixed order. Of rows too wide for the chip, each program sums up some of the
dimensions; it multiplies all of them tile by tile, which is `cdiv(D, 512)` times the first product's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcr.kernels.launch import INTERPRET, Gradients, check_tensor, first_order, on_its_device
from fastcr.kernels.settings import TABLE, Settings, contrast_class, has_wgmma
from fastcr.kernels.spec import Example, Normal, OpSpec, Sizes, draw_units

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ON_CHIP = 512  # numbers of a row that stay on the chip, with the keys' tile and the weighted sum
MAX_DIM = 4096  # of a row: the kernel that joins the parts holds one
LOWEST = -3e38  # below every logit, and finite: a row without a key takes its exponentials from it, and has a mass of 0

SPLIT = {"num_stages": 2, "programs": 264}
ROWS: dict[str, Settings] = {  # that the ops share
    "16 bits, B <= 16, D <= 256": {"BLOCK_B": 16, "BLOCK_N": 64, "num_warps": 4} | SPLIT,
    "16 bits, B <= 16, D > 256": {"BLOCK_B": 16, "BLOCK_N": 32, "num_warps": 4} | SPLIT,
    "16 bits, B > 16, D > 256": {"BLOCK_B": 32, "BLOCK_N": 32, "num_warps": 8} | SPLIT,
    "32 bits, B <= 16, D <= 256": {"BLOCK_B": 16, "BLOCK_N": 32, "num_warps": 8} | SPLIT,
    "32 bits, B <= 16, D > 256": {"BLOCK_B": 16, "BLOCK_N": 16, "num_warps": 8} | SPLIT,
    "32 bits, B > 16, D > 256": {"BLOCK_B": 16, "BLOCK_N": 16, "num_warps": 8} | SPLIT,
    "16 bits, B <= 16, D > 512": {"BLOCK_B": 16, "BLOCK_N": 32, "num_warps": 4} | SPLIT,
    "16 bits, B > 16, D > 512": {"BLOCK_B": 32, "BLOCK_N": 32, "num_warps": 8} | SPLIT,
    "32 bits, B <= 16, D > 512": {"BLOCK_B": 16, "BLOCK_N": 16, "num_warps": 8} | SPLIT,
    "32 bits, B > 16, D > 512": {"BLOCK_B": 16, "BLOCK_N": 16, "num_warps": 8} | SPLIT,
}


def check(tensors: dict[str, Tensor], temperatures: dict[str, float]) -> None:
    """Refuse queries, keys, a queue or temperatures that do not fit; `ValueError` names which."""
    query, key, queue = tensors["query"], tensors["key"], tensors["queue"]
    if query.ndim != 2 or not query.is_floating_point():
        raise ValueError(f"query must be a floating-point [B,D], got {query.dtype} {list(query.shape)}")
    check_tensor("key", key, query.shape, query)
    check_tensor("queue", queue, (max(len(queue), 1), query.shape[1]), query)  # N >= 1
    for name, temperature in temperatures.items():
        if not temperature > 0:
            raise ValueError(f"{name} must be above 0, got {temperature}")


def new_outputs(query: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What such an op gives, not yet written, fp32: loss `[B]`, its gradient by each query `[B,D]`, and a `[B,D]`."""
    gradient = query.new_empty(query.shape, dtype=torch.float32)
    return gradient.new_empty(len(query)), gradient, torch.empty_like(gradient)


def register(name: str, op: torch.library.CustomOpDef, learns: int) -> None:
    """Tracing and autograd of the op `name`, `(query, key, ...)` that gives `new_outputs`.

    The first `learns` inputs, the query or it and the key, get the gradients that come after the loss.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:learns], *output[1 : learns + 1])
        ctx.constants = len(inputs) - learns

    def backward(ctx: Any, grad: Tensor, *unused: Any) -> Gradients:
        inputs, gradients = ctx.saved_tensors[:learns], ctx.saved_tensors[learns:]
        wanted = zip(inputs, gradients, ctx.needs_input_grad, strict=False)
        by = [(grad[:, None] * gradient).to(each.dtype) if needed else None for each, gradient, needed in wanted]
        return *by, *[None] * ctx.constants

    op.register_fake(new_outputs)
    op.register_autograd(first_order(name, backward), setup_context=save)


if triton is not None:
    NOTHING = tl.constexpr(LOWEST)
    TILE = tl.constexpr(128)  # dimensions of a product where a row is wider than the chip

    @triton.jit
    def attend_kernel(
        rows, queue, images, queue_images, peak, total, weighted, R, B, N, share, scale, key_scale,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
        TWO: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """Online softmax of a block of rows over one part of the queue, in powers of two; rows from `B` on are keys.

        `BLOCK_D` of the `D` dimensions of the weighted keys are this program's.
        """
        part, chunk = tl.program_id(1), tl.program_id(2)
        first = part * share
        stop = tl.minimum(first + share, N)
        r, d = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        scales = scale
        if TWO:
            scales = tl.where(r < B, scale, key_scale)[:, None]
        q = tl.load(rows + r[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        mine = r
        if MASKED:
            mine = tl.load(images + r % B, mask=r < R, other=0)
        high = tl.full([BLOCK_B], NOTHING, tl.float32)
        mass = tl.zeros([BLOCK_B], tl.float32)
        sums = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for start in range(first, stop, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            at = queue + n.to(tl.int64)[:, None] * D + d[None, :]
            keys = tl.load(at, mask=(n < stop)[:, None] & (d < D)[None, :], other=0.0)
            if UPCAST:
                keys = keys.to(tl.float32)
            keys = keys.to(q.dtype)
            if BLOCK_D < D:
                logits = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
                for tile in range(0, D, TILE):
                    e = (tile + tl.arange(0, TILE))[None, :]
                    some = tl.load(rows + r[:, None] * D + e, mask=(r < R)[:, None] & (e < D), other=0.0)
                    tiles = queue + n.to(tl.int64)[:, None] * D + e
                    theirs = tl.load(tiles, mask=(n < stop)[:, None] & (e < D), other=0.0)
                    if UPCAST:
                        some, theirs = some.to(tl.float32), theirs.to(tl.float32)
                    logits = tl.dot(some, tl.trans(theirs.to(some.dtype)), logits, input_precision=PRECISION)
            else:
                logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
            counts = (n < stop)[None, :]
            if MASKED:
                counts &= mine[:, None] != tl.load(queue_images + n, mask=n < stop, other=0)[None, :]
            logits = tl.where(counts, logits, float("-inf")) * scales
            higher = tl.maximum(high, tl.max(logits, axis=1))
            p = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(high - higher)
            mass = mass * shrink + tl.sum(p, axis=1)
            weights = p.to(q.dtype)
            sums = sums * shrink[:, None] + tl.dot(weights, keys, input_precision=PRECISION)
            if EXACT:  # what 16 bits leave of a weight
                sums += tl.dot((p - weights.to(tl.float32)).to(q.dtype), keys, input_precision=PRECISION)
            high = higher
        place = part * R + r
        once = (r < R) & (chunk == 0)  # the programs of all chunks find the same
        tl.store(peak + place, high, mask=once)
        tl.store(total + place, mass, mask=once)
        tl.store(
            weighted + place.to(tl.int64)[:, None] * D + d[None, :], sums, mask=(r < R)[:, None] & (d < D)[None, :]
        )

    @triton.jit
    def join(
        peak, total, weighted, row, rows, parts, lowest,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    ):  # fmt: skip
        """One row's highest logit (`lowest` at least), the mass under it and the weighted keys, from all parts."""
        d, part = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_PARTS)
        highs = tl.load(peak + part * rows + row, mask=part < parts, other=NOTHING)
        masses = tl.load(total + part * rows + row, mask=part < parts, other=0.0)
        high = tl.maximum(tl.max(highs, axis=0), lowest)
        mass = tl.sum(masses * tl.exp2(highs - high), axis=0)
        sums = tl.zeros([BLOCK_D], tl.float32)
        for i in range(parts):
            share = tl.exp2(tl.load(peak + i * rows + row) - high)
            sums += share * tl.load(weighted + (i * rows + row).to(tl.int64) * D + d, mask=d < D, other=0.0)
        return high, mass, sums


class Parts(NamedTuple):
    """What `join` takes: of each part of the queue the highest logits and masses `[parts,R]`, and weighted keys."""

    peak: Tensor
    total: Tensor
    weighted: Tensor
    options: dict[str, int]
    """Constants of a kernel that joins them."""


def row_of(op: str, dtype: torch.dtype, rows: int, dim: int) -> str:
    """The row of an op's launch settings for so many rows `[rows,dim]`; some have one of their own for wgmma."""
    row = contrast_class(dtype, rows, dim)
    return f"{row}, wgmma" if f"{row}, wgmma" in TABLE[op] and has_wgmma() else row


@on_its_device
def attend(
    op: str, rows: Tensor, queue: Tensor, batch: int, scales: tuple[float, float], *, exact: bool,
    images: Tensor | None = None, queue_images: Tensor | None = None,
) -> Parts:  # fmt: skip
    """Attention of rows `[R,D]` to a queue `[N,D]`, launched with the settings of `op`.

    Products of the first `batch` of the rows are multiplied by the first of `scales`, those of the others, of the same
    images, by the second. `exact` keeps what rounding the weights to 16 bits would lose.
    """
    count, dim = rows.shape
    chosen: dict[str, Any] = dict(TABLE[op][row_of(op, rows.dtype, count, dim)])
    dims = {"D": dim, "BLOCK_D": max(triton.next_power_of_2(dim), 16)}
    chunk = min(dims["BLOCK_D"], ON_CHIP)
    blocks, chunks, tile = triton.cdiv(count, chosen["BLOCK_B"]), triton.cdiv(dim, chunk), chosen["BLOCK_N"]
    parts = max(chosen.pop("programs") // (blocks * chunks), 1)
    # at least 256 each: a part writes `[R,D]` sums in fp32, and with fewer keys those would be most of the bytes
    share = triton.cdiv(max(triton.cdiv(len(queue), parts), 256), tile) * tile
    parts = triton.cdiv(len(queue), share)
    peak, total = (rows.new_empty(parts, count, dtype=torch.float32) for _ in range(2))
    weighted = peak.new_empty(parts, count, dim)
    mine, theirs = (each.contiguous() if each is not None else rows for each in (images, queue_images))
    attend_kernel[(blocks, parts, chunks)](
        rows, queue, mine, theirs, peak, total, weighted, count, batch, len(queue), share, *scales, dim, chunk,
        TWO=batch < count, MASKED=images is not None, EXACT=exact and rows.dtype != torch.float32,
        PRECISION="ieee" if rows.dtype == torch.float32 else "tf32",
        UPCAST=INTERPRET and torch.bfloat16 in (rows.dtype, queue.dtype), **chosen,
    )  # fmt: skip
    return Parts(peak, total, weighted, dims | {"BLOCK_PARTS": triton.next_power_of_2(parts)})


def queue_spec(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    *,
    rows: int,
    own: dict[str, Settings],
    inputs: Callable[[Sizes, torch.dtype, Normal], dict[str, Any]] = draw_units,
) -> OpSpec:
    """The entry of an op that attends with so many `rows` an image, launched with its `own` settings beside `ROWS`."""
    name = op.__name__
    return OpSpec(
        op,
        reference,
        inputs=inputs,
        learns=("query",),
        usual=tuple(Example({"B": 256, "D": 256, "N": keys}) for keys in (4096, 65536)),
        others=tuple(
            Example({"B": batch, "D": dim, "N": 65536}) for batch in (8, 16, 256) for dim in (128, 256, 384, 512, 2048)
        ),
        bytes=lambda z, width, backward: width * z["N"] * z["D"],
        flops=lambda z: 4 * rows * z["B"] * z["N"] * z["D"],
        rows=lambda z, dtype: {name: row_of(name, dtype, rows * z["B"], z["D"])},
        kernels={name: ROWS | own},
    )
