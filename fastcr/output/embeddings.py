"""The files of `fastcr embed`: plain rows while it works, then the finished files; and what `fastcr search` reads.

Row i of every array is row i of `images.csv`; `encoder.json`, which is written last, says which encoder they are of and
how its features were pooled. A killed job goes on after the rows that `partial/done.json` counts.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from torch import Tensor

from fastcr.errors import UsageError, one_line
from fastcr.runs.checkpoint import write_whole

Array = np.ndarray[Any, Any]
POOLINGS = ("mean", "rationale", "gem", "norm", "gaussian", "cls")  # arrays of embeddings, as in results.json
TABLE, ENCODER, PARTIAL, DONE = "images.csv", "encoder.json", "partial", "done.json"
FINAL = (TABLE, *(f"{name}.npy" for name in POOLINGS), ENCODER)
COLUMNS = ("row", "path", "split", "label", "width", "height")  # of the table: path below the root; size in pixels
IMAGES = "images"  # while it works: number, width and height of the image of each row
PART_SECONDS = 5.0  # work that a kill may cost
PART_ROWS = 1024  # in memory at once, as the finished files are written
ANEW = "remove that folder to begin anew, or name another --out"


class Job:
    """Embeddings that are not finished: a file of rows for each array, which a later process goes on with.

    Attributes:
        images, rows: how many images are done, and how many of those could be read.
    """

    def __init__(self, folder: Path, key: dict[str, str]) -> None:
        """Resume the job in `folder`, or begin it; `key` says what the job is of.

        `UsageError` if the folder is broken or of another job.
        """
        self.folder, self.key, self.saved_at = folder, key, time.monotonic()
        self.images, self.rows, self.kinds = 0, 0, dict[str, list[Any]]()  # dtype and shape of a row, by array
        if not (folder / DONE).exists():
            return
        try:
            begun = json.loads((folder / DONE).read_text())
            other = [name for name in key if begun["key"].get(name) != key[name]]
            self.images, self.rows, self.kinds = begun["images"], begun["rows"], begun["arrays"]
            for name in self.kinds:
                self._read(name)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"{folder} is broken ({one_line(error)}): {ANEW}") from None
        if other:
            raise UsageError(f"{folder} was begun with other {' and other '.join(other)}: {ANEW}")

    def _read(self, name: str) -> Array:
        """The rows of an array, mapped from their file. `ValueError` if it lacks some."""
        dtype, *shape = self.kinds[name]
        return np.memmap(self.folder / name, dtype, "r", shape=(self.rows, *shape))

    def add(self, images: int, arrays: dict[str, Tensor]) -> None:
        """Add a batch of so many images: the rows of those that could be read, `[R,...]` on the CPU.

        `IMAGES` is among the arrays. Where they cannot be written, the command resumes once there is room on the disk.
        """
        for name, array in arrays.items():
            rows = array.contiguous().numpy()
            self.kinds[name] = [rows.dtype.str, *rows.shape[1:]]
            (self.folder / name).touch()
            with (self.folder / name).open("rb+") as file:
                file.seek(self.rows * rows[0].nbytes)
                file.write(rows.data)
        self.images, self.rows = self.images + images, self.rows + len(arrays.get(IMAGES, ()))
        if time.monotonic() - self.saved_at >= PART_SECONDS:
            self.save()

    def save(self) -> None:
        """Note that what was added is on the disk."""
        for name in self.kinds:
            with (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())
        about = {"key": self.key, "images": self.images, "rows": self.rows, "arrays": self.kinds}
        write_whole(self.folder / DONE, lambda file: file.write_text(json.dumps(about)))
        self.saved_at = time.monotonic()

    def finish(self, out: Path, names: Sequence[Sequence[str]], facts: dict[str, Any], *, centre: bool = False) -> None:
        """Write the final files, each whole or not at all, no array ever in memory as a whole; remove the others.

        `names` are path, split and label of every image, `facts` those of the encoder; its "pooling" names the array
        of the embeddings. With `centre` these are less their mean, which becomes the fact "subtracted".
        """
        self.save()
        for name in (name for name in self.kinds if name != IMAGES):
            rows, mean = self._read(name), None
            if centre and name == facts["pooling"]:
                mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
                facts = facts | {"subtracted": mean.tolist()}
            write_whole(out / f"{name}.npy", partial(_write_array, rows=rows, mean=mean))
        write_whole(out / TABLE, partial(_write_table, names=names, images=self._read(IMAGES)))
        write_whole(out / ENCODER, lambda file: file.write_text(json.dumps(facts, indent=2) + "\n"))
        shutil.rmtree(self.folder)


def _write_array(file: Path, rows: Array, mean: Array | None) -> None:
    """Write rows, with a `mean` less that and of unit length."""
    with file.open("wb") as opened:
        write_array_header_1_0(opened, header_data_from_array_1_0(rows))
        for first in range(0, len(rows), PART_ROWS):
            part = rows[first : first + PART_ROWS]
            if mean is not None:
                part = part - mean
                part /= np.linalg.norm(part, axis=1, keepdims=True).clip(1e-12)
            opened.write(part.data)


def _write_table(file: Path, names: Sequence[Sequence[str]], images: Array) -> None:
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as text:
        lines = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")  # every text is quoted
        lines.writerow(COLUMNS)
        lines.writerows((row, *names[image], *size) for row, (image, *size) in enumerate(images.tolist()))


def check_unused(folder: Path) -> None:
    """`UsageError` if the folder holds embeddings already, and they are not those of a job that was killed."""
    found, begun = [name for name in FINAL if (folder / name).exists()], folder / PARTIAL
    if found and not (begun / DONE).exists() and (ENCODER in found or not begun.exists()):
        raise UsageError(f"{folder / found[0]} is there already: remove it, or name another --out")


class Neighbour(NamedTuple):
    """An image of the table."""

    path: str  # below the root
    label: str  # "" without
    similarity: float  # cosine


class Stored(NamedTuple):
    """The embeddings in a folder."""

    vectors: Tensor  # [N,C] fp32, unit length
    mean: Tensor | None  # [C], that was subtracted from them
    rows: list[tuple[str, str]]  # path and label of each image
    facts: dict[str, Any]  # of the encoder, and how its features were pooled

    def nearest(self, queries: Tensor, k: int) -> list[list[Neighbour]]:
        """The `k` images most similar to each of the queries `[Q,C]`, unit length, the most similar first."""
        best = (queries @ self.vectors.T).topk(min(k, len(self.rows)))
        return [
            [Neighbour(self.rows[i][0], self.rows[i][1], each) for i, each in zip(places, similarity, strict=True)]
            for places, similarity in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def read_stored(source: Path) -> Stored:
    """The embeddings in the folder `source`, or in that of the file. `UsageError` where there are none, or broken."""
    folder = source if source.is_dir() else source.parent
    reading = folder / ENCODER
    if not source.exists() or not reading.is_file():
        raise UsageError(f"no embeddings at {source}: name a folder that fastcr embed wrote")
    try:
        facts = json.loads(reading.read_text())
        named = ("weights", "weights_sha256", "root")
        if not all(isinstance(facts[name], str) for name in named) or facts["pooling"] not in POOLINGS:
            raise ValueError(f"it lacks {', '.join(named)} or names no pooling")
        reading = folder / TABLE
        with reading.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
            rows = [(row["path"], row["label"]) for row in csv.DictReader(text)]
        reading = folder / f"{facts['pooling']}.npy"
        vectors = torch.from_numpy(np.load(reading))
        if vectors.ndim != 2 or vectors.dtype != torch.float32:
            raise ValueError("it holds no vectors in fp32")
        if len(vectors) != len(rows) or not rows:
            raise ValueError(f"{len(vectors)} embeddings of {len(rows)} images")
        mean = torch.tensor(facts["subtracted"]).expand_as(vectors[0]) if "subtracted" in facts else None
    except (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, csv.Error) as error:
        raise UsageError(f"{reading} is missing or broken ({one_line(error)}): run fastcr embed again") from None
    return Stored(vectors, mean, rows, facts)
