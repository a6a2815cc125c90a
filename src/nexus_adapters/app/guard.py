"""The outermost layer of the web app: every request passes it before gradio sees any of it.

Gradio's server does much that this app has no use for: it proxies other servers, downloads files that a
request names by URL, and has routes for development. The guard lets through the routes that the page and
gradio's clients need, in the form that they need, and answers everything else itself.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from collections.abc import Awaitable, Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from nexus_adapters.app.answers import Answer, Message, Receive, Refused, Scope, Send
from nexus_adapters.app.failures import log_failure

App = Callable[[Scope, Receive, Send], Awaitable[None]]


Check = Callable[[bytes, str, str], Awaitable[bytes]]
"""(body, content type, path below /gradio_api/) -> the body to pass on, or `Refused`."""


@dataclass(frozen=True)
class Route:
    """A route of gradio's that is let through.

    Args:
        method: "GET" (also HEAD) or "POST".
        path: a regular expression for the whole path.
        queries: names of query parameters that are passed on; others are dropped.
        check: looks at the body of a POST.
        most_bytes: a longer body is refused while it arrives.
    """

    method: str
    path: str
    queries: tuple[str, ...] = ()
    check: Check | None = None
    most_bytes: int = 0


_PART = r"[A-Za-z0-9_@+~-][A-Za-z0-9_.@+~-]*"
_NAME = r"[A-Za-z0-9_-]{1,64}"
# What the page loads; files below /assets and /static are gradio's own, and it keeps to those folders.
PAGES = (
    Route("GET", r"/", ("__theme", "view")),
    Route("GET", r"/config/?"),
    Route("GET", r"/theme\.css"),
    Route("GET", r"/favicon\.ico"),
    Route("GET", r"/manifest\.json"),
    Route("GET", r"/robots\.txt"),
    Route("GET", rf"/(?:assets|static)/(?:{_PART}/){{0,6}}{_PART}"),
    Route("GET", r"/gradio_api/theme\.css"),
    Route("GET", r"/gradio_api/info/?", ("serialize", "all_endpoints")),
    Route("GET", r"/gradio_api/app_id/?"),
    Route("GET", r"/gradio_api/startup-events"),
    Route("GET", r"/gradio_api/queue/data", ("session_hash",)),
    Route("GET", r"/gradio_api/queue/status"),
    Route("GET", r"/gradio_api/upload_progress", ("upload_id",)),
    Route("GET", rf"/gradio_api/heartbeat/{_NAME}"),
    Route("GET", rf"/gradio_api/call/(?:v2/)?{_NAME}/{_NAME}"),
)
_FILES = "/gradio_api/file="
_QUERY_VALUE = re.compile(r"[A-Za-z0-9_.-]{0,64}")
# Others never reach gradio: not cookies, which this app does not use and other programs on this host may have
# set, nor X-Forwarded-Host, by which gradio would name another server to the page.
_HEADERS = frozenset(
    (
        b"accept",
        b"accept-encoding",
        b"accept-language",
        b"content-length",
        b"content-type",
        b"host",
        b"if-modified-since",
        b"if-none-match",
        b"if-range",
        b"origin",
        b"range",
        b"user-agent",
        b"x-forwarded-proto",
    )
)
_HOST = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9._-]{1,253}))(?::[0-9]{1,5})?")
_RANGE = re.compile(rb"bytes=\d{0,18}-\d{0,18}")

# Gradio's page has scripts and styles in its HTML, and runs those of the page by eval.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors {framed_by}"
)
_FILE_POLICY = "default-src 'none'; sandbox"


@dataclass(frozen=True)
class Guard:
    """ASGI middleware that passes on the requests that the page and gradio's clients need.

    Args:
        app: gradio's application.
        folder: uploads and generated files; no other file is ever sent.
        routes: POST routes with their checks, next to `PAGES`.
        hosts: names that a Host header may have, in lower case, without a port.
        any_address: whether it may also be any IP address. A page of another site can make a browser send a
            name that it owns (DNS rebinding), but not an address of this server as the name.
        framed_by: origins whose pages may show this one in a frame.
        body_seconds: the longest time for a body to arrive.
    """

    app: App
    folder: Path
    routes: tuple[Route, ...]
    hosts: frozenset[str] = frozenset(("localhost", "127.0.0.1", "::1"))
    any_address: bool = False
    framed_by: tuple[str, ...] = ()
    body_seconds: float = 120
    _large: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, by gradio's application or by an error."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        answer = Answer(send, self._headers(scope["path"]), head=scope["method"] == "HEAD")
        try:
            await self._pass_on(scope, receive, answer)
        except Refused as refused:
            await answer.error(refused.status, refused.message)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # groups of a task group included
            if not answer.ended_early(error):
                log_failure(f"{scope['method']} {_place(scope['path'])}", error)
            await answer.error(HTTPStatus.INTERNAL_SERVER_ERROR, "The server failed on this request")

    async def _pass_on(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        headers = _headers(scope["headers"])
        self._check_sender(headers)
        path = str(scope["path"])
        route = self._route(str(scope["method"]), path)
        passed = dict(scope)
        passed["headers"] = [pair for pair in headers.items() if _is_passed_on(*pair)]
        passed["query_string"] = _query(scope.get("query_string", b""), route.queries)
        if route.method == "GET":
            return await self.app(passed, receive, answer.send)
        assert route.check is not None
        kind = headers.get(b"content-type", b"").decode("latin-1")
        many = _length(headers) is None or (_length(headers) or 0) > MANY_BYTES
        async with self._large if many else nullcontext():  # bodies are in memory until they are checked
            body = await self._body(receive, headers, route.most_bytes)
            body = await route.check(body, kind, path.removeprefix("/gradio_api/"))
            passed["headers"] = [pair for pair in passed["headers"] if pair[0] != b"content-length"]
            passed["headers"].append((b"content-length", str(len(body)).encode()))
            await self.app(passed, _again(body, receive), answer.send)

    def _check_sender(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self._is_ours(host):
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "This server has another name")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1").lower()).netloc != host:
            raise Refused(HTTPStatus.FORBIDDEN, "Pages of other sites may not use this server")
        if headers.get(b"sec-fetch-site") == b"cross-site" and headers.get(b"sec-fetch-mode") != b"navigate":
            raise Refused(HTTPStatus.FORBIDDEN, "Pages of other sites may not use this server")

    def _is_ours(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1] or found[2]
        return name in self.hosts or (self.any_address and is_address(name))

    def _route(self, method: str, path: str) -> Route:
        if "\x00" in path or ".." in re.split(r"[/\\=]", path):
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such page")
        wanted = "GET" if method == "HEAD" else method
        if path.startswith(_FILES) and wanted == "GET":
            self._check_file(path.removeprefix(_FILES))
            return Route("GET", path)
        there = [route for route in (*PAGES, *self.routes) if re.fullmatch(route.path, path)]
        for route in there:
            if route.method == wanted:
                return route
        if there:
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "This method is not possible here")
        raise Refused(HTTPStatus.NOT_FOUND, "There is no such page")

    def _check_file(self, path: str) -> None:
        if not is_inside(path, self.folder):
            raise Refused(HTTPStatus.NOT_FOUND, "There is no such file")

    async def _body(self, receive: Receive, headers: dict[bytes, bytes], most: int) -> bytes:
        too_long = Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A request of at most {most / 2**20:.3g} MiB is expected"
        )
        if (_length(headers) or 0) > most:
            raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(HTTPStatus.BAD_REQUEST, "The request is incomplete")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_long
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refused(HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive") from None

    def _headers(self, path: str) -> list[tuple[bytes, bytes]]:
        framed_by = " ".join(("'self'", *self.framed_by))
        is_file = path.startswith(_FILES)
        policy = _FILE_POLICY if is_file else _POLICY.format(framed_by=framed_by)
        headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "permissions-policy": "geolocation=(), microphone=(), payment=(), usb=()",
        }
        if not self.framed_by:
            headers["x-frame-options"] = "SAMEORIGIN"
        return [(name.encode(), value.encode()) for name, value in headers.items()]


MANY_BYTES = 2 * 1024 * 1024
"""Of longer bodies, only a few may be in memory at once."""


def is_address(name: str) -> bool:
    """Return whether a host name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_inside(path: str, folder: Path) -> bool:
    """Return whether a path is an existing file below a folder, also after links are followed."""
    if not os.path.isabs(path) or "\x00" in path or ".." in re.split(r"[/\\]", path):
        return False
    try:
        real = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        return False
    return real.is_file() and real.is_relative_to(folder)


