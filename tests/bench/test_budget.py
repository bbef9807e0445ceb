"""The counted step: every fused op is there once, with the bytes and FLOPs of its own shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_step_of_the_preset_calls_each_kernel_once_and_never_makes_the_matrix_of_similarities(
    tmp_path: Path,
) -> None:
    file, batch, channels, dims, keys = tmp_path / "budget.json", 8, 2048, 256, 4096
    command = ["bench/budget.py", "folder", "--batch", str(batch), "--image_size", "64", "--json", str(file)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())[str(batch)]
    operations = found["operations"]
    features = 2 * batch * channels * 2 * 2  # bf16, 2 x 2 positions
    for name, phase in (
        ("rationale_pool", "key forward"),
        ("rationale_pool", "contrast"),
        ("relational", "contrast"),
        ("common_weights", "fit"),
        ("rationale_fit", "fit"),
    ):
        count = operations[f"{phase}: fastcr::{name}"]
        assert count["launches"] == 1
        least = 2 * keys * dims if name == "relational" else features
        assert least <= count["bytes"] < 1.5 * least + 600_000, name  # the rest is small: detectors, rows
    assert operations["contrast: fastcr::relational"]["flops"] == 8 * batch * keys * dims
    matrix = 4 * batch * keys  # bytes of the queries' similarities to the queue
    own = {
        name: count
        for name, count in operations.items()
        if name.startswith(("contrast", "fit")) and "fastcr" not in name
    }
    assert all(count["bytes"] < 6 * 4 * channels * dims for count in own.values())
    assert sum(count["bytes"] for name, count in own.items() if "mm" not in name) < 8 * matrix
    assert found["launches"] == sum(count["launches"] for count in operations.values())
    assert 0 < found["fused_seconds"] < found["seconds"]
