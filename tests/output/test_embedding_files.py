"""The files of embeddings on their own: what a process needs to write them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
def test_what_is_written_is_never_in_memory(format: str, tmp_path: Path) -> None:
    """96 MB of rows in a process that may take 32 MB more than it has."""
    if format == "parquet":
        pytest.importorskip("pyarrow")
    code = f"""
import importlib.util, resource, torch
if importlib.util.find_spec('pyarrow'):
    import pyarrow.parquet  # its libraries are no rows
from pathlib import Path
from fastcr.output import embedding_files
embedding_files.COMMIT_SECONDS, folder, count = 0.1, Path({str(tmp_path)!r}), 12_000
rows = torch.rand(1000, 2048)
(folder / "partial").mkdir()
job = embedding_files.Partial(folder / "partial", {{}})
taken = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (taken + 2**25, taken + 2**25))
for _ in range(count // 1000):
    job.add(1000, {{"mean": rows}}, [("a.jpg", "", "", 5, 5, None, None)] * 1000)
job.finish(folder, {format!r}, {{"pooling": "mean"}}, centre=True)
try:
    torch.rand(count, 2048)
except RuntimeError:
    print("no room for the rows")
"""
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # its own reserves a gigabyte it does not use
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "no room for the rows\n"
    size = 12_000 * 2048 * 4
    (file,) = tmp_path.glob(f"*.{format}")
    assert size < file.stat().st_size < size + 1_000_000
