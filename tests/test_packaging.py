"""The layout that lets `fastcr.kernels` live beside other packages and be taken alone."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted(file for file in (ROOT / "fastcr").rglob("*.py") if "kernels" not in file.relative_to(ROOT).parts)
OPS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


def imports_of(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_kernels_is_no_top_level_package() -> None:
    """An __init__.py would make a checkout shadow the `kernels` package of others."""
    assert OPS
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "fastcr" / "kernels").is_symlink()
    assert (ROOT / "fastcr" / "kernels").resolve() == ROOT / "kernels"


@pytest.mark.parametrize("op", OPS)
def test_ops_depend_on_each_other_only(op: str) -> None:
    names = imports_of(ROOT / "kernels" / f"{op}.py")
    assert not {name for name in names if name.startswith("fastcr") and not name.startswith("fastcr.kernels.")}
    assert not {name for name in names if name.split(".")[0] == "kernels"}


@pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(ROOT / "fastcr")))
def test_the_package_imports_neither_tests_nor_bench_nor_bare_kernels(file: Path) -> None:
    assert not {name for name in imports_of(file) if name.split(".")[0] in ("tests", "bench", "kernels")}
    assert len(file.read_text().splitlines()) <= 300


def test_another_package_named_kernels_wins_in_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'another'\n")
    code = "import kernels, fastcr.kernels.info_nce as op; print(kernels.whose, op.__name__)"
    path = f"import sys; sys.path.append({str(tmp_path)!r}); "
    output = subprocess.run([sys.executable, "-c", path + code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["another", "fastcr.kernels.info_nce"]


def test_the_wheel_holds_every_file_of_the_package_once(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout of git")
    files = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file() or (ROOT / name).is_symlink()]
    for name in files:  # a copy, for a build leaves files beside the sources
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "source" / name, follow_symlinks=False)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), "."]
    subprocess.run([sys.executable, *build], cwd=tmp_path / "source", capture_output=True, check=True)
    (wheel,) = tmp_path.glob("fastcr-*.whl")
    found = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    package = [name for name in files if name.startswith("fastcr/") and not (ROOT / name).is_symlink()]
    kernels = [f"fastcr/{name}" for name in files if name.startswith("kernels/") and name.endswith(".py")]
    assert sorted(found) == sorted(package + kernels)
    assert "fastcr/py.typed" in found
    assert all(f"fastcr/{room}/__init__.py" in found for room in ("data", "method", "measures", "runs"))
