"""Near copies, lonely embeddings and groups, against what all pairs at once say."""

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components

from fastcr.measures import near


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Three tight bundles and forty rows at random, in random order, over several tiles."""
    monkeypatch.setattr(near, "ROWS", 7)
    torch.manual_seed(0)
    bundles = torch.randn(3, 1, 16) + 0.3 * torch.randn(3, 12, 16)
    every = torch.cat([bundles.flatten(0, 1), torch.randn(40, 16)])
    return F.normalize(every[torch.randperm(len(every))], dim=1)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 0.97])
def test_copies_are_the_connected_components(threshold: float, vectors: torch.Tensor) -> None:
    count, labels = connected_components((vectors @ vectors.T >= threshold).numpy(), directed=False)
    expected = {frozenset((labels == label).nonzero()[0].tolist()) for label in range(count)}
    found = near.copies(vectors, threshold)
    assert {frozenset(group) for group in found} == {group for group in expected if len(group) > 1}
    assert [*map(len, found)] == sorted(map(len, found), reverse=True)


def test_equal_rows_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "ROWS", 16)
    assert near.copies(torch.ones(50, 1), 0.9) == [[*range(50)]]


def test_nearest_other_is_that_of_all_pairs(vectors: torch.Tensor) -> None:
    best, at = near.nearest_other(vectors)
    expected = (vectors @ vectors.T).fill_diagonal_(-2).max(1)
    torch.testing.assert_close(best, expected.values)
    assert torch.equal(at, expected.indices)


def test_groups_are_a_partition_in_which_the_bundles_stay_together() -> None:
    torch.manual_seed(0)
    bundle = torch.arange(5).repeat_interleave(20)[torch.randperm(100)]
    vectors = F.normalize(torch.eye(8)[bundle] + 0.1 * torch.randn(100, 8), dim=1)
    found = near.groups(vectors, 30)
    assert sorted(row for group in found for row in group) == [*range(100)]
    assert all(len(bundle[group].unique()) == 1 for group in found)
    assert near.groups(vectors[:2], 30) in ([[0], [1]], [[1], [0]])
