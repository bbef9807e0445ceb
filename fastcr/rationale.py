"""The rationale branch: K detectors whose maximum, softmaxed over positions, says where to look."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcr.config import RationaleConfig
from fastcr.distributed import ALONE, Processes
from fastcr.kernels.launch import Impl
from fastcr.kernels.rationale_fit import CamSign, RationaleFit, Target, gradcam_target, rationale_fit
from fastcr.kernels.rationale_pool import RationalePool, rationale_pool


class RationaleHead(nn.Module):
    """Detectors `weight [K,C]`, `bias [K]` (1x1 convolutions): fitted to GradCAM in training, pooled with after.

    In a training loop of any contrast loss:

        head = RationaleHead(512)                                # channels of the encoder's last map
        features = encoder(images)                               # [B,C,H,W]
        pooled = mean_pool(features)                             # [B,C], what the projection head takes
        projected = projection(pooled)                           # [B,D]; `key` [B,D] has unit length
        loss = contrast_loss(projected, key, ...) + head.loss(features, pooled, -(projected * key).sum(1))
        embedding, attention = head.pool(features)               # afterwards, for retrieval

    The keywords are fields of `RationaleConfig`, which may be given whole instead, as `config` (the others are for
    `fastcr.train`); `impl` chooses the kernels: "auto", "torch" or "triton".
    """

    def __init__(
        self,
        channels: int,
        config: RationaleConfig | None = None,
        impl: Impl = "auto",
        *,
        detectors: int = RationaleConfig.detectors,
        temperature: float = RationaleConfig.temperature,
        target: Target = RationaleConfig.target,
        cam_sign: CamSign = RationaleConfig.cam_sign,
        cam_weights: Literal["own", "common"] = RationaleConfig.cam_weights,
        stop_gradient: bool = RationaleConfig.stop_gradient,
        batchnorm: bool = RationaleConfig.batchnorm,
    ) -> None:
        super().__init__()
        self.config = config or RationaleConfig(
            detectors=detectors, temperature=temperature, target=target, cam_sign=cam_sign, cam_weights=cam_weights,
            stop_gradient=stop_gradient, batchnorm=batchnorm,
        )  # fmt: skip
        initial = nn.Linear(channels, self.config.detectors)  # initialised as a 1x1 convolution is
        self.weight, self.bias, self.impl = initial.weight, initial.bias, impl
        self.norm = nn.BatchNorm1d(self.config.detectors) if self.config.batchnorm else None
        self.processes: Processes = ALONE  # that share the batch

    def loss(self, features: Tensor, pooled: Tensor, contrast: Tensor) -> Tensor:
        """Fit loss (a scalar, nats) of the attention to the GradCAM of `contrast`; call it before `backward`.

        Args:
            features: `[B,C,H,W]`, the encoder's last map.
            pooled: `[B,C]`, their mean over positions, from which `contrast` was computed.
            contrast: what GradCAM is of, one an image `[B]` or their mean or sum: its size is lost on GradCAM. As in
                `fastcr.train` (docs/evidence.md) the negative product of the query, before it is normalised, with its
                own key; or, as in the paper, the contrast loss, with `cam_weights="own"`. Where images are each
                other's negatives, the GradCAM of an image's loss is that of the whole batch's.

        Raises:
            ValueError: `contrast` was not computed from `pooled`, or shapes do not fit.
        """
        try:
            (gradient,) = torch.autograd.grad(contrast.sum(), pooled, retain_graph=True)
        except RuntimeError as error:
            raise ValueError(f"contrast must be computed from pooled, with gradients enabled: {error}") from None
        return self.fit(features, gradient).divergence.mean()

    def fit(self, features: Tensor, gradient: Tensor, pool_weight: float = 0.0) -> RationaleFit:
        """KL to the GradCAM of `gradient [B,C]` over features `[B,C,H,W]`; see `kernels.rationale_fit`.

        `pool_weight` is for `gradient` as it is: with common channel weights it must be 0.
        """
        if self.config.cam_weights == "common":
            gradient = common_cam_weights(features, gradient, self.config.cam_sign, self.processes)
        weight, bias = self.folded(features, moving=True)
        return rationale_fit(
            features,
            gradient,
            weight,
            bias,
            temperature=self.config.temperature,
            target=self.config.target,
            cam_sign=self.config.cam_sign,
            pool_weight=pool_weight,
            stop_gradient=self.config.stop_gradient,
            impl=self.impl,
        )

    def pool(self, features: Tensor) -> RationalePool:
        """Features `[B,C,H,W]` to `(pooled [B,C], attention [B,S])`."""
        return rationale_pool(features, *self.folded(), temperature=self.config.temperature, impl=self.impl)

    def folded(self, features: Tensor | None = None, *, moving: bool = False) -> tuple[Tensor, Tensor]:
        """Weight `[K,C]` and bias `[K]` with the batch normalisation, if any, multiplied in: the ops know of none.

        In training the statistics are those of `features`, if given, and move the running ones if `moving`.
        """
        if self.norm is None:
            return self.weight, self.bias
        mean, variance = self.norm.get_buffer("running_mean"), self.norm.get_buffer("running_var")
        if self.training and features is not None:
            maps = (features.detach() if self.config.stop_gradient else features).flatten(2)
            with torch.autocast(features.device.type, enabled=False):
                responses = self._responses(maps)
            if moving:
                with torch.no_grad():
                    self.norm(responses)
            variance, mean = torch.var_mean(responses, (0, 2), correction=0)
        scale = self.norm.weight * torch.rsqrt(variance + self.norm.eps)
        return self.weight * scale[:, None], (self.bias - mean) * scale + self.norm.bias

    def folded_state(self) -> dict[str, Tensor]:
        """State dict of the same head without batch normalisation: what `fastcr.train` gives its users."""
        weight, bias = self.folded()
        return {"weight": weight.detach(), "bias": bias.detach()}

    def _responses(self, maps: Tensor) -> Tensor:
        """What each detector says of each place of maps `[B,C,S]`: `[B,K,S]`."""
        return torch.einsum("kc,bcs->bks", self.weight, maps.to(self.weight.dtype)) + self.bias[:, None]

    @torch.no_grad()
    def effective_detectors(self, features: Tensor) -> Tensor:
        """exp(entropy of which detector wins a position), 1 (always the same) to K; a scalar."""
        weight, bias = self.folded(features)
        logits = torch.einsum("kc,bcs->bks", weight, features.flatten(2).to(weight.dtype))
        winners = (logits + bias[:, None]).argmax(1).flatten()
        share = torch.zeros_like(self.bias).index_add_(0, winners, torch.ones_like(winners, dtype=self.bias.dtype))
        share = share / winners.numel()
        return torch.exp(-torch.xlogy(share, share).sum())


@torch.no_grad()
def common_cam_weights(features: Tensor, gradient: Tensor, cam_sign: CamSign, processes: Processes = ALONE) -> Tensor:
    """GradCAM's channel weights that a batch's pictures have in common, as the `gradient [B,C]` of `rationale_fit`.

    They are what the places of the pictures' own GradCAMs have more than those pictures on the average, the same for
    all pictures of all `processes`:

        v_c = sum_b sum_s (P_b(s) - 1/S) A_bc(s)            P_b: GradCAM of picture b divided by its sum

    A picture without a GradCAM adds nothing. Features `[B,C,H,W]`, their `gradient [B,C]` after mean pooling.
    """
    maps = features.flatten(2)
    with torch.autocast(maps.device.type, enabled=False):
        # scaled to 1 first, so that 16 bits hold it: its size is lost on GradCAM
        slope = torch.einsum("bcs,bc->bs", maps, F.normalize(gradient, dim=1).to(maps.dtype)).to(gradient.dtype)
        own = gradcam_target(torch.relu(slope if cam_sign == "loss" else -slope), "sum", 1.0) - 1 / maps.shape[2]
        common = torch.einsum("bcs,bs->bc", maps, own.to(maps.dtype)).to(gradient.dtype).sum(0)
    common = processes.total(common)
    return (common if cam_sign == "loss" else -common).expand_as(gradient)


def attention_entropy(attention: Tensor) -> Tensor:
    """Mean entropy of maps `[B,S]`, nats, a scalar: log S is flat, 0 is a single place."""
    return -torch.xlogy(attention, attention).sum(1).mean()
