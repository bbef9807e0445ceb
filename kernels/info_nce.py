"""InfoNCE of a batch of queries against their keys and a queue of negatives.

    loss_b = -s_b0 + log(exp(s_b0) + sum_n exp(s_bn)),   s_b0 = q_b . k_b / T,   s_bn = q_b . queue_n / T

q [B,D] queries, k [B,D] keys, queue [N,D] earlier keys, all of unit length (normalised by the caller), T temperature.
Least bytes: the queue read once, `2 N D` in 16 bits (the reference materialises the `[B,N]` logits; the kernel never).

The gradient by the query is attention over the keys, `(sum_n softmax_n k_n - k_b) / T`: one online-softmax pass over
the queue gives loss and gradient. The queue is split over programs and the parts are combined in a fixed order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcr.kernels.launch import Impl, fused_op, use_triton
from fastcr.kernels.queue import MAX_DIM, SPLIT, attend, check, new_outputs, queue_spec, register
from fastcr.kernels.settings import FENCED

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
        query, key, peak, total, weighted, loss, by_query, by_key, B, parts, scale, inverse_temperature,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    ):  # fmt: skip
        """Join the parts of one query with its positive: the loss, and its gradients by the query and by the key."""
        b, d = tl.program_id(0), tl.arange(0, BLOCK_D)
        q = tl.load(query + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        k = tl.load(key + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        positive = tl.sum(q * k, axis=0) * scale
        high, mass, sums = join(peak, total, weighted, b, B, parts, positive, D, BLOCK_D, BLOCK_PARTS)
        mass += tl.exp2(positive - high)
        excess = tl.exp2(positive - high) / mass - 1
        tl.store(loss + b, (high - positive + tl.log2(mass)) * 0.6931471805599453)
        tl.store(by_query + b * D + d, (sums / mass + excess * k) * inverse_temperature, mask=d < D)
        tl.store(by_key + b * D + d, excess * inverse_temperature * q, mask=d < D)


@fused_op("fastcr::info_nce")
def _fused(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss `[B]`, and its gradients by each query and each key `[B,D]`, all fp32."""
    batch, outputs = len(query), new_outputs(query)
    query, key, queue = query.contiguous(), key.contiguous(), queue.contiguous()
    if batch == 0:
        return outputs
    scale = math.log2(math.e) / temperature
    *parts, options = attend("info_nce", query, queue, batch, (scale, scale), exact=False)
    _combine_kernel[(batch,)](
        query, key, *parts, *outputs, batch, len(parts[0]), scale, 1 / temperature, **options, num_warps=4
    )
    return outputs


register("info_nce", _fused, learns=2)


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


SPEC = queue_spec(
    info_nce,
    info_nce_reference,
    rows=1,
    own={
        "16 bits, B > 16, D <= 256": SPLIT
        | {"BLOCK_B": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2 if FENCED else 1},
        "32 bits, B > 16, D <= 256": SPLIT | {"BLOCK_B": 32, "BLOCK_N": 32, "num_warps": 8},
    },
)
