"""GradCAM's channel weights that all images of a batch share.

    cam_b(s) = relu(sign * sum_c A_bc(s) g_bc)      GradCAM; sign +1 keeps "mismatch", -1 "match"
    P_b      = cam_b / sum_s cam_b                  its distribution; an image whose cam_b is 0 everywhere is left out
    v_c      = sum_b sum_s (P_b(s) - 1/S) A_bc(s)   how features where GradCAM looks differ from their images' means

A [B,C,S] features at S = H*W positions, g [B,C] gradient by each image's mean-pooled features, divided by its norm.
Least bytes: A read once, `2 B C S` in 16 bits (the reference reads it twice, and in 16 bits makes a copy in fp32).

One program does some images in a fixed order. It holds all channels of a few positions, which lie in one piece: their
slopes `A . g` are sums over the tile, and from the same registers `sum_s cam A` and `sum_s A` grow with the positions;
divided by `sum_s cam` and S at the image's end, which no position has to wait for. One partial sum [C] a program.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.kernels.detectors import check_maps, rows_of
from fastcr.kernels.launch import Impl, check_choice, check_tensor, fused_op, use_triton
from fastcr.kernels.rationale_fit import CamKeeps, gradcam_target
from fastcr.kernels.settings import TABLE, channels_class
from fastcr.kernels.spec import Example, OpSpec, draw_maps

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_CHANNELS = 4096  # that a program holds in registers
CPU_IMAGES = 16  # of which the reference makes a copy in fp32 at a time, so that it stays in a CPU's cache


def common_weights_reference(features: Tensor, gradient: Tensor, *, cam_keeps: CamKeeps = "mismatch") -> Tensor:
    """The equations above in plain torch, in fp32 (fp64 for fp64 inputs): the specification and the test oracle."""
    dtype, sign = torch.promote_types(features.dtype, torch.float32), 1 if cam_keeps == "mismatch" else -1
    some = CPU_IMAGES if features.device.type == "cpu" else max(len(features), 1)
    sums = []
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        for part, slopes in zip(features.flatten(2).split(some), gradient.to(dtype).split(some), strict=True):
            maps = part.to(dtype)
            cam = torch.relu(sign * torch.einsum("bcs,bc->bs", maps, F.normalize(slopes, dim=1)))
            differences = gradcam_target(cam, "sum", 1.0) - 1 / maps.shape[2]  # 0 without a GradCAM
            sums.append(torch.einsum("bcs,bs->c", maps, differences))
        return torch.stack(sums).sum(0)


if triton is not None:

    @triton.jit
    def _common_kernel(
        features, gradient, parts, B, S, C, images, sign,
        BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """The sum over `images` images in fixed order, each read once."""
        group = tl.program_id(0)
        c = tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_C], tl.float32)
        for i in range(tl.minimum(images, B - group * images)):
            b = (group * images + i).to(tl.int64)
            g = tl.load(gradient + b * C + c, mask=c < C, other=0.0).to(tl.float32)
            norm = tl.sqrt(tl.sum(g * g, axis=0))
            g = g * sign / tl.where(norm > 1e-12, norm, 1e-12)
            picked, whole = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
            mass = 0.0
            for start in tl.range(0, S, BLOCK_S, num_stages=STAGES):
                s = start + tl.arange(0, BLOCK_S)
                at = features + b * S * C + s[:, None] * C + c[None, :]
                a = tl.load(at, mask=(s < S)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
                slope = tl.sum(a * g[None, :], axis=1)
                cam = tl.where(slope < 0, 0.0, slope)  # NaN stays
                # where GradCAM is 0 an infinity counts by the mean alone
                picked += tl.sum(tl.where(cam[:, None] == 0, 0.0, a * cam[:, None]), axis=0)
                whole += tl.sum(a, axis=0)
                mass += tl.sum(cam, axis=0)
            total += picked / tl.where(mass == 0, 1.0, mass) - whole * tl.where(mass == 0, 0.0, 1.0 / S)
        tl.store(parts + group * C + c, total, mask=c < C)


@fused_op("fastcr::common_weights")
def _fused(features: Tensor, gradient: Tensor, cam_keeps: str) -> Tensor:
    """The weights `[C]`, fp32."""
    rows = rows_of(features)
    batch, positions, channels = rows.shape
    if not batch:
        return rows.new_zeros(channels, dtype=torch.float32)
    chosen = TABLE["common_weights"][channels_class(rows.dtype, channels)]
    images = triton.cdiv(batch, chosen["programs"])
    parts = rows.new_empty(triton.cdiv(batch, images), channels, dtype=torch.float32)
    block_c, sign = max(triton.next_power_of_2(channels), 16), 1.0 if cam_keeps == "mismatch" else -1.0
    _common_kernel[(len(parts),)](
        rows, gradient.contiguous(), parts, batch, positions, channels, images, sign,
        BLOCK_S=min(max(chosen["BLOCK"] // block_c, 1), triton.next_power_of_2(positions)), BLOCK_C=block_c,
        STAGES=chosen["num_stages"], num_warps=chosen["num_warps"],
    )  # fmt: skip
    return parts.sum(0)


@_fused.register_fake
def _(features: Tensor, gradient: Tensor, cam_keeps: str) -> Tensor:
    return features.new_empty(features.shape[1], dtype=torch.float32)


def common_weights(
    features: Tensor, gradient: Tensor, *, cam_keeps: CamKeeps = "mismatch", impl: Impl = "auto"
) -> Tensor:
    """One set of GradCAM channel weights for a batch: what its images' own GradCAMs have in common.

    Args:
        features: A `[B,C,H,W]`, any strides, fp16, bf16, fp32 or fp64; `B` may be 0, `1 <= H*W <= 4096`.
        gradient: g `[B,C]`, of each image, of any length: it is divided by its norm.
        cam_keeps: positions that each GradCAM keeps: "mismatch" those that raise what `gradient` is of, "match" those
            that lower it.
        impl: "auto", "torch" or "triton".

    Returns:
        v `[C]`, fp32 (fp64 for fp64 features), a constant: no gradient passes through it. NaN or infinity in an image
        is in the sum: NaN throughout, but for an infinity that GradCAM leaves out, which stays in its channel.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, or `impl` cannot serve these tensors.
    """
    check_maps(features)
    check_tensor("gradient", gradient, features.shape[:2], features)
    check_choice("cam_keeps", cam_keeps, CamKeeps)
    features, gradient = features.detach(), gradient.detach()
    if use_triton(impl, {"features": features, "gradient": gradient}, fits=features.shape[1] <= MAX_CHANNELS):
        return _fused(features, gradient, cam_keeps)
    return common_weights_reference(features, gradient, cam_keeps=cam_keeps)


SPEC = OpSpec(
    common_weights,
    common_weights_reference,
    inputs=draw_maps,
    usual=tuple(Example({"B": 256, "C": 2048, "S": positions}) for positions in (49, 196)),
    others=tuple(  # odd numbers of channels are read one by one
        Example({"B": 256, "C": channels, "S": 49}) for channels in (64, 511, 512, 1280, 2047, 4095, 4096)
    ),
    bytes=lambda z, width, backward: width * z["B"] * z["C"] * z["S"],
    rows=lambda z, dtype: {"common_weights": channels_class(dtype, z["C"])},
    kernels={
        "common_weights": {
            "16 bits, C <= 512": {"BLOCK": 2048, "num_warps": 2, "num_stages": 4, "programs": 528},
            "16 bits, C <= 2048": {"BLOCK": 8192, "num_warps": 8, "num_stages": 4, "programs": 132},
            "16 bits, C > 2048": {"BLOCK": 8192, "num_warps": 16, "num_stages": 4, "programs": 132},
            "32 bits, C <= 512": {"BLOCK": 2048, "num_warps": 2, "num_stages": 3, "programs": 528},
            "32 bits, C <= 2048": {"BLOCK": 8192, "num_warps": 8, "num_stages": 3, "programs": 132},
            "32 bits, C > 2048": {"BLOCK": 8192, "num_warps": 16, "num_stages": 3, "programs": 132},
        }
    },
)