def _place(path: str) -> str:
    return "a file" if path.startswith(_FILES) else repr(path[:80])


def _headers(pairs: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for name, value in pairs:
        if name in headers and name in (b"host", b"origin", b"content-length", b"content-type"):
            raise Refused(HTTPStatus.BAD_REQUEST, f"The header {name.decode('latin-1')} is there twice")
        headers[name] = value
    return headers


def _length(headers: dict[bytes, bytes]) -> int | None:
    """Return the length that a request says its body has."""
    length = headers.get(b"content-length")
    if length is None:
        return None
    if not length.isdigit() or len(length) > len("9007199254740991"):
        raise Refused(HTTPStatus.BAD_REQUEST, "The length of the request is not a number")
    return int(length)


def _is_passed_on(name: bytes, value: bytes) -> bool:
    if name == b"range":
        return _RANGE.fullmatch(value) is not None
    if name == b"x-forwarded-proto":
        return value in (b"http", b"https")
    return name in _HEADERS


def _query(query: bytes, names: tuple[str, ...]) -> bytes:
    try:
        pairs = parse_qsl(query.decode("ascii"), max_num_fields=32)
    except ValueError:
        return b""
    kept = [(name, value) for name, value in pairs if name in names and _QUERY_VALUE.fullmatch(value)]
    return urlencode(kept).encode()


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read before, and then what the connection gives."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
