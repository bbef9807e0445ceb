"""`relational`: a query shall be as similar to the queue's keys as its own key is (ReSSL, arXiv 2107.09282).

    p = softmax(k_b . queue / t_key)    q = softmax(q_b . queue / t_query)    loss_b = -sum_n p_n log q_n

With t_key below t_query the target is the sharper of the two. No image is pushed away from those that its own key
resembles. An image's own earlier keys are left out. The key's view should show the whole object (`--views.key
centre`, or `weak`), since it is the teacher.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from fastcr.method.objectives.contract import Compared, Keys


def relational(query: Tensor, keys: Keys, *, temperature: float, key_temperature: float) -> Compared:
    """Cross entropy of unit queries `[B,D]` with their keys' similarities to the queue, nats."""
    target = keys.others(keys.own @ keys.queue.T / key_temperature).softmax(1)
    log_probabilities = keys.others(query @ keys.queue.T / temperature).log_softmax(1)
    return Compared(-(target * log_probabilities).sum(1), normalize(target @ keys.queue, dim=1))
