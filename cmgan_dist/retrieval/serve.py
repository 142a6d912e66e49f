"""A page and a JSON API over an index: texts or pictures in, what lies near out.

    GET  /                       the page
    GET  /api/search?text=       also ?picture=TOKEN, which a picture's search has answered with
    POST /api/search             a picture, multipart, field "image"
    GET  /api/similar/{id}       near an item of the index
    GET  /api/browse             items in their order
    GET  /api/info               counts, classes, attribution, chance, limits
    GET  /api/thumbnail/{id}     a small JPEG; /api/picture/TOKEN is that of a picture that was searched with

The first three searches take k, modality (image, text, any: best first of both, each: k of either) and classes.
Whatever is wrong is a status of 4xx and {"error": one sentence}. Nothing of the host but what the index names can be
reached.

HEAD is answered wherever GET is.

The way of a request: one thread encodes and searches, first come first served, two make thumbnails; how many may wait
is bounded, and beyond that the answer is 503. Uploads are read side by side, their bytes bounded in all, and decoded
one at a time by ``upload_decoder.py``, while others search. Connections are bounded by ``connections.py``. This is the
one file that names a web framework.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import signal
import socket
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi.telemetry import TelemetryConfig
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmgan_dist.errors import BadInput, BadSample
from cmgan_dist.retrieval.answers import Ask, NotThere, Searcher, Wanted, checked_text
from cmgan_dist.retrieval.connections import server_of
from cmgan_dist.retrieval.gates import Busy, Gate, Room
from cmgan_dist.retrieval.pictures import MOST_SIDE, SIDE, ByteCache, PicturesOf
from cmgan_dist.retrieval.renewal import Renewal
from cmgan_dist.retrieval.upload_decoder import MOST_PIXELS, Decoded, Decoder

log = logging.getLogger(__name__)
T = TypeVar("T")

MOST_HITS = 200
"""Of each modality in one answer."""
FORM_BYTES = 4096
"""What a multipart form adds to its file at most."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Of every answer: the page may ask nothing of another host, and no other page may show it in a frame."""
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""What FastAPI would write down of requests, and send away where the environment says so."""


@dataclass(frozen=True)
class Limits:
    """How much a server takes at a time."""

    upload_bytes: int = 10 << 20
    """Of a picture that is searched with."""
    upload_seconds: float = 60.0
    """In which it must have come."""
    upload_silence: float = 10.0
    """Seconds without a byte of it, after which it is given up."""
    uploads_bytes: int = 256 << 20
    """Of all pictures together that are read or wait to be decoded."""
    waiting: int = 256
    """Searches that wait or run."""
    waiting_seconds: float = 60.0
    """In which the turn of a search, an upload or a thumbnail must have come."""
    thumbnails_waiting: int = 1024
    """Thumbnails that are waited for."""
    thumbnails_bytes: int = 64 << 20
    """Thumbnails that are kept."""
    connections: int = 1000
    """Connections that are open, fewer where the process may not have as many files."""
    idle_seconds: float = 15.0
    """In which a connection must send a request's header, and take its answer."""


def ask_of(
    k: Annotated[int, Query(ge=1, le=MOST_HITS)] = 20,
    modality: Wanted = "any",
    classes: Annotated[list[str] | None, Query()] = None,
) -> Ask:
    """Return what the parameters of a request ask for."""
    return Ask(k, modality, tuple(classes or ()))


Id = Annotated[int, Path(ge=0, lt=2**63)]
Asked = Annotated[Ask, Depends(ask_of)]


