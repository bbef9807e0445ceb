"""Cross entropy of a query's similarities to a queue with the keys nearest to its own key as positives.

    i in the n nearest: highest key_b . queue_i       P_b = mean over them of queue_i
    loss_b = -mean_i log softmax_n(query_b . queue_n / T)_i

query, key [B,D] and queue [N,D] of unit length (normalised by the caller). Of equally near keys the first is taken. The
loss is `logsumexp_n(query . queue_n / T) - query . P / T` and its gradient by the query that of attention to the queue,
less P (`queue.py`).
Least bytes: the queue read once, `2 N D` in 16 bits; the kernels read it twice. Arithmetic: `6 B N D`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fastcr.kernels.launch import Impl, fused_op, use_triton
from fastcr.kernels.queue import (
    LEFT_OUT,
    MAX_DIM,
    attend,
    backward,
    check,
    check_images,
    own_keys,
    plan,
    pulled,
    results,
    save,
    similarities,
)

try:
    import triton
    import triton.language as tl

    from fastcr.kernels.queue import NOTHING, compare, join, load_rows, pull
except ImportError:
    triton = None

MAX_NEIGHBOURS = 16  # kept for each key while a part of the queue is gone through


def neighbour_reference(
    query: Tensor, key: Tensor, queue: Tensor, *, temperature: float = 0.1, neighbours: int = 1,
    images: Tensor | None = None, queue_images: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The equations above in plain torch, in fp32 (fp64 for fp64 inputs): the specification and the test oracle."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        queue, own = queue.to(dtype), own_keys(images, queue_images)
        near = similarities(key.to(dtype), queue, own)
        found = []
        for _ in range(neighbours):
            found.append(near.max(1, keepdim=True))  # the first of equal ones, which `topk` does not promise
            near.scatter_(1, found[-1].indices, LEFT_OUT)
        del near
        highest, nearest = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
        weights = (highest > LEFT_OUT) + (highest - highest)  # NaN where one is infinite
        weights /= weights.sum(1, keepdim=True).clamp_min(1)
        target = embedding_bag(nearest, queue, mode="sum", per_sample_weights=weights)
        loss, positive = pulled(query, queue, target, own, temperature)
        return loss, positive.to(key.dtype)


if triton is not None:

    @triton.jit
    def _nearest_kernel(
        key, queue, images, queue_images, best, place, B, N, share,
        D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
        NEIGHBOURS: tl.constexpr, KEPT: tl.constexpr,
        MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """The nearest to a block of keys in one part of the queue, in no order: products and places; -inf for none."""
        part = tl.program_id(1)
        first = part * share
        stop = tl.minimum(first + share, N)
        b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        k = load_rows(key, b, B, D, BLOCK_D, UPCAST)
        mine = b
        if MASKED:
            mine = tl.load(images + b, mask=b < B, other=0)
        slot = tl.arange(0, KEPT)
        values = tl.full([BLOCK_B, KEPT], float("-inf"), tl.float32)
        places = tl.zeros([BLOCK_B, KEPT], tl.int32) + (N + slot)[None, :]
        for start in range(first, stop, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            _, products = compare(k, mine, queue, queue_images, n, stop, D, BLOCK_D, MASKED, PRECISION, UPCAST)
            for _ in tl.static_range(NEIGHBOURS):  # the tile's highest takes the place of the worst that is kept
                top, low = tl.max(products, axis=1), tl.min(values, axis=1)
                where = tl.min(tl.where(products == top[:, None], n[None, :], N), axis=1)
                worst = tl.max(tl.where(values == low[:, None], places, -1), axis=1)
                swap = (top > low)[:, None] & (places == worst[:, None])
                values = tl.where(swap, top[:, None], values)
                places = tl.where(swap, where[:, None], places)
                products = tl.where(n[None, :] == where[:, None], float("-inf"), products)
        offsets = (part * B + b)[:, None] * KEPT + slot[None, :]
        tl.store(best + offsets, values, mask=(b < B)[:, None])
        tl.store(place + offsets, places, mask=(b < B)[:, None])

    @triton.jit
    def _combine_kernel(
        query, key, queue, peak, total, weighted, best, place, loss, gradient, positive, B, parts, inverse_temperature,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr,
        NEIGHBOURS: tl.constexpr, KEPT: tl.constexpr,
    ):  # fmt: skip
        """Join the parts of one query and of its key: loss, gradient by the query, positive."""
        b, d = tl.program_id(0), tl.arange(0, BLOCK_D)
        kept = tl.arange(0, BLOCK_PARTS * KEPT)
        inside = kept < parts * KEPT
        offsets = (kept // KEPT * B + b) * KEPT + kept % KEPT
        values = tl.load(best + offsets, mask=inside, other=float("-inf"))
        places = tl.load(place + offsets, mask=inside, other=2147483647)
        target, found = tl.zeros([BLOCK_D], tl.float32), 0.0
        for _ in range(NEIGHBOURS):
            top = tl.max(values, axis=0)
            where = tl.min(tl.where(values == top, places, 2147483647), axis=0)
            there = tl.where(top > float("-inf"), 1, 0)
            row = tl.load(queue + where.to(tl.int64) * D + d, mask=d < there * D, other=0.0)
            target += row.to(tl.float32)
            found += there
            values = tl.where(places == where, float("-inf"), values)
        target /= tl.maximum(found, 1.0)
        high, mass, sums = join(peak, total, weighted, b, B, parts, NOTHING, D, BLOCK_D, BLOCK_PARTS)
        pull(query, key, loss, gradient, positive, b, high, mass, sums, target, inverse_temperature, D, BLOCK_D)


@fused_op("fastcr::neighbour")
def _fused(
    query: Tensor, key: Tensor, queue: Tensor, images: Tensor | None, queue_images: Tensor | None,
    temperature: float, neighbours: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, its gradient by each query, and the positives, for queries and keys of one dtype."""
    batch = len(query)
    query, key, queue = query.contiguous(), key.contiguous(), queue.contiguous()
    loss, gradient, positive = results(query)
    if batch == 0:
        return loss, gradient, positive
    grid = plan("neighbour", query, queue)
    nearest = {"NEIGHBOURS": neighbours, "KEPT": triton.next_power_of_2(neighbours)}
    best = loss.new_empty(grid.parts, batch, nearest["KEPT"])
    place = torch.empty_like(best, dtype=torch.int32)
    mine, theirs = (each.contiguous() if each is not None else key for each in (images, queue_images))
    scale = math.log2(math.e) / temperature
    _nearest_kernel[(grid.blocks, grid.parts)](
        key, queue, mine, theirs, best, place, batch, len(queue), grid.share,
        MASKED=images is not None, **nearest, **grid.options,
    )  # fmt: skip
    parts = attend(grid, query, queue, batch, (scale, scale), exact=False, images=images, queue_images=queue_images)
    _combine_kernel[(batch,)](
        query, key, queue, *parts, best, place, loss, gradient, positive, batch, grid.parts, 1 / temperature,
        **nearest, **grid.dims, num_warps=4,
    )  # fmt: skip
    return loss, gradient, positive


