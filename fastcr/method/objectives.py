"""What a query is trained to be: an objective takes queries and keys, and gives a loss for each image.

- `infonce` is MoCo v2 (arXiv 1911.05722, 2003.04297). It tells the query's own key from the queue's keys:
  `loss_b = -log softmax([q_b . k_b, q_b . queue] / T)[0]`. Every other image is pushed away, those of the same class
  included.
- `relational` is ReSSL (arXiv 2107.09282). The query shall be as similar to the queue's keys as its own key is:
  `p = softmax(k_b . queue / t_key)`, `q = softmax(q_b . queue / t_query)`, `loss_b = -sum_n p_n log q_n`. With t_key
  below t_query the target is the sharper of the two. The key is the teacher, so its view should show the whole object
  (`--views.key centre` or `weak`). An image's own earlier keys are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.config import MocoConfig
from fastcr.kernels import relational as relational_op
from fastcr.kernels.info_nce import info_nce
from fastcr.kernels.launch import Impl


class Keys(NamedTuple):
    """Unit keys that a batch of queries is compared with, in one dtype, which the queries take on; constants."""

    own: Tensor  # [B,D]: of the queries' own images
    batch: Tensor  # [B*ranks,D]: of all processes' images, those of `own` among them
    queue: Tensor  # [N,D], N 0 for none
    first: int = 0  # where `own` begins in `batch`
    images: Tensor | None = None  # [B]: indices of the queries' images, int64; None if they are not known
    queue_images: Tensor | None = None  # [N]: those of the queue's keys; None like `images`


class Compared(NamedTuple):
    """What an objective makes of queries and keys."""

    loss: Tensor  # [B], carries the gradient
    positive: Tensor  # [B,D], constant: what GradCAM's similarity is the similarity to


Objective = Callable[[Tensor, Keys], Compared]  # unit queries [B,D], and the keys


def build_objective(config: MocoConfig, impl: Impl = "auto") -> Objective:
    """The objective that the settings ask for, with its temperatures."""
    if config.objective == "infonce":
        return partial(infonce, temperature=config.temperature, impl=impl)
    return partial(relational, temperature=config.temperature, key_temperature=config.key_temperature, impl=impl)


def infonce(query: Tensor, keys: Keys, *, temperature: float, impl: Impl = "auto") -> Compared:
    """InfoNCE of unit queries `[B,D]`, nats; without a queue the negatives are the batch's other keys."""
    if len(keys.queue):
        narrow = query.to(keys.own.dtype)
        return Compared(info_nce(narrow, keys.own, keys.queue, temperature=temperature, impl=impl), keys.own)
    own, logits = torch.arange(len(query), device=query.device) + keys.first, query @ keys.batch.to(query.dtype).T
    return Compared(F.cross_entropy(logits / temperature, own, reduction="none"), keys.own)


def relational(
    query: Tensor, keys: Keys, *, temperature: float, key_temperature: float, impl: Impl = "auto"
) -> Compared:
    """Cross entropy of unit queries `[B,D]` with their keys' similarities to the queue, nats."""
    loss, positive = relational_op.relational(
        query.to(keys.own.dtype),
        keys.own,
        keys.queue,
        temperature=temperature,
        key_temperature=key_temperature,
        images=keys.images,
        queue_images=keys.queue_images,
        impl=impl,
    )
    return Compared(loss, positive)
