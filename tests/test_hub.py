"""`hf://` against a stand-in for the Hub, with huggingface_hub itself in a process of its own."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcr import UsageError, export, load
from tests.shared import start, write_weights

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: the files of the one that was exported, and what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {"me/empty": {}}
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The part of the Hub's API that huggingface_hub uses to fetch a file."""

    server: Hub

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path == "/stop":
            self.server.shutdown()
            self.server.server_close()
            self.answer(200)
            return
        path = self.path.partition("?")[0]
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", path)
        if not found:  # what the library would like to know besides
            self.answer(404)
            return
        repo, kind, revision, name = found.groups()
        files = self.server.repos.get(repo)
        if files is None:
            self.answer(401, X_Error_Code="RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        elif kind == "revision":
            self.answer(200, {"id": repo, "sha": COMMIT, "siblings": []})
        elif kind == "tree":
            listed = ((name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items())
            self.answer(200, [{"type": "file", "path": n, "size": size, "oid": oid} for n, size, oid in listed])
        else:
            etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            self.answer(200, files[name], ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, form: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "weights.safetensors")


@pytest.fixture
def server(weights: Path, tmp_path: Path) -> Iterator[Hub]:
    export.main([str(weights), "--format", "hub", "--out", str(tmp_path / "hub")])
    with Hub() as found:
        found.repos["me/birds"] = {file.name: file.read_bytes() for file in (tmp_path / "hub").iterdir()}
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def in_process(code: str, tmp_path: Path, address: str) -> str:
    """What `code` prints, with the Hub at `address`."""
    place = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
    less = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # the Hub's own storage has no stand-in
    # huggingface_hub reads them when it is imported
    process = start("-c", f"import sys, fastcr, torch\n{code}", fresh=False, **place, **less)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


# from here on nobody answers
STOP = """
import os, urllib.request
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/stop").close()
"""


def test_what_is_exported_is_what_is_loaded(server: Hub, weights: Path, tmp_path: Path) -> None:
    code = f"""
images = torch.rand(2, 3, 32, 32)
mine = fastcr.load({str(weights)!r})(images)
for address in ("hf://me/birds", "hf://me/birds@{COMMIT}"):
    theirs = fastcr.load(address)(images)
    print(all(torch.equal(a, b) for a, b in zip(mine, theirs)))
{STOP}
print(fastcr.load("hf://me/birds").image_size)  # from the cache
"""
    assert in_process(code, tmp_path, server.address).splitlines() == ["True", "True", "32"]
    assert not [asked for asked in server.asked if "README" in asked]


def test_commands_take_an_address_and_write_here(server: Hub, tmp_path: Path) -> None:
    here, images = tmp_path / "here", tmp_path / "images"
    here.mkdir()
    server.repos["me/birds"] = {"model.safetensors": write_weights(tmp_path / "weights.safetensors").read_bytes()}
    for label in ("a", "b"):
        (images / label).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng([i, ord(label)]).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / label / f"{i}.png")
    code = f"""
import os
from fastcr import embed, evaluate, export, search, visualize
os.chdir({str(here)!r})
address, images = "hf://me/birds", {str(images)!r}
embed.main([address, images, "--out", "vectors", "--data.workers", "0"])
search.main(["vectors", images + "/a/0.png", "--k", "1", "--encoder", address])
visualize.main([address, images])
export.main([address, "--format", "safetensors"])
evaluate.main([address, "--data.root", images, "--data.workers", "0"])
"""
    assert "results: birds-results.json" in in_process(code, tmp_path, server.address)
    written = {"vectors", "search.html", "attention.png", "model-export.safetensors", "birds-results.json"}
    assert {path.name for path in here.iterdir()} == written


def test_each_thing_that_goes_wrong_is_one_line(server: Hub, tmp_path: Path) -> None:
    code = f"""
def said(address):
    try:
        fastcr.load("hf://" + address)
    except fastcr.UsageError as error:
        print(error)
for address in ("me/nothing", "me/empty", "me/empty@v9"):
    said(address)
{STOP}
said("me/birds")
"""
    assert in_process(code, tmp_path, server.address).splitlines() == [
        "hf://me/nothing cannot be fetched: no such repository, or it is private: hf auth login",
        "hf://me/empty cannot be fetched: there is no model.safetensors in it",
        "hf://me/empty@v9 cannot be fetched: there is no such revision",
        "hf://me/birds cannot be fetched: no connection to the Hub",
    ]


@pytest.mark.parametrize("address", ["hf://birds", "hf://me/birds/model"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"hf://OWNER/NAME or hf://OWNER/NAME@REVISION"):
        load(address)
