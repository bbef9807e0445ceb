"""What SECURITY.md promises, promise by promise."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
import yaml
from markupsafe import escape
from PIL import Image

from fastcr import evaluate, train
from fastcr.config import Config, DataConfig
from fastcr.data.layouts import read_splits
from fastcr.data.shards import list_samples
from fastcr.errors import UsageError
from fastcr.output.sheets import POLICY, Section, Tile, html_page
from fastcr.output.summary import run_of
from fastcr.report import page_of
from fastcr.runs.checkpoint import save_weights
from tests.shared import ROOT, TINY, Trap

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_STEP = [*TINY, "--run.steps", "1"]
CLASS, FILE = "<script>alert(1)", "\"><img src=x onerror=alert('2')>&amp;.jpg"


# no code from data, no shell: what the source does not contain

CODE = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads",
        "shelve.open", "joblib.load", "dill.load", "dill.loads", "pandas.read_pickle", "torch.hub.load", "yaml.load",
        "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader"}  # fmt: skip
SHELL = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}


def dangers(source: str) -> list[str]:
    """Names in `source` that run code or a shell, and calls that may, each with its line."""
    tree, imported, found = ast.parse(source), dict[str, str](), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def name_of(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{name_of(node.value)}.{node.attr}"
        return imported.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        loaded = isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load)
        if loaded and name_of(node) in CODE | SHELL:
            found.append(f"{node.lineno}: {name_of(node)}")  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            name, given = name_of(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if (
                (name in ("torch.load", "torch.hub.load_state_dict_from_url") and given.get("weights_only") != "True")
                or (name == "numpy.load" and given.get("allow_pickle", "False") != "False")
                or given.get("shell", "False") != "False"
            ):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "exec(text)", "f = eval", "import os\nos.system('ls')", "from os import system as s\ns('ls')",
        "import pickle as p\np.loads(b'')", "from pickle import Unpickler\nUnpickler(file)",
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=False)", "from torch import load\nload(file)",
        "import torch\ntorch.load(file, weights_only=flag)", "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import numpy as np\nnp.load(file, allow_pickle=True)", "import numpy as np\nnp.load(file, allow_pickle=flag)",
        "import subprocess\nsubprocess.run('ls', shell=True)", "run('ls', shell=flag)",
    ],
)  # fmt: skip
def test_the_scan_sees(source: str) -> None:
    assert dangers(source)


def test_the_scan_passes_over_what_is_harmless() -> None:
    assert not dangers(
        "import re, pickle, torch, yaml\nimport numpy as np\nmodel.eval()\nre.compile('a')\ntorch.compile(model)\n"
        "torch.load(file, weights_only=True)\nnp.load(file)\nyaml.safe_load(text)\ncompile: bool = True\n"
        "try: f()\nexcept pickle.UnpicklingError: pass\nrun(['ls'], shell=False)\n"
    )


def test_no_source_runs_code_from_data_or_a_shell() -> None:
    files = [file for part in ("fastcr", "kernels", "bench", "examples") for file in (ROOT / part).rglob("*.py")]
    assert len(files) > 50
    assert {str(file): found for file in files if (found := dangers(file.read_text()))} == {}


# no code from data: what the readers do


def test_settings_with_python_objects_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    trap, text = tmp_path / "trap", f"run:\n  seed: !!python/object/apply:os.mkdir [{tmp_path}/trap]\n"
    yaml.unsafe_load(text)
    trap.rmdir()  # so that is what the text would do
    (tmp_path / "config.yaml").write_text(text)
    assert f"{tmp_path}/config.yaml is broken" in refused(train.main, "--resume", tmp_path)
    assert not trap.exists()


def test_pickled_objects_in_the_cache_are_refused(flat: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    args = [*ONE_STEP, "--data.root", flat, "--data.cache", "disk", "--data.cache_dir", tmp_path / "cache"]
    train.main([*map(str, args), "--run.dir", str(tmp_path / "first")])
    (index,) = (tmp_path / "cache").glob("*/layout.npz")
    np.savez(index, starts=np.array([Trap(tmp_path / "trap")]), sizes=np.zeros(1), broken=np.zeros(1))
    _ = np.load(index, allow_pickle=True)["starts"]
    (tmp_path / "trap").rmdir()
    line = refused(train.main, *args, "--run.dir", tmp_path / "second")
    assert f"{index.parent} is broken: remove it" in line
    assert not (tmp_path / "trap").exists()
    assert not (tmp_path / "second").exists()


def test_code_in_downloaded_weights_is_refused(
    flat: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in torch's cache folder is as foreign as any other."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.get_model_weights("resnet18")["IMAGENET1K_V1"].url
    file = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save({"conv1.weight": Trap(tmp_path / "trap")}, file)
    args = [*ONE_STEP, "--data.root", flat, "--run.dir", tmp_path / "run", "--model.weights", "imagenet"]
    try:
        assert str(file) in refused(train.main, *args)
    finally:
        assert not (tmp_path / "trap").exists()


# no network, no other programs, nothing written elsewhere: a whole run, watched from inside

# Appends a line to a log for whatever leaves the process: files opened for writing or changed otherwise, sockets that
# are not local, programs. Forked workers write into the same log.
GUARD = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename": (0, 1), "os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,), "os.link": (1,),
           "os.symlink": (1,), "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,)}
NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")
NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")

def note(kind, what):
    text = f"{kind} {what}".replace("\\n", " ")
    os.write(log, os.fsencode(text + "\\n"))

def path_of(path, folder):
    path = os.fsdecode(path)
    return path if os.path.isabs(path) or folder == -1 else f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"

def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITING:
        note("write", os.path.abspath(os.fsdecode(args[0])))
    elif event in CHANGES:
        for place in CHANGES[event]:
            if not isinstance(args[place], int):
                numbers = [arg for arg in args[2:] if isinstance(arg, int)] if len(CHANGES[event]) > 1 else args[-1:]
                note("write", os.path.abspath(path_of(args[place], numbers[place] if len(numbers) > place else -1)))
    elif event in NAMES or event in NETWORK and isinstance(args[1], tuple):
        note("network", args)
        raise OSError(f"{event}: no network in this test")
    elif event in PROGRAMS:
        note("program", args[:2])

sys.addaudithook(hook)
"""
COMMANDS = """
import json
from fastcr import embed, evaluate, report, search, train, visualize
for name, args in json.loads(sys.argv[2]):
    globals()[name].main(args)
note("control", "from here on all is forbidden, to see that it is noticed")
import socket, subprocess
for act in (lambda: socket.create_connection(("127.0.0.1", 9)), lambda: socket.getaddrinfo("example.org", 80),
            lambda: subprocess.run(["true"]), lambda: os.system("true"), lambda: open("elsewhere", "w").close(),
            lambda: os.rename("elsewhere", "there"), lambda: os.remove("there")):
    try:
        act()
    except OSError:
        pass
"""


