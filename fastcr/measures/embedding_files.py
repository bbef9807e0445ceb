"""The files of embeddings: memory-mapped arrays that fill up in a folder `partial`, then the final files, each whole.

A killed job resumes after the images that `state.json` counts. Row i of every array is row i of `images.csv`.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole

COMMIT_SECONDS = 5.0  # work that a kill may cost
COLUMNS = ("row", "path", "split", "label", "width", "height")
TABLE = "images.csv"
FINAL = (TABLE, "embeddings.safetensors", "mean.npy", "rationale.npy", "attention.npy")
UNREADABLE = -1  # height and width of an image that cannot be read; 0 before it is tried
ANEW = "remove that folder to begin anew, or name another --out"
Format = Literal["safetensors", "npy"]
Array = np.ndarray[Any, Any]


class Partial:
    """The unfinished arrays of a job, in a folder that a later process can resume from.

    Attributes:
        arrays: `[N,...]` for N images, of which the first `rows` rows are filled: those of the readable images; and
            `sizes`, `[N,2]`: height and width of each image in pixels, or `UNREADABLE`.
        images, rows: how many images are done, and how many of those could be read.
    """

    def __init__(self, folder: Path, key: dict[str, str], row: dict[str, Tensor], starts: Sequence[int]) -> None:
        """Resume the job in `folder`, or begin it.

        `key` says what the job is of, `row` holds one row `[1,...]` of each array, `starts` the number of images before
        each batch, and N. `UsageError` if the folder is broken or of another job, another process writes into it, or
        the disk is too full.
        """
        self.folder, self.key = folder, key
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when this process ends, however it does
        except OSError:
            raise UsageError(f"another process is writing into {folder}") from None
        row = row | {"sizes": torch.zeros(1, 2, dtype=torch.int32)}
        self._like = {
            folder / f"{name}.npy": np.broadcast_to(first.numpy(), (starts[-1], *first.shape[1:]))
            for name, first in row.items()
        }
        self.images = self._resumed(starts)
        if self.images:
            self._map("r")  # first, for "r+" would lengthen files that are too short
        else:
            try:
                for file, like in self._like.items():
                    allocate(file, like)
            except OSError as error:
                self.remove()  # what is allocated already would fill the disk for nothing
                raise UsageError(f"cannot write {file}: {error.strerror}") from None
        self._map("r+")
        heights = self.arrays["sizes"][: self.images, 0]
        if not heights.all():
            raise UsageError(f"{folder / 'state.json'} is broken, it counts images that are not there: {ANEW}")
        self.rows = int((heights != UNREADABLE).sum())

    def _resumed(self, starts: Sequence[int]) -> int:
        """How many images are done. Too small a number costs time only; too large a one shows in their sizes."""
        file = self.folder / "state.json"
        if not file.exists():
            return 0
        try:
            state = json.loads(file.read_text())
            key, images = dict(state["key"]), state["images"]
            if type(images) is not int or images not in starts:
                raise ValueError
        except (ValueError, TypeError, LookupError, RecursionError):
            raise UsageError(f"{file} is broken: {ANEW}") from None
        if other := [name for name in self.key if key.get(name) != self.key[name]]:
            raise UsageError(f"{self.folder} was begun with other {' and other '.join(other)}: {ANEW}")
        return images

    def _map(self, mode: Literal["r", "r+"]) -> None:
        self.arrays = {file.stem: _open(file, mode, like) for file, like in self._like.items()}
        self._committed = time.monotonic()

    def add(self, arrays: dict[str, Tensor], sizes: Tensor) -> None:
        """Fill in the next batch of B images: their `sizes [B,2]`, and the rows of the readable ones, on the CPU."""
        readable = int((sizes[:, 0] != UNREADABLE).sum())
        for name, array in arrays.items():
            self.arrays[name][self.rows : self.rows + readable] = array
        self.arrays["sizes"][self.images : self.images + len(sizes)] = sizes
        self.images, self.rows = self.images + len(sizes), self.rows + readable
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Bring the arrays to the disk, then count their images in `state.json`."""
        for array in self.arrays.values():
            array.flush()
        text = json.dumps({"key": self.key, "images": self.images})
        write_whole(self.folder / "state.json", lambda file: file.write_text(text))
        self._map("r+")  # anew, so that what is written no longer counts as memory of this process

    def remove(self) -> None:
        """Remove the folder."""
        self._lock.close()
        shutil.rmtree(self.folder)

    def finish(
        self, folder: Path, format: Format, facts: dict[str, Any], images: Sequence[tuple[str, str, str]]
    ) -> None:
        """Write the final files, each whole or not at all and none held in memory, the table last; remove the others.

        `images` are path, split and label of each image.
        """
        arrays = {name: array[: self.rows] for name, array in self.arrays.items() if name != "sizes"}
        if format == "safetensors":
            write_whole(folder / "embeddings.safetensors", partial(self._save_tensors, arrays=arrays, facts=facts))
        else:
            for name, array in arrays.items():
                write_whole(folder / f"{name}.npy", partial(allocate, like=array, copy=True))
        write_whole(folder / TABLE, partial(self._save_table, images=images))
        self.remove()

    def _save_tensors(self, file: Path, arrays: dict[str, Array], facts: dict[str, Any]) -> None:
        made = self.folder / "embeddings.safetensors"  # save_file, if it is killed, leaves a scratch file beside it
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        safetensors.torch.save_file(tensors, made, {"fastcr": json.dumps(facts)})
        shutil.copymode(self.folder / "sizes.npy", made)  # save_file makes it readable to its owner only
        os.replace(made, file)

    def _save_table(self, file: Path, images: Sequence[tuple[str, str, str]]) -> None:
        with file.open("w", encoding="utf-8", errors="surrogateescape", newline="") as text:
            table = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
            table.writerow(COLUMNS)
            sized = zip(images, self.arrays["sizes"].tolist(), strict=True)
            read = ((*image, width, height) for image, (height, width) in sized if height != UNREADABLE)
            table.writerows((row, *image) for row, image in enumerate(read))


def allocate(file: Path, like: Array, *, copy: bool = False) -> None:
    """Write a .npy file of the dtype and shape of `like`, of zeros or a `copy` of it, without holding it in memory.

    Its space on the disk is taken first, for a process that writes into a mapped file without space is ended (SIGBUS).
    `OSError` if there is too little.
    """
    array = open_memmap(file, "w+", like.dtype, like.shape)
    with file.open("rb+") as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    if copy:
        array[:] = like


def _open(file: Path, mode: Literal["r", "r+"], like: Array) -> np.memmap[Any, Any]:
    try:
        array: np.memmap[Any, Any] = open_memmap(file, mode)
        if (array.dtype, array.shape) != (like.dtype, like.shape):
            raise ValueError
    except (OSError, ValueError, OverflowError):
        raise UsageError(f"{file} is broken: {ANEW}") from None
    return array


def check_unused(folder: Path) -> None:
    """`UsageError` if the folder holds embeddings already."""
    unfinished = folder / "partial"
    found = [name for name in FINAL if (folder / name).exists()]
    if found[:1] == [TABLE]:  # the last file to be written: nothing is left to do
        shutil.rmtree(unfinished, ignore_errors=True)
    if found and not unfinished.exists():
        raise UsageError(f"{folder / found[0]} is there already: remove it, or name another --out")
