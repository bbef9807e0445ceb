"""How each kernel is launched, by the shapes of its inputs: one table, read at every call.

Each op's file puts the rows of its kernels into `TABLE` (`spec.py`). `BLOCK_*` are tiles of positions (S), channels
(C), queries (B) and keys (N), `BLOCK` elements of a tile; `programs` is their number. They are chosen so that nothing
spills or exceeds shared memory on capabilities 8.0 to 12.0 (`python bench/resources.py`); `python bench/tune.py` times
others on the GPU at hand.
"""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion

from fastcr.kernels.launch import triton

Settings = dict[str, int]

# before 3.7.1 Triton leaves out the fence between copies ahead and wgmma (docs/compiled-code.md): one stage copies none
FENCED = triton is not None and TorchVersion(triton.__version__) >= "3.7.1"
TABLE: dict[str, dict[str, Settings]] = {}


def map_class(dtype: torch.dtype, detectors: int | None = None) -> str:
    """The row of a kernel that reads features of `dtype`, with `detectors` of them if it multiplies."""
    return f"{dtype.itemsize * 8} bits" + ("" if detectors is None else f", K {'<=' if detectors <= 32 else '>'} 32")


def channels_class(dtype: torch.dtype, channels: int) -> str:
    """The row of `common_weights` for features of `dtype` with so many channels."""
    limit = next((f"C <= {most}" for most in (512, 2048) if channels <= most), "C > 2048")
    return f"{dtype.itemsize * 8} bits, {limit}"


def contrast_class(dtype: torch.dtype, batch: int, dim: int) -> str:
    """The row of an op over a queue, for `batch` rows `[B,D]` of `dtype` (queries and keys, of `relational`)."""
    width = "<= 256" if dim <= 256 else "> 256" if dim <= 512 else "> 512"
    return f"{dtype.itemsize * 8} bits, B {'<=' if batch <= 16 else '>'} 16, D {width}"


def has_wgmma() -> bool:
    """Whether the current GPU multiplies tiles of 64 rows as one: compute capability 9.0, 10.0 or 10.3."""
    try:
        return triton.runtime.driver.active.get_current_target().arch in (90, 100, 103)
    except RuntimeError:  # no GPU
        return False
