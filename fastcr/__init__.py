"""Self-supervised learning for fine-grained images with common rationales (CVPR 2023, arXiv 2303.01669).

What is offered here is imported when it is first asked for: `import fastcr` alone does without torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcr.config import Config as Config
    from fastcr.encoders.encoder import Encoded as Encoded
    from fastcr.encoders.encoder import Encoder as Encoder
    from fastcr.encoders.encoder import load as load
    from fastcr.encoders.rationale import RationaleHead as RationaleHead
    from fastcr.errors import UsageError as UsageError
    from fastcr.kernels.info_nce import info_nce as info_nce
    from fastcr.kernels.rationale_fit import rationale_fit as rationale_fit
    from fastcr.kernels.rationale_pool import rationale_pool as rationale_pool
    from fastcr.kernels.two_views import two_views as two_views
    from fastcr.measures.knn import knn as knn
    from fastcr.measures.retrieval import retrieval as retrieval
    from fastcr.presets import preset as preset

try:
    __version__ = version("fastcr")
except PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0+unknown"

_HOMES = {
    "Config": "config",
    "Encoded": "encoders.encoder",
    "Encoder": "encoders.encoder",
    "RationaleHead": "encoders.rationale",
    "UsageError": "errors",
    "info_nce": "kernels.info_nce",
    "knn": "measures.knn",
    "load": "encoders.encoder",
    "preset": "presets",
    "rationale_fit": "kernels.rationale_fit",
    "rationale_pool": "kernels.rationale_pool",
    "retrieval": "measures.retrieval",
    "two_views": "kernels.two_views",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """One of `__all__`, imported now."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"fastcr.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
