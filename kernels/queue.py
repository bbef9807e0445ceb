"""What the ops over a queue of keys share: attention of rows to its keys, and the loss of a pull towards a target.

    logsumexp_b = log sum_n exp(r_b . k_n / T),   mean_b = sum_n softmax_n(r_b . k_n / T) k_n
    loss_b = logsumexp_b - q_b . target_b / T,    gradient by q_b: (mean_b - target_b) / T

r [B,D] rows (q queries among them), k [N,D] the queue's keys, T temperature. A row's own earlier keys may be left out.
One online-softmax pass over the queue gives both (the `[B,N]` similarities are never stored). The queue is split over
programs, and the parts are combined in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastcr.kernels.launch import INTERPRET, on_its_device
from fastcr.kernels.settings import TABLE, contrast_class

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_DIM = 512  # of a row: it, the keys' tile and the weighted sum stay on the chip
LOWEST = -3e38  # below every logit, and finite: a row without a key takes its exponentials from it, and has a mass of 0
LEFT_OUT = -3.3e38  # finite too: an infinite similarity is an error, and comes out as NaN


def check(tensors: dict[str, Tensor], temperatures: dict[str, float]) -> None:
    """Refuse queries, keys, a queue or temperatures that do not fit; `ValueError` names which."""
    query, key, queue = tensors["query"], tensors["key"], tensors["queue"]
    if query.ndim != 2 or not query.is_floating_point():
        raise ValueError(f"query must be a floating-point [B,D], got {query.dtype} {list(query.shape)}")
    if key.shape != query.shape:
        raise ValueError(f"key must have the shape of query {list(query.shape)}, got {list(key.shape)}")
    if queue.ndim != 2 or queue.shape[1] != query.shape[1] or queue.shape[0] < 1:
        raise ValueError(f"queue must be [N,{query.shape[1]}] with N >= 1, got {list(queue.shape)}")
    for name, tensor in (("key", key), ("queue", queue)):
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device} like query, got {tensor.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    for name, temperature in temperatures.items():
        if not temperature > 0:
            raise ValueError(f"{name} must be above 0, got {temperature}")


def check_images(query: Tensor, queue: Tensor, images: Tensor | None, queue_images: Tensor | None) -> None:
    """Refuse indices of images that do not fit the queries and the queue; `ValueError` names which."""
    if (images is None) != (queue_images is None):
        raise ValueError("images must be given with queue_images, or neither")
    for name, of, tensor in (("images", query, images), ("queue_images", queue, queue_images)):
        if tensor is not None and (tensor.shape != of.shape[:1] or tensor.dtype != torch.int64):
            raise ValueError(f"{name} must be an int64 [{len(of)}], got {tensor.dtype} {list(tensor.shape)}")
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device} like query, got {tensor.device}")


def own_keys(images: Tensor | None, queue_images: Tensor | None) -> Tensor | None:
    """Which keys of the queue are of a row's own image, `[B,N]`; None if not known."""
    return None if images is None or queue_images is None else images[:, None] == queue_images


def similarities(rows: Tensor, queue: Tensor, own: Tensor | None, temperature: float = 1.0) -> Tensor:
    """`rows [B,D] . queue [N,D] / temperature`, `LEFT_OUT` for `own` keys."""
    products = (rows / temperature) @ queue.T
    return products if own is None else products.masked_fill_(own, LEFT_OUT)


