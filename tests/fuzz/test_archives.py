"""Broken tables of the original archives, and of the objects' boxes."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import strategies as st

from fastcr.data.images import ImageList
from fastcr.data.layouts import read_splits
from fastcr.measures.localisation import read_objects
from tests.data.test_archives import ARCHIVES
from tests.fuzz.damage import BYTES, JSON, ODD_NUMBERS, ODD_WORDS, Damage, text
from tests.fuzz.pictures import read_all
from tests.fuzz.properties import REFUSED, attempt, fuzzed, reading

TEXT = text([*ODD_NUMBERS, *ODD_WORDS, "1 2 3 4 5 6", "1", "1 1 nan nan 1", "1 -5 1 1 1", "inf inf inf inf inf"])
TABLES = {"cub": TEXT, "cars": BYTES, "cars in one folder": BYTES, "aircraft": TEXT, "inat": JSON}
INSTEAD = st.sampled_from(["nothing", "folder", "loop"])
BROKEN = [  # an archive, and what befalls its tables, by their numbers
    st.tuples(
        st.just(name),
        st.dictionaries(st.integers(0, 5), st.one_of(*[damage] * 9, INSTEAD), min_size=1, max_size=2),
    )
    for name, damage in [*TABLES.items(), ("cub", TEXT)]
]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """scipy crashes in a process of its own, which nobody needs to hear of."""
    enabled = faulthandler.is_enabled()
    faulthandler.disable()
    yield
    if enabled:
        faulthandler.enable()


def make_archive(name: str, root: Path) -> list[Path]:
    """Write a whole archive of that kind; returns its tables."""
    root.mkdir(exist_ok=True)
    ARCHIVES[name][0](root)
    if name == "cub":
        (root / "parts").mkdir()
        (root / "bounding_boxes.txt").write_text("".join(f"{i} 1.0 2.0 5.0 5.0\n" for i in range(1, 5)))
        parts = [f"{i} {k} {k}.0 3.5 1\n" for i in range(1, 5) for k in (1, 2)]
        (root / "parts/part_locs.txt").write_text("".join(parts))
        rows = [f"{file},0.1,0.2,0.8,0.9\n" for file in ("001.Wren/a.jpg", "002.Robin/c.jpg", "test/001.Wren/b.jpg")]
        (root / "boxes.csv").write_text("path,left,top,right,bottom\n" + "".join(rows))
    return [path for path in sorted(root.rglob("*")) if path.suffix in (".txt", ".mat", ".json", ".csv")]


@fuzzed(sample=20, count=800, broken=st.one_of(BROKEN))
def test_archives_tables(folder: Path, broken: tuple[str, Mapping[int, Damage | str]]) -> None:
    pytest.importorskip("scipy")
    (name, changes), root = broken, folder / "archive"
    tables = make_archive(name, root)
    for table, change in {tables[number % len(tables)]: change for number, change in changes.items()}.items():
        if not isinstance(change, str):
            table.write_bytes(change(table.read_bytes()))
            continue
        table.unlink()
        if change != "nothing":
            table.mkdir() if change == "folder" else table.symlink_to(table)

    def work() -> None:
        splits = read_all(root)
        images = splits.test or splits.train
        for source in (None, root / "boxes.csv") if name == "cub" else (None,):
            objects = read_objects(source, images)
            if objects is not None:
                assert objects.boxes.shape == (len(images), 4)

    reading(work, folder)
    if name == "cub":  # whatever became of its images
        for source, classes in ((root, ("a", "b")), (root / "boxes.csv", ("a",))):
            images = ImageList(root / "images", ("001.Wren/a.jpg",), (0,), classes)
            reading(lambda source=source, images=images: read_objects(source, images), folder)


def test_a_table_that_crashes_its_reader_is_refused(tmp_path: Path) -> None:
    scipy = pytest.importorskip("scipy.io")
    make_archive("cars", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scipy, "loadmat", crash)
        assert attempt(lambda: read_splits(tmp_path)) is REFUSED
    assert attempt(lambda: read_splits(tmp_path)) is not REFUSED


def crash(*args: object, **how: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
