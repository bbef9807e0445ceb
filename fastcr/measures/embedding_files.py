"""The files of embeddings: rows that grow in a folder `partial` while they are made, then the final files, whole.

A job that was killed goes on after the rows that `state.json` counts. Row i of every array is row i of `images.csv`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import math
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from torch import Tensor

from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole

COMMIT_SECONDS = 5.0  # work that a kill may cost
COLUMNS = ("row", "path", "split", "label", "width", "height")
TABLE = "images.csv"
DTYPES = {"mean": "<f4", "rationale": "<f4", "attention": "<f2"}
SAFETENSORS_DTYPES = {"<f4": "F32", "<f2": "F16"}
Format = Literal["safetensors", "npy"]


@dataclass
class State:
    """How far a job has come, as `state.json` keeps it."""

    key: dict[str, str]  # what the job is of
    batches: int = 0
    rows: int = 0  # images that could be read
    unreadable: int = 0
    shapes: dict[str, list[int]] = field(default_factory=dict)  # of a row of each array
    lengths: dict[str, int] = field(default_factory=dict)  # bytes of each growing file


class Partial:
    """The files of a job that grow, and what they held when they were last brought to the disk.

    Raises `UsageError` if the folder is of another job, or another process is at it.
    """

    def __init__(self, folder: Path, key: dict[str, str]) -> None:
        self.folder, self.files, self._handles = folder, dict[str, IO[bytes]](), contextlib.ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        lock = self._handles.enter_context((folder / "lock").open("w"))
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when this process ends, however it does
        except OSError:
            raise UsageError(f"another process is writing into {folder}") from None
        self.state = State(key)
        if (folder / "state.json").exists():
            anew = "remove that folder to begin anew, or name another --out"
            try:
                self.state = State(**_unsealed((folder / "state.json").read_text()))
                files = [(self.path(name), length) for name, length in self.state.lengths.items()]
            except (ValueError, TypeError, LookupError, RecursionError):
                raise UsageError(f"{folder / 'state.json'} is broken: {anew}") from None
            if short := [file for file, length in files if not file.is_file() or file.stat().st_size < length]:
                raise UsageError(f"{short[0]} is broken: {anew}")
            if other := [name for name in key if self.state.key.get(name) != key[name]]:
                raise UsageError(f"{folder} was begun with other {' and other '.join(other)}: {anew}")
        for name in self.state.lengths:
            self._open(name)
        self._committed = time.monotonic()

    def path(self, name: str) -> Path:
        """The growing file of an array, or of the table."""
        return self.folder / f"{name}.rows"

    def _open(self, name: str) -> None:
        self.files[name] = file = self._handles.enter_context(self.path(name).open("ab"))
        file.truncate(self.state.lengths.get(name, 0))  # what came after the last commit is made again
        file.seek(0, os.SEEK_END)

    def _append(self, name: str, content: bytes | memoryview) -> None:
        if name not in self.files:
            self._open(name)
        self.files[name].write(content)

    def add(self, arrays: dict[str, Tensor], rows: list[tuple[Any, ...]], unreadable: int) -> None:
        """Append a batch: arrays `[n,...]` on the CPU, and n rows of the table."""
        for name, array in arrays.items():
            self.state.shapes[name] = list(array.shape[1:])
            self._append(name, array.contiguous().numpy().data.cast("B"))
        self._append(TABLE, _csv([(self.state.rows + i, *row) for i, row in enumerate(rows)]))
        self.state.rows += len(rows)
        self.state.unreadable += unreadable
        self.state.batches += 1
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Bring everything to the disk, then say so in `state.json`."""
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.state.lengths[name] = file.tell()
        text = _sealed(dataclasses.asdict(self.state))
        write_whole(self.folder / "state.json", lambda file: file.write_text(text))
        self._committed = time.monotonic()

    def remove(self) -> None:
        """Remove the folder."""
        self._handles.close()
        shutil.rmtree(self.folder)


def _sealed(state: dict[str, Any]) -> str:
    """Text of `state.json`: the files are cut to what it says, so it carries a checksum."""
    return json.dumps({"state": state, "crc32": zlib.crc32(json.dumps(state).encode())})


def _unsealed(text: str) -> dict[str, Any]:
    """What `_sealed` was given. `ValueError` if that is not what it says."""
    content = json.loads(text)
    if content["crc32"] != zlib.crc32(json.dumps(content["state"]).encode()):
        raise ValueError("checksum")
    return dict(content["state"])


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    """Lines of the table: text in quotes, with the bytes it has on the disk."""
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _joined(header: bytes, *files: Path) -> Callable[[Path], None]:
    """For `write_whole`: write `header`, then copy the files."""

    def write(target: Path) -> None:
        with open(target, "wb") as joined:
            joined.write(header)
            for file in files:
                with open(file, "rb") as part:
                    shutil.copyfileobj(part, joined, 1 << 24)

    return write


def _npy_header(dtype: str, shape: Sequence[int]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": tuple(shape)})
    return header.getvalue()


def _safetensors_header(shapes: dict[str, list[int]], facts: dict[str, Any]) -> bytes:
    """Its own `save_file` would want every array in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"fastcr": json.dumps(facts)}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * np.dtype(DTYPES[name]).itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[DTYPES[name]], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def put_in_place(partial: Partial, folder: Path, format: Format, facts: dict[str, Any]) -> None:
    """Turn the rows into the final files, each whole or not at all, the table last."""
    shapes = {
        name: [partial.state.rows, *partial.state.shapes[name]] for name in DTYPES if name in partial.state.shapes
    }
    if format == "safetensors":
        rows = [partial.path(name) for name in shapes]
        write_whole(folder / "embeddings.safetensors", _joined(_safetensors_header(shapes, facts), *rows))
    else:
        for name, shape in shapes.items():
            write_whole(folder / f"{name}.npy", _joined(_npy_header(DTYPES[name], shape), partial.path(name)))
    write_whole(folder / TABLE, _joined(_csv([COLUMNS]), partial.path(TABLE)))


def check_unused(folder: Path) -> None:
    """`UsageError` if the folder holds embeddings already."""
    partial = folder / "partial"
    names = [TABLE, "embeddings.safetensors", *(f"{name}.npy" for name in DTYPES)]
    found = [name for name in names if (folder / name).exists()]
    if found[:1] == [TABLE]:  # the last file to be written: nothing is left to do
        shutil.rmtree(partial, ignore_errors=True)
    if found and not partial.exists():
        raise UsageError(f"{folder / found[0]} is there already: remove it, or name another --out")
