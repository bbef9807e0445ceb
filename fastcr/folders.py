"""`fastcr folders ROOT`: what a folder of images holds, and which of them are broken."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

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

    width: int = 0  # pixels
    height: int = 0
    digest: bytes = b""  # of the file
    error: str | None = None  # why it cannot be used


class Split(NamedTuple):
    """The images of a split, and what is found out about each."""

    images: ImageList
    facts: list[Facts]


def examine(images: ImageList, index: int) -> Facts:
    """Decode image `index` whole, as training does."""
    try:
        width, height = images.rgb(index).size
        return Facts(width, height, hashlib.blake2b(images.read(index), digest_size=16).digest())
    except OSError as error:
        return Facts(error=str(error))


def class_sizes(images: ImageList) -> dict[str, int]:
    """Number of images of every class."""
    counts = Counter(images.labels)
    return {name: counts[label] for label, name in enumerate(images.classes)}


def tables(splits: dict[str, Split], classes: bool) -> list[Table]:
    """A table of the splits, and one of all `classes`."""

    def spread(values: Sequence[float]) -> str:
        return " / ".join(f"{each:,.0f}" for each in (min(values), median(values), max(values))) if values else "-"

    table = Table("", title="minimum / median / maximum", title_style="dim")
    rows = [["images"], ["broken"], ["classes"], ["images a class"], ["width, px"], ["height, px"]]
    sizes = {name: class_sizes(split.images) for name, split in splits.items()}
    for name, (images, facts) in splits.items():
        table.add_column(name, justify="right")
        good = [fact for fact in facts if not fact.error]
        counts = [f"{len(images):,}", f"{len(images) - len(good):,}"]
        counts += [f"{len(images.classes):,}" if images.labels else "no labels", spread([*sizes[name].values()])]
        sides = [spread([fact.width for fact in good]), spread([fact.height for fact in good])]
        for row, cell in zip(rows, counts + sides, strict=True):
            row.append(cell)
    for row in rows:
        table.add_row(*row)
    if not classes or not any(sizes.values()):
        return [table]
    every = Table("class")
    for name in splits:
        every.add_column(name, justify="right")
    for one in sizes.get("test") or sizes["train"]:  # the same ones, if both have labels
        every.add_row(one, *(f"{count.get(one, 0):,}" for count in sizes.values()))
    return [table, every]


def shared(train: Split, test: Split) -> list[str]:
    """A line if files of the test split are, byte by byte, those of training images."""
    trained = {fact.digest: train.images.path(i) for i, fact in enumerate(train.facts) if fact.digest}
    both = [(test.images.path(i), trained[fact.digest]) for i, fact in enumerate(test.facts) if fact.digest in trained]
    return [f"test images that also train: {len(both):,}, e.g. {both[0][0]!r} is {both[0][1]!r}"] if both else []


def check(root: Path, context: Context, *, classes: bool = False) -> bool:
    """Print what `root` holds, what is left out, and every broken image; returns whether all of it can be read."""
    start, (found, notes) = time.perf_counter(), list_splits(root)
    splits = dict[str, Split]()
    with ThreadPoolExecutor(max(context.workers, 1)) as threads:
        for name, images in (("train", found.train), ("test", found.test)):
            if images is not None:
                done = threads.map(partial(examine, images), range(len(images)))
                splits[name] = Split(images, list(context.progress(done, f"decoding, {name}", len(images))))
    seconds = time.perf_counter() - start
    for table in tables(splits, classes):
        context.show(table)
    facts = [fact for split in splits.values() for fact in split.facts]
    broken = [f"broken: {fact.error}" for fact in facts if fact.error]
    for line in (*notes, *(shared(*splits.values()) if len(splits) == 2 else ()), *broken):
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
