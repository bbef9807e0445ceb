"""Everything else is in pyproject.toml; setuptools maps the top-level kernels/ to fastcr.kernels only from here."""

from setuptools import setup

setup(
    packages=[
        *("fastcr", "fastcr.data", "fastcr.method", "fastcr.method.objectives", "fastcr.measures", "fastcr.runs"),
        "fastcr.kernels",
    ],
    package_dir={"fastcr.kernels": "kernels"},
)
