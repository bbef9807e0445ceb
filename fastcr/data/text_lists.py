"""Text files that people and programs write: lists of images, and the lines of any table."""

from __future__ import annotations

import codecs
import os
from itertools import pairwise
from pathlib import Path

from fastcr.data.images import ImageList
from fastcr.errors import UsageError

SEPARATORS = ("\t", ",", ";", None)  # between a path and its label, the likeliest first; None: blanks
TRIED = 50  # lines that decide on the separator


def read_text(file: Path) -> str:
    """The text of `file`, with or without a byte order mark; what is no UTF-8 is kept as `surrogateescape` does.

    Raises `OSError` if it cannot be read.
    """
    data = file.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").removeprefix("\ufeff")
    return data.decode("utf-8-sig", "surrogateescape")


def read_list(file: Path) -> ImageList:
    """The images a text file names: on each line a path (from the file's own folder), then perhaps a tab and a label.

    Blank lines, lines that begin with `#` and a first line of columns' names are skipped. Commas, semicolons or blanks
    in place of tabs, quotes, Windows' separators in paths and its Western encoding are understood where the files are
    there by what remains.
    """
    try:
        text = read_text(file)
        lines = text.split("\n" if "\n" in text else "\r")  # spreadsheets' "CSV (Macintosh)"
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    if any("\0" in line for line in lines):
        raise UsageError(f"{file} is neither a folder of images or tar shards nor a text file that lists images")
    lines = [line.rstrip("\r") for line in lines if line.strip() and line[0] != "#"]
    if not lines:
        raise UsageError(f"{file} names no images")
    folder = str(file.parent)
    separator = max(SEPARATORS, key=lambda each: sum(_row(folder, line, each)[2] for line in lines[:TRIED]))
    if len(lines) > 1 and _names_columns(_row(folder, lines[0], separator)) and _row(folder, lines[1], separator)[2]:
        del lines[0]
    paths, labels, there = zip(*sorted(_row(folder, line, separator) for line in lines), strict=True)
    if missing := [path for path, found in zip(paths, there, strict=True) if not found]:
        raise UsageError(
            f"{len(missing)} of the {len(paths)} images that {file} names are not there, e.g. {missing[0]!r} "
            "(each line: a path, then perhaps a tab and a label)"
        )
    if twice := [path for path, after in pairwise(paths) if path == after]:
        raise UsageError(f"{file} names {twice[0]!r} twice")
    return ImageList(file.parent, paths, None, ()).with_labels([label or None for label in labels], sorted({*labels}))


def _row(folder: str, line: str, separator: str | None) -> tuple[str, str, bool]:
    """Path and label of a line, and whether there is a file of that path.

    The label is what follows the last separator, but all that follows the first tab.
    """
    for text in dict.fromkeys((line, western(line))):
        before, *after = text.split("\t", 1) if separator == "\t" else text.rstrip().rsplit(separator, 1)
        bare, label = unquoted(before), unquoted("".join(after))
        for path in (before, bare, bare.replace("\\", "/")):
            if os.path.isfile(os.path.join(folder, path)):
                return path, label, True
    return bare, label, False


def _names_columns(row: tuple[str, str, bool]) -> bool:
    """Whether a row reads like `path,label`: words where others have a path."""
    path, _, there = row
    return not there and not set(path) & {*"./\\"}


def western(text: str) -> str:
    """`text` as Windows' Western encoding has it, if it is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
    return text


def unquoted(text: str) -> str:
    """`text` without blanks and quotes around it."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
