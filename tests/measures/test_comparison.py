"""Paired comparison of two encoders, against SciPy; and what the table of a run's end says of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from fastcr.data.images import ImageList
from fastcr.data.layouts import Splits
from fastcr.measures.embeddings import Embeddings
from fastcr.measures.evaluation import Evaluation, Measured, compare_best
from fastcr.measures.results import best_pooling, less_mean
from fastcr.measures.retrieval import compare, mcnemar, retrieval, retrieve_each
from fastcr.output.tables import results_tables
from fastcr.runs.context import Context


def embedded(seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unit vectors `[30,8]`, off the origin, and their labels; one image is alone in its class."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(30) % 6
    labels[-1] = 9
    centres = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    return F.normalize(centres[labels] + spread * torch.randn(30, 8, generator=random) + 1, dim=1), labels


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 4), (12, 2), (700, 800)])
def test_p_value_is_scipys_of_a_binomial_test(gained: int, lost: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected)


def test_queries_are_compared_in_pairs() -> None:
    (first, labels), (second, _) = embedded(1), embedded(2)
    before, after = retrieve_each(first, labels), retrieve_each(second, labels)
    assert before.images.tolist() == list(range(29))  # all but the one without a partner
    found = compare(before, after)
    count = found["queries"]
    changed = retrieval(second, labels).rank1 - retrieval(first, labels).rank1
    assert found["gained"] - found["lost"] == pytest.approx(changed * count / 100)
    assert found["gained"] > 0 < found["lost"]
    stats = pytest.importorskip("scipy.stats")
    paired = stats.ttest_rel(after.precision.numpy(), before.precision.numpy())
    assert found["mAP_difference"] / found["mAP_standard_error"] == pytest.approx(paired.statistic)
    assert found["mAP_difference"] == pytest.approx(retrieval(second, labels).mAP - retrieval(first, labels).mAP)
    same = compare(before, before)
    assert (same["gained"], same["lost"], same["p_value"], same["mAP_difference"]) == (0, 0, 1, 0)


def test_subtracting_the_mean_is_that_of_a_loop() -> None:
    vectors, _ = embedded(1)
    mean = sum(vectors.double()) / 30
    moved = torch.stack([(row - mean) / (row - mean).square().sum().sqrt() for row in vectors.double()])
    torch.testing.assert_close(less_mean(vectors).double(), moved, atol=1e-6, rtol=1e-5)


def test_best_pooling_is_by_map_with_the_mean_subtracted_or_not() -> None:
    def scores(rank1: float, precision: float) -> dict[str, float]:
        return {"rank1": rank1, "rank5": 99.0, "mAP": precision}

    found: dict[str, dict[str, Any]] = {
        "retrieval": {"mean": scores(40, 30), "rationale": scores(60, 20), "ddt": scores(50, 40)},
        "retrieval_centred": {"mean": scores(50, 12), "rationale": scores(1, 1), "ddt": scores(51, 40)},
    }
    assert best_pooling(found) == {"pooling": "ddt", "centred": True, "rank1": 51, "mAP": 40}


def measured(seed: int, spread: float) -> Measured:
    """What an evaluation finds of these vectors as the mean, and of others as the pooling gem."""
    vectors, labels = embedded(seed, spread)
    others = {"gem": embedded(seed + 10, spread)[0]}
    images = ImageList(Path(), tuple(f"{i}.jpg" for i in range(30)), tuple(labels.tolist()), ())
    looks = torch.rand(30, 192, generator=torch.Generator().manual_seed(seed)) * 255
    looks[3], looks[7] = looks[20].view(3, 8, 8).flip(2).flatten(), looks[8] + 1  # mirrored, and lighter
    found = Embeddings(vectors, None, None, torch.full((30, 2), 5), torch.arange(30), looks, [], others)
    encoder: Any = None  # is not asked for anything
    return Evaluation(Splits(images, None), images, Context()).scores_of(encoder, found, None)


def test_the_best_before_and_after_are_compared() -> None:
    before, after = measured(1, 1.0), measured(2, 1.0)
    found = compare_best(before, after)
    assert found is not None
    best = [best_pooling(each.scores) for each in (before, after)]
    assert [found["before"], found["after"]] == best
    first, second = (each.queries[b["pooling"], b["centred"]] for each, b in zip((before, after), best, strict=True))
    assert {**found, **compare(first, second)} == found
    assert found["mAP_difference"] == pytest.approx(best[1]["mAP"] - best[0]["mAP"])
    moved = {name: each._replace(images=each.images + 1) for name, each in after.queries.items()}
    assert compare_best(before, after._replace(queries=moved)) is None


def test_queries_with_a_copy_are_counted_and_left_out() -> None:
    found = measured(1, 1.0)
    ranked = found.queries["mean", False]
    others = [not {3, 7, 8, 20} & {image} for image in ranked.images.tolist()]
    assert found.scores["copies"]["queries"] == 4
    expected = 100 * (ranked.rank[others] == 1).double().mean().item()
    assert found.scores["copies"]["mean"]["rank1"] == pytest.approx(expected)
    assert found.scores["retrieval"]["mean"]["rank1"] != pytest.approx(expected)


def shown(before: dict[str, Any], after: dict[str, Any], every: bool = False, **more: Any) -> str:
    results = {"images": 48, "classes": 8, "frozen_init": before, **after, **more}
    console = Console(file=io.StringIO(), width=80)
    for each in results_tables(results, every=every):
        console.print(each, highlight=False, soft_wrap=isinstance(each, str))
    return console.file.getvalue()  # type: ignore[attr-defined]


def scores(mean: float, gem: float) -> dict[str, Any]:
    return {
        "retrieval": {"mean": {"rank1": mean, "rank5": 90.0, "mAP": mean}},
        "retrieval_centred": {"gem": {"rank1": gem, "rank5": 90.0, "mAP": gem}},
    }


def test_the_table_names_the_best_and_the_line_knows_chance() -> None:
    found = {"queries": 48, "gained": 3, "lost": 4, "p_value": 1.0, "mAP_difference": 5.4, "mAP_standard_error": 1.2}
    out = shown(scores(85.4, 72.7), scores(70.0, 83.3), comparison=found)
    assert "best: mean," in out
    assert "then gem (mean subtracted)" in out
    line = next(line for line in out.splitlines() if line.startswith("best pooling"))
    chance = "no difference that can be told apart from chance"
    assert f"rank-1 83.3 after training, 85.4 before (3 of 48 pictures gained, 4 lost: {chance})" in line
    assert "mAP 83.3, before 85.4 (+5.4, standard error 1.2: more than chance)" in line
    less = found | {"gained": 9, "lost": 0, "p_value": mcnemar(9, 0), "mAP_standard_error": 2.8}
    line = shown(scores(85.4, 72.7), scores(70.0, 83.3), comparison=less)
    assert "9 of 48 pictures gained, 0 lost: more than chance" in line
    assert f"(+5.4, standard error 2.8: {chance})" in line


def test_an_encoder_without_training_has_one_column() -> None:
    out = shown(scores(40.0, 30.0), scores(40.0, 30.0))
    assert "fastcr evaluate RUN --all" in out
    assert "--all" not in shown(scores(40.0, 30.0), scores(40.0, 30.0), every=True)
    assert "after" not in out
    assert "best pooling: mean; the encoder is as it was before training" in out
