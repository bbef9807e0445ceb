"""The layout that lets `fastcr.kernels` live beside other packages and be taken alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize("file", sorted((ROOT / "fastcr").rglob("*.py")), ids=lambda file: file.stem)
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
