"""Divergence of the rationale map from the GradCAM of the contrast loss.

    L_b(s)   = max_k(w_k . A_b(s) + c_k) / tau          attention logits
    Q_b      = softmax_s(L_b)                           attention
    cam_b(s) = relu(sign * sum_c A_bc(s) g_bc)          GradCAM; sign +1 keeps "mismatch", -1 "match"
    P_b      = cam_b / sum_s cam_b                      target "sum"
             | softmax_s(cam_b / max_s cam_b / tau)     target "max-softmax"; uniform where cam_b is 0 everywhere
    KL_b     = sum_s P_b(s) (log P_b(s) - log Q_b(s))   0 log 0 = 0; P is a constant

A [B,C,S] features at S = H*W positions, g [B,C] gradient of each image's own contrast loss by its mean-pooled
features, w [K,C] detectors, c [K] their biases, tau temperature. Backward: dKL_b/dL_b(s) = Q_b(s) - P_b(s).
Least bytes in 16 bits: forward, A read once, `2 B C S`; backward, A read once and its gradient written once, `4 B C S`
(the reference reads A twice and materialises the `[B,K,S]` logits). With `stop_gradient` the features' gradient is that
of pooling, the same at every position: it is an expanded `[B,C]`, and the backward only reads.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastcr.kernels.detectors import (
    SPREAD,
    attention_logits,
    cast,
    check_features,
    launch_settings,
    new_maps,
    rows_of,
    spread_gradients,
)
from fastcr.kernels.launch import Gradients, Impl, check_choice, check_tensor, first_order, fused_op, use_triton
from fastcr.kernels.settings import map_class
from fastcr.kernels.spec import OTHER_MAPS, USUAL_MAPS, Example, OpSpec, draw_detectors, draw_maps

try:
    import triton
    import triton.language as tl

    from fastcr.kernels.detectors import tile_logits
except ImportError:
    triton = None

Target = Literal["max-softmax", "sum"]
CamKeeps = Literal["mismatch", "match"]


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
    if target != "sum":
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
    features: Tensor, gradient: Tensor, detectors: Tensor, bias: Tensor | None = None, *, temperature: float = 0.4,
    target: Target = "max-softmax", cam_keeps: CamKeeps = "mismatch", pool_weight: float = 0.0,
    stop_gradient: bool = False,
) -> RationaleFit:  # fmt: skip
    """The equations above in plain torch, in fp32 (fp64 for fp64 inputs): the specification and the test oracle."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        gradient, detectors = gradient.detach().to(dtype), detectors.to(dtype)
        maps = (features.detach() if stop_gradient else features).flatten(2).to(dtype)
        logits = attention_logits(maps, detectors, bias if bias is None else bias.to(dtype))
        log_attention = torch.log_softmax(logits / temperature, dim=1)

        slope = torch.einsum("bcs,bc->bs", maps.detach(), gradient)
        cam = torch.relu(slope if cam_keeps == "mismatch" else -slope)
        cam = cam.where(slope.isfinite(), torch.nan)  # relu would hide an infinity of the other sign
        probability = gradcam_target(cam, target, temperature)

        divergence = (torch.xlogy(probability, probability) - probability * log_attention).sum(1)
        if pool_weight:
            divergence = _AddPoolGradient.apply(divergence, features, gradient * (pool_weight / maps.shape[2]))
    return RationaleFit(divergence, log_attention.detach().exp(), probability)


