"""Formats of finished embeddings, each written a part at a time: safetensors, npy, Parquet and FAISS."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch

from fastcr.errors import UsageError
from fastcr.runs.checkpoint import write_whole

Format = Literal["safetensors", "npy", "parquet", "faiss"]
Array = np.ndarray[Any, Any]
PACKAGES = {"parquet": "pyarrow", "faiss": "faiss"}  # of the formats that need one
POOLINGS = ("mean", "rationale", "gem", "norm", "gaussian", "scda")  # arrays of embeddings, as in results.json
TABLE, ENCODER = "images.csv", "encoder.json"
FINAL = (
    TABLE, "embeddings.safetensors", *(f"{name}.npy" for name in (*POOLINGS, "attention")), "embeddings.parquet",
    "embeddings.faiss", ENCODER,
)  # fmt: skip
# of the table, after the row's number: path below the root; size in pixels; the attention's peak in fractions of the
# image. What is not known is empty.
COLUMNS = {"path": str, "split": str, "label": str, "width": int, "height": int, "peak_x": float, "peak_y": float}
PART = 512  # rows that are written at once


def extra_of(format: str) -> None:
    """`UsageError` where the package that a format needs is not installed."""
    try:
        if format in PACKAGES:
            importlib.import_module(PACKAGES[format])
    except ImportError:
        raise UsageError(f'the format {format} needs {PACKAGES[format]}: pip install "fastcr[{format}]"') from None


def save_embeddings(
    folder: Path, format: Format, arrays: dict[str, Array], facts: dict[str, Any], scratch: Path
) -> None:
    """Write all `arrays`, or of Parquet and FAISS the one that `facts["pooling"]` names and the attention's maps.

    The folder `scratch` holds the table, and what a kill leaves half-written.
    """
    if format == "npy":
        for name, array in arrays.items():
            write_whole(folder / f"{name}.npy", partial(_save_array, array=array))
        return
    vectors, maps = arrays[facts["pooling"]], arrays.get("attention")
    writers: dict[str, Callable[[Path], object]] = {
        "safetensors": lambda file: _save_tensors(file, arrays, facts, scratch),
        "parquet": lambda file: _save_parquet(file, vectors, maps, scratch / TABLE, facts),
        "faiss": lambda file: _save_faiss(file, vectors),
    }
    write_whole(folder / f"embeddings.{format}", writers[format])


def save_less_mean(file: Path, vectors: Array) -> tuple[Array, Array]:
    """Unit vectors `[N,C]` less their mean, of unit length again, mapped from a new file; and the mean `[C]`, fp32."""
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    with file.open("wb") as opened:
        for first in range(0, len(vectors), PART):
            moved = vectors[first : first + PART] - mean
            opened.write((moved / np.linalg.norm(moved, axis=1, keepdims=True).clip(1e-12)).tobytes())
    return np.memmap(file, np.float32, "r+", shape=vectors.shape), mean


def _save_array(file: Path, array: Array) -> None:
    with file.open("wb") as opened:
        np.save(opened, array)


def _save_tensors(file: Path, arrays: dict[str, Array], facts: dict[str, Any], scratch: Path) -> None:
    made = scratch / "embeddings.safetensors"  # save_file, if it is killed, leaves a scratch file beside it
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    safetensors.torch.save_file(tensors, made, {"fastcr": json.dumps(facts)})
    shutil.copymode(scratch / TABLE, made)  # save_file makes it readable to its owner only
    os.replace(made, file)


def _save_faiss(file: Path, vectors: Array) -> None:
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    for first in range(0, len(vectors), PART):
        index.add(np.ascontiguousarray(vectors[first : first + PART]))
    with file.open("wb") as opened:
        faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write))


def _save_parquet(file: Path, vectors: Array, maps: Array | None, table: Path, facts: dict[str, Any]) -> None:
    """The table, whose names are text: bytes that are no UTF-8 become `\\x..`. What is not known is null."""
    import pyarrow as pa
    from pyarrow import parquet

    lists = {"embedding": vectors} | ({} if maps is None else {"attention": maps.reshape(len(maps), -1)})
    types = {str: pa.string(), int: pa.int32(), float: pa.float32()}
    fields = [(name, types[kind]) for name, kind in COLUMNS.items()]
    fields += [(name, pa.list_(pa.float32(), array.shape[1])) for name, array in lists.items()]
    schema = pa.schema(fields, metadata={"fastcr": json.dumps(facts)})
    texts = [name for name, kind in COLUMNS.items() if kind is str]
    with (
        table.open(newline="", encoding="utf-8", errors="backslashreplace") as text,
        file.open("wb") as opened,
        # numbers that are all different would be tried in vain for a dictionary
        parquet.ParquetWriter(opened, schema, compression="none", use_dictionary=texts) as writer,
    ):
        rows = csv.DictReader(text)
        for first in range(0, len(vectors), PART):
            part = list(islice(rows, PART))
            columns: dict[str, Any] = {
                name: [kind(row[name]) if row[name] else None for row in part] for name, kind in COLUMNS.items()
            }
            for name, array in lists.items():
                flat = pa.array(np.ascontiguousarray(array[first : first + PART], dtype=np.float32).reshape(-1))
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
            writer.write_table(pa.table(columns, schema=schema))
