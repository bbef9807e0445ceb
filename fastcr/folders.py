"""`fastcr folders ROOT`: what a folder of images holds, and which of them are broken."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from fastcr.arguments import FoldersConfig, read_arguments
from fastcr.data.copies import SIDE, originals, thumbnails
from fastcr.data.depth import SCALED
from fastcr.data.images import ImageList
from fastcr.data.layouts import list_splits
from fastcr.data.listing import UNREADABLE
from fastcr.runs.command_line import one_line_errors
from fastcr.runs.context import Context
from fastcr.runs.machine import pick_workers

COPIES = ("copies of images of another class", "test images that also train", "copies within a class and a split")
NAMED = 20  # of each kind


class Facts(NamedTuple):
    """What is found out about one image."""

    width: int = 0  # pixels
    height: int = 0
    digest: bytes = b""  # of the file
    looks: np.ndarray | None = None  # uint8 [8,8,3]: its mean colours
    scaled: str = ""  # from which range, where its values have more than 8 bits
    error: str | None = None  # why it cannot be used


class Split(NamedTuple):
    """The images of a split, and what is found out about each."""

    images: ImageList
    facts: list[Facts]


def examine(images: ImageList, index: int) -> Facts:
    """Decode image `index` whole, as training does."""
    try:
        image = images.rgb(index)
        looks = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
        digest = hashlib.blake2b(images.read(index), digest_size=16).digest()
        return Facts(*image.size, digest, looks, image.info.get(SCALED, ""))
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


def scaled(splits: dict[str, Split]) -> list[str]:
    """A line for each range from which values of more than 8 bits are scaled."""
    found = defaultdict[str, list[str]](list)
    for images, facts in splits.values():
        for index, fact in enumerate(facts):
            found[fact.scaled].append(images.path(index))
    return [f"scaled to 8 bits, {words}: {len(paths):,}, e.g. {paths[0]!r}" for words, paths in found.items() if words]


def copies(splits: dict[str, Split], context: Context) -> list[str]:
    """Lines that name the images which are copies of earlier ones, byte by byte or by their looks."""
    rows = [
        (images.path(index), fact, images.labels and images.labels[index], name)
        for name, (images, facts) in splits.items()
        for index, fact in enumerate(facts)
        if not fact.error
    ]
    if not rows:
        return []

    def numbered(values: Iterable[object]) -> Tensor:
        numbers = dict[object, int]()
        return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])

    paths, facts, *groups = zip(*rows, strict=True)
    looks = thumbnails(torch.from_numpy(np.stack([fact.looks for fact in facts])))
    shown = partial(context.progress, title="looking for copies")
    digests, found = numbered(fact.digest for fact in facts), [list[str]() for _ in COPIES]
    for kind, copy, of, same in originals(looks, digests, [*map(numbered, groups)], shown):
        found[kind].append(f"  {paths[copy]!r} {'is' if same else 'looks like'} {paths[of]!r}")
    lines = list[str]()
    for title, pairs in zip(COPIES, found, strict=True):
        lines += [f"{title}: {len(pairs):,}"] * bool(pairs) + pairs[:NAMED]
        lines += [f"  and {len(pairs) - NAMED:,} more"] * (len(pairs) > NAMED)
    return lines


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
    for line in (*notes, *scaled(splits), *copies(splits, context), *broken):
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
