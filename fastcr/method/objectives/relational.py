"""`relational`: a query shall be as similar to the queue's keys as its own key is (ReSSL, arXiv 2107.09282).

    p = softmax(k_b . queue / t_key)    q = softmax(q_b . queue / t_query)    loss_b = -sum_n p_n log q_n

With t_key below t_query the target is the sharper of the two. No image is pushed away from those that its own key
resembles. An image's own earlier keys are left out. The key's view should show the whole object (`--views.key
centre`, or `weak`), since it is the teacher.
"""

from __future__ import annotations

from torch import Tensor

from fastcr.kernels import relational as kernel
from fastcr.kernels.launch import Impl
from fastcr.method.objectives.contract import Compared, Keys


def relational(
    query: Tensor, keys: Keys, *, temperature: float, key_temperature: float, impl: Impl = "auto"
) -> Compared:
    """Cross entropy of unit queries `[B,D]` with their keys' similarities to the queue, nats."""
    loss, positive = kernel.relational(
        query,
        keys.own,
        keys.queue,
        temperature=temperature,
        key_temperature=key_temperature,
        images=keys.images,
        queue_images=keys.queue_images,
        impl=impl,
    )
    return Compared(loss, positive)