def attention(logits: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """`logsumexp [B]` of the logits `[B,N]`, which are overwritten, and the softmax's mean of the keys `[B,D]`.

    A row of which every key is left out has -inf and 0; one that is not finite has NaN.
    """
    top = logits.amax(1, keepdim=True)
    high = top.clamp_min(LOWEST) + (top - top)  # an infinite one makes all of the row NaN
    weights = logits.sub_(high).exp_()
    mass = weights.sum(1, keepdim=True)  # 1 at least: that of the highest
    return (high + mass.log())[:, 0], (weights @ queue).div_(mass.clamp_min(1))


class _WithGradient(torch.autograd.Function):
    """A loss `[B]` whose gradient by each query `[B,D]` is known already."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = query.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(ctx.dtype), None, None


def pulled(
    query: Tensor, queue: Tensor, target: Tensor, own: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """The module's loss `[B]`, differentiable in `query`, and the target at unit length; in the dtype of `queue`.

    Both are 0 for a row of which every key is left out.
    """
    with torch.no_grad():
        wide = query.to(queue.dtype)
        mass, mean = attention(similarities(wide, queue, own, temperature), queue)
        loss = (mass - torch.linalg.vecdot(wide, target) / temperature).masked_fill_(mass == -torch.inf, 0)
        gradient = mean.sub_(target).div_(temperature)
    return _WithGradient.apply(query, loss, gradient), normalize(target, dim=1)


if triton is not None:
    NOTHING = tl.constexpr(LOWEST)

    @triton.jit
    def load_rows(rows, b, B, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
        """Rows `b` of `[B,D]`, zeros beyond the last."""
        d = tl.arange(0, BLOCK_D)
        tile = tl.load(rows + b[:, None] * D + d[None, :], mask=(b < B)[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            tile = tile.to(tl.float32)
        return tile

    @triton.jit
    def compare(
        q, mine, queue, queue_images, n, stop,
        D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """Keys `n` of the queue and their products with rows `q`; -inf beyond `stop` and for keys of image `mine`."""
        d = tl.arange(0, BLOCK_D)
        offsets = n.to(tl.int64)[:, None] * D + d[None, :]
        keys = tl.load(queue + offsets, mask=(n < stop)[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            keys = keys.to(tl.float32)
        keys = keys.to(q.dtype)
        products = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        counts = (n < stop)[None, :]
        if MASKED:
            counts &= mine[:, None] != tl.load(queue_images + n, mask=n < stop, other=0)[None, :]
        return keys, tl.where(counts, products, float("-inf"))

    @triton.jit
    def attend_kernel(
        rows, queue, images, queue_images, peak, total, weighted, R, B, N, share, scale, key_scale,
        D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
        TWO: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """Online softmax of a block of rows over one part of the queue, in powers of two; rows from `B` on are keys."""
        part = tl.program_id(1)
        first = part * share
        stop = tl.minimum(first + share, N)
        r = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        scales = scale
        if TWO:
            scales = tl.where(r < B, scale, key_scale)[:, None]
        q = load_rows(rows, r, R, D, BLOCK_D, UPCAST)
        mine = r
        if MASKED:
            mine = tl.load(images + r % B, mask=r < R, other=0)
        high = tl.full([BLOCK_B], NOTHING, tl.float32)
        mass = tl.zeros([BLOCK_B], tl.float32)
        sums = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for start in range(first, stop, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            keys, logits = compare(q, mine, queue, queue_images, n, stop, D, BLOCK_D, MASKED, PRECISION, UPCAST)
            logits *= scales
            higher = tl.maximum(high, tl.max(logits, axis=1))
            p = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(high - higher)
            mass = mass * shrink + tl.sum(p, axis=1)
            weights = p.to(q.dtype)
            sums = sums * shrink[:, None] + tl.dot(weights, keys, input_precision=PRECISION)
            if EXACT:  # what 16 bits leave of a weight
                sums += tl.dot((p - weights.to(tl.float32)).to(q.dtype), keys, input_precision=PRECISION)
            high = higher
        d, at = tl.arange(0, BLOCK_D), part * R + r
        tl.store(peak + at, high, mask=r < R)
        tl.store(total + at, mass, mask=r < R)
        tl.store(weighted + at.to(tl.int64)[:, None] * D + d[None, :], sums, mask=(r < R)[:, None] & (d < D)[None, :])

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

    @triton.jit
    def pull(
        query, key, loss, gradient, positive, b, high, mass, sums, target, inverse_temperature,
        D: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Write what `pulled` gives of one query, and its gradient."""
        d = tl.arange(0, BLOCK_D)
        q = tl.load(query + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        k = tl.load(key + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        own = tl.sum(k - k, axis=0)  # NaN where the row is not finite, else 0
        both = own + tl.sum(q - q, axis=0)
        value = (high + tl.log2(mass)) * 0.6931471805599453 - tl.sum(q * target, axis=0) * inverse_temperature
        tl.store(loss + b, tl.where(mass == 0, 0.0, value) + both)
        slope = (sums / tl.maximum(mass, 1.0) - target) * inverse_temperature
        tl.store(gradient + b * D + d, slope + both, mask=d < D)
        length = tl.sqrt(tl.sum(target * target, axis=0))
        tl.store(positive + b * D + d, target / tl.maximum(length, 1e-12) + own, mask=d < D)


class Plan(NamedTuple):
    """How rows and a queue are split over programs."""

    blocks: int  # of rows
    parts: int  # of the queue: whole tiles of keys
    share: int  # keys in a part
    options: dict[str, Any]  # of a kernel that goes over the queue
    dims: dict[str, int]  # of a kernel that joins the parts


def plan(op: str, rows: Tensor, queue: Tensor) -> Plan:
    """The launch of `op` with rows `[R,D]` and a queue `[N,D]`."""
    options: dict[str, Any] = dict(TABLE[op][contrast_class(rows.dtype, *rows.shape)])
    blocks, tile = triton.cdiv(len(rows), options["BLOCK_B"]), options["BLOCK_N"]
    parts = max(options.pop("programs") // blocks, 1)
    # at least 256 each: a part writes `[R,D]` sums in fp32, and with fewer keys those would be most of the bytes
    share = triton.cdiv(max(triton.cdiv(len(queue), parts), 256), tile) * tile
    parts = triton.cdiv(len(queue), share)
    dims = {"D": rows.shape[1], "BLOCK_D": max(triton.next_power_of_2(rows.shape[1]), 16)}
    options |= dims | {
        "PRECISION": "ieee" if rows.dtype == torch.float32 else "tf32",
        "UPCAST": INTERPRET and torch.bfloat16 in (rows.dtype, queue.dtype),
    }
    return Plan(blocks, parts, share, options, dims | {"BLOCK_PARTS": triton.next_power_of_2(parts)})


@on_its_device
def attend(
    plan: Plan, rows: Tensor, queue: Tensor, batch: int, scales: tuple[float, float], *, exact: bool,
    images: Tensor | None = None, queue_images: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each part's highest logit and mass `[parts,R]` and weighted keys `[parts,R,D]`, for `join`.

    Products of the first `batch` of the rows `[R,D]` are multiplied by the first of `scales`, those of the others, of
    the same images, by the second. `exact` keeps what rounding the weights to 16 bits would lose.
    """
    count, keys = len(rows), len(queue)
    peak, total = (rows.new_empty(plan.parts, count, dtype=torch.float32) for _ in range(2))
    weighted = peak.new_empty(plan.parts, count, rows.shape[1])
    mine, theirs = (each.contiguous() if each is not None else rows for each in (images, queue_images))
    attend_kernel[(plan.blocks, plan.parts)](
        rows, queue, mine, theirs, peak, total, weighted, count, batch, keys, plan.share, *scales,
        TWO=batch < count, MASKED=images is not None, EXACT=exact and rows.dtype != torch.float32, **plan.options,
    )  # fmt: skip
    return peak, total, weighted


def results(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the loss `[B]` and its gradient by the query `[B,D]`, both fp32, and for the positives `[B,D]`."""
    loss = query.new_empty(len(query), dtype=torch.float32)
    return loss, loss.new_empty(query.shape), query.new_empty(query.shape)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Setup for `backward` of an op whose first input is the query and which gives loss, gradient and positive."""
    _, gradient, positive = output
    ctx.mark_non_differentiable(gradient, positive)
    ctx.save_for_backward(gradient)
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)


def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    """The gradient by the query, and none by the other inputs."""
    (gradient,) = ctx.saved_tensors
    return (grad[:, None] * gradient).to(ctx.dtype), *[None] * (ctx.inputs - 1)