class Service:
    """The handlers of all requests, and the threads that do their work."""

    def __init__(
        self,
        searcher: Searcher,
        renewal: Renewal | None,
        decoder: Decoder,
        title: str,
        attribution: str,
        limits: Limits,
    ) -> None:
        self.searcher, self.renewal, self.decoder, self.limits = searcher, renewal, decoder, limits
        self.title, self.attribution = title, attribution
        self.searches = Gate(limits.waiting, 1, limits.waiting_seconds)
        self.uploads = Room(limits.uploads_bytes)
        self.decodings = Gate(limits.waiting, 1, limits.waiting_seconds)
        self.thumbnails = Gate(limits.thumbnails_waiting, 2, limits.waiting_seconds)
        self.search_thread = ThreadPoolExecutor(1, "search")
        self.decode_thread = ThreadPoolExecutor(1, "decode")
        self.thumbnail_threads = ThreadPoolExecutor(2, "thumbnail")
        self.made = ByteCache(limits.thumbnails_bytes)

    async def in_turn(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the search thread, after those that came before. Raises Busy when too many wait."""
        async with self.searches:
            return await asyncio.get_running_loop().run_in_executor(self.search_thread, function, *arguments)

    async def current(self) -> Searcher:
        """Return what searches the index as it is on disk now. Raises Busy where that cannot be used."""
        if self.renewal is not None and self.renewal.is_due():
            await self.in_turn(self._renew)
        return self.searcher

    def _renew(self) -> None:
        assert self.renewal is not None
        if self.renewal.is_due():  # nobody before has done it
            self.searcher = self.renewal.renewed(self.searcher)
            self.attribution = self.searcher.index.manifest.attribution
            self.made = ByteCache(self.limits.thumbnails_bytes)

    # ---------------------------------------------------------------------------------------- handlers

    async def search(self, ask: Asked, text: str | None = None, picture: str | None = None) -> dict[str, Any]:
        """Search by a text, or by a picture that was uploaded before."""
        if text is not None and picture is not None:
            raise BadInput("text and picture are both given: search by one of them")
        if text is None and picture is None:
            raise BadInput("text is missing: give ?text=, or POST a picture")
        words, searcher = checked_text(text) if text is not None else "", await self.current()
        if picture is not None:
            return await self.in_turn(searcher.find_known, picture, ask)
        return await self.in_turn(searcher.find_text, words, ask)

    async def search_upload(self, request: Request, ask: Asked) -> dict[str, Any]:
        """Search by an uploaded picture."""
        check_length(request, self.limits)
        searcher = await self.current()
        with self.uploads.share() as take:
            data = await read_upload(request, self.limits, take)
            token = hashlib.sha256(data).hexdigest()[:32]
            try:
                return await self.in_turn(searcher.find_known, token, ask)
            except NotThere:
                decoded = await self.decode(data)
        return await self.in_turn(searcher.find_upload, token, decoded, ask)

    async def decode(self, data: bytes) -> Decoded:
        """Decode an upload, after those that came before. Raises BadInput when it is no picture, or too large a one,
        Busy when too many wait."""
        async with self.decodings:
            try:
                return await asyncio.get_running_loop().run_in_executor(self.decode_thread, self.decoder.decode, data)
            except BadSample as error:
                raise BadInput(f"the upload cannot be used: {error}; give another picture") from None

    async def similar(self, id: Id, ask: Asked) -> dict[str, Any]:
        """Search by an item of the index."""
        return await self.in_turn((await self.current()).find_similar, id, ask)

    async def browse(
        self,
        offset: Annotated[int, Query(ge=0, lt=2**63)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_HITS)] = 60,
        modality: Literal["image", "text"] | None = None,
        classes: Annotated[list[str] | None, Query()] = None,
    ) -> dict[str, Any]:
        """List items in their order."""
        return await self.in_turn((await self.current()).listed, offset, limit, modality, tuple(classes or ()))

    async def info(self) -> dict[str, Any]:
        """Say what the index holds."""
        searcher = await self.current()
        mean, deviation = searcher.chance
        return {
            "title": self.title,
            "counts": searcher.counts,
            "classes": list(searcher.index.classes),
            "attribution": self.attribution,
            "chance": {"mean": mean, "std": deviation},
            "limits": {"k": MOST_HITS, "upload_bytes": self.limits.upload_bytes, "upload_pixels": MOST_PIXELS},
        }

    async def picture(
        self, request: Request, id: Id, size: Annotated[int, Query(ge=16, le=MOST_SIDE)] = SIDE
    ) -> Response:
        """Show an item."""
        make = partial((await self.current()).thumbnail, id, size)
        made = self.made  # of this index
        async with self.thumbnails:
            loop = asyncio.get_running_loop()
            data, tag = await loop.run_in_executor(self.thumbnail_threads, made.get, (id, size), make)
        return jpeg(request, data, tag)

    async def query_picture(self, request: Request, token: str) -> Response:
        """Show a picture that was searched with."""
        _, small = await self.in_turn((await self.current()).known_query, token)
        return jpeg(request, small, f'"{token}"')

    async def page(self) -> HTMLResponse:
        """Show the page."""
        loader = PackageLoader("cmgan_dist.retrieval")
        template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("search.html")
        return HTMLResponse(template.render(**await self.info()))

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Read the text backbone before the first query comes; its errors come again with that."""
        self.search_thread.submit(self.searcher.model.encode_texts, ["first"])
        yield
        self.decoder.close()
        for pool in (self.search_thread, self.decode_thread, self.thumbnail_threads):
            pool.shutdown(wait=False, cancel_futures=True)


def jpeg(request: Request, data: bytes, tag: str) -> Response:
    """Return a picture, or that it is still the one that the client has."""
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type="image/jpeg", headers=headers)


