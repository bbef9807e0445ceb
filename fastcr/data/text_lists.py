"""Text files that people and programs write: lists of images, and the lines of any table."""

from __future__ import annotations

import os
from pathlib import Path

from fastcr.data.images import ImageList
from fastcr.errors import UsageError


def read_text(file: Path) -> str:
    """The text of `file`, with or without a byte order mark; what is no UTF-8 is kept as `surrogateescape` does.

    Raises `OSError` if it cannot be read.
    """
    return file.read_bytes().decode("utf-8-sig", "surrogateescape")


def read_list(file: Path) -> ImageList:
    """The images a text file names: on each line a path (from the file's own folder), then perhaps a tab and a label.

    Blank lines and lines that begin with `#` are skipped. Raises `UsageError` if the file is no text, or names no
    images, or some that are not there.
    """
    try:
        text = read_text(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise UsageError(f"{file} is neither a folder of images or tar shards nor a text file that lists images")
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip() and line[0] != "#"]
    if not lines:
        raise UsageError(f"{file} names no images")
    rows = sorted((path, label.strip()) for path, _, label in (line.partition("\t") for line in lines))
    paths, labels = zip(*rows, strict=True)
    if missing := [path for path in paths if not os.path.isfile(os.path.join(file.parent, path))]:
        raise UsageError(
            f"{len(missing)} of the {len(paths)} images that {file} names are not there, e.g. {missing[0]!r} "
            "(each line: a path, then perhaps a tab and a label)"
        )
    return ImageList(file.parent, paths, None, ()).with_labels([label or None for label in labels], sorted({*labels}))
