"""The step in several processes: gradients averaged by DDP."""

from __future__ import annotations

import contextlib
import warnings
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastcr.data.views import Batch
from fastcr.method.moco import MoCo
from fastcr.method.step import Losses, LossFunction, Scale


class Synchronised:
    """A loss function whose gradients come out averaged over the processes (DDP, static graph)."""

    def __init__(self, model: nn.Module, loss_function: LossFunction, accumulate: int) -> None:
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
        self.watched = accumulate  # backward passes of the first step, from which a static graph is learned

    def __call__(self, moco: MoCo, batch: Batch, autocast: torch.autocast, *, scale: Scale) -> Losses:
        """Losses of this process's part of a batch."""
        self.watched -= 1
        return self.parallel(moco, batch, autocast, scale)

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients made inside only add up; they are averaged with those of the next backward pass outside."""
        return contextlib.nullcontext() if self.watched > 0 else self.parallel.no_sync()


class _LossModule(nn.Module):
    def __init__(self, model: nn.Module, loss_function: LossFunction) -> None:
        super().__init__()
        self.model, self.loss_function = model, loss_function

    def forward(self, moco: MoCo, batch: Batch, autocast: torch.autocast, scale: Scale) -> Losses:
        return self.loss_function(moco, batch, autocast, scale=scale)
