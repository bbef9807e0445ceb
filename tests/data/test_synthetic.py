"""The embedded birds: same bytes for the same seed, whole sets only, species that differ in body and plumage."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastcr.data import synthetic
from fastcr.data.birds import Species
from fastcr.data.synthetic import CLASSES, draw_bird, write_synthetic
from fastcr.errors import UsageError

SMALL = {"train_per_class": 2, "test_per_class": 1}


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("cache") / "birds", **SMALL)


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*.*")}


def test_another_drawing_needs_another_version() -> None:
    """Figures that documents quote depend on the drawn pictures, and caches keep them by their version."""
    drawn_anew = [drawn(kind, seed) for seed, kind in enumerate(CLASSES)]
    found = [np.mean([picture.mean() for picture in drawn_anew]), np.mean([picture.std() for picture in drawn_anew])]
    assert synthetic.VERSION == 3
    np.testing.assert_allclose(found, [120.907, 46.5591], atol=0.02)  # versions of PIL may round differently


def test_a_picture_depends_only_on_seed_split_class_and_index(birds: Path, tmp_path: Path) -> None:
    more = contents(write_synthetic(tmp_path / "more", train_per_class=3, test_per_class=1))
    few = contents(birds)
    boxes = more.pop("boxes.csv").splitlines()
    assert set(few.pop("boxes.csv").splitlines()) < set(boxes)
    assert len(boxes) == 1 + len(more)
    assert {name: more[name] for name in few} == few
    assert len(set(few.values())) == len(few)
    other = contents(write_synthetic(tmp_path / "other", seed=1, **SMALL))
    assert other.keys() == few.keys() | {"boxes.csv"}
    assert not set(other.values()) & set(few.values())


def drawn(kind: Species, seed: int) -> NDArray[np.float64]:
    return np.asarray(draw_bird(kind, np.random.default_rng(seed)), dtype=float)


def test_an_interrupted_write_leaves_no_set_and_stops_no_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "birds"
    calls = iter(range(5))

    def interrupted(*arguments: object) -> Image.Image:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return Image.new("RGB", (8, 8))

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "draw_bird", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_synthetic(root, **SMALL)
    assert not root.exists()
    leftover = tmp_path / ".birds-killed" / "birds" / "train" / CLASSES[0].name
    leftover.mkdir(parents=True)
    (leftover / "0000.jpg").write_bytes(b"half a pict")
    assert len(contents(write_synthetic(root, train_per_class=1, test_per_class=1))) == 41


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a complete synthetic set"):
        write_synthetic(tmp_path, **SMALL)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