# ---------------------------------------------------------------------------------------------- uploads


def too_large(limits: Limits) -> HTTPException:
    """Return the error of an upload over the limit."""
    return HTTPException(413, f"the upload has more than {limits.upload_bytes >> 20} MB: give a smaller picture")


def check_length(request: Request, limits: Limits) -> None:
    """Raise HTTP 413 for a body that says it is too long, before a byte of it is read."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.upload_bytes + FORM_BYTES:
        raise too_large(limits)


async def body_of(request: Request, limits: Limits, take: Callable[[int], None]) -> AsyncGenerator[bytes]:
    """Yield the body of a request as it comes; `take` is told of its bytes first. Raises HTTP 413 as soon as more came
    than is allowed, 408 when it takes too long or stops coming."""
    came, loop = 0, asyncio.get_running_loop()
    end = loop.time() + limits.upload_seconds
    chunks = aiter(request.stream())
    while True:
        left = min(limits.upload_silence, end - loop.time())
        try:
            chunk = await asyncio.wait_for(anext(chunks), left)
        except StopAsyncIteration:
            return
        except TimeoutError:
            reason = (
                "stopped coming" if left >= limits.upload_silence else f"took more than {limits.upload_seconds:g} s"
            )
            raise HTTPException(408, f"the upload {reason}: send it again", {"Connection": "close"}) from None
        came += len(chunk)
        if came > limits.upload_bytes + FORM_BYTES:
            raise too_large(limits)
        take(len(chunk))
        yield chunk


async def read_upload(request: Request, limits: Limits, take: Callable[[int], None]) -> bytes:
    """Return the file in the form field "image". Raises as `body_of` does, and BadInput when there is no such field."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadInput("the body is no multipart/form-data: send the picture as the form field 'image'")
    parser = MultiPartParser(request.headers, body_of(request, limits, take), max_files=1, max_fields=8)
    parser.spool_max_size = limits.upload_bytes + FORM_BYTES  # never to disk
    try:
        form = await parser.parse()
    except UnicodeError:
        raise BadInput("the charset of the form is none that its names are in: leave it out") from None
    except (MultiPartException, ClientDisconnect, ValueError) as error:
        raise BadInput(f"the form cannot be read ({error or 'it ends early'}): send the picture again") from None
    try:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise BadInput("the form field 'image' with a picture is missing: send one")
        data = await image.read(limits.upload_bytes + 1)
    finally:
        await form.close()
    if len(data) > limits.upload_bytes:
        raise too_large(limits)
    return data


# ---------------------------------------------------------------------------------------------- application


