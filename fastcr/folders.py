"""`fastcr folders ROOT`: what a folder of images holds, and which of them are broken."""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import NamedTuple

from PIL import Image
from rich.table import Table

from fastcr.arguments import FoldersConfig, read_arguments
from fastcr.data.images import ImageList
from fastcr.data.layouts import list_splits
from fastcr.data.listing import UNREADABLE
from fastcr.runs.command_line import one_line_errors
from fastcr.runs.context import Context
from fastcr.runs.machine import pick_workers


class Facts(NamedTuple):
    """What is found out about one image."""

    kind: str = ""  # format, mode and what else decides how it is decoded; empty for a broken image
    width: int = 0  # pixels
    height: int = 0
    error: str | None = None  # why it cannot be used
    digest: bytes = b""  # of the file


def examine(images: ImageList, index: int) -> Facts:
    """Decode image `index` whole, as training does."""
    try:
        width, height = images.rgb(index).size
    except OSError as error:
        return Facts(error=str(error))
    data = images.read(index)
    with Image.open(io.BytesIO(data)) as header:
        odd = ["progressive"] * ("progressive" in header.info) + ["animated"] * getattr(header, "is_animated", False)
        kind = " ".join([header.format or "", header.mode, *odd])
    return Facts(kind, width, height, digest=hashlib.blake2b(data, digest_size=16).digest())


def _spread(values: Sequence[float]) -> str:
    """Minimum, median and maximum."""
    return " / ".join(f"{value:,.0f}" for value in (min(values), median(values), max(values))) if values else "-"


def class_sizes(images: ImageList) -> dict[str, int]:
    """Number of images of every class."""
    counts = Counter(images.labels)
    return {name: counts[label] for label, name in enumerate(images.classes)}


def summary(images: ImageList, facts: list[Facts]) -> dict[str, str]:
    """What the first table says of a split."""
    good = [fact for fact in facts if not fact.error]
    return {
        "images": f"{len(images):,}",
        "broken": f"{len(images) - len(good):,}",
        "classes": f"{len(images.classes):,}" if images.labels else "no labels",
        "images a class": _spread([*class_sizes(images).values()]),
        "width, px": _spread([fact.width for fact in good]),
        "height, px": _spread([fact.height for fact in good]),
    }


def _decoding(kind: str) -> str:
    """How the loaders decode images of this kind."""
    if not kind.startswith(("JPEG RGB", "JPEG L")):
        return "one by one on the CPU (PIL): slower"
    return "fast, but not by a GPU's JPEG engine" if "progressive" in kind else "fast"


def shared(parts: dict[str, tuple[ImageList, list[Facts]]]) -> list[str]:
    """A line if files of the test split are, byte by byte, those of training images."""
    if "test" not in parts:
        return []
    (train, known), (test, facts) = parts["train"], parts["test"]
    trained = {fact.digest: train.path(index) for index, fact in enumerate(known) if fact.digest}
    both = [(test.path(i), trained[fact.digest]) for i, fact in enumerate(facts) if fact.digest in trained]
    return [f"test images that also train: {len(both):,}, e.g. {both[0][0]!r} is {both[0][1]!r}"] if both else []


def print_report(parts: dict[str, tuple[ImageList, list[Facts]]], context: Context, classes: bool) -> None:
    """Tables of the splits, of the kinds of images, and of all `classes`."""

    def show(title: str | None, first: str, rows: Iterable[Sequence[str]], *last: str) -> None:
        table = Table(title=title, title_style="dim")
        for name in (first, *parts, *last):
            table.add_column(name, justify="right" if name in parts else "left")
        for row in rows:
            table.add_row(*row)
        if table.row_count:
            context.console.print(table)

    columns = [summary(*part) for part in parts.values()]
    show("minimum / median / maximum", "", ([row, *(column[row] for column in columns)] for row in columns[0]))

    kinds = [Counter(fact.kind for fact in facts if not fact.error) for _, facts in parts.values()]
    rows = [[kind, *(f"{found[kind]:,}" for found in kinds), _decoding(kind)] for kind in sorted({*chain(*kinds)})]
    show("kinds of images", "", rows, "decoding")

    if classes:
        sizes = [class_sizes(images) for images, _ in parts.values()]
        names = sizes[-1] or sizes[0]  # the same ones, if both have labels
        show(None, "class", ([one, *(f"{found.get(one, 0):,}" for found in sizes)] for one in names))


def check(root: Path, context: Context, *, classes: bool = False) -> bool:
    """Print what `root` holds, what is left out, and every broken image; returns whether all of it can be read."""
    start, (splits, notes) = time.perf_counter(), list_splits(root)
    parts = {}
    with ThreadPoolExecutor(max(context.workers, 1)) as threads:
        for name, images in (("train", splits.train), ("test", splits.test)):
            if images is not None:
                done = threads.map(partial(examine, images), range(len(images)))
                parts[name] = images, list(context.progress(done, f"decoding, {name}", len(images)))
    seconds = time.perf_counter() - start
    print_report(parts, context, classes)
    facts = [fact for _, found in parts.values() for fact in found]
    broken = [fact.error for fact in facts if fact.error]
    for line in (*notes, *shared(parts), *(f"broken: {error}" for error in broken)):
        context.say(line)
    total = len(facts)
    verdict = f"{len(broken):,} of {total:,} images are broken" if broken else f"all {total:,} images are whole"
    context.say(f"{verdict} ({seconds:.1f} s, {total / seconds:,.0f} images/s)")
    return not broken and not any(note.startswith(UNREADABLE) for note in notes)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr folders`; exit status 1 if images or folders cannot be read."""
    with one_line_errors("folders"):
        config: FoldersConfig = read_arguments("folders", args)
        if not check(config.root, Context(workers=pick_workers(None)), classes=bool(config.classes)):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
