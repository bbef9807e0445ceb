"""The page to search in: right answers, in a real browser too, and none for other sites and hostile files."""

from __future__ import annotations

import io
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastcr import browse, embed
from fastcr.encoders.encoder import load
from fastcr.output.embeddings import Stored, read_stored
from fastcr.runs.context import Context
from tests.shared import start, write_weights

testclient = pytest.importorskip("starlette.testclient")
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = ("--run.device", "cpu", "--run.precision", "fp32")
HOME = "http://127.0.0.1"


@pytest.fixture(scope="module")
def index(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test pictures and a copy of one of them, embedded; not to be changed."""
    place = tmp_path_factory.mktemp("browse")
    weights = write_weights(place / "weights.safetensors")
    shutil.copytree(birds / "test", place / "birds")
    first, second, *_ = sorted((place / "birds").glob("*/*.jpg"))
    shutil.copyfile(second, first)
    embed.main([*map(str, (weights, place / "birds", "--out", place / "out")), *CPU, "--data.workers", "0"])
    return place / "out"


@pytest.fixture(scope="module")
def stored(index: Path) -> Stored:
    return read_stored(index)


@pytest.fixture(scope="module")
def app(stored: Stored) -> Any:
    return browse.make_app(browse.Browser(stored, load(stored.facts["weights"]), Context()), "secret", "127.0.0.1")


@pytest.fixture
def client(app: Any) -> Iterator[Any]:
    with testclient.TestClient(app, base_url=HOME) as client:
        assert client.get("/?token=secret").status_code == 200  # its cookie is kept
        yield client


def file_of(stored: Stored, row: int) -> bytes:
    return Path(stored.facts["root"], stored.rows[row][0]).read_bytes()


def test_only_the_token_opens_the_page(app: Any) -> None:
    with testclient.TestClient(app, base_url=HOME) as client:
        for path in ("/", "/?token=wrong", "/?token=", "/image/0?token=secret", "/start", "/nothing"):
            assert client.get(path).status_code == 403, path
        page = client.get("/?token=secret")
        assert "HttpOnly" in page.headers["set-cookie"]
        assert "SameSite=strict" in page.headers["set-cookie"]
        assert "secret" not in page.text
        assert [client.get(path).status_code for path in ("/", "/image/0", "/start", "/nothing")] == [
            200,
            200,
            200,
            404,
        ]
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert client.get("/").headers["content-security-policy"] != policy  # another nonce each time


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 400),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": HOME, "sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_other_sites_get_nothing(headers: dict[str, str], status: int, client: Any) -> None:
    response = client.post("/search?row=0", headers=headers)
    assert response.status_code == status
    if status != 400:
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"


def test_pictures_are_served_by_row_alone(client: Any, stored: Stored) -> None:
    count = len(stored.rows)
    content = client.get(f"/image/{count - 1}?side=1024")
    assert content.headers["content-type"] == "image/jpeg"
    expected = Image.open(io.BytesIO(file_of(stored, count - 1))).size
    assert Image.open(io.BytesIO(content.content)).size == expected
    for path in (
        f"/image/{count}",
        "/image/-1",
        "/image/..%2f..%2fetc%2fpasswd",
        "/image/../../etc/passwd",
        "/image/x",
    ):
        assert client.get(path).status_code == 404, path


def test_search_by_row_by_picture_and_by_box(client: Any, stored: Stored) -> None:
    row = 7
    found = client.post(f"/search?row={row}").json()
    similar = stored.vectors @ stored.vectors[row]
    shown = [each["similarity"] for each in found["images"]]
    assert shown == pytest.approx(similar.sort(descending=True).values.tolist(), abs=1e-4)
    assert shown == pytest.approx([similar[each["row"]].item() for each in found["images"]], abs=1e-4)
    assert (found["query"]["path"], found["query"]["label"]) == stored.rows[row]
    sent = client.post("/search", content=file_of(stored, row)).json()["images"]
    assert sent[0]["row"] == row
    assert sent[0]["similarity"] == pytest.approx(1, abs=1e-3)
    # the part of a picture that evaluation sees of it, as a box, gives the picture itself
    wide, high = Image.open(io.BytesIO(file_of(stored, row))).size
    side = 7 / 8 * min(wide, high)
    box = ((wide - side) / 2 / wide, (high - side) / 2 / high, (wide + side) / 2 / wide, (high + side) / 2 / high)
    words = f"box={','.join(f'{each:.4f}' for each in box)}"
    for similar in (
        client.post(f"/search?row={row}&{words}"),
        client.post(f"/search?{words}", content=file_of(stored, row)),
    ):
        assert similar.json()["images"][0]["row"] == row
        assert similar.json()["images"][0]["similarity"] > 0.99
    corner = client.post(f"/search?row={row}&box=0,0,.2,.2").json()["images"]
    assert corner[0]["similarity"] < 0.99
    for wrong in ("box=0,0,2,2", "box=1,2", "box=0,0,nan,1", "box=.5,0,.5,1", "row=x"):
        answer = client.post(f"/search?{wrong}")
        assert (answer.status_code, len(answer.json()["error"].splitlines())) == (400, 1), wrong


def png(wide: int, high: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_hostile_files_are_refused_in_a_line(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, status, said in (
        (png(11_000, 10_000), 413, "more than 100 megapixels"),
        (png(100_000, 100_000), 400, "decompression bomb"),
        (png(1000, 1000), 400, "not a readable image"),
        (b"no picture", 400, "cannot identify"),
        (b"", 400, "cannot identify"),
    ):
        answer = client.post("/search", content=content)
        assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text
        assert "\n" not in answer.json()["error"]
    monkeypatch.setattr(browse, "UPLOAD", 10_000)
    assert client.post("/search", content=bytes(10_001)).status_code == 413
    parts = (bytes(1000) for _ in range(100))  # without a length
    assert client.post("/search", content=parts).status_code == 413


def wait(answer: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while "sets" not in (found := answer()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_near_copies_and_groups(client: Any, stored: Stored) -> None:
    found = wait(lambda: client.get("/sets/0.99").json())
    (copies,) = [each["images"] for each in found["sets"] if any(image["row"] == 0 for image in each["images"])]
    assert {0, 1} <= {image["row"] for image in copies}
    groups = wait(lambda: client.get("/sets/groups").json())
    assert sum(each["count"] for each in groups["sets"]) == len(stored.rows)
    assert client.get("/sets/0.123").status_code == 404


def test_without_the_server_the_extra_is_named(
    index: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setattr(browse, "uvicorn", None)
    assert 'pip install "fastcr[browse]"' in refused(browse.main, index)


def test_in_a_browser(index: Path, stored: Stored, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("there is no chromium")
    server = start("-m", "fastcr.browse", index, *CPU, fresh=True)
    try:
        address = server.stdout.readline().split()[2]
        (tmp_path / "mine.jpg").write_bytes(file_of(stored, 9))
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"] * (os.getuid() == 0))
            page, errors = browser.new_page(), []
            page.on("console", lambda message: errors.append(message.text))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(address)
            tiles, status = page.locator(".tile"), page.locator("#status")
            tiles.first.wait_for()
            assert "token" not in page.url
            page.keyboard.press("ArrowRight")  # the first, then the second, which is searched for
            page.keyboard.press("ArrowRight")
            page.keyboard.press("Enter")
            status.get_by_text("most similar, in").wait_for()
            assert "1.000" in tiles.first.inner_text()
            assert "#row=" in page.url
            page.set_input_files("#file", tmp_path / "mine.jpg")
            tiles.first.and_(page.locator(f"[title='{stored.rows[9][0]}']")).wait_for()
            picture = page.locator("#query").bounding_box()
            page.mouse.move(picture["x"] + 20, picture["y"] + 20)
            page.mouse.down()
            page.mouse.move(picture["x"] + 120, picture["y"] + 100)
            page.mouse.up()
            status.get_by_text("most similar to the box").wait_for()
            page.keyboard.press("Escape")
            status.get_by_text("most similar, in").wait_for()
            page.keyboard.press("2")
            page.locator("h2").first.wait_for()
            page.locator("#groups").click()
            status.get_by_text("groups").wait_for()
            page.go_back()
            assert errors == []
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(245, 246, 247)"
            page.emulate_media(color_scheme="dark")
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 22)"
            browser.close()
    finally:
        server.kill()
        server.communicate()
