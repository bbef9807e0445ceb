"""`neighbour`: the positives are the keys of the queue nearest to the own key (NNCLR, arXiv 2104.14548).

    loss_b = -mean over the n nearest i of log softmax(q_b . queue / T)[i]

A nearest key is often of the same class, so the loss draws together what InfoNCE pushes apart. An image's own earlier
keys are left out.
"""

from __future__ import annotations

from torch import Tensor

from fastcr.kernels import neighbour as kernel
from fastcr.kernels.launch import Impl
from fastcr.method.objectives.contract import Compared, Keys


def neighbour(query: Tensor, keys: Keys, *, temperature: float, neighbours: int, impl: Impl = "auto") -> Compared:
    """Loss of unit queries `[B,D]`, nats; the queue needs at least `neighbours` keys."""
    loss, positive = kernel.neighbour(
        query,
        keys.own,
        keys.queue,
        temperature=temperature,
        neighbours=neighbours,
        images=keys.images,
        queue_images=keys.queue_images,
        impl=impl,
    )
    return Compared(loss, positive)
