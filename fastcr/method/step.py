"""One training step, top to bottom: the objective's loss, GradCAM, the fit of the attention to it, and the updates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from fastcr.data.views import Batch
from fastcr.encoders.backbone import mean_pool
from fastcr.encoders.rationale import RationaleHead, mismatch_gradient
from fastcr.errors import one_line
from fastcr.method.moco import MoCo, Pool
from fastcr.method.objectives import Objective

Step = Callable[[Batch], "tuple[Tensor, Losses]"]
CamOf = Literal["similarity", "loss"]


class Losses(NamedTuple):
    """What one batch gives; `attention`, `features` and `key` are for the log only."""

    contrast: Tensor  # scalar, the objective's loss
    fit: Tensor | None  # scalar, nats, unweighted; None without a branch that is fitted
    attention: Tensor | None  # [B,S]; None likewise
    features: Tensor  # [B,C,H,W]
    key: Tensor  # [B*ranks,D]: those of all processes


# `contrast_losses` with branch and objective bound; in several processes `synchronised`
LossFunction = Callable[..., Losses]


def contrast_losses(
    moco: MoCo,
    batch: Batch,
    autocast: torch.autocast,
    *,
    branch: RationaleHead | None,  # None also where it is not fitted: then nothing asks for GradCAM
    objective: Objective,
    pool: Pool = mean_pool,
    cam_of: CamOf = "similarity",
    recording: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 (it holds no state)
) -> Losses:
    """The objective's loss of a batch and the fit of the branch to its GradCAM; without a branch, the first alone.

    `cam_of` says what GradCAM explains: that loss, or the similarity of the unnormalised query to the objective's
    positive. The query's forward pass runs inside `recording`.
    """
    key = moco.key(batch.second, autocast, pool)
    with record_function("query forward"), autocast, recording:
        features = moco.backbone(batch.first)
    keys = moco.keys(key, batch.images)
    if branch is None:
        with record_function("contrast"):
            contrast = objective(moco.query(pool(features)), keys).loss.mean()
        return Losses(contrast, None, None, features.detach(), key)

    with record_function("contrast"):
        # an image's own gradient of the loss serves both GradCAM and the features: the fit hands it to them in its own
        # pass over them, so pooling is cut off from them here
        shared = cam_of == "loss" and branch.config.cam_weights == "own"
        pooled = pool(features.detach() if shared else features)
        if not pooled.requires_grad:  # cut off, or the backbone is not trained
            pooled.requires_grad_()
        projected = moco.head(pooled)
        compared = objective(F.normalize(projected, dim=1), keys)
        if cam_of == "similarity":
            gradient = mismatch_gradient(pooled, projected, compared.positive)
        else:
            (gradient,) = torch.autograd.grad(compared.loss.sum(), pooled, retain_graph=True)
        contrast = compared.loss.mean()
    with record_function("fit"):  # GradCAM is normalised, so only a shared gradient has to have its size
        pool_weight = 1 / len(pooled) if shared else 0.0
        divergence, attention, _ = branch.fit(features, gradient, pool_weight=pool_weight)
    return Losses(contrast, divergence.mean(), attention, features.detach(), key)


def synchronised(model: nn.Module, loss_function: LossFunction) -> LossFunction:
    """The loss function, of this process's part of a batch, with gradients averaged over the processes (DDP)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch call the buffers' flag otherwise
        # DDP watches one forward: the whole way from a batch to its losses. Buffers stay each process's own:
        # the queue is the same everywhere, BatchNorm's statistics need not be
        return DistributedDataParallel(
            _LossModule(model, loss_function),
            static_graph=True,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


class _LossModule(nn.Module):
    def __init__(self, model: nn.Module, loss_function: LossFunction) -> None:
        super().__init__()
        self.model, self.loss_function = model, loss_function

    def forward(self, moco: MoCo, batch: Batch, autocast: torch.autocast) -> Losses:
        return self.loss_function(moco, batch, autocast)


def train_step(
    moco: MoCo,
    loss_function: LossFunction,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    fit_weight: float,
    key_momentum: float,
    autocast: torch.autocast,
) -> tuple[Tensor, Losses]:
    """Losses, backward, optimiser, EMA of the keys, enqueue; returns the weighted loss. Never waits for the device.

    Of several processes each has its share of the batch.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = loss_function(moco, batch, autocast)
    loss = losses.contrast if losses.fit is None else losses.contrast + fit_weight * losses.fit
    with record_function("backward"):
        loss.backward()
    with record_function("optimiser"):
        optimizer.step()
    moco.update_key_encoder(key_momentum)
    moco.enqueue(losses.key, batch.images)
    return loss.detach(), losses


class Replayed:
    """A step as one CUDA graph, so that Python launches nothing any more.

    The first calls run the step as it is, on a stream of its own (they compile, and make the optimiser's buffers); the
    next one captures it, and from then on each call copies the batch into the graph's inputs and replays it. What
    comes back is overwritten by the next call, the loss excepted.
    """

    WARM_UP = 3

    def __init__(self, step: Step, fall_back: Callable[[str], object] | None = None) -> None:
        """With `fall_back`, which is told why, a step that cannot be captured goes on as it is; else it is an error."""
        self.step, self.fall_back, self.stream = step, fall_back, torch.cuda.Stream()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()

    def __call__(self, batch: Batch) -> tuple[Tensor, Losses]:
        """One step on `batch`, which must have the same shapes and strides each time."""
        self.calls += 1
        if self.calls <= self.WARM_UP:
            caller = torch.cuda.current_stream()
            self.stream.wait_stream(caller)
            with torch.cuda.stream(self.stream):
                results = self.step(batch)
            caller.wait_stream(self.stream)
            return results
        if self.calls == self.WARM_UP + 1:
            self.capture(batch)
        if self.graph is None:
            return self.step(batch)
        for static, tensor in zip(self.inputs.tensors(), batch.tensors(), strict=True):
            static.copy_(tensor)
        self.graph.replay()
        loss, losses = self.results
        return loss.clone(), losses

    def capture(self, batch: Batch) -> None:
        """Record a step on inputs like `batch`, without carrying it out."""
        assert self.graph is not None
        self.inputs = Batch(*map(torch.empty_like, batch.tensors()))
        try:
            # the loader's thread goes on allocating meanwhile
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.results = self.step(self.inputs)
        except RuntimeError as error:
            if not self.fall_back:
                raise
            self.graph = None
            self.fall_back(f"this step cannot be captured as a CUDA graph, so it runs without: {one_line(error)}")
