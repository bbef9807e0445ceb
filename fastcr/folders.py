"""`python -m fastcr.folders ROOT`: what a root holds, and which of its images are broken."""

from __future__ import annotations

import io
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastcr.config import tyro
from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.data.shards import find_shards, list_samples, read_index, with_progress, write_index
from fastcr.errors import UsageError
from fastcr.runs.command_line import called, one_line_errors, parse
from fastcr.runs.machine import pick_workers

CHUNK = 32  # images a task
FEWEST = 5  # classes named


class Facts(NamedTuple):
    """Of one image."""

    kind: str = ""  # format, mode and what else decides how it is decoded; of a broken image none of these
    width: int = 0  # pixels
    height: int = 0
    error: str | None = None  # why it cannot be used


def examine(images: ImageList, index: int) -> Facts:
    """Decode image `index` whole, by the rule training goes by."""
    try:
        images.rgb(index)
    except OSError as error:
        return Facts(error=str(error))
    with Image.open(io.BytesIO(images.read(index))) as header:
        odd = ["progressive"] * ("progressive" in header.info) + ["animated"] * getattr(header, "is_animated", False)
        return Facts(" ".join([header.format or "", header.mode, *odd]), header.width, header.height)


def examine_all(images: ImageList, title: str, console: Console) -> list[Facts]:
    """Facts of every image, in order; decoded by as many threads as there are cores."""
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    with ThreadPoolExecutor(max(pick_workers(None), 1)) as threads:
        done = threads.map(lambda chunk: [examine(images, index) for index in chunk], chunks)
        bar = track(done, title, total=len(chunks), console=console, transient=True, disable=not console.is_terminal)
        return [facts for chunk in bar for facts in chunk]


def _spread(values: Sequence[float], digits: int = 0) -> str:
    """Minimum, median and maximum."""
    if not len(values):
        return "–"
    return " / ".join(f"{value:,.{digits}f}" for value in (min(values), float(np.median(values)), max(values)))


def _decoding(kind: str) -> str:
    """How the loaders decode images of this kind."""
    if not kind.startswith(("JPEG RGB", "JPEG L")):
        return "one by one on the CPU (PIL): slower"
    return "fast, but not by a GPU's JPEG engine" if "progressive" in kind else "fast"


def print_report(parts: dict[str, tuple[ImageList, list[Facts]]], console: Console) -> None:
    """Tables of the splits and of the kinds of images; the classes with fewest images."""
    rows: dict[str, list[str]] = {}
    counts = {}
    for name, (images, facts) in parts.items():
        good = [fact for fact in facts if not fact.error]
        counts[name] = Counter(images.labels)
        per_class = [counts[name][label] for label in range(len(images.classes))]
        for row, value in {
            "images": f"{len(images):,}",
            "broken": f"{len(images) - len(good):,}",
            "classes": f"{len(images.classes):,}" if images.labels else "no labels",
            "images a class": _spread(per_class),
            "width, px": _spread([fact.width for fact in good]),
            "height, px": _spread([fact.height for fact in good]),
            "megapixels": _spread([fact.width * fact.height / 1e6 for fact in good], 2),
        }.items():
            rows.setdefault(row, []).append(value)
    table = Table(title="minimum / median / maximum", title_style="dim")
    for name in ("", *parts):
        table.add_column(name, justify="right" if name else "left")
    for row, values in rows.items():
        table.add_row(row, *values)
    console.print(table)

    table = Table(title="kinds of images", title_style="dim")
    for name in ("", *parts, "decoding"):
        table.add_column(name, justify="right" if name in parts else "left")
    kinds = {name: Counter(fact.kind for fact in facts if not fact.error) for name, (_, facts) in parts.items()}
    for kind in sorted(set().union(*kinds.values())):
        table.add_row(kind, *(f"{kinds[name][kind]:,}" for name in parts), _decoding(kind))
    if table.row_count:
        console.print(table)

    for name, (images, _) in parts.items():
        fewest = sorted(range(len(images.classes)), key=lambda label: counts[name][label])[:FEWEST]
        if fewest:
            named = ", ".join(f"{images.classes[label]} ({counts[name][label]})" for label in fewest)
            console.print(f"fewest images in {name}: {named}")


def print_classes(parts: dict[str, ImageList], console: Console) -> None:
    """How many images each class has."""
    table = Table("class")
    for name in parts:
        table.add_column(name, justify="right")
    counts = [Counter(images.labels) for images in parts.values()]
    for label, name in enumerate(parts["train"].classes or next(reversed(parts.values())).classes):
        table.add_row(name, *(f"{count[label]:,}" for count in counts))
    console.print(table)


@dataclass(frozen=True)
class CheckConfig:
    """Settings of a check."""

    root: tyro.conf.Positional[Path]
    """What --data.root of the training takes; see the README."""
    index: tyro.conf.UseCounterAction[int] = 0
    """Write an index beside each tar shard that has none of today, and do no more."""
    classes: tyro.conf.UseCounterAction[int] = 0
    """List every class with its number of images."""


def check(root: Path, console: Console, *, classes: bool = False) -> int:
    """Print what `root` holds and every broken image; returns how many are broken."""
    splits = read_splits(root)
    start = time.perf_counter()
    parts = {
        name: (images, examine_all(images, f"decoding, {name}", console))
        for name, images in (("train", splits.train), ("test", splits.test))
        if images is not None
    }
    seconds = time.perf_counter() - start
    print_report(parts, console)
    if classes:
        print_classes({name: images for name, (images, _) in parts.items()}, console)
    errors = [fact.error for _, facts in parts.values() for fact in facts if fact.error]
    for error in errors:
        console.print(f"broken: {error}", soft_wrap=True)
    total = sum(len(facts) for _, facts in parts.values())
    verdict = f"{len(errors):,} of {total:,} images are broken" if errors else f"all {total:,} images are whole"
    console.print(f"{verdict} ({seconds:.1f} s, {total / seconds:,.0f} images/s)")
    return len(errors)


def write_indexes(root: Path) -> int:
    """Write the index of every shard in `root` that has none, or one of another day; returns how many."""
    shards = [shard for part in find_shards(root) for shard in part]
    if not shards:
        raise UsageError(f"no tar shards in {root}, so there is nothing to index")
    lacking = [shard for shard in shards if read_index(shard) is None]
    for shard in with_progress(lacking, "listing shards"):
        write_index(shard, list_samples(shard))
    return len(lacking)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `python -m fastcr.folders`; exit status 1 if images are broken."""
    with one_line_errors("folders"):
        args = sys.argv[1:] if args is None else args
        description = "What a folder of images holds, and which of them are broken."
        config = parse(CheckConfig, args, prog=f"{called('folders')} ROOT", description=description)
        console = Console(markup=False, highlight=False)
        if config.index:
            print(f"{write_indexes(config.root)} indexes written, {config.root}")
        elif check(config.root, console, classes=bool(config.classes)):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
