"""Images and charts of a report: which are chosen, and what is drawn."""

import base64
import io
import math
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.measures.embeddings import Embeddings
from fastcr.output.charts import LOOKS, POINTS, chart, thinned
from fastcr.output.gallery import SIDE, Thumbnails, attended, neighbours, spread
from tests.shared import SVG, curves_of, decoded

ODD = "<script>alert(1)"


@pytest.fixture
def images(birds: Path) -> ImageList:
    test = read_splits(birds).test
    assert test is not None
    return test


def embedded(vectors: torch.Tensor, kept: list[int], attention: torch.Tensor | None = None) -> Embeddings:
    none = torch.zeros(len(kept), 2, dtype=torch.int64)
    return Embeddings(vectors, None if attention is None else vectors, attention, none, torch.tensor(kept), [])


def test_neighbours_are_the_most_similar_and_marked_by_their_class(images: ImageList) -> None:
    # angles of the images kept; those of images 0 and 1 are of one class, 2 and 3 of the next, 31 is alone here
    kept, angles = [0, 1, 2, 3, 31], torch.tensor([0.0, 0.3, 0.1, 0.9, 0.85])
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    found = neighbours(embedded(vectors, kept), Thumbnails(images, 32), 5)
    shown = [[(near.file, near.label, right) for near, right, _ in query.found] for query in found]
    assert images.labels is not None
    for query, position in zip(shown, range(5), strict=True):
        others = sorted(set(range(5)) - {position}, key=lambda at: abs(angles[at] - angles[position]).item())
        labels = [images.labels[kept[at]] for at in others]
        assert query == [
            (os.path.basename(images.files[kept[at]]), images.classes[label], label == images.labels[kept[position]])
            for at, label in zip(others, labels, strict=True)
        ]
    assert [query.alone for query in found] == [False] * 4 + [True]
    assert found[0].found[0][2] == pytest.approx(math.cos(0.1))


def test_overlay_is_warm_where_the_image_is_attended(images: ImageList) -> None:
    attention = torch.zeros(3, 16)
    attention[:, 0] = 1  # the upper left of 4 x 4
    ((shown, over),) = attended(embedded(torch.eye(3), [4, 9, 20], attention), Thumbnails(images, 32), 1)
    assert shown.file == os.path.basename(images.files[9])
    plain, covered = (Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in (shown.source, over))
    moved = np.asarray(ImageChops.difference(plain, covered).convert("L"))
    assert moved[: SIDE // 4, : SIDE // 4].mean() > 5 * moved[SIDE // 2 :, SIDE // 2 :].mean()


def test_images_are_spread_evenly() -> None:
    assert spread(3, 9) == [1, 4, 7]
    assert spread(5, 2) == [0, 1]
    assert spread(0, 9) == []


def test_long_curves_are_thinned_to_their_means() -> None:
    found = thinned([(float(x), float(x % 2)) for x in range(2000)] + [(2000.0, math.nan)])
    assert len(found) <= POINTS
    assert sum(y for _, y in found) / len(found) == pytest.approx(0.5, abs=0.01)
    assert (found[0][0], found[-1][0]) == (3.0, pytest.approx(1996, abs=4))
    assert thinned([(1.0, 2.0)]) == [(1.0, 2.0)]


def made_chart(values: list[float]) -> ElementTree.Element:
    made = chart("loss", [("", [(float(x), y) for x, y in enumerate(values)])], "step")
    assert made is not None
    return ElementTree.fromstring(decoded(made.source, "svg+xml"))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (5.13, 5.31), (-3e-7, 2e-7), (0, 260_000), (9.99, 1e4)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    texts = {group.get("id", ""): group for group in made_chart([low, high]).iter(f"{SVG}g")}
    groups = [group for name, group in texts.items() if name.startswith("ytick")]
    words = ["".join(text.text or "" for text in group.iter(f"{SVG}text")) for group in groups]
    found = [float(word.replace("−", "-")) for word in words]
    assert 2 <= len(found) <= 7
    assert f"{found[-1] - found[-2]:.3e}"[:5] in ("1.000", "2.000", "5.000")
    shown = [float(use.get("y", "nan")) for group in groups for use in group.iter(f"{SVG}use")]
    assert len(shown) == len(found)
    assert all(0 <= y <= 230 for y in shown)


@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0], [1.5, 1.5, 1.5], [1e-9, -1e9], [math.inf, 1.0, math.nan]])
def test_any_curve_is_drawn_inside_its_chart(values: list[float]) -> None:
    found = made_chart(values)
    (points,) = curves_of(found)
    width, height = map(float, found.attrib["viewBox"].split()[2:])
    assert len(points) == sum(map(math.isfinite, values))
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert b"nan" not in ElementTree.tostring(found).lower()
    assert chart("none", [("", [(0.0, math.nan)])], "step") is None


def test_a_curve_that_is_flat_but_for_rounding_is_drawn_flat() -> None:
    (points,) = curves_of(made_chart([3.8918203, 3.8918201, 3.8918202]))
    assert max(y for _, y in points) - min(y for _, y in points) < 0.1


def test_charts_have_a_description_and_a_legend_of_any_text() -> None:
    points = [(0.0, 5.25), (1.0, 4.0)]
    one = chart("loss", [(ODD, points)], "step")
    assert one is not None
    assert (one.description, one.legend) == ("loss: from 5.25 to 4", [])
    lines = [(ODD, points), ("empty", []), *((f"$\\frac_{i}", points) for i in range(len(LOOKS) - 1))]
    every = chart("loss", lines, "epoch")
    assert every is not None
    assert every.description == f"loss of {len(LOOKS)} runs"
    assert [label for label, *_ in every.legend] == [label for label, found in lines if found]
    assert len({tuple(look) for _, *look in every.legend}) == len(LOOKS) - 1  # they begin again after all were seen
    svg = decoded(every.source, "svg+xml").decode()
    assert not [label for label, _ in lines if label in svg]
    for _, colour, dashes, _ in every.legend:
        assert colour in svg
        assert f"stroke-dasharray: {','.join(map(str, dashes))}" in svg or not dashes


def test_charts_leave_the_settings_of_matplotlib_alone_and_come_out_the_same() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    first = chart("loss", [("", [(0.0, 1.0), (1.0, 2.0)])], "step")
    with matplotlib.rc_context({"lines.linewidth": 40, "font.size": 3, "text.usetex": True}):
        assert chart("loss", [("", [(0.0, 1.0), (1.0, 2.0)])], "step") == first
    assert dict(matplotlib.rcParams) == before
    code = "import sys, fastcr.report, fastcr.output.charts as c; print('matplotlib' in sys.modules); "
    code += "c.chart('', [('', [(0, 1)])], ''); print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
