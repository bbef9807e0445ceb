"""Retrieval scores against scikit-learn and a loop over the queries."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.measures import retrieval as module
from fastcr.measures.knn import knn
from fastcr.measures.linear_probe import fit_linear
from fastcr.measures.reranking import expand, reciprocal, whiten
from fastcr.measures.retrieval import Retrieval, retrieval

SIZES = {"one class": [9], "pairs": [2] * 8, "uneven": [2, 3, 5, 13, 30], "many": [4] * 25, "singles": [1, 2, 1, 7, 1]}


def draw(sizes: list[int], *, dim: int = 16, spread: float = 1.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit embeddings around one centre a class, and their labels, shuffled; labels are neither dense nor from 0."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=random)]
    centres = torch.randn(len(sizes), dim, generator=random)
    noise = torch.randn(len(labels), dim, generator=random)
    return F.normalize(centres[labels] + spread * noise, dim=1), 5 * labels + 3


def brute_force(embeddings: Tensor, labels: Tensor) -> Retrieval:
    """One query at a time; the average precision is scikit-learn's."""
    average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score
    similarity = (embeddings.double() @ embeddings.double().T).numpy()
    found: list[tuple[bool, bool, float]] = []
    for query, row in enumerate(similarity):
        others = np.arange(len(row)) != query
        relevant, scores = (labels == labels[query]).numpy()[others], row[others]
        if relevant.any():
            ranked = relevant[np.argsort(-scores)]
            found.append((ranked[0], ranked[:5].any(), average_precision_score(relevant, scores)))
    rank1, rank5, precision = (100 * float(np.mean(column)) for column in zip(*found, strict=True))
    return Retrieval(rank1, rank5, precision, len(found), len(labels) - len(found))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_scores_are_those_of_a_loop_over_the_queries(sizes: list[int]) -> None:
    embeddings, labels = draw(sizes)
    assert retrieval(embeddings, labels) == pytest.approx(brute_force(embeddings, labels), abs=1e-4)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_without_a_query_every_score_is_zero(count: int) -> None:
    embeddings = F.normalize(torch.randn(count, 8), dim=1)
    assert retrieval(embeddings, torch.arange(count)) == (0, 0, 0, 0, count)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 53 * 7])
def test_chunks_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    embeddings, labels = draw(SIZES["uneven"])
    whole = retrieval(embeddings, labels)
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    assert retrieval(embeddings, labels) == pytest.approx(whole, abs=1e-9)


def test_collapsed_embeddings_score_as_badly_as_they_are() -> None:
    labels = torch.arange(10).repeat_interleave(4)
    embeddings = torch.zeros(40, 8)
    embeddings[:, 0] = 1
    # the three relevant images come after the 36 others
    worst = 100 * sum(found / (36 + found) for found in (1, 2, 3)) / 3
    assert retrieval(embeddings, labels) == pytest.approx((0, 0, worst, 40, 0))


def test_a_tie_counts_against_the_query_only_between_classes() -> None:
    embeddings, labels = torch.eye(2)[[0, 0, 0, 1, 1]], torch.tensor([0, 0, 1, 1, 1])
    # queries of class 0 find their like tied with the image of class 1; that image finds two strangers first
    precisions = [1 / 2, 1 / 2, (1 / 3 + 2 / 4) / 2, (1 + 2 / 4) / 2, (1 + 2 / 4) / 2]
    expected = (40.0, 100.0, 100 * sum(precisions) / 5, 5, 0)
    assert retrieval(embeddings, labels) == pytest.approx(expected)


# every public measure of embeddings and their labels, by what it gives
MEASURES: dict[str, Callable[[Any, Any], Any]] = {
    "retrieval": lambda embeddings, labels: torch.tensor(retrieval(embeddings, labels)),
    "knn": lambda embeddings, labels: knn(embeddings, labels, embeddings, 25, k=3),
    "linear": lambda embeddings, labels: fit_linear(embeddings, labels, 25, epochs=2).weight,
    "expand": lambda embeddings, _: expand(embeddings),
    "expand queries": lambda embeddings, _: expand(torch.eye(16), embeddings),
    "whiten": lambda embeddings, _: whiten(embeddings, embeddings, 4).abs(),
    "reciprocal": lambda embeddings, _: reciprocal(embeddings)(torch.arange(20)),
}
LABELLED = ["retrieval", "knn", "linear"]


@pytest.mark.parametrize("name", MEASURES)
def test_embeddings_of_every_usual_form_are_measured_alike(name: str) -> None:
    embeddings, labels = draw([5] * 4)
    measure, long = MEASURES[name], embeddings * torch.linspace(0.5, 9, 20)[:, None]
    expected = measure(embeddings, labels)
    for other in (long, long.numpy(), long.tolist(), list(long), long.clone().requires_grad_(), long.double()):
        torch.testing.assert_close(measure(other, labels).to(expected.dtype), expected, atol=1e-3, rtol=1e-3)
    bf16 = embeddings.bfloat16()
    torch.testing.assert_close(measure(bf16, labels), measure(bf16.float(), labels), atol=1e-3, rtol=1e-3)
    for others in (labels.numpy(), labels.tolist(), labels[:, None], labels.float(), labels.to(torch.uint8)):
        assert torch.equal(measure(embeddings, others), expected)


@pytest.mark.parametrize("name", MEASURES)
def test_what_means_nothing_is_an_error_that_names_it(name: str) -> None:
    (embeddings, labels), measure = draw([5] * 4), MEASURES[name]
    for value in (torch.nan, torch.inf):
        broken = embeddings.clone()
        broken[2, 1] = value
        with pytest.raises(ValueError, match="row 2, is not finite"):
            measure(broken, labels)
    ragged = [[1.0, 0.0], *[[1.0]] * 19]
    for bad, message in ((embeddings[0], r"must be \[N,.*\], .* got \[16\]"), (ragged, "rows of one length")):
        with pytest.raises(ValueError, match=message):
            measure(bad, labels)
    for wrong, message in (
        (labels[:3], "20 embeddings need as many labels"),
        (["crow"] * 20, "labels must be numbers"),
        (torch.where(labels == labels[3], 0.5, labels), "label . is 0.5, not a whole number"),
    ):
        with pytest.raises(ValueError, match=message) if name in LABELLED else nullcontext():
            measure(embeddings, wrong)
    with pytest.raises(ValueError, match="label 0 is 7, not a whole number from 0 to 4"):
        knn(embeddings, [7] * 20, embeddings, 5)
    with pytest.raises(ValueError, match=r"queries must be \[N,16\], .* got \[2, 3\]"):
        knn(embeddings, labels, torch.eye(3)[:2], 25)


MEASURE = """
import resource
import torch
from fastcr.measures.retrieval import retrieval
random = torch.Generator().manual_seed(0)
labels = torch.randint(1000, (COUNT,), generator=random)
embeddings = torch.randn(1000, 512, generator=random)[labels] + 2 * torch.randn(COUNT, 512, generator=random)
found = retrieval(torch.nn.functional.normalize(embeddings, dim=1), labels)
assert found.queries == COUNT, found
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow  # four CPU minutes for all
@pytest.mark.parametrize("count", [pytest.param(20_000, id="sample"), 100_000])
def test_a_hundred_thousand_images_take_under_four_gigabytes(count: int) -> None:
    root, code = Path(__file__).parents[2], MEASURE.replace("COUNT", str(count))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) * 1024 < 4e9
