"""Pairs that are the same or different: what is read of a file, and figures that another library gives too."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fastcr.errors import UsageError
from fastcr.measures.pairs import Pairs, read_pairs, results_of

LINES = ["a.jpg, b/c.jpg,same"] * 5 + [f"a.jpg,/d/{i}.jpg,Different" for i in range(6)]


def test_figures_and_ranges() -> None:
    rng, same = np.random.default_rng(0), np.arange(40) % 2 == 0
    cosines = {name: np.round(rng.normal(shift * same, 1), 1) for name, shift in (("poor", 0.5), ("good", 2.0))}
    for each in cosines.values():
        each[7] = np.nan  # of a pair that cannot be read
    images = read_pairs_of_nothing(same)
    scored = {"poor": {"mean": cosines["poor"], "rationale": -cosines["poor"]}, "good": {"mean": cosines["good"]}}
    found = results_of(images, scored)
    assert found["pairs"] == {"same": 20, "different": 19, "left_out": 1}
    kept = np.arange(40) != 7
    for row in found["encoders"]:
        each = scored[row["encoder"]][row["pooling"]][kept]
        assert row["auc"][0] == pytest.approx(100 * roc_auc_score(same[kept], each))
        limits = [*each, np.inf]
        assert row["accuracy"][0] == pytest.approx(
            max(100 * np.mean((each >= limit) == same[kept]) for limit in limits)
        )
        for figure, low, high in (row["auc"], row["accuracy"]):
            assert low <= figure <= high
    poor, worse, good = (row["auc"] for row in found["encoders"])
    assert worse[0] < poor[0]
    figure, low, high = found["gained"]
    assert figure == pytest.approx(good[0] - poor[0])
    assert 0 < low < figure < high  # which range the two alone would not give: theirs overlap
    with pytest.raises(UsageError, match="40 of 40 pairs"):
        results_of(images, {"none": {"mean": np.full(40, np.nan)}})


def read_pairs_of_nothing(same: np.ndarray) -> Pairs:
    return Pairs(None, np.zeros((len(same), 2), dtype=int), same)  # type: ignore[arg-type]  # no image is looked at


def test_a_file_of_pairs(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("\n".join(["first,second,answer", *LINES, ""]))
    images, places, same = read_pairs(file)
    assert [images.path(0), images.path(len(images) - 1)] == ["/d/0.jpg", str(tmp_path / "b/c.jpg")]
    assert [images.files[place] for place in places[0]] == ["a.jpg", "b/c.jpg"]
    assert same.tolist() == [True] * 5 + [False] * 6
    for lines, message in (([*LINES, "a,b,maybe"], "line 12: not two paths"), (LINES[1:], "4 pairs are the same")):
        file.write_text("\n".join(lines))
        with pytest.raises(UsageError, match=message):
            read_pairs(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_pairs(tmp_path / "none.csv")
