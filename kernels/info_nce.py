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

from fastcr.kernels.launch import Impl, fused_op, use_triton
from fastcr.kernels.queue import MAX_DIM, OTHER_QUEUES, ROWS, SPLIT, USUAL_QUEUES, attend, check
from fastcr.kernels.settings import FENCED, contrast_class
from fastcr.kernels.spec import Example, OpSpec, draw_units

try:
    import triton
    import triton.language as tl

    from fastcr.kernels.queue import join
except ImportError:
    triton = None


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
    def _combine_kernel(
        query, key, peak, total, weighted, loss, gradient, pull, B, parts, scale, inverse_temperature,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    ):  # fmt: skip
        """Join the parts of one query with its positive: loss, gradient by the query, softmax of the positive - 1."""
        b, d = tl.program_id(0), tl.arange(0, BLOCK_D)
        q = tl.load(query + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        k = tl.load(key + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        positive = tl.sum(q * k, axis=0) * scale
        high, mass, sums = join(peak, total, weighted, b, B, parts, positive, D, BLOCK_D, BLOCK_PARTS)
        mass += tl.exp2(positive - high)
        excess = tl.exp2(positive - high) / mass - 1
        tl.store(loss + b, (high - positive + tl.log2(mass)) * 0.6931471805599453)
        tl.store(gradient + b * D + d, (sums / mass + excess * k) * inverse_temperature, mask=d < D)
        tl.store(pull + b, excess * inverse_temperature)


@fused_op("fastcr::info_nce")
def _fused(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss `[B]`, its gradient by each query `[B,D]`, and by `q_b . k_b` `[B]`, all fp32."""
    batch, dim = query.shape
    query, key, queue = query.contiguous(), key.contiguous(), queue.contiguous()
    loss, pull = (query.new_empty(batch, dtype=torch.float32) for _ in range(2))
    gradient = query.new_empty(batch, dim, dtype=torch.float32)
    if batch == 0:
        return loss, gradient, pull
    scale = math.log2(math.e) / temperature
    *parts, options = attend("info_nce", query, queue, batch, (scale, scale), exact=False)
    _combine_kernel[(batch,)](
        query, key, *parts, loss, gradient, pull, batch, len(parts[0]), scale, 1 / temperature, **options, num_warps=4
    )
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
    given = {"query": query, "key": key, "queue": queue}
    check(given, {"temperature": temperature})
    queue = queue.detach()
    if not use_triton(impl, given, fits=query.shape[1] <= MAX_DIM):
        return info_nce_reference(query, key, queue, temperature=temperature)
    return _fused(query.to(torch.promote_types(query.dtype, queue.dtype)), key, queue, temperature)[0]


SPEC = OpSpec(
    info_nce,
    info_nce_reference,
    inputs=draw_units,
    learns=("query",),
    usual=tuple(map(Example, USUAL_QUEUES)),
    others=tuple(map(Example, OTHER_QUEUES)),
    bytes=lambda z, width, backward: width * z["N"] * z["D"],
    flops=lambda z: 4 * z["B"] * z["N"] * z["D"],
    rows=lambda z, dtype: {"info_nce": contrast_class(dtype, z["B"], z["D"])},
    kernels={
        "info_nce": ROWS
        | {
            "16 bits, B > 16, D <= 256": {"BLOCK_B": 64, "BLOCK_N": 64, "num_warps": 4}
            | SPLIT
            | {"num_stages": 2 if FENCED else 1},
            "32 bits, B > 16, D <= 256": {"BLOCK_B": 32, "BLOCK_N": 32, "num_warps": 8} | SPLIT,
        }
    },
)
