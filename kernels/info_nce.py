"""InfoNCE of a batch of queries against their keys and a queue of negatives.

    loss_b = -s_b0 + log(exp(s_b0) + sum_n exp(s_bn)),   s_b0 = q_b . k_b / T,   s_bn = q_b . queue_n / T

q [B,D] queries, k [B,D] keys, queue [N,D] earlier keys, all of unit length (normalised by the caller), T temperature.
Least bytes: the queue read once, `2 N D` in 16 bits (the reference materialises the `[B,N]` logits; the kernel never).

The gradient by the query is attention over the keys, `(sum_n softmax_n k_n - k_b) / T`: one online-softmax pass over
the queue gives loss and gradient. The queue is split over programs and the parts are combined in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastcr.kernels.launch import INTERPRET, Impl, fused_op, use_triton
from fastcr.kernels.settings import TABLE, contrast_class

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_DIM = 512  # of a query: its row, the keys' tile and the gradient stay on the chip


def info_nce_reference(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float = 0.2) -> Tensor:
    """The equation above in plain torch, in fp32 (fp64 for fp64 inputs): the specification and the test oracle."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, key, queue = query.to(dtype), key.to(dtype), queue.to(dtype)
        positive = (query * key).sum(1, keepdim=True)
        logits = torch.cat([positive, query @ queue.T], dim=1) / temperature
        return torch.logsumexp(logits, dim=1) - logits[:, 0]


