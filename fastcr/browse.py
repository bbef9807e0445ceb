"""`fastcr browse EMBEDDINGS`: a local page to search an index in, by a picture or by a part of one.

Only who has the token of the printed address gets an answer (a cookie carries it on), only from pages of this server's
own, and only pictures of the index are served, by their row.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import secrets
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock, Thread
from typing import Any, BinaryIO

import torch
from PIL import Image

from fastcr.arguments import BrowseConfig, read_arguments
from fastcr.data.crops import enough
from fastcr.data.images import ImageList, read_rgb
from fastcr.encoders.encoder import Encoder
from fastcr.errors import UsageError, one_line
from fastcr.measures import near
from fastcr.output.embeddings import Stored, read_stored
from fastcr.output.gallery import Picture, as_evaluated, encode, spread
from fastcr.output.sheets import template_of
from fastcr.runs.command_line import one_line_errors
from fastcr.runs.context import Context
from fastcr.search import encoder_of

try:
    import uvicorn
    from anyio import CapacityLimiter, to_thread
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError:
    uvicorn = None  # type: ignore[assignment]

UPLOAD = 32 * 2**20  # bytes of a picture that is sent
PIXELS = 100_000_000  # of a picture that is decoded
NEAREST, START, SETS, OF_A_SET = 60, 48, 100, 12  # images shown of each kind
LIMITS = ("0.9", "0.95", "0.98", "0.99")  # similarities of near copies
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
POLICY = (
    "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; style-src 'nonce-{0}'; "
    "script-src 'nonce-{0}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Browser:
    """What the server's answers are made of; its methods run in threads, several at once."""

    def __init__(self, stored: Stored, encoder: Encoder, context: Context) -> None:
        self.stored, self.encoder, self.context = stored, encoder, context
        self.among = stored.vectors if stored.expanded is None else stored.expanded
        self.half = self.among.half()  # reads half as much memory, and errs by less than 1e-4
        self.sets, self.starting, self.computing = dict[str, dict[str, Any]](), Lock(), Lock()
        self.jpeg = lru_cache(1000)(self._jpeg)  # some 10 kB each, and up to 200 kB for the few large ones

    def known(self, row: int) -> int:
        """The row, if there is one."""
        if not 0 <= row < len(self.stored.rows):
            raise HTTPException(404, f"there is no image {row}")
        return row

    def picture(self, row: int, least: int) -> Image.Image:
        """The image of a row, its shorter side of `least` pixels or more if it has them; all of it for 0."""
        path = self.stored.rows[self.known(row)][0]
        try:
            return ImageList(Path(self.stored.facts["root"]), (path,), None, ()).rgb(0, least)
        except OSError:
            raise HTTPException(404, "this image is not there any more") from None

    def _jpeg(self, row: int, side: int) -> bytes:
        picture = self.picture(row, side)
        picture.thumbnail((side, side))
        picture.save(held := io.BytesIO(), "JPEG", quality=85)
        return held.getvalue()

    def named(self, row: int, **more: float) -> dict[str, Any]:
        """An image as the page shows it."""
        path, label = (text.encode(errors="surrogateescape").decode(errors="replace") for text in self.stored.rows[row])
        return {"row": row, "path": path, "label": label, **more}

    @torch.inference_mode()
    def search(self, row: int | None, sent: BinaryIO, box: Sequence[float] | None) -> dict[str, Any]:
        """The images nearest to that of a row, or to one that was sent, or to what is in a box on it."""
        if row is not None and not box:
            vector = self.among[self.known(row)]
        else:
            # in full where a part of it is looked for
            least = 0 if box else enough(self.encoder.image_size)
            picture = _decode(sent, least) if row is None else self.picture(row, least)
            seen = Picture("", as_evaluated(_cut(picture, box) if box else picture, self.encoder.image_size))
            vectors, _ = encode([seen], self.encoder, self.context, self.stored.facts["pooling"])
            vector = self.stored.queries(vectors)[0]
        likely = (self.half @ vector.half()).float().topk(min(4 * NEAREST, len(self.half))).indices
        best = (self.among[likely] @ vector).topk(min(NEAREST, len(likely)))
        near = zip(likely[best.indices].tolist(), best.values.tolist(), strict=True)
        found = {"images": [self.named(each, similarity=round(similar, 4)) for each, similar in near]}
        return found if row is None else found | {"query": self.named(row)}

    def start(self, name: str) -> dict[str, Any]:
        """Near copies or groups, or how far they are; computed from the first question on."""
        with self.starting:
            if name not in self.sets:
                self.sets[name] = {"done": 0.0}
                Thread(target=self._compute, args=(name,), daemon=True).start()
            return self.sets[name]

    def _compute(self, name: str) -> None:
        def show(items: Sequence[int]) -> Iterator[int]:
            for number, item in enumerate(items):
                self.sets[name] = {"done": number / len(items)}
                yield item

        vectors = self.stored.vectors
        with self.computing, torch.inference_mode():
            if name == "groups":
                found = near.groups(vectors, max(2, min(60, round((len(vectors) / 2) ** 0.5))))
            else:
                found = near.copies(vectors, float(name), show)
        first = [{"count": len(rows), "images": [*map(self.named, rows[:OF_A_SET])]} for rows in found[:SETS]]
        self.sets[name] = {"count": len(found), "sets": first}


