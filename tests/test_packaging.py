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


@pytest.fixture(scope="module")
def files() -> list[str]:
    """What git has of the package and what it is built with."""
    pytest.importorskip("setuptools", minversion="77")
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard", "fastcr", "kernels", "tests", ":(glob)*"]
    git = ["git", "-C", str(ROOT), *listing]  # folders by name: a virtual environment beside them is no source
    listed = subprocess.run(git, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout of git")
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file() or (ROOT / name).is_symlink()]


@pytest.fixture(scope="module")
def source(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone named fastcr: a copy, for a build leaves files beside the sources."""
    clone = tmp_path_factory.mktemp("above") / "fastcr"
    for name in files:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name, follow_symlinks=False)
    return clone


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is made of the source archive, which holds no tests: they would be some of them."""
    scratch = tmp_path_factory.mktemp("wheel")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(scratch)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (archive,) = scratch.glob("fastcr-*.tar.gz")
    with tarfile.open(archive) as opened:
        assert not [name for name in opened.getnames() if "/tests" in name]
    build_wheel = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", ".", archive]
    subprocess.run([sys.executable, *build_wheel], cwd=scratch, capture_output=True, check=True)
    return next(scratch.glob("fastcr-*.whl"))


def test_the_wheel_holds_every_file_of_the_package_once(files: list[str], wheel: Path) -> None:
    found = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    package = [name for name in files if name.startswith("fastcr/") and not (ROOT / name).is_symlink()]
    kernels = [f"fastcr/{name}" for name in files if name.startswith("kernels/") and name.endswith(".py")]
    assert sorted(found) == sorted(package + kernels)
    assert "fastcr/py.typed" in found
    assert all(
        f"fastcr/{room}/__init__.py" in found for room in ("runs", "data", "encoders", "method", "measures", "output")
    )


def test_it_is_found_from_above_a_clone_beside_a_random_py_and_in_a_wheel(source: Path, wheel: Path) -> None:
    """Above a clone of the name fastcr lies a folder that Python could take for a package without files."""
    build = "from setuptools import build_meta; build_meta.build_editable('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (editable,) = source.parent.glob("fastcr-*editable*.whl")
    with zipfile.ZipFile(editable) as opened:
        (line,) = [opened.read(name).decode().strip() for name in opened.namelist() if name.endswith(".pth")]
    beside = source.parent / "beside"
    beside.mkdir()
    (beside / "random.py").write_text("raise SystemExit('the wrong random')")

    def said(folder: Path, path: object, *words: object) -> str:
        ran, variables = [sys.executable, *map(str, words)], {**os.environ, "PYTHONPATH": str(path)}
        return subprocess.run(ran, cwd=folder, env=variables, capture_output=True, text=True, check=False).stdout

    page = "import fastcr, fastcr.output.sheets as out; print(fastcr.__file__, out.html_page('', [])[:9])"
    for path in (line, wheel):
        assert said(source.parent, path, "-c", page) == f"{path}/fastcr/__init__.py <!DOCTYPE\n"
    assert said(beside, ROOT, "-c", "import fastcr; print(fastcr.UsageError.__name__)") == "UsageError\n"
    assert "images are whole" in said(beside, ROOT, "-m", "fastcr.folders", ROOT / "docs")


def test_what_the_container_names_is_there_and_a_release_has_the_tag_of_its_version() -> None:
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for names in copied for name in names.split()} >= {"pyproject.toml", "fastcr", "kernels"}
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
