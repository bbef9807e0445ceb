"""The layout that lets `fastcr.kernels` live beside other packages and be taken alone."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CODE = sorted(file for file in (ROOT / "fastcr").rglob("*.py") if "kernels" not in file.relative_to(ROOT).parts)


def imports_of(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_kernels_is_no_top_level_package(tmp_path: Path) -> None:
    """An __init__.py would make a checkout shadow the `kernels` package of others."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    found = PathFinder.find_spec("kernels", [str(ROOT), str(tmp_path)])
    assert found is not None
    assert found.origin == str(tmp_path / "kernels" / "__init__.py")
    assert (ROOT / "fastcr" / "kernels").is_symlink()
    assert (ROOT / "fastcr" / "kernels").resolve() == ROOT / "kernels"


def test_ops_depend_on_each_other_only_and_the_package_neither_on_tests_nor_bench_nor_bare_kernels() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        names = imports_of(file)
        assert not {each for each in names if each.startswith("fastcr") and not each.startswith("fastcr.kernels.")}
        assert not {each for each in names if each.split(".")[0] == "kernels"}, file
    for file in CODE:
        assert not {each for each in imports_of(file) if each.split(".")[0] in ("tests", "bench", "kernels")}, file
        assert len(file.read_text().splitlines()) <= 300, file


def test_the_wheel_made_of_the_source_archive_holds_every_file_of_the_package_once(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard", "fastcr", "kernels", "tests", ":(glob)*"]
    git = ["git", "-C", str(ROOT), *listing]  # folders by name: a virtual environment beside them is no source
    listed = subprocess.run(git, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout of git")
    files = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file() or (ROOT / name).is_symlink()]
    for name in files:  # a copy, for a build leaves files beside the sources
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "source" / name, follow_symlinks=False)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", capture_output=True, check=True)
    (archive,) = tmp_path.glob("fastcr-*.tar.gz")
    with tarfile.open(archive) as opened:
        assert not [name for name in opened.getnames() if "/tests" in name]  # it would be some of them
    build_wheel = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", ".", archive]
    subprocess.run([sys.executable, *build_wheel], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("fastcr-*.whl")
    found = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    package = [name for name in files if name.startswith("fastcr/") and not (ROOT / name).is_symlink()]
    kernels = [f"fastcr/{name}" for name in files if name.startswith("kernels/") and name.endswith(".py")]
    assert sorted(found) == sorted(package + kernels)
    assert "fastcr/py.typed" in found
    assert all(
        f"fastcr/{room}/__init__.py" in found for room in ("runs", "data", "encoders", "method", "measures", "output")
    )


def test_what_the_container_names_is_there_and_a_release_has_the_tag_of_its_version() -> None:
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for names in copied for name in names.split()} >= {"pyproject.toml", "setup.py", "fastcr", "kernels"}
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    (installed,) = re.findall(r'"\.\[(.*)\]"', (ROOT / "Dockerfile").read_text())
    assert set(installed.split(",")) <= extras
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("test", "build")
    tag = next(step["run"] for step in jobs["build"]["steps"] if "tag" in step.get("name", ""))
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for name, status in ((f"v{version}", 0), ("v9.9", 1)):
        ran = subprocess.run(["bash", "-c", tag], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": name}, check=False)
        assert ran.returncode == status
