"""`byol`: a predictor makes the own key out of the query; no negatives, no queue (BYOL, arXiv 2006.07733).

    loss_b = 2 - 2 q_b . k_b

The predictor, and a key encoder that follows slowly, keep everything from becoming the same. Heads are BYOL's: two
layers of which the first, of 4,096 units, is normalised over the batch.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastcr.method.objectives.contract import Compared, Keys

HIDDEN = 4096


def byol_head(channels: int, embedding_dim: int) -> nn.Sequential:
    """Projector or predictor: `[B,channels]` to `[B,embedding_dim]`."""
    first = nn.Linear(channels, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()
    return nn.Sequential(*first, nn.Linear(HIDDEN, embedding_dim))


def byol(query: Tensor, keys: Keys) -> Compared:
    """Squared distance `[B]` of unit queries `[B,D]` from their own keys."""
    return Compared(2 - 2 * (query * keys.own).sum(1), keys.own)