class Watched(NamedTuple):
    """What a run of several commands did."""

    place: Path  # the folders home, temp, here (the working folder), run and out
    log: list[tuple[str, str]]  # kind and what
    control: list[tuple[str, str]]  # of what is forbidden
    changed: set[str]  # files that came, went or changed outside run and out


def files_of(*folders: Path) -> dict[str, tuple[int, int]]:
    facts = {str(file): file.stat() for folder in folders for file in folder.rglob("*") if file.is_file()}
    return {name: (fact.st_size, fact.st_mtime_ns) for name, fact in facts.items()}


@pytest.fixture(scope="module")
def watched(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Training, every measure, a report, embeddings, a search and maps of birds with hostile names."""
    place = tmp_path_factory.mktemp("watched")
    root, run, out = Path(shutil.copytree(birds, place / "birds")), place / "run", place / "out"
    for split in ("train", "test"):
        first = sorted((root / split).iterdir())[0]
        for i, file in enumerate(sorted(first.iterdir())):
            file.rename(file.with_name(f"{i}{FILE}"))
        first.rename(first.with_name(CLASS))
    for name in ("home", "temp", "here"):
        (place / name).mkdir()
    cpu = ["--data.workers", "0", "--run.device", "cpu"]
    commands = [
        ("train", [*ONE_STEP, "--data.root", root, "--run.dir", run, "--data.workers", "1", "--data.cache", "disk"]),
        ("evaluate", [run, *cpu, "--linear.enabled", "False"]),
        ("report", [run, *cpu]),
        ("visualize", [run, "--run.device", "cpu"]),
        ("embed", [run, root, "--out", out, *cpu]),
        ("search", [out, root, "--out", out / "search.html", "--run.device", "cpu"]),
    ]
    before = files_of(*(place / name for name in ("home", "here", "birds")))
    process = subprocess.run(
        [sys.executable, "-c", GUARD + COMMANDS, place / "log",
         json.dumps([(name, list(map(str, args))) for name, args in commands])],
        cwd=place / "here", capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(place / "home"), "TMPDIR": str(place / "temp"),
             "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    after = files_of(*(place / name for name in ("home", "here", "birds")))
    lines = (place / "log").read_text(errors="surrogateescape").splitlines()
    log = [(kind, what) for kind, _, what in (line.partition(" ") for line in lines)]
    at = [kind for kind, _ in log].index("control")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return Watched(place, log[:at], log[at + 1 :], changed)


def test_the_guard_sees_what_is_forbidden(watched: Watched) -> None:
    kinds = [kind for kind, _ in watched.control]
    assert kinds.count("network") >= 2
    assert kinds.count("program") >= 2
    here = watched.place / "here"
    assert {what for kind, what in watched.control if kind == "write"} >= {f"{here}/elsewhere", f"{here}/there"}


def test_nothing_goes_over_the_network(watched: Watched) -> None:
    assert [what for kind, what in watched.log if kind == "network"] == []


def test_no_other_program_is_started(watched: Watched) -> None:
    # Triton, when it is imported, asks where CUDA's library lies; matplotlib, the first time, which fonts there are
    libraries = ("('/sbin/ldconfig', ['/sbin/ldconfig', '-p'])", "('fc-list', ['fc-list', ")
    assert [what for kind, what in watched.log if kind == "program" and not what.startswith(libraries)] == []


def test_files_are_written_in_the_named_folders_the_cache_and_the_temporary_folder(watched: Watched) -> None:
    place = watched.place
    allowed = [place / "run", place / "out", place / "home" / ".cache" / "fastcr", place / "temp"]
    written = {Path(what) for kind, what in watched.log if kind == "write"} - {Path("/dev/null")}
    elsewhere = [str(path) for path in written if not any(path.is_relative_to(folder) for folder in allowed)]
    # a folder that has to be there for an allowed one to be made
    assert set(elsewhere) <= {str(place / "home" / ".cache")}
    for folder in allowed[:3]:
        assert any(path.is_relative_to(folder) for path in written), folder
    # libraries may write past Python: what lies in the home, the data and the working folder afterwards
    assert all(name.startswith(f"{place}/home/.cache/fastcr/") for name in watched.changed), watched.changed
    assert watched.changed


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
    for name in ("hf-hub:someone/model", "hf_hub:someone/model.v1", "local-dir:/tmp/x", "https://example.org/x.pth"):
        facts = {"backbone": f"timm:{name}", "last_stage": "layer4", "stem_maxpool": True, "detectors": 0,
                 "temperature": 0.4, "attention": "softmax", "image_size": 32}  # fmt: skip
        save_weights(file, {"backbone.conv1.weight": torch.ones(2)}, facts)
        assert "timm has no model" in refused(evaluate.main, file, "--data.root", birds)


# names are only names


class Page(HTMLParser):
    """The tags and attributes of a page, and the words in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names, self.attributes, self.words = set[str](), set[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words += data


def is_harmless(text: str) -> bool:
    found = Page(text)
    active = {"script", "iframe", "object", "embed", "link", "base", "form"}
    policy = f'http-equiv="Content-Security-Policy" content="{escape(POLICY)}"'
    return not found.names & active and not any(name.startswith("on") for name in found.attributes) and policy in text


@pytest.mark.parametrize("name", [CLASS, FILE, "</title></style><script>", "' onload='x", "]]><svg/onload=x>", "\0<b>"])
def test_pages_show_names_as_text(name: str) -> None:
    config = Config(preset=name, data=DataConfig(root=Path(name)))
    scores = {"rank1": 1.0, "rank5": 2.0, "mAP": 1.0}
    results = {"folder": name, "images": name, "classes": name, "retrieval": {name: scores}}
    images = [Section(name, name, rows=[[Tile(name, [Image.new("RGB", (8, 8))])]])]
    run = run_of(name, config, [], results, images)
    for runs in ([run], [run, run._replace(name=f"{name} (2)", config=Config())]):
        text = html_page(*page_of(runs))
        assert is_harmless(text)
        assert Page(text).words.count(name.replace("\0", "\ufffd")) >= 6
        assert not is_harmless(text.replace("&lt;", "<").replace("&#39;", "'").replace("&#34;", '"') + "<script>")


def test_a_report_of_hostile_names_is_harmless(watched: Watched) -> None:
    text = (watched.place / "run" / "report.html").read_text()
    assert is_harmless(text)
    assert CLASS in Page(text).words


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
    names = ["../../out.jpg", "/out.jpg", f"{tmp_path}/out.jpg", "a/../../../out2.jpg", "x/..//y.jpg", "~/x.jpg",
             "$HOME/x.jpg", "plain.jpg"]  # fmt: skip
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
    assert len(images) == len(list_samples(hostile_shard / "train-0.tar")) == 8
    assert all(images.path(i).startswith(f"{hostile_shard}/train-0.tar/") for i in range(8))
    secret = (tmp_path / "secret.jpg").read_bytes()
    assert secret not in [images.read(i) for i in range(8)]
    train.main([*ONE_STEP, "--data.root", str(hostile_shard), "--run.dir", str(tmp_path / "run")])


def test_a_label_nested_without_end_is_refused(flat: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        add(tar, "a.jpg", next(flat.iterdir()).read_bytes())
        add(tar, "a.json", b"[" * 200_000)
    line = refused(train.main, *ONE_STEP, "--data.root", tmp_path, "--run.dir", tmp_path / "run")
    assert "'a.json' holds no object" in line


@pytest.mark.parametrize("name", ["../../secret.jpg", "{tmp}/secret.jpg", "001.Wren/../../../secret.jpg"])
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


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "trap")))
    assert (tmp_path / "trap").is_dir()
