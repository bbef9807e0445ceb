"""The rationale branch: K detectors whose maximum, after a softmax over positions, says where to look."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcr.config import RationaleConfig
from fastcr.kernels.common_weights import common_weights
from fastcr.kernels.launch import Impl
from fastcr.kernels.rationale_fit import CamKeeps, RationaleFit, rationale_fit
from fastcr.kernels.rationale_pool import RationalePool, rationale_pool
from fastcr.runs.distributed import ALONE, Processes


class _Attended(torch.autograd.Function):
    """What features `[B,C,H,W]` give when pooled with an attention `[B,S]` that is a constant: `pooled` `[B,C]`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, pooled: Tensor, attention: Tensor) -> Tensor:
        ctx.save_for_backward(attention)
        ctx.shape, ctx.dtype = features.shape, features.dtype
        return pooled.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (attention,) = ctx.saved_tensors
        by_pooled, weights = grad[:, None], attention[:, :, None]
        if torch.is_grad_enabled():  # somebody will differentiate it again
            by_rows = (by_pooled * weights).to(ctx.dtype)
        else:  # multiplied in fp32, written in the features' dtype; a CPU has the product of a few images in its cache
            by_rows = grad.new_empty(len(grad), weights.shape[1], grad.shape[1], dtype=ctx.dtype)
            few = 4 if grad.device.type == "cpu" else max(len(grad), 1)
            for written, *factors in zip(by_rows.split(few), by_pooled.split(few), weights.split(few), strict=True):
                torch.mul(*factors, out=written)
        return by_rows.transpose(1, 2).view(ctx.shape), None, None


class RationaleHead(nn.Module):
    """Detectors `weight [K,C]`, `bias [K]` (1x1 convolutions): fitted to GradCAM in training, pooled with afterwards.

    The README shows it in a training loop. `settings` are fields of `RationaleConfig` (detectors, temperature, target,
    cam_keeps, cam_weights, stop_gradient), which may be given whole instead, as `config`; `impl` chooses the kernels:
    "auto", "torch" or "triton". Of several `processes` that share a batch, all take part in its common channel weights.
    """

    def __init__(
        self,
        channels: int,
        config: RationaleConfig | None = None,
        impl: Impl = "auto",
        *,
        processes: Processes = ALONE,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.config = config or RationaleConfig(**settings)
        initial = nn.Linear(channels, self.config.detectors)  # initialised as a 1x1 convolution is
        self.weight, self.bias, self.impl, self.processes = initial.weight, initial.bias, impl, processes

    def attended(self, features: Tensor) -> Tensor:
        """Features `[B,C,H,W]` to their sum weighted with the attention `[B,C]`, fp32; its gradient is the features'.

        The attention is taken as it is: no gradient passes through it, nor to the detectors.
        """
        with torch.no_grad():
            pooled, attention = self.pool(features)
        return _Attended.apply(features, pooled, attention)

    def loss(self, features: Tensor, pooled: Tensor, projected: Tensor, key: Tensor) -> Tensor:
        """Fit loss (a scalar, nats): KL divergence of the attention from GradCAM; call it before `backward`.

        GradCAM is that of the similarity of each image's two views, `projected . key`.

        Args:
            features: `[B,C,H,W]`, the encoder's last feature map.
            pooled: `[B,C]`, their mean over positions, from which `projected` was computed.
            projected: `[B,D]`, the query before it is normalised.
            key: `[B,D]`, of unit length: the other view of the same images.

        Raises:
            ValueError: `projected` was not computed from `pooled`, or shapes do not fit.
        """
        return self.fit(features, mismatch_gradient(pooled, projected, key)).divergence.mean()

    def fit(self, features: Tensor, gradient: Tensor, pool_weight: float = 0.0) -> RationaleFit:
        """KL divergence from the GradCAM of `gradient [B,C]` over features `[B,C,H,W]`; see `kernels.rationale_fit`.

        `gradient` is that of what shall be explained, a loss, by the mean-pooled features. `pool_weight` must be 0 with
        common channel weights.
        """
        if self.config.cam_weights == "common":
            gradient = common_cam_weights(features, gradient, self.config.cam_keeps, self.processes, self.impl)
        return rationale_fit(
            features,
            gradient,
            self.weight,
            self.bias,
            temperature=self.config.temperature,
            target=self.config.target,
            cam_keeps=self.config.cam_keeps,
            pool_weight=pool_weight,
            stop_gradient=self.config.stop_gradient,
            impl=self.impl,
        )

    def pool(self, features: Tensor) -> RationalePool:
        """Features `[B,C,H,W]` to `(pooled [B,C], attention [B,S])`."""
        return rationale_pool(features, self.weight, self.bias, temperature=self.config.temperature, impl=self.impl)

    @torch.no_grad()
    def effective_detectors(self, features: Tensor) -> Tensor:
        """exp(entropy of which detector wins a position), 1 (always the same) to K; a scalar."""
        responses = F.conv2d(features.float(), self.weight[:, :, None, None], self.bias)
        winners = responses.argmax(1).flatten()
        share = torch.bincount(winners, minlength=len(self.bias)) / winners.numel()
        return torch.exp(-torch.xlogy(share, share).sum())


def mismatch_gradient(pooled: Tensor, projected: Tensor, key: Tensor) -> Tensor:
    """Gradient `[B,C]` of the views' mismatch, `-projected . key`, by the mean-pooled features `[B,C]`.

    `ValueError` if `projected [B,D]` was not computed from `pooled`.
    """
    try:
        return torch.autograd.grad(-(projected * key).sum(1).sum(), pooled, retain_graph=True)[0]
    except RuntimeError as error:
        raise ValueError(f"projected must be computed from pooled, with gradients enabled: {error}") from None


def common_cam_weights(
    features: Tensor, gradient: Tensor, cam_keeps: CamKeeps, processes: Processes = ALONE, impl: Impl = "auto"
) -> Tensor:
    """GradCAM's channel weights that all images of a batch share, as the `gradient [B,C]` of `rationale_fit`.

    `kernels.common_weights` has the equation. Features `[B,C,H,W]`, their `gradient [B,C]` after mean pooling; the sum
    runs over the images of all `processes`.
    """
    common = processes.total(common_weights(features, gradient, cam_keeps=cam_keeps, impl=impl))
    return (common if cam_keeps == "mismatch" else -common).expand_as(gradient)


def attention_entropy(attention: Tensor) -> Tensor:
    """Mean entropy of maps `[B,S]`, nats, a scalar: log S is flat, 0 is a single position."""
    return -torch.xlogy(attention, attention).sum(1).mean()
