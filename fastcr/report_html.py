"""HTML pieces of a report: escaped tags, tables, charts as SVG, and the page around them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

# where the page's own colours are not enough to tell lines apart, their dashes do: see the style below
LINES = 8
POINTS = 300  # of a curve, at most
GENERATOR = "fastcr.report"
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is run or fetched, whatever a name holds
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 230, 58, 12, 10, 40  # of a chart, in its own units
# what no page may hold: control characters, and halves of characters from file names that are not UTF-8
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Markup, to be taken as it is; every other text is escaped."""


def escaped(text: object) -> str:
    """`text` as it may stand between tags and inside quoted attributes."""
    return text if isinstance(text, Html) else html.escape(UNPRINTABLE.sub("\ufffd", str(text)))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element; `class_` is the attribute class, `aria_label` aria-label; those that are None are left out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("br", "img", "meta"):
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{''.join(map(escaped, children))}</{name}>")


def broken_at_underscores(name: str) -> Html:
    """A name that may go on in the next line after each `_`."""
    return Html(escaped(name).replace("_", "_<wbr>"))


def table(head: Sequence[Sequence[Html]], rows: Sequence[Sequence[object]], caption: str) -> Html:
    """A table that scrolls in its own box; the first cell of a row is its heading, cells that are no tags get one."""

    def cell(content: object, number: int) -> Html:
        made = isinstance(content, Html) and content.startswith(("<td", "<th"))
        return Html(content) if made else tag("th" if number == 0 else "td", content, scope=None if number else "row")

    body = [tag("tr", *(cell(content, number) for number, content in enumerate(row))) for row in rows]
    parts = [tag("caption", caption), tag("thead", *(tag("tr", *cells) for cells in head)), tag("tbody", *body)]
    # a box that scrolls must be reachable with the keyboard
    return tag("div", tag("table", *parts), class_="scroll", tabindex=0, role="region", aria_label=caption)


def heading(text: str, columns: int = 1, class_: str | None = None) -> Html:
    """A column's heading, or that of several; class `plain` is for columns of text."""
    scope, colspan = ("col", None) if columns == 1 else ("colgroup", columns)
    return tag("th", text, scope=scope, colspan=colspan, class_=class_)


class Line(NamedTuple):
    """One curve of a chart."""

    label: str
    points: list[tuple[float, float]]


