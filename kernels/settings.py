"""How each kernel is launched, by the shapes of its inputs: one table, read at every call.

`BLOCK_*` are tiles of positions (S), channels (C), queries (B) and keys (N), `BLOCK` elements of a tile; `programs` is
their number.
Chosen so that nothing spills or exceeds shared memory on capabilities 8.0 to 12.0 (`python
bench/resources.py`); `python bench/tune.py` times others on the GPU at hand and prints the rows to put here.
"""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion

from fastcr.kernels.launch import triton

Settings = dict[str, int]

# before 3.7.1 Triton leaves out the fence between copies ahead and wgmma (docs/compiled-code.md): one stage copies none
FENCED = triton is not None and TorchVersion(triton.__version__) >= "3.7.1"

TABLE: dict[str, dict[str, Settings]] = {
    "rationale_fit": {
        "16 bits, K <= 32": {"BLOCK_S": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 4},
        "16 bits, K > 32": {"BLOCK_S": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 3},
        "32 bits, K <= 32": {"BLOCK_S": 16, "BLOCK_C": 32, "num_warps": 4, "num_stages": 3},
        "32 bits, K > 32": {"BLOCK_S": 16, "BLOCK_C": 32, "num_warps": 8, "num_stages": 2},
    },
    "fit_pairs": {
        "16 bits, K <= 32": {"BLOCK_C": 64, "num_warps": 8, "num_stages": 3},
    },
    "rationale_pool": {
        "16 bits, K <= 32": {"BLOCK_S": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3},
        "16 bits, K > 32": {"BLOCK_S": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 3},
        "32 bits, K <= 32": {"BLOCK_S": 16, "BLOCK_C": 32, "num_warps": 4, "num_stages": 3},
        "32 bits, K > 32": {"BLOCK_S": 16, "BLOCK_C": 32, "num_warps": 8, "num_stages": 2},
    },
    "attention_gradient": {
        "16 bits": {"BLOCK_S": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3},
        "32 bits": {"BLOCK_S": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3},
    },
    "common_weights": {
        "16 bits, C <= 512": {"BLOCK": 2048, "num_warps": 2, "num_stages": 4, "programs": 528},
        "16 bits, C <= 2048": {"BLOCK": 8192, "num_warps": 8, "num_stages": 4, "programs": 132},
        "16 bits, C > 2048": {"BLOCK": 8192, "num_warps": 16, "num_stages": 4, "programs": 132},
        "32 bits, C <= 512": {"BLOCK": 2048, "num_warps": 2, "num_stages": 3, "programs": 528},
        "32 bits, C <= 2048": {"BLOCK": 8192, "num_warps": 8, "num_stages": 3, "programs": 132},
        "32 bits, C > 2048": {"BLOCK": 8192, "num_warps": 16, "num_stages": 3, "programs": 132},
    },
    "spread_gradients": {
        "16 bits, K <= 32": {"BLOCK_S": 64, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3, "programs": 528},
        "16 bits, K > 32": {
            "BLOCK_S": 32, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3 if FENCED else 1, "programs": 528,
        },
        "32 bits, K <= 32": {"BLOCK_S": 32, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3, "programs": 528},
        "32 bits, K > 32": {"BLOCK_S": 32, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3, "programs": 528},
    },
    "info_nce": {
        "16 bits, B <= 16, D <= 256": {"BLOCK_B": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "programs": 264},
        "16 bits, B <= 16, D > 256": {"BLOCK_B": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "programs": 264},
        "16 bits, B > 16, D <= 256": {
            "BLOCK_B": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2 if FENCED else 1, "programs": 264,
        },
        "16 bits, B > 16, D > 256": {"BLOCK_B": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "programs": 264},
        "32 bits, B <= 16, D <= 256": {"BLOCK_B": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "programs": 264},
        "32 bits, B <= 16, D > 256": {"BLOCK_B": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2, "programs": 264},
        "32 bits, B > 16, D <= 256": {"BLOCK_B": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "programs": 264},
        "32 bits, B > 16, D > 256": {"BLOCK_B": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2, "programs": 264},
    },
    "relational": {
        "16 bits, B <= 16, D <= 256": {"BLOCK_B": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "programs": 264},
        "16 bits, B <= 16, D > 256": {"BLOCK_B": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "programs": 264},
        "16 bits, B > 16, D <= 256": {"BLOCK_B": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "programs": 264},
        "16 bits, B > 16, D > 256": {"BLOCK_B": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "programs": 264},
        "32 bits, B <= 16, D <= 256": {"BLOCK_B": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "programs": 264},
        "32 bits, B <= 16, D > 256": {"BLOCK_B": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2, "programs": 264},
        "32 bits, B > 16, D <= 256": {"BLOCK_B": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "programs": 264},
        "32 bits, B > 16, D > 256": {"BLOCK_B": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2, "programs": 264},
    },
}  # fmt: skip
TABLE["neighbour"] = dict(TABLE["relational"])  # until a GPU has timed them apart


def map_class(dtype: torch.dtype, detectors: int | None = None) -> str:
    """The row of a kernel that reads features of `dtype`, with `detectors` of them if it multiplies."""
    return f"{dtype.itemsize * 8} bits" + ("" if detectors is None else f", K {'<=' if detectors <= 32 else '>'} 32")


def channels_class(dtype: torch.dtype, channels: int) -> str:
    """The row of `common_weights` for features of `dtype` with so many channels."""
    limit = next((f"C <= {most}" for most in (512, 2048) if channels <= most), "C > 2048")
    return f"{dtype.itemsize * 8} bits, {limit}"


def contrast_class(dtype: torch.dtype, batch: int, dim: int) -> str:
    """The row of an op over a queue, for `batch` rows `[B,D]` of `dtype` (queries and keys, of `relational`)."""
    return f"{dtype.itemsize * 8} bits, B {'<=' if batch <= 16 else '>'} 16, D {'<=' if dim <= 256 else '>'} 256"
