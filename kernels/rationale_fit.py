"""Divergence of the rationale map from the GradCAM of the contrast loss.

    L_b(s)   = max_k(w_k . A_b(s) + c_k) / tau          attention logits
    Q_b      = softmax_s(L_b)                           attention
    cam_b(s) = relu(sign * sum_c A_bc(s) g_bc)          GradCAM; sign +1 "loss", -1 "score"
    P_b      = cam_b / sum_s cam_b                      target "sum"
             | softmax_s(cam_b / max_s cam_b / tau)     target "max-softmax"; uniform where cam_b is 0 everywhere
    KL_b     = sum_s P_b(s) (log P_b(s) - log Q_b(s))   0 log 0 = 0; P is a constant

A [B,C,S] features at S = H*W positions, g [B,C] gradient of each image's own contrast loss by its mean-pooled
features, w [K,C] detectors, c [K] their biases, tau temperature. Backward: dKL_b/dL_b(s) = Q_b(s) - P_b(s).
Least bytes in 16 bits: forward, A read once, `2 B C S`; backward, A read once and its gradient written once, `4 B C S`.
The reference here reads A twice and materialises the `[B,K,S]` logits.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastcr.kernels.rationale_pool import Impl, attention_logits, check_features

Target = Literal["max-softmax", "sum"]
CamSign = Literal["score", "loss"]


class RationaleFit(NamedTuple):
    """Result of `rationale_fit`."""

    divergence: Tensor
    """KL `[B]`, nats."""
    attention: Tensor
    """Q `[B,S]`, each row sums to 1; carries no gradient."""
    target: Tensor
    """P `[B,S]`, each row sums to 1; carries no gradient."""


def gradcam_target(cam: Tensor, target: Target, temperature: float) -> Tensor:
    """Distribution P `[B,S]` from a GradCAM `[B,S]` >= 0; uniform where an image's GradCAM is 0 everywhere."""
    if target == "max-softmax":
        peak = cam.amax(1, keepdim=True)
        return torch.softmax(cam / torch.where(peak == 0, 1, peak) / temperature, dim=1)
    total = cam.sum(1, keepdim=True)
    return torch.where(total == 0, 1 / cam.shape[1], cam / torch.where(total == 0, 1, total))


class _AddPoolGradient(torch.autograd.Function):
    """Hand the divergence on; in backward, add a gradient of its own to the features."""

    @staticmethod
    def forward(ctx: Any, divergence: Tensor, features: Tensor, pool_gradient: Tensor) -> Tensor:
        ctx.save_for_backward(pool_gradient)
        ctx.shape, ctx.dtype = features.shape, features.dtype
        return divergence.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (pool_gradient,) = ctx.saved_tensors
        return grad, pool_gradient[..., None, None].expand(ctx.shape).to(ctx.dtype), None


def rationale_fit_reference(
    features: Tensor,
    gradient: Tensor,
    detectors: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 0.4,
    target: Target = "max-softmax",
    cam_sign: CamSign = "score",
    pool_weight: float = 0.0,
    stop_gradient: bool = False,
) -> RationaleFit:
    """The equations above in plain torch, in fp32 (fp64 for fp64 inputs): the specification and the test oracle."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        gradient, detectors = gradient.detach().to(dtype), detectors.to(dtype)
        maps = (features.detach() if stop_gradient else features).flatten(2).to(dtype)
        logits = attention_logits(maps, detectors, bias if bias is None else bias.to(dtype))
        log_attention = torch.log_softmax(logits / temperature, dim=1)

        slope = torch.einsum("bcs,bc->bs", maps.detach(), gradient)
        cam = torch.relu(slope if cam_sign == "loss" else -slope)
        cam = cam.where(slope.isfinite(), torch.nan)  # relu would hide an infinity of the other sign
        probability = gradcam_target(cam, target, temperature)

        divergence = (torch.xlogy(probability, probability) - probability * log_attention).sum(1)
        if pool_weight:
            divergence = _AddPoolGradient.apply(divergence, features, gradient * (pool_weight / maps.shape[2]))
    return RationaleFit(divergence, log_attention.detach().exp(), probability)


def rationale_fit(
    features: Tensor,
    gradient: Tensor,
    detectors: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 0.4,
    target: Target = "max-softmax",
    cam_sign: CamSign = "score",
    pool_weight: float = 0.0,
    stop_gradient: bool = False,
    impl: Impl = "auto",
) -> RationaleFit:
    """KL of each image's GradCAM from its rationale map (arXiv 2303.01669, L_KL), and both maps.

    Args:
        features: A `[B,C,H,W]`, any strides, fp16, bf16, fp32 or fp64; `B` may be 0, `1 <= H*W <= 4096`.
        gradient: g `[B,C]`, of each image's own loss (not of the batch mean); treated as a constant.
        detectors: w `[K,C]`, `1 <= K <= 128`.
        bias: c `[K]`, or None for no bias.
        temperature: tau of the attention and of the target "max-softmax", above 0.
        target: how GradCAM becomes a distribution.
        cam_sign: "loss" keeps places that raise the contrast loss, "score" places that lower it.
        pool_weight: backward also adds `pool_weight * g_b / S` to the feature gradient, whatever the gradient of the
            divergence. A caller who mean-pools detached features sets it to 1/B, and the whole gradient of the
            features is written in one pass. The divergence must then take part in the loss.
        stop_gradient: keep the divergence's gradient from the features (not from detectors and bias).
        impl: "auto", "torch" or "triton".

    Returns:
        `(divergence [B], attention [B,S], target [B,S])`, fp32 (fp64 for fp64 inputs). Only the divergence carries
        gradient: to features, detectors and bias.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, or `impl` cannot serve these tensors.
    """
    check_features(features, detectors, bias, temperature)
    if gradient.shape != features.shape[:2] or not gradient.is_floating_point():
        raise ValueError(
            f"gradient must be a floating-point {list(features.shape[:2])}, got {gradient.dtype} {list(gradient.shape)}"
        )
    if gradient.device != features.device:
        raise ValueError(f"gradient must be on {features.device} like features, got {gradient.device}")
    if target not in ("max-softmax", "sum"):
        raise ValueError(f"target must be 'max-softmax' or 'sum', got {target!r}")
    if cam_sign not in ("score", "loss"):
        raise ValueError(f"cam_sign must be 'score' or 'loss', got {cam_sign!r}")
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl must be 'auto' or 'torch' (rationale_fit has no other implementation), got {impl!r}")
    return rationale_fit_reference(
        features,
        gradient,
        detectors,
        bias,
        temperature=temperature,
        target=target,
        cam_sign=cam_sign,
        pool_weight=pool_weight,
        stop_gradient=stop_gradient,
    )
