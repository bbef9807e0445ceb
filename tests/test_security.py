"""What SECURITY.md promises, promise by promise."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from markupsafe import escape

from fastcr import evaluate, search, train
from fastcr.data.layouts import read_splits
from fastcr.errors import UsageError
from fastcr.output.sheets import POLICY
from fastcr.runs.checkpoint import save_weights
from tests.output.test_sheets import Page
from tests.shared import ROOT, TINY, Trap

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_STEP = [*TINY, "--run.steps", "1"]
CLASS, FILE = "<script>alert(1)", "\"><img src=x onerror=alert('2')>&amp;.jpg"


# no code from data: what the readers do


def test_settings_with_python_objects_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    trap, text = tmp_path / "trap", f"run:\n  seed: !!python/object/apply:os.mkdir [{tmp_path}/trap]\n"
    yaml.unsafe_load(text)
    trap.rmdir()  # so that is what the text would do
    (tmp_path / "config.yaml").write_text(text)
    assert f"{tmp_path}/config.yaml is broken" in refused(train.main, "--resume", tmp_path)
    assert not trap.exists()


def test_pickled_objects_in_an_index_are_refused(place: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = shutil.copytree(place / "out", tmp_path / "out")
    for array in out.glob("*.npy"):
        np.save(array, np.array([Trap(tmp_path / "trap")]))
        _ = np.load(array, allow_pickle=True)
        (tmp_path / "trap").rmdir()
    line = refused(search.main, out, place / "birds")
    assert ".npy is missing or broken" in line
    assert not (tmp_path / "trap").exists()


# no network, no other programs, nothing written elsewhere: a whole run, watched from inside

# Appends a line to a log for whatever leaves the process: sockets that are not local, programs. Forked workers write
# into the same log.
GUARD = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")
NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")

def note(kind, what):
    text = f"{kind} {what}".replace("\\n", " ")
    os.write(log, os.fsencode(text + "\\n"))

def hook(event, args):
    if event in NAMES or event in NETWORK and isinstance(args[1], tuple):
        note("network", args)
        raise OSError(f"{event}: no network in this test")
    if event in PROGRAMS:
        note("program", args[:2])

sys.addaudithook(hook)
"""
COMMANDS = """
import json
from fastcr import embed, report, search, train, visualize
for name, args in json.loads(sys.argv[2]):
    globals()[name].main(args)
note("control", "from here on all is forbidden, to see that it is noticed")
import socket, subprocess
open("control", "w").close()
for act in (lambda: socket.create_connection(("127.0.0.1", 9)), lambda: socket.getaddrinfo("example.org", 80),
            lambda: subprocess.run(["true"]), lambda: os.system("true")):
    try:
        act()
    except OSError:
        pass
"""


def files_of(*folders: Path) -> dict[str, tuple[int, int]]:
    facts = {str(file): file.stat() for folder in folders for file in folder.rglob("*") if file.is_file()}
    return {name: (fact.st_size, fact.st_mtime_ns) for name, fact in facts.items()}


