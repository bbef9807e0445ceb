"""Everything else is in pyproject.toml; setuptools maps the top-level kernels/ to fastcr.kernels only from here."""

from setuptools import setup

setup(
    packages=[
        "fastcr",
        "fastcr.kernels",
        *(f"fastcr.{room}" for room in ("runs", "data", "encoders", "method", "measures", "output")),
    ],
    package_dir={"fastcr.kernels": "kernels"},
)
