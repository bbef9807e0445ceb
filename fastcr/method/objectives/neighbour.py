"""`neighbour`: the positives are the keys of the queue nearest to the own key (NNCLR, arXiv 2104.14548).

    loss_b = -mean over the n nearest i of log softmax(q_b . queue / T)[i]

A nearest key is often of the same class, so the loss draws together what InfoNCE pushes apart. An image's own earlier
keys are left out.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from fastcr.method.objectives.contract import Compared, Keys


def neighbour(query: Tensor, keys: Keys, *, temperature: float, neighbours: int) -> Compared:
    """Loss of unit queries `[B,D]`, nats; the queue needs at least `neighbours` keys."""
    nearest = keys.others(keys.own @ keys.queue.T).topk(neighbours, dim=1).indices
    log_probabilities = keys.others(query @ keys.queue.T / temperature).log_softmax(1)
    positive = normalize(keys.queue[nearest].mean(1), dim=1)
    return Compared(-log_probabilities.gather(1, nearest).mean(1), positive)
