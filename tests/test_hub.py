"""`hf://` and `--push` against a stand-in for the Hub, with huggingface_hub itself in a process of its own."""

from __future__ import annotations

import base64
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

from fastcr import UsageError, load
from tests.shared import start, write_weights

pytest.importorskip("huggingface_hub")
TOKEN = "hf_of_me"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: their files, each in its one revision."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {"me/empty": {}}
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The part of the Hub's API that huggingface_hub uses to push a folder and to fetch a file."""

    server: Hub

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command in ("GET", "HEAD"):
            self.file()
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.command == "POST":
            self.answer(401, {"error": "Invalid username or password."})
        else:
            self.change(self.path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def file(self) -> None:
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

    def change(self, path: str, body: bytes) -> None:
        repos, content = self.server.repos, body.decode()
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo.startswith("other/"):
                self.answer(403, {"error": "You don't have the rights to create a model under other"})
            else:
                known = repo in repos
                repos.setdefault(repo, {})
                self.answer(409 if known else 200, {"url": f"{self.server.address}/{repo}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [each["path"] for each in json.loads(content)["files"]]
            self.answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in files]})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            files = repos[found[1]]
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.address}/{found[1]}/commit/{COMMIT}"
            self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self.answer(501)

    def log_message(self, form: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def in_process(code: str, tmp_path: Path, address: str, token: str = TOKEN) -> str:
    """What `code` prints, with the Hub at `address`."""
    place = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
    less = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # the Hub's own storage has no stand-in
    code = f"import sys, fastcr, torch\nfrom fastcr import export\n{code}"
    process = start("-c", code, fresh=False, **place, **less)  # huggingface_hub reads them when it is imported
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


# from here on nobody answers
STOP = """
import os, urllib.request
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/stop").close()
"""
# what a call leaves: its error, on one line
CATCH = """
def said(act):
    try:
        act()
    except fastcr.UsageError as error:
        print(error)
def pushed(repo, out):
    export.write_hub(encoder, out, None, repo)
    print("pushed:", export.push(out, repo))
"""


def test_what_is_pushed_is_what_is_loaded(server: Hub, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "weights.safetensors")
    out = tmp_path / "hub"
    code = f"""
for out in ({str(out)!r}, {str(out)!r} + "-again"):
    export.main([{str(weights)!r}, "--format", "hub", "--out", out, "--push", "me/birds"])
images = torch.rand(2, 3, 32, 32)
mine = fastcr.load({str(weights)!r})(images)
for address in ("hf://me/birds", "hf://me/birds@{COMMIT}"):
    theirs = fastcr.load(address)(images)
    print(all(torch.equal(a, b) for a, b in zip(mine, theirs)))
{STOP}
print(fastcr.load("hf://me/birds").image_size)  # from the cache
"""
    lines = in_process(code, tmp_path, server.address).splitlines()
    pushed = f"pushed: {server.address}/me/birds"
    assert lines == [f"exported: {out}", pushed, f"exported: {out}-again", pushed, "True", "True", "32"]
    assert server.repos["me/birds"] == {file.name: file.read_bytes() for file in out.iterdir()}
    assert 'fastcr.load("hf://me/birds")' in server.repos["me/birds"]["README.md"].decode()


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
from fastcr import embed, evaluate, search, visualize
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
    weights = write_weights(tmp_path / "weights.safetensors")
    code = f"""{CATCH}
from pathlib import Path
encoder = fastcr.load({str(weights)!r})
for address in ("me/nothing", "me/empty", "me/empty@v9"):
    said(lambda: fastcr.load("hf://" + address))
said(lambda: pushed("other/birds", Path({str(tmp_path / "a")!r})))
import os
os.environ["HF_TOKEN"] = "hf_of_nobody"
said(lambda: pushed("me/birds", Path({str(tmp_path / "b")!r})))
{STOP}
said(lambda: fastcr.load("hf://me/birds"))
said(lambda: pushed("me/birds", Path({str(tmp_path / "c")!r})))
"""
    said = in_process(code, tmp_path, server.address).splitlines()
    written = "is written, but not pushed to"
    assert said == [
        "hf://me/nothing cannot be fetched: no such repository, or it is private: hf auth login",
        "hf://me/empty cannot be fetched: there is no model.safetensors in it",
        "hf://me/empty@v9 cannot be fetched: there is no such revision",
        f"{tmp_path}/a {written} other/birds: your token does not allow it; later: hf upload other/birds {tmp_path}/a",
        f"{tmp_path}/b {written} me/birds: the Hub does not take your token; later: hf upload me/birds {tmp_path}/b",
        "hf://me/birds cannot be fetched: no connection to the Hub",
        f"{tmp_path}/c {written} me/birds: no connection to the Hub; later: hf upload me/birds {tmp_path}/c",
    ]


@pytest.mark.parametrize("address", ["hf://birds", "hf://me/birds/model"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"hf://OWNER/NAME or hf://OWNER/NAME@REVISION"):
        load(address)
