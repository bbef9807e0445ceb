"""The packages; everything else is in pyproject.toml.

`fastcr/kernels` is a link to `kernels/`. An installation to edit (`pip install -e .`) is then a line in the path, which
a folder of the name fastcr above it cannot hide, as it would what setuptools does for any other layout.
"""

from setuptools import setup

ROOMS = ("kernels", "runs", "data", "encoders", "method", "measures", "output")
setup(packages=["fastcr", *(f"fastcr.{room}" for room in ROOMS)], package_dir={"": "."})