@pytest.fixture(scope="module")
def place(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `home`, `here`, `run` and more, of training, measures, a report, embeddings, a search and maps of birds.

    Their names are hostile. `log` says what left the process, `changed` which files of `home`, `here` and `birds` are
    not as they were.
    """
    place = tmp_path_factory.mktemp("watched")
    root, run, out = place / "birds", place / "run", place / "out"
    for split in ("train", "test"):
        for i, kind in enumerate(sorted((birds / split).iterdir())[:4]):
            folder = root / split / (kind.name if i else CLASS)
            folder.mkdir(parents=True)
            for number, file in enumerate(sorted(kind.iterdir())):
                shutil.copyfile(file, folder / f"{number}{FILE if i == 0 else '.jpg'}")
    for name in ("home", "temp", "here"):
        (place / name).mkdir()
    cpu = ["--data.workers", "0", "--run.device", "cpu"]
    commands = [
        ("train", [*ONE_STEP, "--data.root", root, "--run.dir", run, "--data.workers", "1"]),
        ("report", [run, "--run.device", "cpu"]),
        ("visualize", [run, "--run.device", "cpu"]),
        ("embed", [run, root, "--out", out, *cpu]),
        ("search", [out, root, "--out", out / "search.html", "--run.device", "cpu"]),
    ]
    watched = [place / name for name in ("home", "here", "birds")]
    before = files_of(*watched)
    arguments = [place / "log", json.dumps([(name, list(map(str, args))) for name, args in commands])]
    process = subprocess.run(
        [sys.executable, "-c", GUARD + COMMANDS, *arguments],
        cwd=place / "here", capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
             "OMP_NUM_THREADS": "1", "HOME": str(place / "home"), "TMPDIR": str(place / "temp")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    after = files_of(*watched)
    changed = (name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    (place / "changed").write_text("\n".join(changed), errors="surrogateescape")
    return place


def test_nothing_leaves_the_process(place: Path) -> None:
    """No network, and no other programs but those with which libraries look around when they are imported."""
    log, _, control = f"\n{(place / 'log').read_text(errors='surrogateescape')}".partition("\ncontrol ")
    for kind in ("network", "program"):
        assert control.count(f"\n{kind} ") >= 2  # it would have been noticed
    triton = "program ('/sbin/ldconfig', ['/sbin/ldconfig', '-p'])"  # it asks where CUDA's library lies
    assert [line for line in log.splitlines() if line and not line.startswith(triton)] == []


def test_files_are_written_in_the_named_folders_and_the_cache(place: Path) -> None:
    changed = (place / "changed").read_text().splitlines()
    changed.remove(f"{place}/here/control")  # it would have been noticed
    assert all(name.startswith(f"{place}/home/.cache/fastcr/") for name in changed), changed


def test_weights_that_name_a_model_elsewhere_are_refused(
    birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """timm takes the names of models on a hub; a weights file must not make it fetch one."""
    pytest.importorskip("timm")

    def no_network(*args: object) -> None:
        raise AssertionError(f"the network was asked for: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    file = tmp_path / "weights.safetensors"
    for name in ("hf-hub:someone/model", "local-dir:/tmp/x", "https://example.org/x.pth"):
        facts = {"backbone": f"timm:{name}", "last_stage": "layer4", "stem_maxpool": True, "detectors": 0,
                 "temperature": 0.4, "attention": "softmax", "image_size": 32}  # fmt: skip
        save_weights(file, {"backbone.conv1.weight": torch.ones(2)}, facts)
        assert f"no encoder 'timm:{name}'" in refused(evaluate.main, file, "--data.root", birds)


# names are only names


def test_a_report_of_hostile_names_is_harmless(place: Path) -> None:
    text = (place / "run" / "report.html").read_text()
    found = Page(text)
    assert not {tag for tag, _ in found.tags} & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]
    assert f'http-equiv="Content-Security-Policy" content="{escape(POLICY)}"' in text
    assert CLASS in found.words


# what archives, shards and indexes name stays inside them


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **more: Any) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for key, value in more.items():
        setattr(entry, key, value)
    tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def hostile_shard(flat: Path, tmp_path: Path) -> Iterator[Path]:
    """A shard of eight sound images with names that lead out of it, and of links and holes; a secret beside it."""
    root, pictures = tmp_path / "deep" / "shards", sorted(flat.iterdir())
    root.mkdir(parents=True)
    shutil.copyfile(pictures[20], tmp_path / "secret.jpg")
    names = ["../../out.jpg", "/out.jpg", f"{tmp_path}/out.jpg", "a/../../../out2.jpg", "~/x.jpg", "$HOME/x.jpg"]
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for name, picture in zip(names, pictures, strict=False):
            add(tar, name, picture.read_bytes())
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            add(tar, f"link{kind.decode()}.jpg", type=kind, linkname="../../secret.jpg")
        add(tar, "pipe.jpg", type=tarfile.FIFOTYPE)
        add(tar, "device.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        holes = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**50)}
        add(tar, "holes.jpg", b"0\n".ljust(512, b"\0"), pax_headers={**holes, "GNU.sparse.name": "holes.jpg"})
    before = {*files_of(tmp_path)}
    yield root
    made = {name for name in files_of(tmp_path) if not Path(name).is_relative_to(tmp_path / "run")}
    assert made <= before


def test_members_of_a_shard_stay_inside_it(hostile_shard: Path, tmp_path: Path) -> None:
    images = read_splits(hostile_shard).train
    assert len(images) == 6
    assert all(images.path(i).startswith(f"{hostile_shard}/train-0.tar/") for i in range(6))
    secret = (tmp_path / "secret.jpg").read_bytes()
    assert secret not in [images.read(i) for i in range(6)]
    args = [*ONE_STEP, "--optim.batch_size", "6", "--data.root", hostile_shard, "--run.dir", tmp_path / "run"]
    train.main([str(arg) for arg in args])


@pytest.mark.parametrize("name", ["{tmp}/secret.jpg", "001.Wren/../../../secret.jpg"])
def test_tables_of_an_archive_name_nothing_outside_it(flat: Path, tmp_path: Path, name: str) -> None:
    root, picture = tmp_path / "archive", next(flat.iterdir())
    name = name.format(tmp=tmp_path)
    (root / "images" / "001.Wren").mkdir(parents=True)
    shutil.copyfile(picture, tmp_path / "secret.jpg")
    shutil.copyfile(picture, root / "images" / "001.Wren" / "a.jpg")
    (root / "images.txt").write_text(f"1 001.Wren/a.jpg\n2 {name}\n")
    (root / "train_test_split.txt").write_text("1 0\n2 1\n")
    (root / "image_class_labels.txt").write_text("1 1\n2 1\n")
    with pytest.raises(UsageError, match="names an image outside"):
        read_splits(root)
