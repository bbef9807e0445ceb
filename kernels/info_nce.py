"""InfoNCE of a batch of queries against their keys and a queue of negatives.

    loss_b = -s_b0 + log(exp(s_b0) + sum_n exp(s_bn)),   s_b0 = q_b . k_b / T,   s_bn = q_b . queue_n / T

q [B,D] queries, k [B,D] keys, queue [N,D] earlier keys, all of unit length (normalised by the caller), T temperature.
Least bytes: the queue read once, `2 N D` in 16 bits; the reference here materialises the `[B,N]` logits.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]


def info_nce_reference(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float = 0.2) -> Tensor:
    """The equation above in plain torch, in fp32 (fp64 for fp64 inputs): the specification and the test oracle."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, key, queue = query.to(dtype), key.to(dtype), queue.to(dtype)
        positive = (query * key).sum(1, keepdim=True)
        logits = torch.cat([positive, query @ queue.T], dim=1) / temperature
        return torch.logsumexp(logits, dim=1) - logits[:, 0]


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
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl must be 'auto' or 'torch' (info_nce has no other implementation), got {impl!r}")
    return info_nce_reference(query, key, queue.detach(), temperature=temperature)
