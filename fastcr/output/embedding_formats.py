"""Formats of finished embeddings: safetensors, Parquet and FAISS written, and all of them read again."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fastcr.data.crops import centres_of, in_image
from fastcr.errors import UsageError

Format = Literal["safetensors", "npy", "parquet", "faiss"]
Array = np.ndarray[Any, Any]
PACKAGES = {"parquet": "pyarrow", "faiss": "faiss"}  # of the formats that need one
ARRAYS = ("mean", "rationale", "attention", "patches")
FILES = (
    "embeddings.safetensors",
    *(f"{name}.npy" for name in ARRAYS),
    "embeddings.parquet",
    "patches.parquet",
    "embeddings.faiss",
)
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


COLUMNS = Row._fields


def extra_of(format: str) -> None:
    """`UsageError` where the package that a format needs is not installed."""
    try:
        if format in PACKAGES:
            importlib.import_module(PACKAGES[format])
    except ImportError:
        raise UsageError(f'the format {format} needs {PACKAGES[format]}: pip install "fastcr[{format}]"') from None


def save_tensors(file: Path, *, arrays: dict[str, Array], facts: dict[str, Any], scratch: Path) -> None:
    """Write arrays as safetensors, `facts` in the metadata; what a kill leaves lies in the folder `scratch`."""
    made = scratch / "embeddings.safetensors"  # save_file, if it is killed, leaves a scratch file beside it
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    safetensors.torch.save_file(tensors, made, {"fastcr": json.dumps(facts)})
    shutil.copymode(scratch / "sizes.npy", made)  # save_file makes it readable to its owner only
    os.replace(made, file)


def save_faiss(file: Path, *, vectors: Array) -> None:
    """Write unit vectors `[N,C]` as FAISS's flat index of inner products."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    for first in range(0, len(vectors), PART):
        index.add(np.ascontiguousarray(vectors[first : first + PART]))
    with file.open("wb") as opened:
        faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write))


def save_parquet(file: Path, *, vectors: Array, maps: Array | None, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Write a row an image: the table's columns, its embedding and, where there are `maps` `[N,h,w]`, its attention."""
    import pyarrow as pa

    fields = {"path": pa.string(), "split": pa.string(), "label": pa.string(), "width": pa.int32(),
              "height": pa.int32(), "peak_x": pa.float32(), "peak_y": pa.float32(),
              "embedding": pa.list_(pa.float32(), vectors.shape[1])}  # fmt: skip
    if maps is not None:
        maps = maps.reshape(len(maps), -1)
        fields["attention"] = pa.list_(pa.float32(), maps.shape[1])

    def parts() -> Iterator[dict[str, Any]]:
        for first in range(0, len(rows), PART):
            part = slice(first, first + PART)
            columns: dict[str, Any] = dict(zip(COLUMNS, zip(*rows[part], strict=True), strict=True))
            columns["path"] = _texts(columns["path"])
            for name in ("split", "label"):
                columns[name] = [text or None for text in _texts(columns[name])]
            columns["embedding"] = _lists(vectors[part])
            yield columns | ({} if maps is None else {"attention": _lists(maps[part])})

    _write(file, fields, parts(), facts)


def save_patches(
    file: Path, *, arrays: dict[str, Array], rows: Sequence[Row], sizes: Tensor, facts: dict[str, Any]
) -> None:
    """Write a row a position: its image's path, its centre in fractions of the image, its embedding and attention."""
    import pyarrow as pa

    patches, maps = arrays["patches"], arrays.get("attention")
    count, side = patches.shape[1], math.isqrt(patches.shape[1])
    where = in_image(centres_of(side, side)[None], sizes, facts["image_size"]).float().numpy()
    fields = {"path": pa.string(), "x": pa.float32(), "y": pa.float32(),
              "embedding": pa.list_(pa.float32(), patches.shape[2]), "attention": pa.float32()}  # fmt: skip

    def parts() -> Iterator[dict[str, Any]]:
        step = max(PART // count, 1)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            own = None if maps is None else maps[part].reshape(-1).astype(np.float32)
            yield {
                "path": [path for path in _texts([row.path for row in rows[part]]) for _ in range(count)],
                "x": where[part, :, 0].reshape(-1),
                "y": where[part, :, 1].reshape(-1),
                "embedding": _lists(patches[part].reshape(-1, patches.shape[2])),
                "attention": [None] * (len(rows[part]) * count) if own is None else own,
            }

    _write(file, fields, parts(), facts)


def _write(file: Path, fields: dict[str, Any], parts: Iterator[dict[str, Any]], facts: dict[str, Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema(fields.items(), metadata={"fastcr": json.dumps(facts)})
    # numbers that are all different would be tried in vain for a dictionary
    texts = [name for name, kind in fields.items() if kind == pa.string()]
    with (
        file.open("wb") as opened,
        parquet.ParquetWriter(opened, schema, compression="none", use_dictionary=texts) as writer,
    ):
        for part in parts:
            columns = [
                part[name] if isinstance(part[name], pa.Array) else pa.array(part[name], kind)
                for name, kind in fields.items()
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _texts(names: Sequence[str]) -> list[str]:
    """Names as Parquet takes them: bytes that are no UTF-8 as `\\x..`."""
    return [name.encode(errors="surrogateescape").decode(errors="backslashreplace") for name in names]


def _lists(array: Array) -> Any:
    """An array `[N,C]` as N lists of fp32."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(array, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
