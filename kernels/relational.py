"""Cross entropy of a query's similarities to a queue of keys with those of its own key.

    u_bn = key_b . queue_n / t_key      p = softmax_n(u)      P_b = sum_n p_bn queue_n
    s_bn = query_b . queue_n / t        q = softmax_n(s)      loss_b = -sum_n p_bn log q_bn

query, key [B,D] and queue [N,D] of unit length (normalised by the caller). The loss is `logsumexp_n(s) - query . P / t`
and its gradient by the query `(sum_n q_n queue_n - P) / t`, so that attention of query and key to the queue gives loss,
gradient and P (`queue.py`).
Least bytes: the queue read once, `2 N D` in 16 bits. Arithmetic: `8 B N D`, and `4 B N D` more in 16 bits, where the
weights come in two parts: loss and gradient are differences of what they give.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcr.kernels.launch import Impl, fused_op, use_triton
from fastcr.kernels.queue import (
    MAX_DIM,
    attend,
    attention,
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

    from fastcr.kernels.queue import NOTHING, join, pull
except ImportError:
    triton = None


def relational_reference(
    query: Tensor, key: Tensor, queue: Tensor, *, temperature: float = 0.1, key_temperature: float = 0.04,
    images: Tensor | None = None, queue_images: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The equations above in plain torch, in fp32 (fp64 for fp64 inputs): the specification and the test oracle."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        queue, own = queue.to(dtype), own_keys(images, queue_images)
        _, target = attention(similarities(key.to(dtype), queue, own, key_temperature), queue)
        loss, positive = pulled(query, queue, target, own, temperature)
        return loss, positive.to(key.dtype)


if triton is not None:

    @triton.jit
    def _combine_kernel(
        rows, peak, total, weighted, loss, gradient, positive, B, parts, inverse_temperature,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    ):  # fmt: skip
        """Join the parts of one query and of its key: loss, gradient by the query, positive."""
        b = tl.program_id(0)
        high, mass, sums = join(peak, total, weighted, b, 2 * B, parts, NOTHING, D, BLOCK_D, BLOCK_PARTS)
        _, key_mass, target = join(peak, total, weighted, B + b, 2 * B, parts, NOTHING, D, BLOCK_D, BLOCK_PARTS)
        target /= tl.maximum(key_mass, 1.0)
        pull(rows, rows + B * D, loss, gradient, positive, b, high, mass, sums, target, inverse_temperature, D, BLOCK_D)


@fused_op("fastcr::relational")
def _fused(
    query: Tensor, key: Tensor, queue: Tensor, images: Tensor | None, queue_images: Tensor | None,
    temperature: float, key_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, its gradient by each query, and the positives, for queries and keys of one dtype."""
    batch, queue = len(query), queue.contiguous()
    loss, gradient, positive = results(query)
    if batch == 0:
        return loss, gradient, positive
    scales = math.log2(math.e) / temperature, math.log2(math.e) / key_temperature
    rows = torch.cat([query, key])
    grid = plan("relational", rows, queue)
    parts = attend(grid, rows, queue, batch, scales, exact=True, images=images, queue_images=queue_images)
    _combine_kernel[(batch,)](
        rows, *parts, loss, gradient, positive, batch, grid.parts, 1 / temperature, **grid.dims, num_warps=4
    )
    return loss, gradient, positive


@_fused.register_fake
def _(query: Tensor, *unused: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    return results(query)


_fused.register_autograd(backward, setup_context=save)


def relational(
    query: Tensor, key: Tensor, queue: Tensor, *, temperature: float = 0.1, key_temperature: float = 0.04,
    images: Tensor | None = None, queue_images: Tensor | None = None, impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Relational loss of each image (ReSSL, arXiv 2107.09282, eq. 4 to 6): be as similar to others as its key is.

    Args:
        query: `[B,D]`, unit length, fp16, bf16, fp32 or fp64; `B` may be 0.
        key: `[B,D]`, of the same images, the teacher's; a constant.
        queue: `[N,D]`, keys of other images, `N >= 1`; a constant.
        temperature: t, above 0.
        key_temperature: t_key, above 0; below `temperature` the target is the sharper distribution.
        images: int64 `[B]`, the index of each image, with `queue_images` int64 `[N]`: keys of an image of the same
            index are left out of both distributions.
        queue_images: see `images`.
        impl: "auto", "torch" or "triton", whose kernels take D up to 512.

    Returns:
        Loss `[B]` in nats, fp32 (fp64 for fp64 inputs), differentiable in `query` alone; and `[B,D]` in the dtype of
        `key`, the queue's keys weighted with p, at unit length. Both are 0 for an image whose every key is left out.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot serve these tensors.
    """
    given = {"query": query, "key": key, "queue": queue}
    check(given, {"temperature": temperature, "key_temperature": key_temperature})
    check_images(query, queue, images, queue_images)
    key, queue = key.detach(), queue.detach()
    if not use_triton(impl, given, fits=query.shape[1] <= MAX_DIM):
        return relational_reference(
            query, key, queue, temperature=temperature, key_temperature=key_temperature,
            images=images, queue_images=queue_images,
        )  # fmt: skip
    rows = torch.promote_types(torch.promote_types(query.dtype, key.dtype), queue.dtype)
    fused = _fused(query.to(rows), key.to(rows), queue, images, queue_images, temperature, key_temperature)
    return fused[0], fused[2].to(key.dtype)
