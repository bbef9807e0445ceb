"""What lies below a folder: its images, and what is left out or not what one may take it for."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from fastcr.data.images import SUFFIXES

# what systems and programs leave in people's folders, besides hidden files and folders
SYSTEM = frozenset({
    "__macosx", "network trash folder", "temporary items", "icon\r",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "found.000", "lost+found",
    "@eadir", "@tmp", "@recycle", "#recycle", "@recently-snapshot", "#snapshot", "~snapshot", "__pycache__",
})  # fmt: skip
MASKS = frozenset({"annotations", "ground_truth", "groundtruth", "segmentation", "segmentations", "trimaps"})
MASKS_BESIDE = frozenset({"gt", "labels", "mask", "masks"})  # beside one of `IMAGES` or a split
IMAGES = frozenset({"image", "images", "img", "imgs", "jpegimages"})
MASK = re.compile(r"(.+)[_-](?:mask|masks|gt|seg|segmentation|ground_?truth)(?:_?\d+)?", re.DOTALL)  # of NAME.jpg
TABLES = frozenset({".txt", ".csv", ".tsv", ".json", ".mat"})
SPLIT = re.compile(r"(?<![a-z])(train|test|val)(?:ing|val|id|idation)?(?![a-z])")  # in the name of a folder or a shard

HIDDEN = "left out: hidden files and folders, and what systems leave behind"
UNREADABLE = "left out: folders that cannot be read"
EMPTY = "left out: folders without an image"
BESIDE = "left out: what lies beside the folders or shards of the splits"
MASKED = "left out: masks and annotations of other images"
TWICE = "counted once: images that are listed twice"
SPELT = "counted as one class: folders whose names differ in how an accent is written"
ALIKE = "counted as different classes: names that differ in case, spaces or dashes alone"
LISTS = "not read: lists that may say which images are for training and which for testing"
OTHERS = "left out: files whose ending is not that of an image"
DEEPER = "counted for their class folder: images in folders within it"


class Notes(defaultdict[str, list[str | Path]]):
    """Paths by what is to be said of them; what is looked at twice counts once."""

    def __init__(self) -> None:
        super().__init__(list)

    def lines(self, root: Path) -> tuple[str, ...]:
        """A line for each thing that was found, with an example below `root`."""
        lines = []
        for what, found in self.items():
            if paths := [*dict.fromkeys(os.fspath(path) for path in found)]:
                line = f"{what}: {len(paths):,}"
                if what != HIDDEN:
                    line += f", e.g. {os.path.relpath(paths[0], root)!r}"
                if what == OTHERS:
                    endings = Counter(ending_of(path) or "none" for path in paths).most_common(5)
                    line += f" (by ending: {', '.join(f'{ending} {count}' for ending, count in endings)})"
                lines.append(line)
        return tuple(lines)


class Entries(NamedTuple):
    """Names of what lies in a folder, sorted."""

    folders: list[str]
    images: list[str]  # files with the ending of an image
    others: list[str]  # other files


def ending_of(name: str) -> str:
    """The ending of a file's name, in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def split_of(name: str, *, among_words: bool = False) -> str:
    """The split that a folder of this name holds, or a shard with it `among_words`: train, test or val; or nothing."""
    found = (SPLIT.search if among_words else SPLIT.fullmatch)(name.lower())
    return found[1] if found else ""


def entries_of(folder: str | Path, notes: Notes) -> Entries:
    """What lies in `folder`; what is hidden or left by systems is left out, and noted."""
    found = Entries([], [], [])
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name[0] == "." or entry.name.casefold() in SYSTEM:
                    notes[HIDDEN].append(entry.path)
                elif entry.is_dir():
                    found.folders.append(entry.name)
                # a link that leads nowhere is listed too, to be named as unreadable; pipes are left out
                elif entry.is_file() or not os.path.exists(entry.path):
                    (found.images if ending_of(entry.name) in SUFFIXES else found.others).append(entry.name)
    except OSError as error:
        notes[UNREADABLE].append(f"{folder} ({error.strerror})")
    names = {name.casefold() for name in found.folders}
    masks = MASKS | (MASKS_BESIDE if names & IMAGES or any(map(split_of, names)) else frozenset())
    stems = {os.path.splitext(name)[0] for name in found.images}
    of_others = [name for name in found.folders if name.casefold() in masks]
    of_others += [name for name in found.images if (of := MASK.fullmatch(os.path.splitext(name)[0])) and of[1] in stems]
    notes[MASKED] += [os.path.join(folder, name) for name in of_others]
    left = {*of_others}
    lists = [name for name in found.others if ending_of(name) in TABLES and split_of(name, among_words=True)]
    notes[LISTS] += [os.path.join(folder, name) for name in lists]
    return Entries(*([name for name in part if name not in left] for part in found))


def holds_images(folder: Path) -> bool:
    """Whether there is an image or a shard in `folder` or below."""
    return any(ending_of(name) in {*SUFFIXES, ".tar"} for *_, names in os.walk(folder) for name in names)


def images_below(root: Path, top: str, notes: Notes) -> list[str]:
    """The images in the folder `top` of `root` and in all folders below it, as paths from `root`, sorted.

    Links to folders are followed, but for those to a folder that they lie in, which would never end.
    """
    found: list[str] = []

    def walk(below: str, above: frozenset[str]) -> None:
        folder = os.path.join(root, below)
        real = os.path.realpath(folder)
        if real in above:
            return
        entries = entries_of(folder, notes)
        notes[OTHERS] += [os.path.join(folder, name) for name in entries.others]
        found.extend(f"{below}/{name}" for name in entries.images)
        if below != top:
            notes[DEEPER] += [os.path.join(folder, name) for name in entries.images]
        for name in entries.folders:
            walk(f"{below}/{name}", above | {real})

    walk(top, frozenset({os.path.realpath(root)}))
    return sorted(found)
