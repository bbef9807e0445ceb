"""The files of `fastcr embed`: parts while it works, then the finished files; and what `fastcr search` reads of them.

A killed job resumes after its last part. Row i of every array is row i of `images.csv`; `encoder.json` says which
encoder they are of, and how its features were pooled.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from safetensors.torch import save_file
from torch import Tensor

from fastcr.errors import UsageError, one_line
from fastcr.runs.checkpoint import load_weights, write_whole

Array = np.ndarray[Any, Any]
POOLINGS = ("mean", "rationale", "gem", "norm", "gaussian", "scda")  # arrays of embeddings, as in results.json
TABLE, ENCODER, TENSORS = "images.csv", "encoder.json", "embeddings.safetensors"
FINAL = (TABLE, TENSORS, *(f"{name}.npy" for name in (*POOLINGS, "attention")), ENCODER)
# of the table: path below the root; size in pixels; the attention's peak in fractions of the image. What is not known
# is empty.
COLUMNS = ("row", "path", "split", "label", "width", "height", "peak_x", "peak_y")
PART_SECONDS = 5.0  # work that a kill may cost
ANEW = "remove that folder to begin anew, or name another --out"


class Job:
    """Embeddings that are not finished: parts in a folder, each written whole, that a later process resumes after.

    Attributes:
        images, rows: how many images are done, and how many of those could be read.
    """

    def __init__(self, folder: Path, key: dict[str, str]) -> None:
        """Resume the job in `folder`, or begin it; `key` says what the job is of.

        `UsageError` if the folder is broken or of another job.
        """
        self.folder, self.key = folder, key
        self.images, self.rows = 0, 0
        self.parts = sorted(folder.glob("*.npz"))
        self.waiting, self.table = list[dict[str, Tensor]](), io.StringIO()
        self.saved_at = time.monotonic()
        if self.parts:
            if self.parts[-1] != self._part(len(self.parts) - 1):
                raise UsageError(f"{folder} is broken (it lacks a part): {ANEW}")
            begun = self._about(self.parts[-1])
            if other := [name for name in key if begun["key"].get(name) != key[name]]:
                raise UsageError(f"{folder} was begun with other {' and other '.join(other)}: {ANEW}")
            self.images, self.rows = begun["images"], begun["rows"]

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def _read(self, part: Path, name: str) -> Array:
        try:
            with np.load(part) as content:
                return content[name]
        except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, zipfile.BadZipFile) as error:
            raise UsageError(f"{part} is broken ({one_line(error)}): {ANEW}") from None

    def _about(self, part: Path) -> dict[str, Any]:
        """What the job is of, the names of its arrays, and how much was done after this part."""
        about: dict[str, Any] = json.loads(str(self._read(part, "about")))
        return about

    def add(self, images: int, arrays: dict[str, Tensor], table: Sequence[Sequence[object]]) -> None:
        """Add a batch of so many images: the rows of those that could be read, `[R,...]` on the CPU and in the table.

        `UsageError` if they cannot be written; the command resumes once there is room on the disk.
        """
        lines = csv.writer(self.table, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")  # every text is quoted
        lines.writerows((self.rows + i, *row) for i, row in enumerate(table))
        self.images, self.rows = self.images + images, self.rows + len(table)
        if arrays:
            self.waiting.append(arrays)
        if time.monotonic() - self.saved_at >= PART_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what was added since the last part as the next one."""
        if not self.waiting:
            return
        content: dict[str, Any] = {name: torch.cat([each[name] for each in self.waiting]) for name in self.waiting[0]}
        about = {"key": self.key, "arrays": [*content], "images": self.images, "rows": self.rows}
        content["about"] = json.dumps(about)
        content["table"] = np.frombuffer(self.table.getvalue().encode(errors="surrogateescape"), np.uint8)
        part = self._part(len(self.parts))
        _write(part, lambda opened: np.savez(opened, **content))
        self.parts.append(part)
        self.waiting, self.table, self.saved_at = [], io.StringIO(), time.monotonic()

    def _rows(self, name: str, mean: Array | None) -> Iterator[Any]:
        """Content of the .npy file of an array of all parts; with a `mean`, its rows less that, of unit length."""
        for part in self.parts:
            rows = self._read(part, name)
            if part == self.parts[0]:
                shape, header = (self.rows, *rows.shape[1:]), io.BytesIO()
                facts = {"descr": dtype_to_descr(rows.dtype), "fortran_order": False, "shape": shape}
                write_array_header_1_0(header, facts)
                yield header.getvalue()
            if mean is not None:
                rows = rows - mean
                rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
            yield rows.data

    def _join(self, name: str, mean: Array | None = None) -> Array:
        """An array of all parts, as `_rows`, mapped from a new file."""
        joined = self.folder / f"{name}.npy"
        _write(joined, lambda opened: opened.writelines(self._rows(name, mean)))
        return np.load(joined, mmap_mode="r+")

    def finish(
        self, folder: Path, format: Literal["safetensors", "npy"], facts: dict[str, Any], *, centre: bool = False
    ) -> None:
        """Write the final files, each whole or not at all and the table last; remove the parts.

        No array is ever in memory as a whole. `facts` are those of the encoder; its "pooling" names the array of the
        embeddings. With `centre` these are less their mean, which becomes the fact "subtracted".
        """
        self.save()
        arrays = {name: self._join(name) for name in self._about(self.parts[-1])["arrays"]}
        if centre:
            mean = arrays[facts["pooling"]].mean(axis=0, dtype=np.float64).astype(np.float32)
            arrays[facts["pooling"]] = self._join(facts["pooling"], mean)
            facts = facts | {"subtracted": mean.tolist()}
        if format == "npy":
            for name in arrays:
                os.replace(self.folder / f"{name}.npy", folder / f"{name}.npy")
        else:
            made = self.folder / TENSORS  # save_file, if it is killed, leaves a scratch file beside it
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            save_file(tensors, made, {"fastcr": json.dumps(facts)})
            shutil.copymode(self.parts[0], made)  # save_file makes it readable to its owner only
            write_whole(folder / TENSORS, lambda file: os.replace(made, file))
        write_whole(folder / ENCODER, lambda file: file.write_text(json.dumps(facts, indent=2) + "\n"))
        head = ",".join(f'"{name}"' for name in COLUMNS).encode() + b"\n"
        lines = (self._read(part, "table").data for part in self.parts)
        _write(folder / TABLE, lambda opened: opened.writelines(chain([head], lines)))
        shutil.rmtree(self.folder)


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Have `fill` write a file, whole or not at all."""

    def write(file: Path) -> None:
        with file.open("wb") as opened:
            fill(opened)

    write_whole(path, write)


def check_unused(folder: Path) -> None:
    """`UsageError` if the folder holds embeddings already, and they are not those of a job that was killed."""
    found = [name for name in FINAL if (folder / name).exists()]
    if found and (TABLE in found or not (folder / "partial").exists()):
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
    if not source.exists() or not any((folder / name).is_file() for name in FINAL if name not in (TABLE, ENCODER)):
        raise UsageError(f"no embeddings at {source}: name a folder that fastcr embed wrote")
    reading = folder / ENCODER
    try:
        facts = json.loads(reading.read_text())
        named = ("weights", "weights_sha256", "root")
        if not all(isinstance(facts[name], str) for name in named) or facts["pooling"] not in POOLINGS:
            raise ValueError(f"it lacks {', '.join(named)} or names no pooling")
        reading = folder / TABLE
        with reading.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
            rows = [(row["path"], row["label"]) for row in csv.DictReader(text)]
        reading = folder / TENSORS
        if reading.is_file():
            vectors = load_weights(reading)[0][facts["pooling"]]
        else:
            reading = folder / f"{facts['pooling']}.npy"
            vectors = torch.from_numpy(np.load(reading))
        if vectors.ndim != 2 or vectors.dtype != torch.float32:
            raise ValueError("it holds no vectors in fp32")
        if len(vectors) != len(rows) or not rows:
            raise ValueError(f"{len(vectors)} embeddings of {len(rows)} images")
        mean = torch.tensor(facts["subtracted"]).expand_as(vectors[0]) if "subtracted" in facts else None
    except (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, UsageError, csv.Error) as error:
        raise UsageError(f"{reading} is missing or broken ({one_line(error)}): run fastcr embed again") from None
    return Stored(vectors, mean, rows, facts)
