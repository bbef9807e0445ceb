"""What every benchmark report says of the machine it was made on, and the device the benchmarks run on."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.timing import copy_bandwidth, matmul_rate


def _first_line(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add GPU, driver, versions and commit to pytest-benchmark's JSON."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    machine_info["fastcr"] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _first_line("git", "rev-parse", "--short", "HEAD"),
        "threads": torch.get_num_threads(),
    }


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Append each finished benchmark to the file FASTCR_BENCH_LINES: the report itself is written at the very end."""
    path, benchmark = os.environ.get("FASTCR_BENCH_LINES"), getattr(item, "funcargs", {}).get("benchmark")
    if path and benchmark is not None and benchmark.stats:
        stats = benchmark.stats.stats
        figures = {name: getattr(stats, name) for name in ("min", "max", "mean", "median", "iqr", "rounds")}
        entry = {"name": benchmark.name, "fullname": benchmark.fullname, "stats": figures}
        with Path(path).open("a") as file:
            file.write(json.dumps(entry | {"extra_info": benchmark.extra_info}) + "\n")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA when there is one, else the CPU: figures are of the device their report names."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def copy_rate(device: torch.device) -> float | None:
    """Bytes a second of a large copy on the GPU, the ceiling of what only moves bytes; None without a GPU."""
    return copy_bandwidth(device) if device.type == "cuda" else None


@pytest.fixture(scope="session")
def product_rate(device: torch.device) -> float | None:
    """FLOP a second of a large bf16 matrix product on the GPU, the ceiling of what computes; None without a GPU."""
    return matmul_rate(device, torch.bfloat16) if device.type == "cuda" else None


@pytest.fixture
def finished(device: torch.device) -> Callable[[Callable[[], Any]], Callable[[], None]]:
    """Wrap a call so that it returns once the device has done the work."""

    def wrap(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    return wrap