class Guarded:
    """Adds HEADERS to every answer of an application, has it answer HEAD as GET (uvicorn leaves out the body) and parts
    of files by the whole, and answers in its place where it fails or is stopped, or was asked under a name that is none
    of `hosts` (empty: any will do)."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        if scope["type"] == "http":
            whole = [each for each in scope["headers"] if each[0] != b"range"]  # wrong ones get no sentence below
            scope = {**scope, "headers": whole, "method": {"HEAD": "GET"}.get(scope["method"], scope["method"])}

        async def send_with(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            asked = host_of(scope) if self.hosts and scope["type"] == "http" else ""
            if asked and asked not in self.hosts:
                said = f"this server is not asked as {asked[:80]!r}: ask as localhost, or start it with --allowed-hosts"
                await JSONResponse({"error": said}, 421)(scope, receive, send_with)
                return
            await self.app(scope, receive, send_with)
        except asyncio.CancelledError:  # by the server when it stops, which waits for nobody
            if scope["type"] != "http" or started:
                raise
            await JSONResponse({"error": "the server is stopping: try again later"}, 503)(scope, receive, send_with)
        except Exception:  # the server goes on
            if scope["type"] != "http" or started:
                raise
            log.exception("%s %s failed", scope["method"], scope["path"])
            failed = JSONResponse({"error": "the server failed at this request: its log says why"}, 500)
            await failed(scope, receive, send_with)


def host_of(scope: Scope) -> str:
    """Return the name that a request was sent to, in small letters; "" where it says none."""
    said = Headers(scope=scope).get("host", "").strip().lower()
    name, colon, port = said.rpartition(":")
    return (name if colon and port.isdigit() else said).strip("[]")


def only_known(request: Request) -> None:
    """Raises BadInput at a parameter that the address does not take, or takes once and is given again: it would be
    ignored."""
    taken = request.app.openapi()["paths"].get(request.scope["route"].path, {}).get(request.method.lower())
    if not taken:
        return
    known = {one["name"]: one["schema"] for one in taken.get("parameters", ()) if one["in"] == "query"}
    given = Counter(name for name, _ in request.query_params.multi_items())
    if unknown := sorted(given.keys() - known.keys()):
        names = ", ".join(sorted(known)) or "none"
        raise BadInput(f"there is no parameter {unknown[0][:80]!r} here: known are {names}")
    for name, times in sorted(given.items()):
        if times > 1 and not any(kind.get("type") == "array" for kind in (known[name], *known[name].get("anyOf", ()))):
            raise BadInput(f"{name} is given {times} times: give it once")


async def say(request: Request, error: Exception) -> JSONResponse:
    """Return an error as JSON of one sentence."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        given = repr(first.get("input"))[:80]
        reason = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        return JSONResponse({"error": f"{first['loc'][-1]} is {given}: {reason}"}, 400)
    if isinstance(error, Busy):
        return JSONResponse({"error": str(error)}, 503, {"Retry-After": "3"})
    if isinstance(error, BadInput):
        return JSONResponse({"error": str(error)}, 404 if isinstance(error, NotThere) else 400)
    assert isinstance(error, AnyHTTPException)
    detail = {
        "Not Found": "there is nothing at this address: the page is at /, and /openapi.json lists the others",
        "Method Not Allowed": f"{request.method} cannot be answered here: /openapi.json lists what can",
    }.get(str(error.detail), str(error.detail))
    return JSONResponse({"error": detail}, error.status_code, dict(error.headers or {}))


def build_app(
    index: Any,
    model: Any,
    pictures_of: PicturesOf,
    decoder: Decoder,
    *,
    title: str = "Search",
    attribution: str = "",
    limits: Limits | None = None,
    renewal: Renewal | None = None,
    hosts: Collection[str] = (),
) -> FastAPI:
    """Return the application over an `Index`, a `Model` and what tells where an item's picture lies.

    `decoder`: of uploads, as large as the model takes them; it is closed when the application ends. `renewal`: opens
    the index anew when it has changed on disk. `hosts`: see `Guarded`."""
    service = Service(Searcher(index, model, pictures_of), renewal, decoder, title, attribution, limits or Limits())
    options: dict[str, Any] = {"docs_url": None, "redoc_url": None, "telemetry": NO_TELEMETRY}
    app = FastAPI(title=title, lifespan=service.lifespan, dependencies=[Depends(only_known)], **options)
    app.add_middleware(Guarded, hosts=hosts)
    for kind in (RequestValidationError, BadInput, Busy, AnyHTTPException):
        app.add_exception_handler(kind, say)
    app.add_api_route("/", service.page, response_class=HTMLResponse, include_in_schema=False)
    app.add_api_route("/api/search", service.search)
    app.add_api_route("/api/search", service.search_upload, methods=["POST"])
    app.add_api_route("/api/similar/{id}", service.similar)
    app.add_api_route("/api/browse", service.browse)
    app.add_api_route("/api/info", service.info)
    app.add_api_route("/api/thumbnail/{id}", service.picture, response_class=Response)
    app.add_api_route("/api/picture/{token}", service.query_picture, response_class=Response)
    app.mount("/static", StaticFiles(directory=str(files("cmgan_dist.retrieval") / "static")))
    return app


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM, and end those that run."""
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises what it got once more when it has stopped
        signal.signal(number, lambda *_: None)
    limits = Limits()
    server_of(app, limits.connections, limits.idle_seconds).run(sockets=[listening])
