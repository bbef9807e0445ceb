"""Charts of a report: curves drawn by matplotlib, each an SVG image that is part of the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import cycle
from typing import Any, NamedTuple

Points = list[tuple[float, float]]
POINTS = 300  # of a curve, at most
# colours and dashes of curves, which can be told apart by either, on a white and on a dark page; then thinner ones
COLOURS = ("#2b7bd4", "#cf5c16", "#2a8a4c", "#b3479f", "#8a7400", "#7b6fd6", "#cf4452", "#14858f")
DASHES = ((), (7, 3), (2, 3), (9, 3, 2, 3), (12, 4), (4, 2), (6, 2, 2, 2, 2, 2), (1, 2))
LOOKS = [(colour, dashes, width) for width in (2, 1) for colour, dashes in zip(COLOURS, DASHES, strict=True)]
DARK = b"@media (prefers-color-scheme: dark) { text { fill: #a0aab4 !important } }"
SETTINGS = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), "#767676"),
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.alpha": 0.35, "font.size": 12},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False},
    **{"lines.scale_dashes": False, "path.simplify": False},  # there are few points: each is drawn
    **{"svg.fonttype": "none", "svg.hashsalt": "fastcr"},  # text stays text; the same curves make the same file
}


class Chart(NamedTuple):
    """A chart as the page shows it."""

    title: str
    source: str  # data URI of the SVG
    description: str  # for those who do not see it
    means: int  # records that a point is the mean of, at most
    legend: list[tuple[Any, ...]]  # label (any text), colour, dashes and width of each curve; none for a single one


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def thinned(points: Points) -> Points:
    """At most `POINTS` points, each the mean of as many neighbours; those that are no numbers are left out."""
    points = [point for point in points if all(map(math.isfinite, point))]
    size = math.ceil(len(points) / POINTS) or 1
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def limits(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    """Lowest and highest value of an axis, never the same; a curve that is flat but for rounding is drawn flat."""
    low, high = min(0.0, *values) if from_zero else min(values), max(values)
    room = 0.05 * (high - low) if high - low > 1e-6 * max(abs(high), 1e-12) else max(abs(high) / 2, 1e-6)
    return (low if from_zero and low == 0 else low - room), high + room


def chart(title: str, lines: Sequence[tuple[str, Points]], across: str, *, from_zero: bool = False) -> Chart | None:
    """Labelled curves over steps or epochs (`across`) in one chart; None where there is no point to draw."""
    curves = [(label, *look, thinned(points)) for (label, points), look in zip(lines, cycle(LOOKS), strict=False)]
    if not (curves := [curve for curve in curves if curve[-1]]):
        return None
    first, last = (curves[0][-1][end][1] for end in (0, -1))
    spoken = f"{title} of {len(curves)} runs" if len(curves) > 1 else f"{title}: from {first:.4g} to {last:.4g}"
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg(curves, across, from_zero)).decode()}"
    means = math.ceil(max(len(points) for _, points in lines) / POINTS)
    return Chart(title, source, spoken, means, [curve[:-1] for curve in curves] if len(lines) > 1 else [])


def svg(curves: Sequence[tuple[Any, ...]], across: str, from_zero: bool) -> bytes:
    """The drawing, on a transparent ground. Neither `pyplot` nor the user's own settings of matplotlib are touched."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", SETTINGS]):
        axes = (figure := Figure(figsize=(5.2, 2.9), layout="constrained")).subplots()
        for number, (_, colour, dashes, width, points) in enumerate(curves):
            (line,) = axes.plot(
                *zip(*points, strict=True), color=colour, linestyle=(0, dashes or None), linewidth=width
            )
            line.set(gid=f"curve{number}", marker="o" if len(points) == 1 else "")
        x, y = zip(*(point for *_, points in curves for point in points), strict=True)
        axes.set(xlabel=across, xlim=limits(x, across == "epoch"), ylim=limits(y, from_zero))
        axes.locator_params(axis="x", nbins=6, steps=[1, 2, 5, 10], integer=across == "step")
        axes.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10])
        figure.savefig(held := io.BytesIO(), format="svg", transparent=True, metadata={"Date": None})
    return held.getvalue().replace(b"</style>", DARK + b"</style>", 1)
