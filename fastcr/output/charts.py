"""Curves of a report, drawn by matplotlib as SVG."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from fastcr.output.sheets import UNPRINTABLE, Chart

Points = Sequence[tuple[float, float]]
POINTS = 500  # of a curve, about: of longer ones every so many are drawn
LONGEST = 50  # characters of a name in a legend
GREY = "#808890"  # can be read on a white and on a dark page
SETTINGS = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), GREY),
    **{"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False},
    **{"svg.fonttype": "none", "svg.hashsalt": "fastcr"},  # text stays text; the same curves make the same file
}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def chart(title: str, curves: Mapping[str, Points], across: str) -> Chart | None:
    """Named curves over steps or epochs (`across`); several get a legend. None where there is no point to draw.

    Neither `pyplot` nor the user's own settings of matplotlib are touched.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    curves = {name: points[:: math.ceil(len(points) / POINTS)] for name, points in curves.items() if points}
    if not curves:
        return None
    with style.context(["default", SETTINGS]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks: the browser has them
        axes = (figure := Figure(figsize=(5.2, 3), layout="constrained")).subplots()
        lines = [
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else "", gid=f"curve{number}")[0]
            for number, points in enumerate(curves.values())
        ]
        axes.set_xlabel(across)
        if len(lines) > 1:
            # set afterwards: matplotlib leaves out labels that begin with _ and reads $ as mathematics
            legend = axes.legend(lines, list(map(str, range(len(lines)))), frameon=False, labelcolor=GREY)
            for text, name in zip(legend.get_texts(), curves, strict=True):
                text.set(text=UNPRINTABLE.sub("\ufffd", name)[:LONGEST], parse_math=False)
        figure.savefig(held := io.BytesIO(), format="svg", transparent=True, metadata={"Date": None})
    return Chart(title, held.getvalue())
