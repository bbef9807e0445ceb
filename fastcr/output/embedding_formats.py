"""Formats of finished embeddings, each written a part at a time: safetensors, npy, Parquet and FAISS; and the table."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from numpy.lib.format import open_memmap

from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole

Format = Literal["safetensors", "npy", "parquet", "faiss"]
Array = np.ndarray[Any, Any]
PACKAGES = {"parquet": "pyarrow", "faiss": "faiss"}  # of the formats that need one
POOLINGS = (
    "mean",
    "rationale",
    "gem",
    "norm",
    "gaussian",
    "scda",
)  # arrays of embeddings, by the names of results.json
TABLE, ENCODER = "images.csv", "encoder.json"
FINAL = (
    TABLE, "embeddings.safetensors", *(f"{name}.npy" for name in (*POOLINGS, "attention")), "embeddings.parquet",
    "embeddings.faiss", ENCODER,
)  # fmt: skip
PART = 512  # rows that are written at once


class Row(NamedTuple):
    """An image in the table."""

    path: str  # below the root
    split: str
    label: str  # "" without
    width: int  # pixels
    height: int
    peak_x: float | None  # of the attention, fractions of the image; None without a branch
    peak_y: float | None


def extra_of(format: str) -> None:
    """`UsageError` where the package that a format needs is not installed."""
    try:
        if format in PACKAGES:
            importlib.import_module(PACKAGES[format])
    except ImportError:
        raise UsageError(f'the format {format} needs {PACKAGES[format]}: pip install "fastcr[{format}]"') from None


def save_embeddings(
    folder: Path, format: Format, arrays: dict[str, Array], rows: Sequence[Row], facts: dict[str, Any], scratch: Path
) -> None:
    """Write all `arrays`, or of Parquet and FAISS the one that `facts["pooling"]` names and the attention's maps.

    What a kill leaves half-written lies in the folder `scratch`, or beside the file as `write_whole` does it.
    """
    vectors, maps = arrays[facts["pooling"]], arrays.get("attention")
    if format == "npy":
        for name, array in arrays.items():
            write_whole(folder / f"{name}.npy", _copied(array))
        return
    writers: dict[str, Callable[[Path], object]] = {
        "safetensors": lambda file: _save_tensors(file, arrays, facts, scratch),
        "parquet": lambda file: _save_parquet(file, vectors, maps, rows, facts),
        "faiss": lambda file: _save_faiss(file, vectors),
    }
    write_whole(folder / f"embeddings.{format}", writers[format])


def allocate(file: Path, like: Array) -> Array:
    """A new .npy file of zeros with the dtype and shape of `like`, mapped into memory.

    Its space on the disk is taken first, for a process that writes into a mapped file without space is ended (SIGBUS).
    `OSError` if there is too little.
    """
    array = open_memmap(file, "w+", like.dtype, like.shape)
    with file.open("rb+") as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return array


def _copied(array: Array) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        allocate(file, array)[:] = array

    return write


def save_less_mean(file: Path, vectors: Array) -> tuple[Array, Array]:
    """Unit vectors `[N,C]` less their mean, of unit length again, in a new .npy file; and the mean `[C]`, fp32."""
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    made = allocate(file, vectors)
    for first in range(0, len(vectors), PART):
        moved = vectors[first : first + PART] - mean
        made[first : first + PART] = moved / np.linalg.norm(moved, axis=1, keepdims=True).clip(1e-12)
    return made, mean


def _save_tensors(file: Path, arrays: dict[str, Array], facts: dict[str, Any], scratch: Path) -> None:
    made = scratch / "embeddings.safetensors"  # save_file, if it is killed, leaves a scratch file beside it
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    safetensors.torch.save_file(tensors, made, {"fastcr": json.dumps(facts)})
    shutil.copymode(scratch / "sizes.npy", made)  # save_file makes it readable to its owner only
    os.replace(made, file)


def _save_faiss(file: Path, vectors: Array) -> None:
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    for first in range(0, len(vectors), PART):
        index.add(np.ascontiguousarray(vectors[first : first + PART]))
    with file.open("wb") as opened:
        faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write))


def _save_parquet(file: Path, vectors: Array, maps: Array | None, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    lists = {"embedding": vectors} | ({} if maps is None else {"attention": maps.reshape(len(maps), -1)})
    texts = ["path", "split", "label"]
    fields = [(name, pa.string()) for name in texts] + [("width", pa.int32()), ("height", pa.int32())]
    fields += [("peak_x", pa.float32()), ("peak_y", pa.float32())]
    fields += [(name, pa.list_(pa.float32(), array.shape[1])) for name, array in lists.items()]
    schema = pa.schema(fields, metadata={"fastcr": json.dumps(facts)})
    with (
        file.open("wb") as opened,
        # numbers that are all different would be tried in vain for a dictionary
        parquet.ParquetWriter(opened, schema, compression="none", use_dictionary=texts) as writer,
    ):
        for first in range(0, len(rows), PART):
            part = slice(first, first + PART)
            columns: dict[str, Any] = dict(zip(Row._fields, zip(*rows[part], strict=True), strict=True))
            for name in texts:  # bytes of a name that are no UTF-8 as `\x..`; no label: null
                plain = [text.encode(errors="surrogateescape").decode(errors="backslashreplace")
                         for text in columns[name]]  # fmt: skip
                columns[name] = [text or None for text in plain]
            for name, array in lists.items():
                flat = pa.array(np.ascontiguousarray(array[part], dtype=np.float32).reshape(-1))
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
            writer.write_table(pa.table(columns, schema=schema))


def save_table(file: Path, rows: Sequence[Row]) -> None:
    """Write the table as CSV; every text is quoted."""
    with file.open("w", encoding="utf-8", errors="surrogateescape", newline="") as text:
        table = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        table.writerow(("row", *Row._fields))
        table.writerows((number, *row) for number, row in enumerate(rows))
