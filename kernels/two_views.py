"""Augmented views of images that lie decoded in memory: crop, resize, jitter, grey, blur, flip, normalise.

    x   = resize(image[top : top + height, left : left + width])   triangle filter, as wide as the crop is reduced
    x   = brightness, contrast, saturation, hue of x               in the order given (`colour.py`)
    x   = grey(x)                                                  where asked for
    x   = x * Gaussian(sigma)                                      `window` taps an axis, edges reflected
    out = (mirror(x) - mean) / std

pixels uint8: images of any sizes one after the other, each `[H,W,3]`; image b starts at byte `starts[b]`, its rows are
`widths[b]` pixels. table `[B,V,16]` fp32 holds the V views of each image, columns as in `COLUMNS`. All is computed in
fp32 on colours in [0, 1] and rounded at the end; torchvision on uint8 rounds after the resize too, and so does a CPU.

Least bytes in 16 bits: the crops read once, `3 B V h w`, the views written once, `6 B V S^2`. Contrast needs the mean
of the whole view and blur its neighbours, so there are four passes, with the view between them in 16 bits: cut and
jitter up to contrast; jitter from contrast on; blur along rows; blur along columns. A view without blur takes two. The
cut meets a pixel of a crop four times at any reduction; rows and columns apart, twice, through `[h,S]` in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.kernels.colour import blur_reference, grey_reference, jitter_reference
from fastcr.kernels.launch import KERNEL_DTYPES, Impl, check_tensor, fused_op, use_triton
from fastcr.kernels.spec import Example, Normal, OpSpec, Sizes

try:
    import triton
    import triton.language as tl

    from fastcr.kernels.colour import jitter, luma
except ImportError:
    triton = None

COLUMNS = (
    *("top", "left", "height", "width"),  # of the crop, whole pixels inside the image
    *("first", "second", "third", "fourth"),  # 0 brightness, 1 contrast, 2 saturation, 3 hue, -1 nothing; each once
    *("brightness", "contrast", "saturation", "hue"),  # factors; hue in turns
    *("grey", "sigma", "window", "mirror"),  # 0 or 1; pixels; taps, odd, up to MAX_WINDOW, 1 for no blur; 0 or 1
)
MAX_WINDOW, MIN_SIZE = 13, 8  # more than half the window, so that an edge is reflected once
MAX_SIZE = 1 << 14  # of the kernels: places inside a view are counted in 32 bits
BLOCK = 256  # pixels of a view a program works on


def _view(image: Tensor, row: Sequence[float], size: int, compute: torch.dtype, whole_levels: bool) -> Tensor:
    """One view `[3,S,S]` in [0, 1] of an image `[H,W,3]` in uint8."""
    top, left, height, width = (int(value) for value in row[:4])
    x = image[None, top : top + height, left : left + width].contiguous().permute(0, 3, 1, 2)
    x = F.interpolate(x if whole_levels else x.to(compute), (size, size), mode="bilinear", antialias=True)[0]
    x = x.to(compute, memory_format=torch.contiguous_format) / 255
    for which in map(int, row[4:8]):
        x = jitter_reference(x, which, row[8 + which])
    grey, sigma, window, mirror = row[12:]
    x = grey_reference(x).expand_as(x) if grey else x
    x = blur_reference(x, sigma, int(window)) if window > 1 else x
    return x.flip(2) if mirror else x


def two_views_reference(
    pixels: Tensor, starts: Tensor, widths: Tensor, table: Tensor, size: int, *, mean: Sequence[float],
    std: Sequence[float], dtype: torch.dtype = torch.float32, whole_levels: bool = False,
) -> Tensor:  # fmt: skip
    """The steps above in plain torch, in fp32 (fp64 for an fp64 result): the specification and the test oracle.

    `whole_levels`: the resize gives uint8 again, as torchvision's does, which a CPU is three times as fast at.
    """
    compute = torch.promote_types(dtype, torch.float32)
    batch, views = table.shape[:2]
    out = torch.empty(views, batch, size, size, 3, dtype=dtype, device=pixels.device).permute(0, 1, 4, 2, 3)
    shift, scale = (torch.tensor(each, dtype=compute, device=pixels.device)[:, None, None] for each in (mean, std))
    for b, (start, width, rows) in enumerate(zip(starts.tolist(), widths.tolist(), table.tolist(), strict=True)):
        for v, row in enumerate(rows):
            height = int(row[0] + row[2])  # what lies below the crop does not matter
            image = pixels[start : start + 3 * height * width].view(height, width, 3)
            out[v, b] = (_view(image, row, size, compute, whole_levels) - shift).div_(scale).to(dtype)
    return out


if triton is not None:

    @triton.jit
    def _place(tiles):
        """The view a program works on and the tile of it: neighbours share a crop, and y and z end at 65,535."""
        return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles

    @triton.jit
    def _load(at, S, inside):
        """The three colours of some pixels; they lie one plane of S^2 after the other."""
        r = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(at + S * S, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + 2 * S * S, mask=inside, other=0.0).to(tl.float32)
        return r, g, b

    @triton.jit
    def _store(at, S, inside, r, g, b):
        tl.store(at, r.to(at.dtype.element_ty), mask=inside)
        tl.store(at + S * S, g.to(at.dtype.element_ty), mask=inside)
        tl.store(at + 2 * S * S, b.to(at.dtype.element_ty), mask=inside)

    @triton.jit
    def _finish(out, view, pixel, inside, r, g, b, row, means, stds, B, V, S):
        """Mirror, normalise and store as `[V,B,S,S,3]`."""
        x = pixel % S
        x = pixel - x + tl.where(tl.load(row + 15) > 0, S - 1 - x, x)
        at = out + ((view % V * B + view // V) * S * S + x) * 3
        tl.store(at, ((r - means[0]) / stds[0]).to(at.dtype.element_ty), mask=inside)
        tl.store(at + 1, ((g - means[1]) / stds[1]).to(at.dtype.element_ty), mask=inside)
        tl.store(at + 2, ((b - means[2]) / stds[2]).to(at.dtype.element_ty), mask=inside)

    @triton.jit
    def _cut_kernel(pixels, starts, widths, table, between, greys, V, S, tiles, BLOCK: tl.constexpr):
        """Crop and resize some pixels of one view, jitter them up to contrast; and sum their grey."""
        view, tile = _place(tiles)
        row = table + view * 16
        pixel = tile * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < S * S
        stride = tl.load(widths + view // V).to(tl.int64) * 3
        top, left, height, width = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        corner = pixels + tl.load(starts + view // V) + top.to(tl.int64) * stride + left.to(tl.int64) * 3
        # where torch's antialiased interpolation takes its pixels from
        scale_y, scale_x = height / S, width / S
        reach_y, reach_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
        centre_y, centre_x = (pixel // S + 0.5) * scale_y, (pixel % S + 0.5) * scale_x
        first_y = tl.maximum(tl.floor(centre_y - reach_y + 0.5), 0.0)
        first_x = tl.maximum(tl.floor(centre_x - reach_x + 0.5), 0.0)
        last_y = tl.minimum(tl.floor(centre_y + reach_y + 0.5), height)
        last_x = tl.minimum(tl.floor(centre_x + reach_x + 0.5), width)
        r = tl.zeros([BLOCK], tl.float32)
        g, b, total = r, r, r
        for i in range(tl.ceil(2 * reach_y).to(tl.int32)):  # no more pixels lie strictly within the reach
            y = first_y + i
            weight_y = tl.maximum(1 - tl.abs(y - centre_y + 0.5) / reach_y, 0.0)
            for j in range(tl.ceil(2 * reach_x).to(tl.int32)):
                x = first_x + j
                taken = inside & (y < last_y) & (x < last_x)
                weight = weight_y * tl.maximum(1 - tl.abs(x - centre_x + 0.5) / reach_x, 0.0)
                weight = tl.where(taken, weight, 0.0)
                at = corner + y.to(tl.int64) * stride + x.to(tl.int32) * 3
                r += weight * tl.load(at, mask=taken, other=0).to(tl.float32)
                g += weight * tl.load(at + 1, mask=taken, other=0).to(tl.float32)
                b += weight * tl.load(at + 2, mask=taken, other=0).to(tl.float32)
                total += weight
        total = tl.where(inside, total * 255, 1.0)
        r, g, b = r / total, g / total, b / total
        waiting = 0  # from contrast on, for the mean
        for slot in range(4):
            which = tl.load(row + 4 + slot).to(tl.int32)
            waiting = tl.where(which == 1, 1, waiting)
            r, g, b = jitter(r, g, b, tl.where(waiting == 1, -1, which), row + 8, 0.0)
        tl.store(greys + view * tiles + tile, tl.sum(tl.where(inside, luma(r, g, b), 0.0), axis=0))
        _store(between + view * 3 * S * S + pixel, S, inside, r, g, b)

    @triton.jit
    def _colour_kernel(table, between, greys, out, B, V, S, tiles, means, stds, BLOCK: tl.constexpr):
        """Jitter some pixels of one view from contrast on, and grey; a view without blur is then finished."""
        view, tile = _place(tiles)
        row = table + view * 16
        pixel = tile * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < S * S
        mean = tl.load(greys + view) / (S * S)
        r, g, b = _load(between + view * 3 * S * S + pixel, S, inside)
        waiting = 1
        for slot in range(4):
            which = tl.load(row + 4 + slot).to(tl.int32)
            waiting = tl.where(which == 1, 0, waiting)
            r, g, b = jitter(r, g, b, tl.where(waiting == 1, -1, which), row + 8, mean)
        if tl.load(row + 12) > 0:
            r = luma(r, g, b)
            g, b = r, r
        if tl.load(row + 14) > 1:
            _store(between + view * 3 * S * S + pixel, S, inside, r, g, b)
        else:
            _finish(out, view, pixel, inside, r, g, b, row, means, stds, B, V, S)

    @triton.jit
    def _blur_kernel(
        table, source, target, B, V, S, tiles, means, stds, ROWS: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """Blur some pixels of one view along its rows, or along its columns and finish it."""
        view, tile = _place(tiles)
        row = table + view * 16
        window, sigma = tl.load(row + 14).to(tl.int32), tl.load(row + 13)
        if window > 1:
            pixel = tile * BLOCK + tl.arange(0, BLOCK)
            inside = pixel < S * S
            step = 1 if ROWS else S
            along = pixel % S if ROWS else pixel // S
            line = source + view * 3 * S * S + pixel - along * step
            r = tl.zeros([BLOCK], tl.float32)
            g, b, total = r, r, 0.0
            for i in range(window):
                tap = (i - window // 2) / sigma
                weight = tl.exp(-0.5 * tap * tap)
                near = tl.abs(along + i - window // 2)
                near = S - 1 - tl.abs(S - 1 - near)  # reflected at either edge, which is not repeated
                x, y, z = _load(line + near * step, S, inside)
                r, g, b, total = r + weight * x, g + weight * y, b + weight * z, total + weight
            r, g, b = r / total, g / total, b / total
            if ROWS:
                _store(target + view * 3 * S * S + pixel, S, inside, r, g, b)
            else:
                _finish(target, view, pixel, inside, r, g, b, row, means, stds, B, V, S)


@fused_op("fastcr::two_views")
def _fused(
    pixels: Tensor, starts: Tensor, widths: Tensor, table: Tensor, size: int, mean: list[float], std: list[float],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The views, as `[V,B,S,S,3]`."""
    batch, views = table.shape[:2]
    out = table.new_empty(views, batch, size, size, 3, dtype=dtype)
    if out.numel() == 0:
        return out
    starts, widths, table = starts.contiguous(), widths.contiguous(), table.contiguous()
    narrow = torch.float32 if dtype == torch.float32 else torch.float16
    between, blurred = (table.new_empty(batch * views, 3, size, size, dtype=narrow) for _ in range(2))
    tiles = triton.cdiv(size * size, BLOCK)
    greys = table.new_empty(batch * views, tiles)
    grid, colours = (batch * views * tiles,), (tuple(mean), tuple(std))
    _cut_kernel[grid](pixels, starts, widths, table, between, greys, views, size, tiles, BLOCK=BLOCK)
    _colour_kernel[grid](table, between, greys.sum(1), out, batch, views, size, tiles, *colours, BLOCK=BLOCK)
    _blur_kernel[grid](table, between, blurred, batch, views, size, tiles, *colours, ROWS=True, BLOCK=BLOCK)
    _blur_kernel[grid](table, blurred, out, batch, views, size, tiles, *colours, ROWS=False, BLOCK=BLOCK)
    return out


