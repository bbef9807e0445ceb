"""The step in several processes: gradients averaged by DDP."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastcr.data.views import Batch
from fastcr.method.moco import MoCo
from fastcr.method.step import Losses, LossFunction


class Synchronised:
    """A loss function whose gradients come out averaged over the processes (DDP, static graph)."""

    def __init__(self, model: nn.Module, loss_function: LossFunction) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch call the buffers' flag otherwise
            # DDP watches one forward: the whole way from a batch to its losses. Buffers stay each process's own:
            # the queue is the same everywhere, BatchNorm's statistics need not be
            self.parallel = DistributedDataParallel(
                _LossModule(model, loss_function),
                static_graph=True,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def __call__(self, moco: MoCo, batch: Batch, autocast: torch.autocast) -> Losses:
        """Losses of this process's part of a batch."""
        return self.parallel(moco, batch, autocast)


class _LossModule(nn.Module):
    def __init__(self, model: nn.Module, loss_function: LossFunction) -> None:
        super().__init__()
        self.model, self.loss_function = model, loss_function

    def forward(self, moco: MoCo, batch: Batch, autocast: torch.autocast) -> Losses:
        return self.loss_function(moco, batch, autocast)