if triton is not None:

    @triton.jit
    def _partial_kernel(
        query, queue, peak, total, weighted, B, N, rows, scale,
        D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
        PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """Online softmax of one block of queries over one part of the queue, in powers of two."""
        part = tl.program_id(1)
        b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        d = tl.arange(0, BLOCK_D)
        q = tl.load(query + b[:, None] * D + d[None, :], mask=(b < B)[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        high = tl.full([BLOCK_B], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_B], tl.float32)
        sums = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        stop = tl.minimum((part + 1) * rows, N)
        for start in range(part * rows, stop, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            offsets = n.to(tl.int64)[:, None] * D + d[None, :]
            keys = tl.load(queue + offsets, mask=(n < stop)[:, None] & (d < D)[None, :], other=0.0)
            if UPCAST:
                keys = keys.to(tl.float32)
            keys = keys.to(q.dtype)
            logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
            logits = tl.where((n < stop)[None, :], logits, float("-inf"))
            higher = tl.maximum(high, tl.max(logits, axis=1))
            p = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(high - higher)
            mass = mass * shrink + tl.sum(p, axis=1)
            sums = sums * shrink[:, None] + tl.dot(p.to(q.dtype), keys, input_precision=PRECISION)
            high = higher
        at = part * B + b
        tl.store(peak + at, high, mask=b < B)
        tl.store(total + at, mass, mask=b < B)
        tl.store(weighted + at.to(tl.int64)[:, None] * D + d[None, :], sums, mask=(b < B)[:, None] & (d < D)[None, :])

    @triton.jit
    def _combine_kernel(
        query, key, peak, total, weighted, loss, gradient, pull, B, parts, scale, inverse_temperature,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """Join the parts of one query with its positive: loss, gradient by the query, softmax of the positive - 1."""
        b = tl.program_id(0)
        d, part = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_PARTS)
        q = tl.load(query + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        k = tl.load(key + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        positive = tl.sum(q * k, axis=0) * scale
        highs = tl.load(peak + part * B + b, mask=part < parts, other=float("-inf"))
        masses = tl.load(total + part * B + b, mask=part < parts, other=0.0)
        high = tl.maximum(tl.max(highs, axis=0), positive)
        mass = tl.sum(masses * tl.exp2(highs - high), axis=0) + tl.exp2(positive - high)
        sums = tl.zeros([BLOCK_D], tl.float32)
        for i in range(parts):
            share = tl.exp2(tl.load(peak + i * B + b) - high)
            sums += share * tl.load(weighted + (i * B + b).to(tl.int64) * D + d, mask=d < D, other=0.0)
        excess = tl.exp2(positive - high) / mass - 1
        tl.store(loss + b, (high - positive + tl.log2(mass)) * 0.6931471805599453)
        tl.store(gradient + b * D + d, (sums / mass + excess * k) * inverse_temperature, mask=d < D)
        tl.store(pull + b, excess * inverse_temperature)


@fused_op("fastcr::info_nce")
def _fused(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss `[B]`, its gradient by each query `[B,D]`, and by `q_b . k_b` `[B]`, all fp32."""
    batch, dim = query.shape
    keys = queue.shape[0]
    query, key, queue = query.contiguous(), key.contiguous(), queue.contiguous()
    loss, pull = (query.new_empty(batch, dtype=torch.float32) for _ in range(2))
    gradient = query.new_empty(batch, dim, dtype=torch.float32)
    if batch == 0:
        return loss, gradient, pull
    blocks = dict(TABLE["info_nce"][contrast_class(query.dtype, batch, dim)])
    # whole tiles of keys to each of the programs that share a block of queries
    blocks_of_queries = triton.cdiv(batch, blocks["BLOCK_B"])
    parts = max(blocks.pop("programs") // blocks_of_queries, 1)
    # at least 256 each: a part writes `[B,D]` sums in fp32, and with fewer keys those would be most of the bytes
    rows = triton.cdiv(max(triton.cdiv(keys, parts), 256), blocks["BLOCK_N"]) * blocks["BLOCK_N"]
    parts = triton.cdiv(keys, rows)
    peak, total = (loss.new_empty(parts, batch) for _ in range(2))
    weighted = loss.new_empty(parts, batch, dim)
    block_d = max(triton.next_power_of_2(dim), 16)
    scale = math.log2(math.e) / temperature
    _partial_kernel[(blocks_of_queries, parts)](
        query, queue, peak, total, weighted, batch, keys, rows, scale,
        D=dim, BLOCK_D=block_d, **blocks,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        UPCAST=INTERPRET and torch.bfloat16 in (query.dtype, queue.dtype),
    )  # fmt: skip
    _combine_kernel[(batch,)](
        query, key, peak, total, weighted, loss, gradient, pull, batch, parts, scale, 1 / temperature,
        D=dim, BLOCK_D=block_d, BLOCK_PARTS=triton.next_power_of_2(parts), UPCAST=False, num_warps=4,
    )  # fmt: skip
    return loss, gradient, pull


@_fused.register_fake
def _(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim = query.shape
    loss, gradient, pull = (query.new_empty(shape, dtype=torch.float32) for shape in ((batch,), (batch, dim), (batch,)))
    return loss, gradient, pull


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, _, _ = inputs
    _, gradient, pull = output
    ctx.mark_non_differentiable(gradient, pull)
    ctx.save_for_backward(gradient, pull, query)
    ctx.dtypes = query.dtype, key.dtype


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
    gradient, pull, query = ctx.saved_tensors
    by_query = (grad[:, None] * gradient).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    by_key = ((grad * pull)[:, None] * query.float()).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return by_query, by_key, None, None


_fused.register_autograd(_backward, setup_context=_save)


def info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float = 0.2, impl: Impl = "auto") -> Tensor:
    """Contrast loss of each image (arXiv 2303.01669, L_CL; InfoNCE as in MoCo, arXiv 1911.05722 eq. 1).

    Args:
        query: `[B,D]`, unit length, fp16, bf16, fp32 or fp64; `B` may be 0.
        key: `[B,D]`, the positive of each query.
        queue: `[N,D]`, negatives shared by the batch, `N >= 1`; treated as a constant.
        temperature: T, above 0.
        impl: "auto", "torch" or "triton".

    Returns:
        Loss `[B]` in nats, fp32 (fp64 for fp64 inputs); differentiable in `query` and `key`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot serve these tensors.
    """
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
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    queue = queue.detach()
    if not use_triton(impl, {"query": query, "key": key, "queue": queue}, fits=query.shape[1] <= MAX_DIM):
        return info_nce_reference(query, key, queue, temperature=temperature)
    return _fused(query.to(torch.promote_types(query.dtype, queue.dtype)), key, queue, temperature)[0]
