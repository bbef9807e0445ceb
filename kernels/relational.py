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
from torch.nn.functional import normalize

from fastcr.kernels.launch import Impl, check_tensor, fused_op, use_triton
from fastcr.kernels.queue import MAX_DIM, SPLIT, attend, check, new_outputs, queue_spec, register
from fastcr.kernels.settings import FENCED
from fastcr.kernels.spec import Normal, Sizes, draw_units

try:
    import triton
    import triton.language as tl

    from fastcr.kernels.queue import NOTHING, join
except ImportError:
    triton = None

LEFT_OUT = -3.3e38  # below every logit, and finite, so that a row without others has no infinity


def relational_reference(
    query: Tensor, key: Tensor, queue: Tensor, *, temperature: float = 0.1, key_temperature: float = 0.04,
    images: Tensor | None = None, queue_images: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The equations above in plain torch, in fp32 (fp64 for fp64 inputs): the specification and the test oracle."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        queue = queue.to(dtype)
        logits = (query.to(dtype) / temperature) @ queue.T
        key_logits = (key.to(dtype) / key_temperature) @ queue.T
        alone = torch.zeros_like(logits[:, 0], dtype=torch.bool)
        if images is not None and queue_images is not None:
            own = images[:, None] == queue_images
            alone = own.all(1)
            logits, key_logits = logits.masked_fill(own, LEFT_OUT), key_logits.masked_fill_(own, LEFT_OUT)
        p = torch.softmax(key_logits, dim=1)
        loss = -torch.linalg.vecdot(p, torch.log_softmax(logits, dim=1)).masked_fill(alone, 0)
        target = (p @ queue).masked_fill(alone[:, None], 0)
    return loss, normalize(target, dim=1).to(key.dtype)


if triton is not None:

    @triton.jit
    def _combine_kernel(
        rows, peak, total, weighted, loss, gradient, positive, B, parts, inverse_temperature,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    ):  # fmt: skip
        """Join the parts of one query and of its key: loss, gradient by the query, positive."""
        b, d = tl.program_id(0), tl.arange(0, BLOCK_D)
        high, mass, sums = join(peak, total, weighted, b, 2 * B, parts, NOTHING, D, BLOCK_D, BLOCK_PARTS)
        _, key_mass, target = join(peak, total, weighted, B + b, 2 * B, parts, NOTHING, D, BLOCK_D, BLOCK_PARTS)
        target /= tl.maximum(key_mass, 1.0)
        q = tl.load(rows + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        k = tl.load(rows + (B + b) * D + d, mask=d < D, other=0.0).to(tl.float32)
        own = tl.sum(k - k, axis=0)  # NaN where the row is not finite, else 0
        both = own + tl.sum(q - q, axis=0)
        value = (high + tl.log2(mass)) * 0.6931471805599453 - tl.sum(q * target, axis=0) * inverse_temperature
        tl.store(loss + b, tl.where(mass == 0, 0.0, value) + both)
        slope = (sums / tl.maximum(mass, 1.0) - target) * inverse_temperature
        tl.store(gradient + b * D + d, slope + both, mask=d < D)
        length = tl.sqrt(tl.sum(target * target, axis=0))
        tl.store(positive + b * D + d, target / tl.maximum(length, 1e-12) + own, mask=d < D)


@fused_op("fastcr::relational")
def _fused(
    query: Tensor, key: Tensor, queue: Tensor, images: Tensor | None, queue_images: Tensor | None,
    temperature: float, key_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, its gradient by each query, and the positives, all fp32, for queries and keys of one dtype."""
    batch, queue, outputs = len(query), queue.contiguous(), new_outputs(query)
    if batch == 0:
        return outputs
    scales = math.log2(math.e) / temperature, math.log2(math.e) / key_temperature
    rows = torch.cat([query, key])
    *parts, options = attend(
        "relational", rows, queue, batch, scales, exact=True, images=images, queue_images=queue_images
    )
    _combine_kernel[(batch,)](rows, *parts, *outputs, batch, len(parts[0]), 1 / temperature, **options, num_warps=4)
    return outputs


register("relational", _fused, learns=1)


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
        impl: "auto", "torch" or "triton", whose kernels take D up to 4096.

    Returns:
        Loss `[B]` in nats, fp32 (fp64 for fp64 inputs), differentiable in `query` alone; and `[B,D]` in the dtype of
        `key`, the queue's keys weighted with p, at unit length. Both are 0 for an image whose every key is left out.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot serve these tensors.
    """
    given = {"query": query, "key": key, "queue": queue}
    check(given, {"temperature": temperature, "key_temperature": key_temperature})
    if (images is None) != (queue_images is None):
        raise ValueError("images must be given with queue_images, or neither")
    if images is not None and queue_images is not None:
        check_tensor("images", images, query.shape[:1], query, torch.int64)
        check_tensor("queue_images", queue_images, queue.shape[:1], query, torch.int64)
    key, queue = key.detach(), queue.detach()
    if not use_triton(impl, given, fits=query.shape[1] <= MAX_DIM):
        return relational_reference(
            query, key, queue, temperature=temperature, key_temperature=key_temperature,
            images=images, queue_images=queue_images,
        )  # fmt: skip
    rows = torch.promote_types(torch.promote_types(query.dtype, key.dtype), queue.dtype)
    fused = _fused(query.to(rows), key.to(rows), queue, images, queue_images, temperature, key_temperature)
    return fused[0], fused[2].to(key.dtype)


def _inputs(sizes: Sizes, dtype: torch.dtype, normal: Normal) -> dict[str, Tensor]:
    drawn = draw_units(sizes, dtype, normal)
    keys = torch.arange(sizes["N"], device=drawn["query"].device)  # a queue that holds a key of every image
    return drawn | {"images": keys[torch.arange(sizes["B"]) % sizes["N"]], "queue_images": keys}


SPEC = queue_spec(
    relational,
    relational_reference,
    rows=2,
    inputs=_inputs,
    own={
        "16 bits, B > 16, D <= 256": SPLIT | {"BLOCK_B": 32, "BLOCK_N": 32, "num_warps": 4},
        "16 bits, B > 16, D <= 256, wgmma": SPLIT
        | {"BLOCK_B": 64, "num_warps": 4}
        | ({"BLOCK_N": 64, "num_stages": 2} if FENCED else {"BLOCK_N": 32, "num_stages": 1}),
        "32 bits, B > 16, D <= 256": SPLIT | {"BLOCK_B": 16, "BLOCK_N": 32, "num_warps": 8},
    },
)
