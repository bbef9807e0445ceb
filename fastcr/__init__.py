"""Self-supervised learning for fine-grained images with common rationales (CVPR 2023, arXiv 2303.01669).

What is offered here is imported when it is first asked for: `import fastcr` alone does without torch.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# `python -m fastcr.X` looks for all it imports in the working folder first: a random.py there would pass for Python's
if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].removeprefix("-m").split(".")[0] == __name__
    and not getattr(sys.flags, "safe_path", False)  # the folder is not there
    and os.path.dirname(os.path.dirname(__file__)) != sys.path[0]  # a checkout that is not installed
):
    del sys.path[0]

if TYPE_CHECKING:
    from fastcr.config import Config
    from fastcr.encoders.encoder import Encoded, Encoder, load
    from fastcr.encoders.rationale import RationaleHead
    from fastcr.errors import UsageError
    from fastcr.kernels.info_nce import info_nce
    from fastcr.kernels.rationale_fit import rationale_fit
    from fastcr.kernels.rationale_pool import rationale_pool
    from fastcr.kernels.two_views import two_views
    from fastcr.measures.knn import knn
    from fastcr.measures.retrieval import retrieval
    from fastcr.presets import preset

    __version__: str

__all__ = [
    "Config", "Encoded", "Encoder", "RationaleHead", "UsageError", "info_nce", "knn", "load", "preset",
    "rationale_fit", "rationale_pool", "retrieval", "two_views",
]  # fmt: skip
# of those whose module has another name; the operations and measures are in modules of their own names
_MODULES = {
    "Config": "config", "Encoded": "encoders.encoder", "Encoder": "encoders.encoder", "load": "encoders.encoder",
    "RationaleHead": "encoders.rationale", "UsageError": "errors", "knn": "measures.knn", "preset": "presets",
    "retrieval": "measures.retrieval",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """One of `__all__`, imported now, or `__version__`."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fastcr")
        except PackageNotFoundError:  # a bare checkout on the path
            return "0+unknown"
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"fastcr.{_MODULES.get(name, f'kernels.{name}')}"), name)
    globals()[name] = value
    return value
