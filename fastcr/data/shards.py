"""Tar shards in WebDataset's layout: `*train*.tar` and `*test*.tar` or `*val*.tar`, or any `*.tar` without a split.

Members that follow each other and share a key (the name up to the first dot of its last part) are a sample: its first
image, and a label from `.cls` (a number) or from `"label"` in `.json`, if it has one. Keys that hold dots themselves
(`v1.0001.jpg`) end at the last one.

The headers of every shard are read once, at the start. From then on any image is read by one `pread` at its offset, so
shuffling, the share of each process and an exact resume work as they do with single files.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastcr.data.images import SUFFIXES, ImageList, Splits
from fastcr.data.listing import BESIDE, Entries, Notes, ending_of, entries_of, split_in
from fastcr.errors import UsageError, one_line
from fastcr.runs.context import progress

BARE = "left out: samples in shards that hold no image"
Label = int | str


class Member(NamedTuple):
    """A file in a shard."""

    extension: str  # all that follows the first dot of its name
    offset: int  # bytes from the start of the shard to its content
    size: int  # bytes
    name: str


class Sample(NamedTuple):
    """Members of a shard that share a key."""

    name: str  # of its first member
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
    """The images in the tar shards of `root`, which holds `inside`; None where there are no shards.

    Raises `UsageError` if a shard is broken or holds no image, or if only some images of a split have a label.
    """
    splits = [split for split in find_shards(root, inside, notes) if split]
    if not splits:
        return None
    listed = {shard: list_samples(root / shard) for shard in progress([*chain(*splits)], "listing shards")}
    labels = {sample.label for sample in chain(*listed.values()) if sample.image}
    classes = sorted(labels - {None}, key=lambda label: (isinstance(label, str), label))  # numbers by their value
    train, *test = (_images(root, split, listed, classes, notes) for split in splits)
    return Splits(train, test[0] if test else None)


def find_shards(root: Path, inside: Entries, notes: Notes) -> tuple[list[str], list[str]]:
    """Training and test shards of `root`, as paths below it; none if there are images or folders too.

    Shards whose names begin with `train-` or `test-` count beside images and folders as well. The split is a word of
    the name, or of the folder: `birds-train-0.tar`, `train/0.tar`. Without `test`, it is `val`.
    """
    folders = [name for name in inside.folders if split_in(name)]
    beside = {*inside.folders, *inside.images} - {*folders}
    found: dict[str, list[str]] = {}
    for folder in ("", *sorted(folders)):
        others = entries_of(root, folder, notes).others if folder else inside.others
        for name in sorted(others):
            # archives may lie beside what they were unpacked to
            if ending_of(name) == ".tar" and (folder or not beside or name.startswith(("train-", "test-"))):
                shard = os.path.join(folder, name)
                found.setdefault(split_in(shard), []).append(shard)
    train, held_out = found.pop("train", []), "test" if "test" in found else "val"
    test = found.pop(held_out, [])
    if test and not train:
        raise UsageError(f"{root} has shards like {os.path.basename(test[0])} but none named train")
    if not train:
        return found.get("", []), []
    for other in (*chain(*found.values()), *sorted(beside)):
        notes.add(BESIDE, other)
    return train, test


def _images(
    root: Path, shards: list[str], listed: dict[str, list[Sample]], classes: list[Label], notes: Notes
) -> TarImages:
    """The images of one split, with their labels as positions in `classes` if they have any."""
    files, extents, labels = [], [], []
    for number, shard in enumerate(shards):
        for name, image, label in listed[shard]:
            if image is None:
                notes.add(BARE, f"{shard}/{name}")
                continue
            files.append(f"{shard}/{image.name}")
            extents.append((number, image.offset, image.size))
            labels.append(label)
    if not files:
        raise UsageError(f"no images in the shards of {root} (looked for {' '.join(sorted(SUFFIXES))})")
    images = TarImages(root, tuple(files), None, (), tuple(shards), np.array(extents, dtype=np.int64))
    return images.with_labels(labels, classes)


def list_samples(shard: Path) -> list[Sample]:
    """The samples of a shard, from its headers. `UsageError` if it is no whole, uncompressed tar."""
    members = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for entry in tar:
                key, dot, extension = entry.name.rpartition("/")[2].partition(".")
                # no links, nor files with holes, whose size says nothing; what has no extension or is hidden is no part
                if entry.isreg() and not entry.issparse() and key and dot:
                    members.append(Member(extension, entry.offset_data, entry.size, entry.name))
    except Exception as error:  # tarfile raises whatever the broken bytes lead it to
        raise UsageError(f"{shard} is not a whole, uncompressed tar: {one_line(error)}") from None
    samples = groupby(members, lambda member: member.name[: -len(member.extension) - 1])
    parts = chain.from_iterable(_parts(shard, list(members)) for _, members in samples)
    with open(shard, "rb", buffering=0) as file:
        return [Sample(part[0].name, image, _label(file, part) if image else None) for part, image in parts]


def _parts(shard: Path, sample: list[Member]) -> Iterator[tuple[list[Member], Member | None]]:
    """The sample and its image, if it has one; several samples if it is one only because their keys hold dots.

    Raises `UsageError` for names of which it is not clear what they share.
    """

    def images_of(members: list[Member]) -> list[Member]:
        return [member for member in members if f".{member.extension.lower()}" in SUFFIXES]

    if images := images_of(sample):
        yield sample, images[0]
        return
    sample = [member._replace(extension=ending_of(member.name)[1:]) for member in sample]
    images = images_of(sample)
    if len(images) < 2:
        yield sample, images[0] if images else None
        return
    for _, members in groupby(sample, lambda member: os.path.splitext(member.name)[0]):
        part = list(members)
        if len(images_of(part)) != 1:
            raise UsageError(
                f"{shard}: {images[0].name!r} and {images[1].name!r} are one sample, whose key ends at the first dot: "
                "write a dash for the dots within a key"
            )
        yield part, images_of(part)[0]


def _label(shard: BinaryIO, sample: list[Member]) -> Label | None:
    """The label of a sample, from its `.cls` or else its `.json`; None where it has none."""
    member = min((member for member in sample if member.extension in ("cls", "json")), default=None)
    if member is None:
        return None
    text, is_number = os.pread(shard.fileno(), member.size, member.offset), member.extension == "cls"
    try:
        label = int(text) if is_number else json.loads(text).get("label")
    except (ValueError, AttributeError, RecursionError):
        raise UsageError(f"{shard.name}: {member.name!r} holds no {'number' if is_number else 'object'}") from None
    if label is not None and not isinstance(label, (int, str)):
        raise UsageError(f"{shard.name}: the label in {member.name!r} is neither a number nor text")
    return label
