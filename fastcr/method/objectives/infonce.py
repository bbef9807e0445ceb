"""`infonce`: MoCo v2 (arXiv 1911.05722, 2003.04297). The positive is the own key, the queue's keys are negatives.

    loss_b = -log softmax([q_b . k_b, q_b . queue] / T)[0]

Every other image is pushed away, those of the same class included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.kernels.info_nce import info_nce
from fastcr.kernels.launch import Impl
from fastcr.method.objectives.contract import Compared, Keys


def infonce(query: Tensor, keys: Keys, *, temperature: float, impl: Impl = "auto") -> Compared:
    """InfoNCE of unit queries `[B,D]`, nats; without a queue the negatives are the batch's other keys."""
    if len(keys.queue):
        return Compared(info_nce(query, keys.own, keys.queue, temperature=temperature, impl=impl), keys.own)
    own = torch.arange(len(query), device=query.device) + keys.first
    return Compared(F.cross_entropy(query @ keys.batch.T / temperature, own, reduction="none"), keys.own)
