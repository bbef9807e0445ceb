"""Tar shards in WebDataset's layout: `*train*.tar` and `*test*.tar` or `*val*.tar`, or any `*.tar` without a split.

Members that follow each other and share a key (the name up to the first dot of its last part) are a sample: its first
image, and a label from `.cls` (a number) or from `"label"` in `.json`, if it has one.

The headers of every shard are read once, at the start. From then on any image is read by one `pread` at its offset, so
shuffling, the share of each process and an exact resume work as they do with single files.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastcr.data.images import SUFFIXES, ImageList, Splits
from fastcr.data.listing import BESIDE, Entries, Notes, ending_of, split_in
from fastcr.errors import UsageError, one_line
from fastcr.runs.context import progress

BARE = "left out: samples in shards that hold no image"
Label = int | str


class Member(NamedTuple):
    """A file in a shard."""

    key: str  # what the members of a sample share
    extension: str  # all that follows the first dot of its name
    offset: int  # bytes from the start of the shard to its content
    size: int  # bytes

    @property
    def name(self) -> str:
        """As the shard has it."""
        return f"{self.key}.{self.extension}"


class Sample(NamedTuple):
    """Members of a shard that share a key."""

    key: str
    image: Member | None
    label: Label | None


@dataclass(frozen=True)
class TarImages(ImageList):
    """Images in tar shards: `files` are `<shard>/<member>`, and image `i` is `size` bytes of its shard at `offset`."""

    shards: tuple[str, ...]
    extents: np.ndarray = field(compare=False)  # int64 [n,3]: shard, offset, size

    def open(self, index: int) -> BinaryIO:
        """The encoded file of image `index`, in memory. Raises `OSError` where its shard is gone."""
        shard, offset, size = self.extents[index].tolist()
        # opened anew each time: nothing to share between threads or carry through a fork, and no limit on the shards
        with open(os.path.join(self.root, self.shards[shard]), "rb", buffering=0) as file:
            return io.BytesIO(os.pread(file.fileno(), size, offset))

    def stamp(self, index: int) -> str:
        """Text that changes when the shard of image `index` does. Raises `OSError` where it is gone."""
        shard, offset, size = self.extents[index].tolist()
        facts = os.stat(os.path.join(self.root, self.shards[shard]))
        return f"{self.path(index)} {offset} {size} {facts.st_size} {facts.st_mtime_ns}"


def read_shards(root: Path, inside: Entries, notes: Notes) -> Splits | None:
    """The images in the tar shards of `root`, which holds `inside`; None where there are none, or images or folders.

    The split is a word of a shard's name (`birds-train-0.tar`). Without `test`, it is `val`. Raises `UsageError` if a
    shard is broken, if a split holds no image, or if only some images of a split have a label.
    """
    names = [name for name in inside.others if ending_of(name) == ".tar"]
    if not names or inside.folders or inside.images:  # archives may lie beside what they were unpacked to
        return None
    found = {split: [name for name in names if split_in(name) == split] for split in ("train", "test", "val", "")}
    train, test = found["train"], found["test"] or found["val"]
    if test and not train:
        raise UsageError(f"{root} has shards like {test[0]} but none named train")
    splits = [split for split in (train or found[""], test) if split]
    for name in names:
        if not any(name in split for split in splits):
            notes.add(BESIDE, root / name)
    listed = {shard: list_samples(root / shard) for shard in progress([*chain(*splits)], "listing shards")}
    labels = {sample.label for sample in chain(*listed.values()) if sample.label is not None}
    classes = sorted(labels, key=lambda label: (isinstance(label, str), label))  # numbers by their value
    images = [_images(root, split, listed, classes, notes) for split in splits]
    return Splits(images[0], images[1] if test else None)


def _images(
    root: Path, shards: list[str], listed: dict[str, list[Sample]], classes: list[Label], notes: Notes
) -> TarImages:
    """The images of one split, with their labels as positions in `classes` if they have any."""
    files, extents, labels = [], [], []
    for number, shard in enumerate(shards):
        for key, image, label in listed[shard]:
            if image is None:
                notes.add(BARE, root / shard / key)
                continue
            files.append(f"{shard}/{image.name}")
            extents.append((number, image.offset, image.size))
            labels.append(label)
    if not files:
        raise UsageError(f"no images in the shards of {root} (looked for {' '.join(sorted(SUFFIXES))})")
    images = TarImages(root, tuple(files), None, (), tuple(shards), np.array(extents, dtype=np.int64))
    return images.with_labels(labels, classes)


def list_samples(shard: Path) -> list[Sample]:
    """The samples of a shard, from its headers.

    Raises `UsageError` if it is no whole, uncompressed tar, or if a dot within a key hides an image.
    """
    members = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for entry in tar:
                name, dot, extension = entry.name.rpartition("/")[2].partition(".")
                # no links, nor files with holes, whose size says nothing; what has no extension or is hidden is no part
                if entry.isreg() and not entry.issparse() and name and dot:
                    key = entry.name[: -len(extension) - 1]
                    members.append(Member(key, extension, entry.offset_data, entry.size))
    except Exception as error:  # tarfile raises whatever the broken bytes lead it to
        raise UsageError(f"{shard} is not a whole, uncompressed tar: {one_line(error)}") from None
    samples = []
    with open(shard, "rb", buffering=0) as file:
        for key, group in groupby(members, lambda member: member.key):
            parts = list(group)
            image = next((part for part in parts if f".{part.extension.lower()}" in SUFFIXES), None)
            dotted = [part.name for part in parts if ending_of(part.name) in SUFFIXES]
            if dotted and image is None:
                raise UsageError(
                    f"{shard}: the key of {dotted[0]!r} ends at its first dot: write a dash for the dots in a key"
                )
            samples.append(Sample(key, image, _label(file, parts) if image else None))
    return samples


def _label(shard: BinaryIO, sample: list[Member]) -> Label | None:
    """The label of a sample, from its `.cls` or else its `.json`; None where it has none."""
    named = {part.extension: part for part in sample}
    member = named.get("cls") or named.get("json")
    if member is None:
        return None
    text, is_number = os.pread(shard.fileno(), member.size, member.offset), member.extension == "cls"
    try:
        label = int(text) if is_number else json.loads(text).get("label")
    except (ValueError, AttributeError, RecursionError):
        kind = "number" if is_number else "object"
        raise UsageError(f"{shard.name}: {member.name!r} holds no {kind}") from None
    if label is not None and not isinstance(label, (int, str)):
        raise UsageError(f"{shard.name}: the label in {member.name!r} is neither a number nor text")
    return label