@_fused.register_fake
def _(pixels: Tensor, starts: Tensor, widths: Tensor, table: Tensor, size: int, *others: Any) -> Tensor:
    return table.new_empty(table.shape[1], len(table), size, size, 3, dtype=others[-1])


def two_views(
    pixels: Tensor, starts: Tensor, widths: Tensor, table: Tensor, size: int, *, mean: Sequence[float],
    std: Sequence[float], dtype: torch.dtype = torch.float32, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Views of decoded images, augmented as `table` says, normalised (MoCo v2's augmentation, arXiv 2003.04297).

    Args:
        pixels: uint8 `[bytes]`, contiguous: images `[H,W,3]` one after the other, of any sizes.
        starts: int64 `[B]`, byte at which each image begins; the same image may come twice.
        widths: int64 `[B]`, pixels in a row of each image.
        table: fp32 `[B,V,16]`, columns as in `COLUMNS`. Crops must lie inside their images: that is not checked.
        size: side of the views, pixels, at least 8.
        mean, std: of red, green and blue, for colours in [0, 1].
        dtype: of the result: fp16, bf16, fp32; fp64 by the reference alone.
        impl: "auto", "torch" or "triton"; auto on a CPU rounds to uint8 after the resize, unless `dtype` is fp64.

    Returns:
        `[V,B,3,S,S]`, each view channels-last.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot serve these tensors.
    """
    if pixels.ndim != 1 or pixels.dtype != torch.uint8 or not pixels.is_contiguous():
        raise ValueError(f"pixels must be a contiguous uint8 [bytes], got {pixels.dtype} {list(pixels.shape)}")
    check_tensor("table", table, (*table.shape[:2], len(COLUMNS)), pixels, torch.float32)
    check_tensor("starts", starts, table.shape[:1], pixels, torch.int64)
    check_tensor("widths", widths, table.shape[:1], pixels, torch.int64)
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE}, got {size}")
    if not len(mean) == len(std) == 3:
        raise ValueError(f"mean and std must have three values, got {len(mean)} and {len(std)}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, got {dtype}")
    if use_triton(impl, {"table": table}, fits=dtype in KERNEL_DTYPES and size <= MAX_SIZE):
        views = _fused(pixels, starts, widths, table, size, list(mean), list(std), dtype)
        return views.permute(0, 1, 4, 2, 3)
    whole = impl == "auto" and pixels.device.type == "cpu" and dtype != torch.float64
    return two_views_reference(pixels, starts, widths, table, size, mean=mean, std=std, dtype=dtype, whole_levels=whole)


def _inputs(sizes: Sizes, dtype: torch.dtype, normal: Normal) -> dict[str, Any]:
    """Whole images of h x w pixels, all augmentations on."""
    batch, views, height, width, size = (sizes[name] for name in "BVhwS")
    row = [0, 0, height, width, 0, 1, 2, 3, 1.2, 0.8, 1.1, 0.05, 0, 1, MAX_WINDOW, 1]
    table = normal(batch, views, len(COLUMNS)).copy_(torch.tensor(row))
    pixels = (normal(batch * height * width * 3) * 60 + 128).clamp_(0, 255).to(torch.uint8)
    starts = torch.arange(batch, device=pixels.device) * (3 * height * width)
    colours = {"size": size, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "dtype": dtype}
    return {"pixels": pixels, "starts": starts, "widths": torch.full_like(starts, width), "table": table} | colours


SPEC = OpSpec(
    two_views,
    two_views_reference,
    inputs=_inputs,
    usual=(Example({"B": 64, "V": 2, "h": 300, "w": 300, "S": 224}),),
    bytes=lambda z, width, backward: 3 * z["B"] * z["V"] * (z["h"] * z["w"] + width * z["S"] ** 2),
)