@_fused.register_fake
def _(query: Tensor, *unused: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    return results(query)


_fused.register_autograd(backward, setup_context=save)


def neighbour(
    query: Tensor, key: Tensor, queue: Tensor, *, temperature: float = 0.1, neighbours: int = 1,
    images: Tensor | None = None, queue_images: Tensor | None = None, impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss of each image with its key's nearest neighbours in the queue as positives (NNCLR, arXiv 2104.14548, eq. 3).

    Args:
        query: `[B,D]`, unit length, fp16, bf16, fp32 or fp64; `B` may be 0.
        key: `[B,D]`, of the same images; a constant.
        queue: `[N,D]`, keys of other images, `N >= 1`; a constant.
        temperature: T, above 0.
        neighbours: n, how many are positives, 1 to N.
        images: int64 `[B]`, the index of each image, with `queue_images` int64 `[N]`: keys of an image of the same
            index are neither positives nor what they are told from.
        queue_images: see `images`.
        impl: "auto", "torch" or "triton", whose kernels take D up to 512 and n up to 16.

    Returns:
        Loss `[B]` in nats, fp32 (fp64 for fp64 inputs), differentiable in `query` alone; and `[B,D]` in the dtype of
        `key`, the mean of the neighbours at unit length. An image with fewer other keys than n has all of them as
        positives; both results are 0 for one that has none.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot serve these tensors.
    """
    given = {"query": query, "key": key, "queue": queue}
    check(given, {"temperature": temperature})
    check_images(query, queue, images, queue_images)
    if not 1 <= neighbours <= len(queue):
        raise ValueError(f"neighbours must be 1 to {len(queue)}, the keys in the queue, got {neighbours}")
    key, queue = key.detach(), queue.detach()
    if not use_triton(impl, given, fits=query.shape[1] <= MAX_DIM and neighbours <= MAX_NEIGHBOURS):
        return neighbour_reference(
            query, key, queue, temperature=temperature, neighbours=neighbours, images=images, queue_images=queue_images
        )
    rows = torch.promote_types(torch.promote_types(query.dtype, key.dtype), queue.dtype)
    fused = _fused(query.to(rows), key.to(rows), queue, images, queue_images, temperature, neighbours)
    return fused[0], fused[2].to(key.dtype)