def thinned(points: list[tuple[float, float]], limit: int = POINTS) -> list[tuple[float, float]]:
    """Not more than `limit` points, each the mean of as many neighbours; those that are no numbers are left out."""
    points = [point for point in points if all(map(math.isfinite, point))]
    size = max(math.ceil(len(points) / limit), 1)
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def _room(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    """Lowest and highest value of an axis, never the same."""
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    # a curve that is flat but for rounding is drawn flat
    room = 0.05 * (high - low) if high - low > 1e-6 * max(abs(high), 1e-12) else max(abs(high) / 2, 1e-6)
    return (low if from_zero and low == 0 else low - room), high + room


def chart(title: str, lines: Sequence[Line], across: str, *, from_zero: bool = False) -> Html:
    """Curves over steps or epochs, with axes, ticks and, for several, a legend; nothing where there are no points."""
    curves = [(number, Line(label, thinned(points))) for number, (label, points) in enumerate(lines)]
    curves = [(number, line) for number, line in curves if line.points]
    if not curves:
        return Html("")
    left, right = _room([x for _, line in curves for x, _ in line.points], across == "epoch")
    low, high = _room([y for _, line in curves for _, y in line.points], from_zero)
    ends = [(x, y) for _, line in curves for x, y in (line.points[0], line.points[-1])]

    def place(x: float, y: float) -> tuple[str, str]:
        across_, up = (x - left) / (right - left), (y - low) / (high - low)
        return (f"{LEFT + across_ * (WIDTH - LEFT - RIGHT):.1f}", f"{TOP + (1 - up) * (HEIGHT - TOP - BOTTOM):.1f}")

    drawn: list[Html] = []
    for value in ticks(low, high, 5):
        _, y = place(left, value)
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        drawn.append(tag("text", _number(value), x=LEFT - 6, y=y, dy="0.35em", text_anchor="end"))
    for value in ticks(left, right, 6):
        x, _ = place(value, low)
        drawn.append(tag("line", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis"))
        drawn.append(tag("text", _number(value), x=x, y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    drawn.append(tag("path", d=f"M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="axis"))
    drawn.append(tag("text", across, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle"))
    for number, line in curves:
        places = [place(x, y) for x, y in line.points]
        if len(places) == 1:
            drawn.append(tag("circle", cx=places[0][0], cy=places[0][1], r=3, class_=f"dot {_look(number)}"))
        drawn.append(tag("path", d="M" + "L".join(map(",".join, places)), class_=f"curve {_look(number)}"))
    from_, to = ends[0][1], ends[1][1]
    spoken = f"{title}: from {from_:.4g} to {to:.4g}" if len(curves) == 1 else f"{title} of {len(curves)} runs"
    picture = tag("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=spoken)
    means = math.ceil(max(len(line.points) for line in lines) / POINTS)
    caption = tag("figcaption", title, tag("small", f" (means of up to {means} records)") if means > 1 else "")
    return tag("figure", caption, picture, _legend(curves) if len(lines) > 1 else "", class_="chart")


def _legend(curves: Sequence[tuple[int, Line]]) -> Html:
    def entry(number: int, line: Line) -> Html:
        sample = tag("path", d="M0,5H34", class_=f"curve {_look(number)}")
        return tag("li", tag("svg", sample, viewBox="0 0 34 10", class_="sample", aria_hidden="true"), " ", line.label)

    return tag("ul", *(entry(*curve) for curve in curves), class_="legend")


def _look(number: int) -> str:
    return f"line{number % LINES}{' thin' * (number // LINES % 2)}"


def _number(value: float) -> str:
    """A tick: short, without the noise of adding up."""
    for unit, sign in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * unit:
            return f"{value / unit:g} {sign}"
    return f"{0.0 if abs(value) < 1e-12 else value:.5g}"


STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2126; --faint: #59636e; --rule: #d0d7de; --panel: #f4f6f8;
  --right: #1a7f37; --wrong: #c62b36; }
@media (prefers-color-scheme: dark) { :root { --page: #14181c; --text: #e4e8ec; --faint: #a0aab4; --rule: #3b444d;
  --panel: #1e242a; --right: #4cc26a; --wrong: #ff7b7f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .6rem 0; } h2 { font-size: 1.3rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 48rem; } small { color: var(--faint); font-size: .86rem; }
code { font: .9em ui-monospace, monospace; }
pre { background: var(--panel); border-radius: 6px; padding: .7rem .9rem; white-space: pre-wrap; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0; }
.facts dt { color: var(--faint); } .facts dd { margin: 0; }
.scroll { overflow-x: auto; max-width: 100%; margin: .7rem 0; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); font-size: .86rem; padding-bottom: .3rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:first-child, th.plain, td.plain { text-align: left; } tbody th { font-weight: 500; }
thead th { font-weight: 600; } th[colspan] { text-align: center; }
td.best { font-weight: 700; background: var(--panel); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; } figcaption { font-size: .86rem; line-height: 1.3; margin-top: .25rem; }
.chart figcaption { font-weight: 600; } .chart > svg { width: 100%; height: auto; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: var(--faint); }
.grid { stroke: var(--rule); stroke-width: .7; } .axis { stroke: var(--faint); fill: none; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.legend { list-style: none; padding: 0; margin: .3rem 0; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem;
  font-size: .86rem; }
.sample { width: 34px; height: 10px; }
.line0 { stroke: #2b7bd4; } .line1 { stroke: #cf5c16; stroke-dasharray: 7 3; }
.line2 { stroke: #2a8a4c; stroke-dasharray: 2 3; }
.line3 { stroke: #b3479f; stroke-dasharray: 9 3 2 3; } .line4 { stroke: #8a7400; stroke-dasharray: 12 4; }
.line5 { stroke: #7b6fd6; stroke-dasharray: 4 2; } .line6 { stroke: #cf4452; stroke-dasharray: 6 2 2 2 2 2; }
.line7 { stroke: #14858f; stroke-dasharray: 1 2; } .dot { fill: none; }
.thin { stroke-width: 1; }
.images { display: flex; flex-wrap: wrap; gap: .8rem; margin: .7rem 0 1.3rem; }
.images img { display: block; width: 100%; height: auto; border-radius: 3px; }
.pair { width: 15rem; max-width: 100%; } .pair > div { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; }
.image { width: clamp(6.4rem, 14vw, 9rem); } .image img { border: 4px solid var(--rule); }
.query { margin-right: .6rem; } .query img { border-color: var(--faint); }
.right img { border-color: var(--right); } .wrong img { border-color: var(--wrong); border-style: dashed; }
.right .mark { color: var(--right); } .wrong .mark { color: var(--wrong); } .mark { font-weight: 600; display: block; }
@media (max-width: 30rem) { .pair { width: 100%; } th, td { padding: .28rem .45rem; }
  tbody th { white-space: normal; min-width: 7rem; overflow-wrap: anywhere; } }
details { margin: 1rem 0; border: 1px solid var(--rule); border-radius: 6px; padding: .4rem .9rem; }
summary { cursor: pointer; } summary > * { display: inline; }
.warning { border-left: 4px solid var(--wrong); padding-left: .7rem; }
"""


def page(title: str, *parts: Html) -> str:
    """The whole page; it says who made it, so that only reports are overwritten by reports."""
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=GENERATOR),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    ]
    body = tag("body", tag("main", tag("h1", title), *parts))
    return f"<!DOCTYPE html>\n{tag('html', tag('head', *head), body, lang='en')}\n"


def is_report(start: bytes) -> bool:
    """Whether a file that begins so is a page made here."""
    return start.startswith(b"<!DOCTYPE html>") and f'name="generator" content="{GENERATOR}"'.encode() in start
