"""The files of embeddings: memory-mapped arrays that fill up in a folder `partial`, then the final files, each whole.

A killed job resumes after the images that `state.json` counts. Row i of every array is row i of `images.csv`;
`encoder.json` says which encoder they are of, and how its features were pooled.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from fastcr.data.crops import in_image
from fastcr.errors import UsageError
from fastcr.output.embedding_formats import (
    ENCODER,
    FINAL,
    TABLE,
    Array,
    Format,
    Row,
    allocate,
    save_embeddings,
    save_less_mean,
    save_table,
)
from fastcr.runs.checkpoint import write_whole

COMMIT_SECONDS = 5.0  # work that a kill may cost
HELD = ("sizes", "peak")  # arrays that end in the table
UNREADABLE = -1  # height and width of an image that cannot be read; 0 before it is tried
ANEW = "remove that folder to begin anew, or name another --out"


class Partial:
    """The unfinished arrays of a job, in a folder that a later process can resume from.

    Attributes:
        arrays: `[N,...]` for N images, of which the first `rows` rows are filled: those of the readable images; and
            `sizes`, `[N,2]`: height and width of each image in pixels, or `UNREADABLE`. `peak`, `[N,2]`: x and y of the
            attention's, in fractions of the square that the encoder sees, or NaN.
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
            self._check_files()  # before they are opened for writing, which would lengthen files that are too short
        else:
            try:
                for file, like in self._like.items():
                    allocate(file, like)
            except OSError as error:
                self.remove()  # what is allocated already would fill the disk for nothing
                raise UsageError(f"cannot write {file}: {error.strerror}") from None
        self._map()
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

    def _check_files(self) -> None:
        try:
            for file, like in self._like.items():
                array = open_memmap(file, "r")
                if (array.dtype, array.shape) != (like.dtype, like.shape):
                    raise ValueError
        except (OSError, ValueError, OverflowError):
            raise UsageError(f"{file} is broken: {ANEW}") from None

    def _map(self) -> None:
        self.arrays: dict[str, Array] = {file.stem: open_memmap(file, "r+") for file in self._like}
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
            array.flush()  # type: ignore[attr-defined]
        text = json.dumps({"key": self.key, "images": self.images})
        write_whole(self.folder / "state.json", lambda file: file.write_text(text))
        self._map()  # anew, so that what is written no longer counts as memory of this process

    def remove(self) -> None:
        """Remove the folder."""
        self._lock.close()
        shutil.rmtree(self.folder)

    def finish(
        self,
        folder: Path,
        format: Format,
        facts: dict[str, Any],
        images: Sequence[tuple[str, str, str]],
        *,
        centre: bool = False,
    ) -> None:
        """Write the final files, each whole or not at all, the table last; remove the others.

        None is held in memory, but for an index of FAISS. `images` are path, split and label of each image, `facts`
        those of the encoder; its "pooling" names the array of the embeddings. With `centre` these are less their mean,
        which becomes the fact "subtracted".
        """
        arrays = {name: array[: self.rows] for name, array in self.arrays.items() if name not in HELD}
        if centre:
            name = facts["pooling"]
            arrays[name], mean = save_less_mean(self.folder / "centred.npy", arrays[name])
            facts = facts | {"subtracted": mean.tolist()}
        rows = self._table(images, facts["image_size"])
        save_embeddings(folder, format, arrays, rows, facts, scratch=self.folder)
        write_whole(folder / ENCODER, lambda file: file.write_text(json.dumps(facts, indent=2) + "\n"))
        write_whole(folder / TABLE, lambda file: save_table(file, rows))
        self.remove()

    def _table(self, images: Sequence[tuple[str, str, str]], image_size: int) -> list[Row]:
        """The readable images."""
        sizes = torch.from_numpy(np.array(self.arrays["sizes"]))
        readable = sizes[:, 0] != UNREADABLE
        peaks = torch.from_numpy(np.array(self.arrays["peak"][: self.rows])).double()
        found = in_image(peaks[:, None], sizes[readable], image_size)[:, 0].tolist()
        read = [image for image, there in zip(images, readable.tolist(), strict=True) if there]
        rows = []
        for image, (height, width), peak in zip(read, sizes[readable].tolist(), found, strict=True):
            x, y = (None if math.isnan(each) else round(each, 4) for each in peak)
            rows.append(Row(*image, width, height, x, y))
        return rows


def check_unused(folder: Path) -> None:
    """`UsageError` if the folder holds embeddings already."""
    unfinished = folder / "partial"
    found = [name for name in FINAL if (folder / name).exists()]
    if found[:1] == [TABLE]:  # the last file to be written: nothing is left to do
        shutil.rmtree(unfinished, ignore_errors=True)
    if found and not unfinished.exists():
        raise UsageError(f"{folder / found[0]} is there already: remove it, or name another --out")
