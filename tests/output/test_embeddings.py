"""The files of embeddings on their own: what a process needs to write them."""

import subprocess
import sys
from pathlib import Path


def test_what_is_written_is_never_in_memory(tmp_path: Path) -> None:
    """96 MB of rows in a process that may take 72 MB more than it has: NumPy copies 16 MB at a time."""
    code = f"""
import resource, torch
from pathlib import Path
from fastcr.output import embeddings
embeddings.PART_SECONDS, folder, count = 0.0, Path({str(tmp_path)!r}), 12_000
rows = torch.rand(1000, 2048)
(folder / "partial").mkdir()
job = embeddings.Job(folder / "partial", {{}})
taken = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
most = taken + 72 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
for _ in range(count // 1000):
    job.add(1000, {{"mean": rows, "images": torch.zeros(1000, 3, dtype=torch.int64)}})
job.finish(folder, [("a.jpg", "", "")], {{"pooling": "mean"}}, centre=True)
try:
    torch.rand(count, 2048)
except RuntimeError:
    print("no room for the rows")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "no room for the rows\n"
    size = 12_000 * 2048 * 4
    assert size < (tmp_path / "mean.npy").stat().st_size < size + 1_000_000