if triton is not None:

    @triton.jit
    def _fit_kernel(
        features, gradient, detectors, bias, divergence, attention, target, winners, S, C, K, inverse_temperature, sign,
        BLOCK_S: tl.constexpr, BLOCK_ALL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
        HAS_BIAS: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ):  # fmt: skip
        """One image: logits and slopes tile by tile from one read, then both distributions and their divergence."""
        b = tl.program_id(0).to(tl.int64)
        row = b * S
        for start in range(0, S, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            high, winner, slope = tile_logits(
                features + row * C, detectors, bias, s, S, C, K, BLOCK_S, BLOCK_K, BLOCK_C, HAS_BIAS, PRECISION, UPCAST,
                gradient + b * C, True,
            )  # fmt: skip
            tl.store(attention + row + s, high * inverse_temperature, mask=s < S)
            tl.store(target + row + s, slope * sign, mask=s < S)
            tl.store(winners + row + s, winner, mask=s < S)
        tl.debug_barrier()
        s = tl.arange(0, BLOCK_ALL)[None, :]
        inside = s < S
        logits = tl.load(attention + row + s, mask=inside, other=0.0)
        cam = tl.load(target + row + s, mask=inside, other=0.0)
        tl.debug_barrier()
        # relu would hide an infinity of the other sign; sums keep NaN where maxima drop it
        cam = tl.where(cam - cam == 0, tl.where(cam > 0, cam, 0.0), float("nan"))
        if SUM:
            mass = tl.sum(tl.where(inside, cam, 0.0), axis=1, keep_dims=True)
            p = tl.where(mass == 0, 1.0 / S, cam / tl.where(mass == 0, 1.0, mass))
        else:
            peak = tl.max(tl.where(inside, cam, 0.0), axis=1, keep_dims=True)
            cam = cam / tl.where(peak == 0, 1.0, peak) - tl.where(peak == 0, 0.0, 1.0)
            p = tl.where(inside, tl.exp(cam * inverse_temperature), 0.0)
            p = p / tl.sum(p, axis=1, keep_dims=True)
        high = tl.max(tl.where(inside, logits, float("-inf")), axis=1, keep_dims=True)
        mass = tl.sum(tl.where(inside, tl.exp(logits - high), 0.0), axis=1, keep_dims=True)
        log_q = logits - high - tl.log(mass)
        log_p = tl.log(tl.where(p > 0, p, 1.0))
        kl = tl.sum(tl.where(inside, p * (log_p - log_q), 0.0), axis=1)
        tl.store(attention + row + s, tl.exp(log_q), mask=inside)
        tl.store(target + row + s, p, mask=inside)
        tl.store(divergence + b + tl.arange(0, 1), kl)


@fused_op("fastcr::rationale_fit")
def _fused(
    features: Tensor, gradient: Tensor, detectors: Tensor, bias: Tensor | None, temperature: float, target: str,
    cam_keeps: str, pool_weight: float, stop_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """KL `[B]`, attention and target `[B,S]` (fp32), winning detectors `[B,S]` (int32)."""
    rows, detectors, outputs = rows_of(features), detectors.contiguous(), _new_outputs(features)
    batch, positions, channels = rows.shape
    sign = 1.0 if cam_keeps == "mismatch" else -1.0
    gradient, bias = gradient.float().contiguous(), None if bias is None else bias.contiguous()
    if batch:
        _fit_kernel[(batch,)](
            rows, gradient, detectors, rows if bias is None else bias, *outputs,
            positions, channels, len(detectors), 1 / temperature, sign,
            HAS_BIAS=bias is not None, SUM=target == "sum",
            **launch_settings("rationale_fit", rows, len(detectors)),
        )  # fmt: skip
    return outputs


@_fused.register_fake
def _new_outputs(features: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    attention, winners = new_maps(features)
    return attention.new_empty(len(attention)), attention, torch.empty_like(attention), winners


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, _, _, ctx.pool_weight, ctx.stop_gradient = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, by_divergence: Tensor, *unused: Any) -> Gradients:
    features, gradient, detectors, bias, attention, target, winners = ctx.saved_tensors
    write, share = ctx.needs_input_grad[0] and not ctx.stop_gradient, ctx.pool_weight / attention.shape[1]
    by_logits = (by_divergence / ctx.temperature)[:, None] * (attention - target)
    by_features, *by_branch = spread_gradients(
        features, detectors, winners, by_logits, torch.full_like(attention, share), gradient.float(), write=write
    )
    if not write:  # pooling alone: the same at every position, so nothing is written at all
        by_pooled = (gradient * share).to(features.dtype)
        by_features = by_pooled[:, :, None, None].expand_as(features) if ctx.pool_weight else None
    return by_features, None, *cast(by_branch, (detectors, bias)), None, None, None, None, None


_fused.register_autograd(first_order("rationale_fit", _backward), setup_context=_save)


def rationale_fit(
    features: Tensor, gradient: Tensor, detectors: Tensor, bias: Tensor | None = None, *, temperature: float = 0.4,
    target: Target = "max-softmax", cam_keeps: CamKeeps = "mismatch", pool_weight: float = 0.0,
    stop_gradient: bool = False, impl: Impl = "auto",
) -> RationaleFit:  # fmt: skip
    """KL of each image's GradCAM from its rationale map (arXiv 2303.01669, L_KL), and both maps.

    Args:
        features: A `[B,C,H,W]`, any strides, fp16, bf16, fp32 or fp64; `B` may be 0, `1 <= H*W <= 4096`.
        gradient: g `[B,C]`, of each image's own loss (not of the batch mean); treated as a constant.
        detectors: w `[K,C]`, `1 <= K <= 128`.
        bias: c `[K]`, or None for no bias.
        temperature: tau of the attention and of the target "max-softmax", above 0.
        target: how GradCAM becomes a distribution.
        cam_keeps: positions that GradCAM keeps, "mismatch" those that raise the loss `gradient` is of (in contrastive
            learning they make the two views of an image less similar), "match" those that lower it.
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
    check_tensor("gradient", gradient, features.shape[:2], features)
    check_choice("target", target, Target)
    check_choice("cam_keeps", cam_keeps, CamKeeps)
    options: dict[str, Any] = {
        "temperature": temperature, "target": target, "cam_keeps": cam_keeps, "pool_weight": pool_weight,
        "stop_gradient": stop_gradient,
    }  # fmt: skip
    if use_triton(impl, {"features": features, "gradient": gradient, "detectors": detectors, "bias": bias}):
        return RationaleFit(*_fused(features, gradient, detectors, bias, *options.values())[:3])
    return rationale_fit_reference(features, gradient, detectors, bias, **options)


SPEC = OpSpec(
    rationale_fit,
    rationale_fit_reference,
    inputs=lambda z, dtype, normal: draw_maps(z, dtype, normal) | draw_detectors(z, normal),
    learns=("features", "detectors", "bias"),
    usual=tuple(
        Example(sizes, {"pool_weight": 1 / sizes["B"], "stop_gradient": stop})
        for sizes in USUAL_MAPS
        for stop in (True, False)
    ),
    others=tuple(Example(sizes, {"target": "sum"}) for sizes in OTHER_MAPS),
    bytes=lambda z, width, backward: (3 if backward else 1) * width * z["B"] * z["C"] * z["S"],
    rows=lambda z, dtype: dict.fromkeys(("rationale_fit", "spread_gradients"), map_class(dtype, z["K"])),
    kernels={
        "spread_gradients": SPREAD,
        "rationale_fit": {
            "16 bits, K <= 32": {"BLOCK_S": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 4},
            "16 bits, K > 32": {"BLOCK_S": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 3},
            "32 bits, K <= 32": {"BLOCK_S": 16, "BLOCK_C": 32, "num_warps": 4, "num_stages": 3},
            "32 bits, K > 32": {"BLOCK_S": 16, "BLOCK_C": 32, "num_warps": 8, "num_stages": 2},
        },
    },
)
