"""A half-written folder of embeddings, broken: the command makes the same files of it as without a stop, or refuses."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from PIL import Image

from fastcr import embed
from fastcr.data.images import ImageList
from fastcr.measures import embedding_files, embeddings
from tests.fuzz.damage import JSON, SHARE
from tests.fuzz.properties import REFUSED, attempt, contents, fuzzed
from tests.shared import write_weights

FILES = ["embeddings.safetensors", "encoder.json", "images.csv"]


def run(place: Path, out: Path) -> Any:
    """`fastcr embed` of the images in `place`, two a batch; what is done is on the disk after each."""
    command = [place / "weights.safetensors", place / "images", "--out", out, "--attention", "True"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "BATCH_SIZE", 2)
        patch.setattr(embeddings, "BATCH_SIZE", 2)
        patch.setattr(embedding_files, "COMMIT_SECONDS", 0.0)
        return attempt(lambda: embed.main([*map(str, command), "--run.device", "cpu", "--data.workers", "0"]))


@cache
def place() -> Path:
    """Folder with weights, images, `left` by a job that was stopped in its last batch, and `whole` by another."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    write_weights(folder / "weights.safetensors")
    (folder / "images").mkdir()
    for number in range(8):
        Image.effect_noise((40, 40), 20 + 20 * number).save(folder / "images" / f"{number}.png")
    rgb = ImageList.rgb

    def killed(images: ImageList, index: int, least: int) -> Image.Image:
        if index == 6:
            raise KeyboardInterrupt
        return rgb(images, index, least)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageList, "rgb", killed)
        with pytest.raises(AssertionError, match="exit status 130"):
            run(folder, folder / "left")
    assert run(folder, folder / "whole") is not REFUSED
    return folder


DAMAGE = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 1023)),
    st.tuples(st.just("shorter"), SHARE),
    st.tuples(st.just("longer"), st.binary(min_size=1, max_size=99)),
    st.tuples(st.sampled_from(["nothing", "folder"]), st.none()),
)


def spoil(file: Path, kind: str, value: Any) -> None:
    """Flip a bit of a header, or give a file another length; or put nothing, or a folder, in its place."""
    content = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "flip":
        header = bytearray(content[:128])
        if header:
            header[value % len(header)] ^= 1 << value % 8
        file.write_bytes(header + content[128:])
    elif kind != "nothing":
        file.write_bytes(content + value if kind == "longer" else content[: int(value * len(content))])


@fuzzed(sample=30, count=200, state=st.one_of(JSON, JSON, JSON, st.none()), which=st.integers(0, 9), damage=DAMAGE)
def test_half_written_embeddings(folder: Path, state: Any, which: int, damage: tuple[str, Any]) -> None:
    """The state may be anything, headers and lengths of the arrays too; of what is in their rows nothing is known."""
    out = shutil.copytree(place() / "left", folder / "out")
    (state_file,) = out.glob("partial/*.json")
    files = sorted(out.glob("partial/*"))
    assert len(files) > 3
    if state:
        state_file.write_bytes(state(state_file.read_bytes()))
    else:
        spoil(files[which % len(files)], *damage)
    lock, before = {out / "partial" / "lock": (0, None)}, contents(folder)
    if run(place(), out) is REFUSED:
        assert contents(folder) | lock == before | lock, "files have changed"
        return
    assert sorted(path.name for path in out.iterdir()) == FILES
    for name in FILES:
        assert (out / name).read_bytes() == (place() / "whole" / name).read_bytes(), f"another {name} came of it"


def test_a_changed_state_is_noticed(tmp_path: Path) -> None:
    """Numbers in the state, were they others, would lead to other files."""
    out = shutil.copytree(place() / "left", tmp_path / "out")
    (file,) = out.glob("partial/*.json")
    whole = file.read_text()
    numbers = list(re.finditer(r"\d+", whole))
    assert numbers
    for number in numbers[:: -(len(numbers) // 4)]:  # the last one, of the images that are done, among them
        file.write_text(whole[: number.start()] + str(int(number.group()) + 1) + whole[number.end() :])
        assert run(place(), out) is REFUSED
