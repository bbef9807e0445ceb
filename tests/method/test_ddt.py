"""Detectors that begin where DDT is: what they are fitted to, against sums of one position at a time in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.method.ddt import NOISE, Axis, Moments, detectors_like, fit_detector, pair_error

pytestmark = pytest.mark.usefixtures("one_thread")


def things(images: int = 60, channels: int = 8) -> Tensor:
    """Features `[N,C,5,5]` of images with a thing somewhere inside: other than its surroundings, of its own kind."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(images, channels, 5, 5, generator=generator)
    features[:, 0] += 2
    rows, columns = torch.randint(1, 3, (2, images), generator=generator)
    kinds = torch.rand(images, channels, generator=generator)
    for i in range(images):
        inside = features[i, :, rows[i] : rows[i] + 2, columns[i] : columns[i] + 2]
        inside[0] -= 1.5
        inside[1] += 2
        inside += kinds[i, :, None, None]
    return features


def axis_of(features: Tensor) -> Axis:
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.axis()


def slow_error(found: Tensor, wanted: Tensor, maps: Tensor) -> float:
    """`pair_error` by loops in fp64."""

    def products(weights: Tensor) -> list[float]:
        pooled = [sum(w * f for w, f in zip(*pair, strict=True)) for pair in zip(weights, maps.double(), strict=True)]
        unit = [each / each.square().sum().sqrt() for each in pooled]
        centred = [each - sum(unit) / len(unit) for each in unit]
        return [float((one * other).sum()) for one in centred for other in centred]

    pairs = list(zip(products(found.double()), products(wanted.double()), strict=True))
    return sum((one - other) ** 2 for one, other in pairs) / sum(other**2 for _, other in pairs)


def attention(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The branch's attention `[N,S]` at temperature 1."""
    return (features.flatten(2).transpose(1, 2) @ weight.T + bias).amax(2).softmax(1)


def test_error_of_all_pairs() -> None:
    torch.manual_seed(0)
    maps, found, wanted = torch.rand(7, 9, 6), torch.rand(7, 9).softmax(1), torch.rand(7, 9).softmax(1)
    assert pair_error(found, wanted, maps).item() == pytest.approx(slow_error(found, wanted, maps), rel=1e-4)
    assert pair_error(wanted, wanted, maps) == 0


def test_a_detector_that_there_is_is_found() -> None:
    torch.manual_seed(0)
    maps, true = torch.rand(60, 9, 6), torch.randn(6)
    wanted = (maps @ true * 3).softmax(1)
    begun = F.normalize(true + torch.randn(6), dim=0)
    before = slow_error((maps @ begun / (maps @ begun).std()).softmax(1), wanted, maps)
    found = fit_detector(maps, wanted, begun, torch.Generator().manual_seed(0))
    assert slow_error((maps @ found).softmax(1), wanted, maps) < 0.01 < 0.1 < before


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_detectors_pool_as_ddt_does(scale: float) -> None:
    features = things()
    maps, wanted = features.flatten(2).transpose(1, 2), axis_of(features).attention(features).flatten(1)
    weight, bias = detectors_like(axis_of(features), scale * features, 16, seed=0)
    flat = torch.full_like(wanted, 1 / 25)
    found = attention(scale * features, weight, bias)
    assert slow_error(found, wanted, maps) < slow_error(flat, wanted, maps) / 4


def test_detectors_are_centred_nearly_one_and_all_in_use() -> None:
    features = things()
    weight, bias = detectors_like(axis_of(features), features, 16, seed=0)
    scores = features.double().flatten(2).transpose(1, 2) @ weight.double().T + bias.double()
    torch.testing.assert_close(scores.mean((0, 1)), torch.zeros(16, dtype=torch.float64), atol=1e-4, rtol=0)
    apart = (weight - weight.mean(0)).norm(dim=1) / weight.mean(0).norm()
    assert apart.mean() == pytest.approx(NOISE, rel=0.3)
    wins = torch.bincount(scores.argmax(2).flatten(), minlength=16)
    assert (wins > 0).sum() > 8


@pytest.mark.parametrize("features", [torch.ones(3, 5, 2, 2), torch.zeros(3, 5, 2, 2), torch.rand(1, 5, 1, 1)])
def test_images_without_any_difference_give_numbers(features: Tensor) -> None:
    axis = Axis(F.normalize(torch.ones(5), dim=0), torch.zeros(5))
    weight, bias = detectors_like(axis, features, 4, seed=0)
    assert attention(features, weight, bias).isfinite().all()