def _decode(sent: BinaryIO, least: int) -> Image.Image:
    """A picture that somebody sent; nothing is decoded before its size is known to be sound."""
    try:
        with Image.open(sent) as picture:
            pixels = picture.width * picture.height
        sent.seek(0)
        if pixels <= PIXELS:
            return read_rgb(sent, "the picture", least)
    except Exception as error:  # decoders raise whatever the broken bytes lead them to
        raise HTTPException(400, one_line(error)) from None
    raise HTTPException(413, f"the picture has more than {PIXELS / 1e6:.0f} megapixels")


def _cut(picture: Image.Image, box: Sequence[float]) -> Image.Image:
    """The square around a box, as far as the picture reaches, of which an evaluation sees what is in the box."""
    (left, top, right, bottom), (wide, high) = box, picture.size
    side = max((right - left) * wide, (bottom - top) * high, 1) * 8 / 7
    across, down = min(side, wide), min(side, high)
    x = min(max((left + right) / 2 * wide - across / 2, 0), wide - across)
    y = min(max((top + bottom) / 2 * high - down / 2, 0), high - down)
    return picture.crop((int(x), int(y), max(int(x + across), int(x) + 1), max(int(y + down), int(y) + 1)))


async def _received(request: Request) -> BinaryIO:
    """The body of a request, in a temporary file; refused as soon as it is too large."""
    length, file = 0, tempfile.TemporaryFile()  # noqa: SIM115 (it ends with the request)
    large = HTTPException(413, f"the picture has more than {UPLOAD >> 20} MB")
    if int(request.headers.get("content-length", 0)) > UPLOAD:
        raise large
    async for part in request.stream():
        length += len(part)
        if length > UPLOAD:
            raise large
        file.write(part)
    file.seek(0)
    return file


def _asked(words: Mapping[str, str]) -> tuple[int | None, list[float] | None]:
    """The row and the box that an address names."""
    try:
        row = int(words["row"]) if "row" in words else None
        box = [float(side) for side in words["box"].split(",")] if "box" in words else None
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    if box and not (len(box) == 4 and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise HTTPException(400, "a box is left,top,right,bottom, as fractions of the picture's sides")
    return row, box


def make_app(browser: Browser, token: str, host: str) -> Starlette:
    """The server; no `token` (empty): everybody who reaches it gets answers."""
    rows, root = browser.stored.rows, Path(browser.stored.facts["root"])
    cookie = f"fastcr-{hashlib.sha256(token.encode()).hexdigest()[:12]}"  # the servers of a machine share cookies
    template = template_of("browse.html.jinja")
    pictures, encodings = CapacityLimiter(2), CapacityLimiter(2)  # at once

    async def page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        html = template.render(title=root.name, count=len(rows), limits=LIMITS, nonce=nonce)
        response = HTMLResponse(html, headers={"Content-Security-Policy": POLICY.format(nonce)})
        response.set_cookie(cookie, token, httponly=True, samesite="strict")
        return response

    async def image(request: Request) -> Response:
        side = 1024 if request.query_params.get("side") == "1024" else 256
        content = await to_thread.run_sync(browser.jpeg, request.path_params["row"], side, limiter=pictures)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    async def search(request: Request) -> Response:
        row, box = _asked(request.query_params)
        with await _received(request) as sent:
            return JSONResponse(await to_thread.run_sync(browser.search, row, sent, box, limiter=encodings))

    async def start(request: Request) -> Response:
        return JSONResponse({"images": [browser.named(row) for row in spread(range(len(rows)), START)]})

    async def sets(request: Request) -> Response:
        if (name := request.path_params["name"]) not in ("groups", *LIMITS):
            raise HTTPException(404, "there are no such sets")
        return JSONResponse(browser.start(name))

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code)

    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        own, home = f"{request.url.scheme}://{request.headers['host']}", request.url.path == "/"
        given = (request.query_params.get("token") if home else None) or request.cookies.get(cookie, "")
        if request.headers.get("origin", own) != own or (
            request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not home
        ):
            response: Response = JSONResponse({"error": "this was asked by another site"}, 403)
        elif not hmac.compare_digest(given.encode(), token.encode()):
            response = JSONResponse({"error": "the address lacks the token: open the one that was printed"}, 403)
        else:
            response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return Starlette(
        routes=[
            Route("/", page),
            Route("/image/{row:int}", image),
            Route("/search", search, methods=["POST"]),
            Route("/start", start),
            Route("/sets/{name}", sets),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=[host, "127.0.0.1", "localhost"]),
            Middleware(BaseHTTPMiddleware, dispatch=guard),
        ],
        exception_handlers={HTTPException: failed},
    )


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr browse`."""
    with one_line_errors("browse"):
        config: BrowseConfig = read_arguments("browse", args)
        if uvicorn is None:
            raise UsageError('fastcr browse needs Starlette and uvicorn: pip install "fastcr[browse]"')
        context = Context.of(config.run.device, config.run.precision)
        stored = read_stored(config.embeddings)
        encoder = encoder_of(stored, config.encoder, context.device)
        token = secrets.token_urlsafe(16) if config.token is None else config.token
        try:
            listening = socket.create_server((config.host, config.port))
        except OSError as error:
            raise UsageError(f"cannot listen at --host {config.host} --port {config.port}: {error.strerror}") from None
        # the sockets of its connections have it too, or else each answer would wait 40 ms
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with listening, encoder.evaluating():
            app = make_app(Browser(stored, encoder, context), token, config.host)
            words = f"?token={token}" if token else ""
            context.say(f"browse at http://{config.host}:{listening.getsockname()[1]}/{words} (Ctrl-C ends it)")
            server = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
            uvicorn.Server(server).run(sockets=[listening])


if __name__ == "__main__":
    main()
