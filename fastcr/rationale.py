"""The rationale branch: K detectors whose maximum, softmaxed over positions, says where to look."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcr.config import RationaleConfig
from fastcr.kernels.launch import Impl
from fastcr.kernels.rationale_fit import RationaleFit, rationale_fit
from fastcr.kernels.rationale_pool import RationalePool, rationale_pool


class Rationale(nn.Module):
    """Detectors `weight [K,C]`, `bias [K]` (1x1 convolutions): fitted to GradCAM in training, pooled with after."""

    def __init__(self, channels: int, config: RationaleConfig, impl: Impl = "auto") -> None:
        super().__init__()
        initial = nn.Linear(channels, config.detectors)  # initialised as a 1x1 convolution is
        self.weight, self.bias = initial.weight, initial.bias
        self.config, self.impl = config, impl

    def fit(self, features: Tensor, gradient: Tensor, pool_weight: float) -> RationaleFit:
        """KL to the GradCAM of `gradient [B,C]` over features `[B,C,H,W]`; see `kernels.rationale_fit`."""
        return rationale_fit(
            features,
            gradient,
            self.weight,
            self.bias,
            temperature=self.config.temperature,
            target=self.config.target,
            cam_sign=self.config.cam_sign,
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
        logits = torch.einsum("kc,bcs->bks", self.weight, features.flatten(2).to(self.weight.dtype))
        winners = (logits + self.bias[:, None]).argmax(1).flatten()
        share = torch.zeros_like(self.bias).index_add_(0, winners, torch.ones_like(winners, dtype=self.bias.dtype))
        share = share / winners.numel()
        return torch.exp(-torch.xlogy(share, share).sum())


def attention_entropy(attention: Tensor) -> Tensor:
    """Mean entropy of maps `[B,S]`, nats, a scalar: log S is flat, 0 is a single place."""
    return -torch.xlogy(attention, attention).sum(1).mean()
