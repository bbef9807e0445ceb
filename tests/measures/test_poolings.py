"""Poolings without training, against plain loops in fp64 and independent libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcr.measures.poolings import SIGMA, gaussian, gem, largest_region, norm, scda, weighted, without_training
from fastcr.method.ddt import Moments


@pytest.fixture
def features() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 6, 4, 5)


def by_loop(features: Tensor, weight: object) -> Tensor:
    """Weighted mean of the positions; `weight(image, y, x)` gives one position's."""
    rows = []
    for image in features.double():
        _, high, wide = image.shape
        weights = {(y, x): weight(image, y, x) for y in range(high) for x in range(wide)}  # type: ignore[operator]
        total = sum(weights.values())
        rows.append(sum(value / total * image[:, y, x] for (y, x), value in weights.items()))
    return torch.stack(rows)  # type: ignore[arg-type]


def test_poolings_with_one_weight_a_position_are_those_of_a_loop(features: Tensor) -> None:
    def centred(image: Tensor, y: int, x: int) -> float:
        return math.exp(-(((y + 0.5) / 4 - 0.5) ** 2 + ((x + 0.5) / 5 - 0.5) ** 2) / (2 * SIGMA**2))

    def size(image: Tensor, y: int, x: int) -> float:
        return math.sqrt(float(image[:, y, x].square().sum()))

    for pool, weight in ((gaussian, centred), (norm, size)):
        torch.testing.assert_close(pool(features).double(), by_loop(features, weight), rtol=1e-5, atol=1e-6)


def test_gem_is_the_cube_root_of_the_mean_cube(features: Tensor) -> None:
    positive = features.abs().double()
    expected = (sum(positive[:, :, y, x] ** 3 for y in range(4) for x in range(5)) / 20) ** (1 / 3)
    torch.testing.assert_close(gem(positive).double(), expected, rtol=1e-5, atol=1e-6)
    assert gem(-positive).max() < 1e-5


def test_largest_region_is_scipys() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    masks = torch.rand(200, 7, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    for mask, found in zip(masks.numpy(), largest_region(masks).numpy(), strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions = [labels == number for number in range(1, count + 1)]
        largest = max((int(region.sum()) for region in regions), default=0)
        assert found.sum() == largest
        assert any(np.array_equal(found, region) for region in regions if region.sum() == largest) or not largest


def test_scda_pools_the_positions_that_stand_out() -> None:
    features = torch.full((2, 3, 6, 6), 0.1)
    features[0, :, 1:3, 1:4] = torch.rand(3, 2, 3) + 1  # the object
    features[0, :, 5, 5] = 5.0  # and something smaller elsewhere
    part = features[0, :, 1:3, 1:4].flatten(1)
    torch.testing.assert_close(scda(features)[0], torch.cat([part.mean(1), part.amax(1)]))
    torch.testing.assert_close(scda(features)[1], torch.full((6,), 0.1))  # the same everywhere: kept whole


def test_ddt_is_the_first_component_of_an_independent_pca() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    torch.manual_seed(0)
    features = torch.randn(12, 8, 5, 5)
    features[:, :, 1:4, 1:4] += 3 * torch.randn(8)[:, None, None]  # an object inside
    moments = Moments(8)
    for part in features.split(5):
        moments.add(part)
    axis = moments.axis()
    rows = torch.nn.functional.normalize(features.double(), dim=1).permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    pca = decomposition.PCA(n_components=1).fit(rows)
    scores = torch.from_numpy(pca.transform(rows)).view(12, 5, 5)
    inside, border = scores[:, 1:4, 1:4].mean(), (scores.sum() - scores[:, 1:4, 1:4].sum()) / (12 * 16)
    scores = scores if inside > border else -scores
    torch.testing.assert_close(axis.scores(features).double(), scores, rtol=1e-4, atol=1e-5)
    attention = scores.clamp(min=0) / scores.clamp(min=0).sum((1, 2), keepdim=True)
    torch.testing.assert_close(axis.attention(features).double(), attention, rtol=1e-4, atol=1e-5)
    pooled = without_training(axis)["ddt"](features)
    torch.testing.assert_close(pooled, weighted(features, attention.float()), rtol=1e-4, atol=1e-5)
    nothing = axis._replace(direction=torch.zeros(8))
    torch.testing.assert_close(nothing.attention(features), torch.full((12, 5, 5), 1 / 25))
