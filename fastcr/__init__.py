"""Self-supervised learning for fine-grained images with common rationales (CVPR 2023, arXiv 2303.01669)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastcr")
except PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0+unknown"
