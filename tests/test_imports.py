"""The house's one rule: imports lead inwards, from the doors to the rooms behind them, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import fastcr

PACKAGE = Path(fastcr.__file__).parent
# each may import what stands before it, and its own neighbours; the last are the doors, a file a command
ORDER = (
    "kernels", "errors", "config", "presets", "runs", "data", "encoders", "method", "measures", "output", "doors",
)  # fmt: skip


def imports() -> dict[str, set[str]]:
    """Each module of fastcr, and those it imports at any place, for type checkers too."""
    folders = (PACKAGE, *filter(Path.is_dir, PACKAGE.iterdir()))  # rglob would not follow the link to kernels/
    paths = [file for folder in folders for file in folder.glob("*.py")]
    files = {".".join(("fastcr", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in paths}
    found = {}
    for module, file in files.items():
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names} | {n.module for n in nodes}
        found[module] = (names & files.keys()) - {module}
    return found


def floor(module: str) -> int:
    """Where a module stands in `ORDER`."""
    name = module.split(".")[1]
    return ORDER.index(name if name in ORDER else "doors")


def test_no_import_leads_back_up() -> None:
    inner = {module: names for module, names in imports().items() if module != "fastcr.__init__"}
    assert len(inner) > 40
    assert [f"{a} imports {b}" for a, names in inner.items() for b in names if floor(b) > floor(a)] == []


def test_no_circles() -> None:
    TopologicalSorter(imports()).prepare()
