"""What lies below a folder: its images, and what is left out or not what one may take it for."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastcr.data.images import SUFFIXES, Note

# what systems and programs leave in people's folders, besides hidden files and folders
SYSTEM = frozenset({
    "__macosx", "network trash folder", "temporary items", "icon\r",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "found.000", "lost+found",
    "@eadir", "@tmp", "@recycle", "#recycle", "@recently-snapshot", "#snapshot", "~snapshot", "__pycache__",
})  # fmt: skip
BACKUP = re.compile(r"(~|_original|\.(bak|old|orig))$", re.IGNORECASE)  # added to the name of what a program changes
SNIFFED = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "AVIF")  # not TIFF: what a camera's raw files hold is a thumbnail
SPLIT = re.compile(r"(?<![a-z])(train|test|val)(?:ing|val|id|idation)?(?![a-z])")  # in the name of a folder or a shard
FEW = 8  # files of an ending that are looked into: if none is an image, its others are none

HIDDEN = "left out: hidden files and folders, and what systems leave behind"
UNREADABLE = "left out: folders that cannot be read"
BACKUPS = "left out: what programs keep of images that they changed, beside them"
RUNS = "left out: run folders of fastcr"
EMPTY = "left out: folders without an image"
LOOPS = "left out: links to a folder that they lie in"
BESIDE = "left out: what lies beside the folders or shards of the splits"
OTHERS = "left out: files of no image format that can be read"
CONTENT = "read as images: files of other endings that hold one"
DEEPER = "counted for their class folder: images in folders within it"
SHARED = "test images that also train"


@dataclass
class Notes:
    """Paths by what is to be said of them; `within` a folder they are still told from the root."""

    found: dict[str, dict[str, None]] = field(default_factory=dict)  # what is looked at twice counts once
    folder: str = ""

    def within(self, folder: str) -> Notes:
        """The same notes for paths that begin in `folder`."""
        return Notes(self.found, os.path.join(self.folder, folder))

    def add(self, what: str, path: str) -> None:
        """Take note of a path."""
        self.found.setdefault(what, {})[os.path.join(self.folder, path)] = None

    def __iter__(self) -> Iterator[Note]:
        """One note for each thing that was found."""
        for what, paths in self.found.items():
            example = "" if what == HIDDEN else repr(next(iter(paths)))
            if what == OTHERS:
                endings = Counter(ending_of(path) or "none" for path in paths).most_common(5)
                example += f" (by ending: {', '.join(f'{ending} {count}' for ending, count in endings)})"
            yield Note(what, len(paths), example)


class Entries(NamedTuple):
    """What lies in a folder: names of folders, of files that are images by their ending, and of other files."""

    folders: list[str]
    links: set[str]  # those folders that are links
    images: list[str]
    others: list[str]


def of_the_system(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or one that systems leave in people's folders."""
    return name[0] == "." or name.casefold() in SYSTEM


def ending_of(name: str) -> str:
    """The ending of a file's name, in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def split_in(name: str, *, whole: bool = False) -> str:
    """The split that is a word of a file's or folder's name, or the `whole` name: train, test or val; else nothing."""
    found = SPLIT.search(name.lower())
    return found[1] if found and (not whole or found[0] == name.lower()) else ""


def is_image(path: str) -> bool:
    """Whether the file begins like an image, whatever its name."""
    try:
        with Image.open(path, formats=SNIFFED):
            return True
    except Exception:  # PIL raises whatever the bytes lead it to
        return False


def entries_of(root: Path, below: str, notes: Notes, through: tuple[str, ...] = ()) -> Entries:
    """What lies in the folder `below` of `root`, but for what is noted as left out.

    `through`: the real paths of the folders whose links led here; a link back to where it lies would never end.
    """
    found = Entries([], set(), [], [])
    try:
        with os.scandir(root / below) as entries:
            for entry in entries:
                name = entry.name
                if of_the_system(name):
                    notes.add(HIDDEN, os.path.join(below, name))
                elif entry.is_dir():
                    if not entry.is_symlink():
                        found.folders.append(name)
                    elif _leads_back(entry.path, (*through, os.path.realpath(root / below))):
                        notes.add(LOOPS, os.path.join(below, name))
                    else:
                        found.folders.append(name)
                        found.links.add(name)
                # a link that leads nowhere is listed too, to be named as unreadable; pipes are left out
                elif entry.is_file() or not os.path.exists(entry.path):
                    (found.images if ending_of(name) in SUFFIXES else found.others).append(name)
    except OSError as error:
        notes.add(UNREADABLE, f"{below or '.'} ({error.strerror})")
    if {"config.yaml", "metrics.jsonl"} <= {*found.others}:
        notes.add(RUNS, below)
        return Entries([], set(), [], [])
    images = {*found.images} if found.others else ()
    backups = {name for name in found.others if BACKUP.sub("", name) in images}
    for name in backups:
        notes.add(BACKUPS, os.path.join(below, name))
    return found._replace(others=[name for name in found.others if name not in backups]) if backups else found


def _leads_back(link: str, folders: tuple[str, ...]) -> bool:
    target = os.path.join(os.path.realpath(link), "")
    return any(os.path.join(folder, "").startswith(target) for folder in folders)


def images_below(root: Path, top: str, notes: Notes) -> list[str]:
    """The images in the folder `top` of `root` and in all folders below it, as paths from `root`, sorted."""
    found, others = list[str](), list[str]()

    def walk(below: str, through: tuple[str, ...]) -> None:
        entries = entries_of(root, below, notes, through)
        images = [f"{below}/{name}" for name in entries.images]
        found.extend(images)
        others.extend(f"{below}/{name}" for name in entries.others)
        if below != top:
            for path in images:
                notes.add(DEEPER, path)
        for name in entries.folders:
            linked = (os.path.realpath(root / below),) if name in entries.links else ()
            walk(f"{below}/{name}", through + linked)

    walk(top, (os.path.realpath(root),))
    return sorted(found + images_among(root, others, notes))


def images_among(root: Path, others: list[str], notes: Notes) -> list[str]:
    """Those of the files of other endings that hold an image, such as the nameless ones of download caches."""
    by_ending, found = dict[str, list[str]](), list[str]()
    for path in others:
        by_ending.setdefault(ending_of(path), []).append(path)
    for paths in by_ending.values():
        looked = paths if any(is_image(os.path.join(root, path)) for path in paths[:FEW]) else []
        images = {path for path in looked if is_image(os.path.join(root, path))}
        found += images
        for path in paths:
            notes.add(CONTENT if path in images else OTHERS, path)
    return found
