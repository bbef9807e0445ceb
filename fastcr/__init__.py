"""Self-supervised learning for fine-grained images with common rationales (CVPR 2023, arXiv 2303.01669)."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcr.encoder import Encoded, Encoder, load

try:
    __version__ = version("fastcr")
except PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0+unknown"

__all__ = ["Encoded", "Encoder", "load"]


def __getattr__(name: str) -> Any:
    """What `fastcr.encoder` offers, imported when it is first asked for: `import fastcr` alone does without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastcr import encoder

    return getattr(encoder, name)
