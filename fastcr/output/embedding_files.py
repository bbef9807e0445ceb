"""The files of embeddings: rows that grow in a folder `partial`, then the final files, each whole.

A killed job resumes after the images that `state.json` counts. Row i of every array is row i of `images.csv`;
`encoder.json` says which encoder they are of, and how its features were pooled.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastcr.errors import UsageError, one_line
from fastcr.output.embedding_formats import (
    COLUMNS,
    ENCODER,
    FINAL,
    TABLE,
    Array,
    Format,
    save_embeddings,
    save_less_mean,
)
from fastcr.runs.checkpoint import write_whole

COMMIT_SECONDS = 5.0  # work that a kill may cost
ANEW = "remove that folder to begin anew, or name another --out"


class Partial:
    """Files of a job that is not finished, in a folder that a later process can resume from.

    Attributes:
        images, rows: how many images are done, and how many of those could be read.
    """

    def __init__(self, folder: Path, key: dict[str, str]) -> None:
        """Resume the job in `folder`, or begin it; `key` says what the job is of.

        `UsageError` if the folder is broken or of another job.
        """
        self.folder, self.key, self.state = folder, key, folder / "state.json"
        self.images, self.rows = 0, 0
        self.bytes = dict[str, int]()  # written into each file
        self.kinds = dict[str, tuple[str, list[int]]]()  # dtype, and shape of a row, of each array
        self._committed = time.monotonic()
        if self.state.exists():
            self._resume()

    def _resume(self) -> None:
        try:
            state = json.loads(self.state.read_text())
            other = [name for name in self.key if state["key"].get(name) != self.key[name]]
            self.images, self.rows, self.bytes, self.kinds = (
                state[name] for name in ("images", "rows", "bytes", "kinds")
            )
            short = [name for name, size in self.bytes.items() if (self.folder / name).stat().st_size < size]
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UsageError(f"{self.folder} is broken ({one_line(error)}): {ANEW}") from None
        if other:
            raise UsageError(f"{self.folder} was begun with other {' and other '.join(other)}: {ANEW}")
        if short:
            raise UsageError(f"{self.folder} is broken ({short[0]} is too short): {ANEW}")
        for name, size in self.bytes.items():
            os.truncate(self.folder / name, size)  # what came after the last count is computed again

    def add(self, images: int, arrays: dict[str, Tensor], table: Sequence[Sequence[object]]) -> None:
        """Add a batch of so many images: the rows of those that could be read, `[R,...]` on the CPU and in the table.

        `UsageError` if they cannot be written; the command resumes once there is room on the disk.
        """
        text = io.StringIO()
        lines = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")  # every text is quoted
        if TABLE not in self.bytes:
            lines.writerow(("row", *COLUMNS))
        lines.writerows((self.rows + i, *row) for i, row in enumerate(table))
        parts = {TABLE: text.getvalue().encode(errors="surrogateescape")}
        for name, array in arrays.items():
            self.kinds[name] = str(array.numpy().dtype), list(array.shape[1:])
            parts[name] = array.numpy().tobytes()
        for name, content in parts.items():
            file = self.folder / name
            try:
                with file.open("ab" if name in self.bytes else "wb") as opened:
                    opened.write(content)
            except OSError as error:
                raise UsageError(f"cannot write {file}: {error.strerror}") from None
            self.bytes[name] = self.bytes.get(name, 0) + len(content)
        self.images, self.rows = self.images + images, self.rows + len(table)
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Bring the files to the disk, then count what is in them in `state.json`."""
        for name in self.bytes:
            with (self.folder / name).open("rb+") as file:
                os.fsync(file.fileno())
        state = {name: getattr(self, name) for name in ("key", "images", "rows", "bytes", "kinds")}
        write_whole(self.state, lambda file: file.write_text(json.dumps(state)))
        self._committed = time.monotonic()

    def arrays(self) -> dict[str, Array]:
        """Every array `[rows,...]`, mapped into memory."""
        return {
            name: np.memmap(self.folder / name, dtype, "r+", shape=(self.rows, *shape))
            for name, (dtype, shape) in self.kinds.items()
        }

    def finish(self, folder: Path, format: Format, facts: dict[str, Any], *, centre: bool = False) -> None:
        """Write the final files, each whole or not at all, the table last; remove the others.

        None is held in memory, but for an index of FAISS. `facts` are those of the encoder; its "pooling" names the
        array of the embeddings. With `centre` these are less their mean, which becomes the fact "subtracted".
        """
        self.commit()
        arrays = self.arrays()
        if centre:
            name = facts["pooling"]
            arrays[name], mean = save_less_mean(self.folder / "centred", arrays[name])
            facts = facts | {"subtracted": mean.tolist()}
        save_embeddings(folder, format, arrays, facts, scratch=self.folder)
        write_whole(folder / ENCODER, lambda file: file.write_text(json.dumps(facts, indent=2) + "\n"))
        os.replace(self.folder / TABLE, folder / TABLE)
        shutil.rmtree(self.folder)


def check_unused(folder: Path) -> None:
    """`UsageError` if the folder holds embeddings already."""
    unfinished = folder / "partial"
    found = [name for name in FINAL if (folder / name).exists()]
    if found[:1] == [TABLE]:  # the last file to be written: nothing is left to do
        shutil.rmtree(unfinished, ignore_errors=True)
    if found and not unfinished.exists():
        raise UsageError(f"{folder / found[0]} is there already: remove it, or name another --out")
