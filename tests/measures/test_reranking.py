"""Whitening, query expansion and k-reciprocal re-ranking against plain loops written from the papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.measures.reranking import cosine, expand, nearest, reciprocal, whiten


def clusters(count: int = 90, dims: int = 12, seed: int = 0) -> Tensor:
    """Unit vectors around ten centres, so that neighbourhoods overlap in part."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, dims, generator=random)
    return F.normalize(centres[torch.arange(count) % 10] + 0.8 * torch.randn(count, dims, generator=random), dim=1)


def slow_reciprocal(embeddings: np.ndarray[Any, Any], k1: int, k2: int, weight: float) -> np.ndarray[Any, Any]:
    """Distances `[N,N]` as the paper describes them, a set at a time, in fp64."""
    squared = ((embeddings[:, None] - embeddings[None]) ** 2).sum(2)
    distance = squared / squared.max(1, keepdims=True)
    order = np.argsort(squared, axis=1, kind="stable")

    def mutual(image: int, k: int) -> set[int]:
        return {int(other) for other in order[image, : k + 1] if image in order[other, : k + 1]}

    weights = np.zeros_like(squared)
    for image in range(len(embeddings)):
        own = mutual(image, k1)
        whole = set(own)
        for other in own:
            theirs = mutual(other, round(k1 / 2))
            if len(theirs & own) > 2 / 3 * len(theirs):
                whole |= theirs
        members = sorted(whole)
        weights[image, members] = np.exp(-distance[image, members])
        weights[image] /= weights[image].sum()
    spread = np.stack([weights[order[image, :k2]].mean(0) for image in range(len(embeddings))])
    least = np.minimum(spread[:, None], spread[None]).sum(2)
    jaccard = 1 - least / np.maximum(spread[:, None], spread[None]).sum(2)
    return (1 - weight) * jaccard + weight * distance


@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (7, 1, 0.0), (4, 3, 1.0)])
def test_reciprocal_distances_are_those_of_the_papers_sets(k1: int, k2: int, weight: float) -> None:
    embeddings = clusters()
    expected = slow_reciprocal(embeddings.double().numpy(), k1, k2, weight)
    images = torch.tensor([5, 0, 89, *range(10, 80)])
    found = reciprocal(embeddings, k1, k2, weight)(images)
    np.testing.assert_allclose(-found.numpy(), expected[images], atol=2e-5)


def test_reciprocal_takes_fewer_images_than_neighbours() -> None:
    few = clusters(6)
    assert reciprocal(few)(torch.arange(6)).isfinite().all()


def test_expansion_is_the_weighted_sum_of_the_nearest_and_itself() -> None:
    embeddings = clusters(40)
    found = expand(embeddings, count=5)
    for image in range(40):
        similar = embeddings @ embeddings[image]
        best = similar.argsort(descending=True)[:6]
        assert image in best
        total = sum(similar[other].clamp(min=0) ** 3 * embeddings[other] for other in best)
        torch.testing.assert_close(found[image], F.normalize(total, dim=0))  # type: ignore[arg-type]


def test_queries_that_are_not_among_the_embeddings_stay_in_the_sum() -> None:
    embeddings, queries = clusters(40), clusters(7, seed=1)
    for query, found in zip(queries, expand(embeddings, queries, count=5), strict=True):
        similar = embeddings @ query
        total = query + sum(similar[n].clamp(min=0) ** 3 * embeddings[n] for n in similar.argsort(descending=True)[:5])
        torch.testing.assert_close(found, F.normalize(total, dim=0))


def test_whitened_axes_have_equal_variance_and_half_whitened_the_root_of_it() -> None:
    known = F.normalize(clusters(400, 8) * torch.linspace(3, 0.3, 8), dim=1)
    spread = []
    for power in (0.0, 0.5, 1.0):
        moved = whiten(known, known, 8, power)
        # of what is at unit length only ratios within a row are left: undo it by the longest axis of the plain PCA
        values, axes = np.linalg.eigh(np.cov(known.double().numpy().T, bias=True))
        plain = (known.double().numpy() - known.double().numpy().mean(0)) @ axes[:, ::-1] / values[::-1] ** (power / 2)
        plain /= np.linalg.norm(plain, axis=1, keepdims=True)
        np.testing.assert_allclose(np.abs(moved.numpy()), np.abs(plain), atol=1e-4)
        spread.append(moved.var(0).max() / moved.var(0).min())
    assert spread[0] > spread[1] > spread[2]
    assert whiten(known, known, 3).shape == (400, 3)
    assert whiten(known, known[:5]).shape == (400, 4)


def test_nearest_and_cosine_are_those_of_all_products() -> None:
    embeddings = clusters(70)
    products = embeddings @ embeddings.T
    assert torch.equal(nearest(embeddings, 4), products.topk(4).indices)
    torch.testing.assert_close(cosine(embeddings)(torch.tensor([3, 1])), products[[3, 1]])
