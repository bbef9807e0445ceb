"""Tar shards in WebDataset's layout: `*train*.tar` and `*test*.tar` or `*val*.tar`, or any `*.tar` without a split.

Members that follow each other and share a key (the name up to the first dot of its last part) are a sample: its first
image, and a label from `.cls` (a number) or from `"label"` in `.json`, if it has one. Keys that hold dots themselves
(`v1.0001.jpg`) end at the last one.

An index beside each shard (`train-0.tar`: `train-0.idx`) spares listing the shard at every start. It is what DALI's
`wds2idx` writes: a line `v1.2 <samples>`, then of each sample one line, `extension offset size name` of every member.
DALI's own reader is not used: it goes through a shard in order, shuffles within a buffer, and cannot start at a given
step. Every loader here asks for image `i` instead, so a shard is read at random, with one `pread` an image: shuffling,
the share of a rank and an exact resume are those of single files.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastcr.data.images import SUFFIXES, ImageList, Splits
from fastcr.data.listing import BESIDE, Entries, Notes, ending_of, entries_of
from fastcr.errors import UsageError, one_line
from fastcr.runs.checkpoint import write_whole
from fastcr.runs.command_line import called
from fastcr.runs.context import progress

VERSION = b"v1.2"
SPLIT = re.compile(r"(?<![a-z])(train|test|val)(?:ing|val|id|idation)?(?![a-z])")  # in a shard's name, or its folder's
BARE = "left out: samples in shards that hold no image"
Label = int | str


class Member(NamedTuple):
    """A file in a shard."""

    extension: str  # all that follows the first dot of its name
    offset: int  # bytes from the start of the shard to its content
    size: int  # bytes
    name: str


Sample = list[Member]


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


def find_shards(root: Path, inside: Entries, notes: Notes) -> tuple[list[Path], list[Path]]:
    """Training and test shards of `root`, which holds `inside`.

    None where there are images or folders too, and no name begins with a split.
    The split is a word of the name, or of the folder: `birds-train-0.tar`, `train/0.tar`. Without `test`, it is `val`.
    """
    folders = [name for name in inside.folders if SPLIT.search(name.lower())]
    beside = {*inside.folders, *inside.images} - {*folders}
    found: dict[str, list[Path]] = {}
    for folder in ("", *sorted(folders)):
        others = entries_of(root, folder, notes).others if folder else inside.others
        for name in sorted(others):
            # archives may lie beside what they were unpacked to
            if ending_of(name) == ".tar" and (folder or not beside or name.startswith(("train-", "test-"))):
                word = SPLIT.search(os.path.join(folder, name).lower())
                found.setdefault(word.group(1)[:2] if word else "", []).append(root / folder / name)
    train, held_out = found.pop("tr", []), next((split for split in ("te", "va") if split in found), "")
    if held_out and not train:
        raise UsageError(f"{root} has shards like {found[held_out][0].name} but none named train")
    if not train:
        return found.get("", []), []
    test = found.pop(held_out) if held_out else []
    for other in (*(os.path.relpath(shard, root) for shard in chain(*found.values())), *sorted(beside)):
        notes.add(BESIDE, other)
    return train, test


def read_shards(root: Path, inside: Entries, notes: Notes) -> Splits | None:
    """The images in the tar shards of `root`; None where there are none.

    Raises `UsageError` if a shard is broken or holds no image, or if only some images of a split have a label.
    """
    splits = find_shards(root, inside, notes)
    if not splits[0]:
        return None
    listed, bare = {}, 0
    for shard in progress([*splits[0], *splits[1]], "listing shards"):
        samples = read_index(shard)
        bare += samples is None
        listed[shard] = list_samples(shard) if samples is None else samples
    if bare:
        how = f"to keep them beside the shards: {called('folders')} {root} --index"
        print(f"fastcr: {bare} shards have no index, or an old one: made anew; {how}", file=sys.stderr)
    parts = [_images(root, {shard: listed[shard] for shard in split}, notes) for split in splits if split]
    known = {label for _, labels in parts for label in labels if label is not None}
    classes = sorted(known, key=lambda label: (isinstance(label, str), label))  # numbers by their value, then names
    train, *test = (_labelled(images, labels, classes) for images, labels in parts)
    return Splits(train, test[0] if test else None)


def _images(root: Path, listed: dict[Path, list[Sample]], notes: Notes) -> tuple[TarImages, list[Label | None]]:
    """The images of one split, still without labels, and their labels."""
    files, extents, labels = [], [], []
    shards = {os.path.relpath(shard, root): samples for shard, samples in listed.items()}
    for number, (shard, samples) in enumerate(shards.items()):
        with open(root / shard, "rb", buffering=0) as file:
            for sample, image in chain.from_iterable(map(partial(_pictures, shard), samples)):
                if image is None:
                    notes.add(BARE, f"{shard}/{sample[0].name}")
                    continue
                files.append(f"{shard}/{image.name}")
                extents.append((number, image.offset, image.size))
                labels.append(_label(file.fileno(), root / shard, sample))
    if not files:
        raise UsageError(f"no images in the shards of {root} (looked for {' '.join(sorted(SUFFIXES))})")
    return TarImages(root, tuple(files), None, (), tuple(shards), np.array(extents, dtype=np.int64)), labels


def _pictures(shard: str, sample: Sample) -> list[tuple[Sample, Member | None]]:
    """The sample and its image, if it has one; several samples if it is one only because their keys hold dots.

    Raises `UsageError` for names of which it is not clear what they share.
    """
    if image := next((member for member in sample if f".{member.extension.lower()}" in SUFFIXES), None):
        return [(sample, image)]
    sample = [member._replace(extension=ending_of(member.name)[1:]) for member in sample]
    images = [member for member in sample if f".{member.extension}" in SUFFIXES]
    if len(images) < 2:
        return [(sample, images[0] if images else None)]
    parts = [list(part) for _, part in groupby(sample, lambda member: os.path.splitext(member.name)[0])]
    found = [[member for member in part if member in images] for part in parts]
    if any(len(each) != 1 for each in found):
        raise UsageError(
            f"{shard}: {images[0].name!r} and {images[1].name!r} are one sample, whose key ends at the first dot: "
            "write a dash for the dots within a key"
        )
    return [(part, image) for part, (image,) in zip(parts, found, strict=True)]


def _labelled(images: TarImages, labels: list[Label | None], classes: list[Label]) -> TarImages:
    """The images with their labels as numbers, if they have any."""
    if all(label is None for label in labels):
        return images
    if None in labels:
        raise UsageError(f"some images have a label and some, e.g. {images.path(labels.index(None))!r}, have none")
    number = {label: i for i, label in enumerate(classes)}
    numbers = tuple(number[label] for label in labels if label is not None)
    return replace(images, labels=numbers, classes=tuple(map(str, classes)))


def _label(descriptor: int, shard: Path, sample: Sample) -> Label | None:
    member = min((member for member in sample if member.extension in ("cls", "json")), default=None)
    if member is None:
        return None
    text, is_number = os.pread(descriptor, member.size, member.offset), member.extension == "cls"
    try:
        label = int(text) if is_number else json.loads(text).get("label")
    except (ValueError, AttributeError, RecursionError):
        raise UsageError(f"{shard}: {member.name!r} holds no {'number' if is_number else 'object'}") from None
    if label is not None and not isinstance(label, (int, str)):
        raise UsageError(f"{shard}: the label in {member.name!r} is neither a number nor text")
    return label


def list_samples(shard: Path) -> list[Sample]:
    """The samples of `shard`, from its own headers. `UsageError` if it is no whole, uncompressed tar."""
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
    return [list(sample) for _, sample in groupby(members, lambda member: member.name[: -len(member.extension) - 1])]


def index_of(shard: Path) -> Path:
    """The index that belongs to `shard`."""
    return shard.with_suffix(".idx")


def read_index(shard: Path) -> list[Sample] | None:
    """The samples of `shard`, from its index; None if there is none, or if it is not that of the shard as it is."""
    try:
        if index_of(shard).stat().st_mtime < shard.stat().st_mtime:
            return None
        (version, count), *lines = (line.split() for line in index_of(shard).read_bytes().splitlines())
        if version != VERSION or int(count) != len(lines):
            return None
        samples = [
            [Member(_plain(extension), int(offset), int(size), _plain(name))
             for extension, offset, size, name in zip(*(line[i::4] for i in range(4)), strict=True)]
            for line in lines
        ]  # fmt: skip
        members, length = [member for sample in samples for member in sample], shard.stat().st_size
        if any(not 0 <= member.offset <= member.offset + member.size <= length for member in members):
            return None
        last = max(members, key=lambda member: member.offset)
        with open(shard, "rb") as file:
            header = os.pread(file.fileno(), tarfile.BLOCKSIZE, last.offset - tarfile.BLOCKSIZE)
        return samples if tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size == last.size else None
    except (OSError, ValueError, tarfile.TarError):
        return None


def write_index(shard: Path, samples: Sequence[Sample]) -> None:
    """Keep `samples` beside `shard`, in the format of DALI's `wds2idx`."""
    lines = [
        b" ".join(b"%b %d %d %b" % (_word(m.extension), m.offset, m.size, _word(m.name)) for m in sample)
        for sample in samples
    ]
    text = b"\n".join([VERSION + b" %d" % len(samples), *lines, b""])
    write_whole(index_of(shard), lambda file: file.write_bytes(text))


def _word(text: str) -> bytes:
    """`text` without white space, which separates the fields of an index: as octal, the way tar lists odd names."""
    return re.sub(rb"[\s\\]", lambda found: b"\\%03o" % found[0][0], text.encode("utf-8", "surrogateescape"))


def _plain(word: bytes) -> str:
    plain = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), word)
    return plain.decode("utf-8", "surrogateescape")
