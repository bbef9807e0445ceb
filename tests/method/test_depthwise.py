"""Fast gradients of depthwise convolutions: against torch's own in fp64, and how they come into a training step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcr.data.views import Batch
from fastcr.encoders.backbone import build_backbone
from fastcr.method.build import build
from fastcr.method.depthwise import Depthwise, FastGradients, has_slow_gradients
from fastcr.presets import preset
from fastcr.runs.context import Context

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = torch.autocast("cpu", dtype=torch.bfloat16)


def is_fast(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "DepthwiseBackward"


def gradients(*shape_and_settings: Any, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of images, weight and bias: ours and torch's."""
    channels, taps, sides, stride, padding = shape_and_settings
    generator = torch.Generator().manual_seed(0)
    shapes = (3, channels, *sides), (channels, 1, *taps), (channels,)
    inputs = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    with FastGradients():
        ours = F.conv2d(*inputs, stride, padding, 1, channels)
    theirs = F.conv2d(*inputs, stride, padding, 1, channels)
    assert is_fast(ours)
    assert torch.equal(ours, theirs)
    back = torch.randn(ours.shape, generator=generator, dtype=dtype)
    return [list(torch.autograd.grad(each, inputs, back)) for each in (ours, theirs)]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("taps", "sides", "stride", "padding"),
    [
        ((5, 5), (9, 8), 1, 2),
        ((5, 5), (9, 10), 2, 2),
        ((5, 5), (8, 11), 2, 0),
        ((3, 3), (9, 10), 2, 1),
        ((3, 3), (7, 8), 3, 0),
        ((7, 7), (9, 8), 1, 3),
        ((4, 4), (9, 10), 3, 1),
        ((3, 5), (9, 10), (1, 2), (0, 2)),
        ((11, 11), (12, 13), 2, 1),
        ((5, 5), (5, 5), 1, 0),
    ],
)
def test_gradients_are_torchs(taps: Any, sides: Any, stride: Any, padding: Any) -> None:
    ours, theirs = gradients(4, taps, sides, stride, padding)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("convolution", "fast"),
    [
        (nn.Conv2d(4, 4, 5, padding=2, groups=4), True),
        (nn.Conv2d(4, 4, 3, stride=2, groups=4), True),
        (nn.Conv2d(4, 4, 3, groups=4), False),  # torch's are fast
        (nn.Conv2d(4, 8, 5, groups=4), False),  # two outputs of each channel
        (nn.Conv2d(4, 4, 5), False),
        (nn.Conv2d(4, 4, 5, groups=2), False),
        (nn.Conv2d(4, 4, 5, groups=4, dilation=2), False),
        (nn.Conv2d(4, 4, 5, groups=4, padding="same"), False),
        (nn.Conv2d(4, 4, (1, 7), groups=4), False),  # no tile fits
        (nn.Conv2d(1, 1, 5), False),
    ],
)
def test_only_slow_convolutions_are_replaced(convolution: nn.Conv2d, fast: bool) -> None:
    images = torch.randn(2, convolution.in_channels, 12, 12)
    with FastGradients():
        found = convolution(images)
        with torch.no_grad():
            assert found.requires_grad
            assert not is_fast(convolution(images))
    assert is_fast(found) == fast
    assert torch.equal(found, convolution(images))


def test_under_autocast_they_are_as_exact_as_torchs() -> None:
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 5, padding=2, stride=2, groups=16))
    images = torch.randn(8, 3, 14, 14)
    found = []
    for ours in (True, False, None):
        model = copy.deepcopy(exact)
        if ours is None:
            model.double()(images.double()).square().sum().backward()
        else:
            with BF16, FastGradients() if ours else torch.enable_grad():
                output = model(images)
            assert output.dtype == torch.bfloat16
            assert is_fast(output) == ours
            output.float().square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for mine, theirs, true in zip(*found, strict=True):
        assert mine.dtype == torch.float32  # as the parameter is
        assert (mine - true).norm() < 1.5 * (theirs - true).norm() + 1e-6 * true.norm()
        assert (mine - true).norm() < 0.02 * true.norm()


def test_a_step_in_bf16_uses_them_and_one_in_fp32_does_not() -> None:
    pytest.importorskip("timm")
    config = preset("synthetic")
    config = replace(config, model=replace(config.model, weights="none", batchnorm="frozen"))
    for dtype in (torch.bfloat16, torch.float32):
        training = build(replace(config, data=replace(config.data, image_size=64)), Context(dtype=dtype))
        with patch.object(Depthwise, "apply", side_effect=Depthwise.apply) as used:
            training.step(Batch(*torch.randn(2, 4, 3, 64, 64), torch.arange(4)))
        assert used.called == (dtype == torch.bfloat16)
        assert all(each.grad is None or each.grad.isfinite().all() for each in training.moco.backbone.parameters())


def test_a_resnet_has_no_use_for_them() -> None:
    with torch.device("meta"):
        assert not has_slow_gradients(build_backbone("resnet18")[0])
