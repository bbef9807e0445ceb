"""Embeddings that `fastcr embed` wrote, read again, and those of them that are nearest to others."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcr.errors import UsageError, one_line
from fastcr.output.embedding_formats import ENCODER, POOLINGS, TABLE, extra_of
from fastcr.runs.checkpoint import load_weights

FACTS = ("weights", "weights_sha256", "root")
QUERIES = 64  # compared at once: their similarities to a million images are 256 MB


class Neighbour(NamedTuple):
    """An image of the table."""

    path: str  # below the root
    label: str  # "" without
    similarity: float  # cosine


class Stored(NamedTuple):
    """The embeddings in a folder."""

    vectors: Any  # [N,C] fp32, unit length; or FAISS's index of them
    rows: list[tuple[str, str]]  # path and label of each image
    facts: dict[str, Any]  # of the encoder, and how its features were pooled

    @property
    def pooling(self) -> str:
        """How the embeddings were pooled, by its name in `results.json`."""
        return str(self.facts["pooling"])

    @property
    def mean(self) -> Tensor | None:
        """The mean `[C]` that was subtracted from them, if one was."""
        return torch.tensor(self.facts["subtracted"]) if "subtracted" in self.facts else None

    def nearest(self, queries: Tensor, k: int) -> list[list[Neighbour]]:
        """The `k` images most similar to each of the queries `[Q,C]`, unit length, the most similar first."""
        k, found = min(k, len(self.rows)), list[list[Neighbour]]()
        for part in queries.split(QUERIES):
            if isinstance(self.vectors, Tensor):
                similarity, places = (part @ self.vectors.T).topk(k)
            else:
                similarity, places = map(torch.from_numpy, self.vectors.search(part.numpy(), k))
            for row, where in zip(similarity.tolist(), places.tolist(), strict=True):
                near = zip(where, row, strict=True)
                found.append([Neighbour(self.rows[i][0], self.rows[i][1], each) for i, each in near])
        return found


def read_stored(source: Path) -> Stored:
    """The embeddings in the folder `source`, or in that of the file. `UsageError` where there are none, or broken."""
    folder = source if source.is_dir() else source.parent
    names = ("embeddings.faiss", "embeddings.parquet", "embeddings.safetensors", *(f"{each}.npy" for each in POOLINGS))
    files = [folder / name for name in names if (folder / name).is_file()]
    if not source.exists() or not files:
        raise UsageError(f"no embeddings at {source}: name a folder that fastcr embed wrote")
    extra_of(files[0].suffix.removeprefix("."))
    reading = folder / ENCODER
    try:
        facts = json.loads(reading.read_text())
        stored = Stored(None, [], facts)
        if not all(isinstance(facts[name], str) for name in FACTS) or stored.pooling not in POOLINGS:
            raise ValueError(f"it lacks {', '.join(FACTS)} or names no pooling")
        reading = folder / TABLE
        with reading.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
            rows = [(row["path"], row["label"]) for row in csv.DictReader(text)]
        reading = folder / f"{stored.pooling}.npy" if files[0].suffix == ".npy" else files[0]
        vectors = _vectors(reading, stored.pooling)
        count, channels = vectors.shape if isinstance(vectors, Tensor) else (vectors.ntotal, vectors.d)
        if count != len(rows) or not rows:
            raise ValueError(f"{count} embeddings of {len(rows)} images")
        if stored.mean is not None and len(stored.mean) != channels:
            raise ValueError(f"{channels} dimensions, of the mean {len(stored.mean)}")
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, UsageError, csv.Error) as error:
        raise UsageError(f"{reading} is missing or broken ({one_line(error)}): run fastcr embed again") from None
    return stored._replace(vectors=vectors, rows=rows)


def _vectors(file: Path, pooling: str) -> Any:
    """What a file holds: a tensor `[N,C]`, fp32, or FAISS's index."""
    if file.suffix == ".faiss":
        import faiss

        with file.open("rb") as opened:
            return faiss.read_index(faiss.PyCallbackIOReader(opened.read))
    if file.suffix == ".npy":
        found = torch.from_numpy(np.load(file))
    elif file.suffix == ".safetensors":
        found = load_weights(file)[0][pooling]
    else:
        from pyarrow import parquet

        with file.open("rb") as opened:
            column = parquet.read_table(opened, columns=["embedding"])["embedding"].combine_chunks()
        found = torch.tensor(column.flatten().to_numpy()).view(len(column), -1)
    if found.ndim != 2 or found.dtype != torch.float32:
        raise ValueError("it holds no vectors in fp32")
    return found
