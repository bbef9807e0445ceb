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
import re
import tarfile
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastcr.data.images import SUFFIXES, ImageList, Splits
from fastcr.data.listing import BESIDE, Entries, Notes, ending_of, split_of
from fastcr.errors import UsageError, one_line
from fastcr.runs.context import progress

BARE = "left out: samples in shards that hold no image"
# hidden files, and those without an extension, are no part of a sample
MEMBER = re.compile(r"(?P<key>(.*/)?[^/.]+)\.(?P<extension>[^/]*)", re.DOTALL)
Label = int | str
Sample = tuple[str, tarfile.TarInfo | None, Label | None]  # key, image and label: members of a shard that share the key


@dataclass(frozen=True)
class TarImages(ImageList):
    """Images in tar shards: `files` are `<shard>/<member>`, and image `i` is `size` bytes of its shard at `offset`."""

    extents: np.ndarray = field(compare=False)  # int64 [n,2]: offset, size
    shards: tuple[str, ...] = field(repr=False)  # of each image

    def open(self, index: int) -> BinaryIO:
        """The encoded file of image `index`, in memory. Raises `OSError` where its shard is gone."""
        offset, size = self.extents[index].tolist()
        # opened anew each time: nothing to share between threads or carry through a fork, and no limit on the shards
        with open(os.path.join(self.root, self.shards[index]), "rb", buffering=0) as file:
            return io.BytesIO(os.pread(file.fileno(), size, offset))

    def stamp(self, index: int) -> str:
        """Text that changes when the shard of image `index` does. Raises `OSError` where it is gone."""
        facts = os.stat(os.path.join(self.root, self.shards[index]))
        return f"{self.extents[index].tolist()} {facts.st_size} {facts.st_mtime_ns}"


def read_shards(root: Path, inside: Entries, notes: Notes) -> Splits | None:
    """The images in the tar shards of `root`, which holds `inside`; None where there are none, or images or folders.

    The split is a word of a shard's name (`birds-train-0.tar`). Without `test`, it is `val`. Raises `UsageError` if a
    shard is broken, if a split holds no image, or if only some images of a split have a label.
    """
    names = [name for name in inside.others if ending_of(name) == ".tar"]
    if not names or inside.folders or inside.images:  # archives may lie beside what they were unpacked to
        return None
    found = defaultdict[str, list[str]](list)
    for name in names:
        found[split_of(name, among_words=True)].append(name)
    train, test = found["train"], found["test"] or found["val"]
    if test and not train:
        raise UsageError(f"{root} has shards like {test[0]} but none named train")
    train = train or found[""]
    notes[BESIDE] += [root / name for name in names if name not in train + test]
    listed = {shard: list_samples(root / shard) for shard in progress(train + test, "listing shards")}
    labels = {label for _, _, label in chain(*listed.values()) if label is not None}
    classes = sorted(labels, key=lambda label: (isinstance(label, str), label))  # numbers by their value
    images = [_images(root, {shard: listed[shard] for shard in split}, classes, notes) for split in (train, test)]
    return Splits(images[0], images[1] if test else None)


def _images(root: Path, listed: dict[str, list[Sample]], classes: list[Label], notes: Notes) -> TarImages:
    """The images of one split, with their labels as positions in `classes` if they have any."""
    found = [(shard, image, label) for shard, samples in listed.items() for _, image, label in samples if image]
    notes[BARE] += [root / shard / key for shard, samples in listed.items() for key, image, _ in samples if not image]
    if listed and not found:
        raise UsageError(f"no images in the shards of {root} (looked for {' '.join(sorted(SUFFIXES))})")
    files = tuple(f"{shard}/{image.name}" for shard, image, _ in found)
    extents = np.array([(image.offset_data, image.size) for _, image, _ in found], dtype=np.int64)
    images = TarImages(root, files, None, (), extents, tuple(shard for shard, *_ in found))
    return images.with_labels([label for *_, label in found], classes)


def list_samples(shard: Path) -> list[Sample]:
    """The samples of a shard, from its headers.

    Raises `UsageError` if it is no whole, uncompressed tar, or if a dot within a key hides an image.
    """
    samples: list[Sample] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            # no links, nor files with holes, whose size says nothing
            files = [entry for entry in tar if entry.isreg() and not entry.issparse()]
    except Exception as error:  # tarfile raises whatever the broken bytes lead it to
        raise UsageError(f"{shard} is not a whole, uncompressed tar: {one_line(error)}") from None
    members = [(found, entry) for entry in files if (found := MEMBER.fullmatch(entry.name))]
    with open(shard, "rb", buffering=0) as file:
        for key, group in groupby(members, lambda member: member[0]["key"]):
            parts = {found["extension"]: entry for found, entry in group}
            image = next((part for extension, part in parts.items() if f".{extension.lower()}" in SUFFIXES), None)
            dotted = [part.name for part in parts.values() if ending_of(part.name) in SUFFIXES]
            if dotted and not image:
                why = f"the key of {dotted[0]!r} ends at its first dot"
                raise UsageError(f"{shard}: {why}: write a dash for the dots in a key")
            samples.append((key, image, _label(file, parts) if image else None))
    return samples


def _label(shard: BinaryIO, parts: dict[str, tarfile.TarInfo]) -> Label | None:
    """The label of a sample, from its `.cls` or else its `.json`; None where it has none."""
    member, is_number = parts.get("cls") or parts.get("json"), "cls" in parts
    if member is None:
        return None
    text = os.pread(shard.fileno(), member.size, member.offset_data)
    try:
        label = int(text) if is_number else json.loads(text).get("label")
    except (ValueError, AttributeError, RecursionError):
        kind = "number" if is_number else "object"
        raise UsageError(f"{shard.name}: {member.name!r} holds no {kind}") from None
    if label is not None and not isinstance(label, (int, str)):
        raise UsageError(f"{shard.name}: the label in {member.name!r} is neither a number nor text")
    return label
