"""The web app's server: gradio behind the guard, on this machine only unless another host is named."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import fastapi
import gradio as gr
import uvicorn
from starlette.routing import Mount

from nexus_adapters.app.failures import report_errors
from nexus_adapters.app.guard import Guard, is_address
from nexus_adapters.app.payloads import Payloads
from nexus_adapters.app.uploads import MAX_BYTES
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.library_logs import logs_hidden

logger = logging.getLogger("nexus_adapters.app")

DEFAULT_PORT = 7860
DEFAULT_QUEUE = 16
MOST_CONNECTIONS = 512
MOST_SESSIONS = 512
MOST_THREADS = 8
STOP_SECONDS = 2
DELETE_EVERY = 15 * 60
DELETE_AFTER = 12 * 60 * 60
"""Seconds after which uploads and generated files are deleted; all of them when the server ends."""

Build = Callable[[], gr.Blocks]
"""Builds the page. Its `theme`, `css`, `js` and `head` are attributes that it may set on the Blocks."""


def serve(
    build: Build,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    max_queue: int = DEFAULT_QUEUE,
    on_ready: Callable[[str], None] = lambda address: None,
    allowed_hosts: Sequence[str] = (),
    framed_by: Sequence[str] = (),
) -> None:
    """Serve a page until Ctrl-C.

    Nothing is sent to other hosts: no analytics, no share link, no download.

    Args:
        build: returns the page.
        host: the name or address to listen on. If other machines can reach it, a warning is logged, because
            there is no login.
        port: 0 for any free one.
        max_queue: events that may wait; more are refused until one is done.
        on_ready: gets the page's address once it can be opened.
        allowed_hosts: more names that this server is reached by, such as a reverse proxy's.
        framed_by: origins of pages that may show this one in a frame.

    Raises:
        InvalidArgument: named "host" or "port" if nothing can listen there.
    """
    reached_by = (host, *allowed_hosts)
    with _listening(host, port) as listener, _prepared(build, reached_by, max_queue, framed_by) as app:
        server = _Server(app, lambda: on_ready(_address(host, listener)))
        if not is_loopback(host):
            logger.warning(
                "Anyone who can reach %s can use the app: it has no login", _address(host, listener)
            )
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


@contextmanager
def running(
    build: Build,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    max_queue: int = DEFAULT_QUEUE,
    allowed_hosts: Sequence[str] = (),
) -> Iterator[str]:
    """Serve a page in a thread for the length of the block, which gets its address; else as `serve`."""
    reached_by = (host, *allowed_hosts)
    with _listening(host, port) as listener, _prepared(build, reached_by, max_queue, ()) as app:
        ready = threading.Event()
        server = _Server(app, ready.set)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True, name="web app")
        thread.start()
        while not ready.wait(0.05):
            if not thread.is_alive():
                raise RuntimeError("The web app's server did not start")
        try:
            yield _address(host, listener)
        finally:
            server.should_exit = True
            thread.join()


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host."""
    if is_address(host):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


class _Server(uvicorn.Server):
    """uvicorn's server, without logs of its own, that ends gradio's endless responses when it stops."""

    def __init__(self, app: _App, on_ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app.guard,
            log_config=None,
            access_log=False,
            ws="none",
            lifespan="on",
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.stop()
        with logs_hidden(("timeout graceful shutdown exceeded",), ("uvicorn.error",)):
            await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # stopping is what was asked for, not an error of this process


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Listen at once, so that a port in use is an error before any model is loaded."""
    if not 0 <= port <= 65535:
        raise InvalidArgument("port", "0 to 65535", port)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InvalidArgument("host", "a name or address of this machine", repr(host)) from error
    with socket.socket(family, kind, protocol) as listener:
        if os.name == "posix":  # elsewhere it would take over a port in use
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(128)
        except OSError as error:
            raise _unusable(host, port, error) from error
        yield listener


def _unusable(host: str, port: int, error: OSError) -> InvalidArgument:
    if error.errno == errno.EADDRINUSE:
        return InvalidArgument("port", "a free port", f"{port}, which is in use", "0 is any free one")
    if error.errno == errno.EACCES:
        return InvalidArgument(
            "port", "a port you may listen on", port, "Ports above 1023 need no permission"
        )
    return InvalidArgument("host", "a name or address of this machine", f"{host!r} ({error.strerror})")


def _address(host: str, listener: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


@dataclass(frozen=True)
class _App:
    guard: Guard
    page: gr.Blocks
    stopped: asyncio.Event

    def stop(self) -> None:
        """End what gradio would keep open: the queue and the sessions' heartbeats."""
        self.page._queue.close()  # type: ignore[no-untyped-call]
        self.stopped.set()


@contextmanager
def _prepared(
    build: Build, reached_by: Sequence[str], max_queue: int, framed_by: Sequence[str]
) -> Iterator[_App]:
    with _private_folder() as folder:
        page = build()
        page.max_threads = MOST_THREADS
        page.queue(max_size=max_queue, default_concurrency_limit=1, api_open=False)
        page.delete_cache = (DELETE_EVERY, DELETE_AFTER)
        page.state_session_capacity = MOST_SESSIONS
        page.has_launched = True  # or gradio would not check which files a request names
        report_errors(page)
        mounted = gr.mount_gradio_app(
            fastapi.FastAPI(openapi_url=None),
            page,
            path="/",
            footer_links=["api"],
            run_history=False,
            show_error=False,
            max_file_size=MAX_BYTES,
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
            theme=page.theme,
            css=page.css,
            js=page.js,
            head=page.head,
        )
        mounts = [route.app for route in mounted.routes if isinstance(route, Mount)]
        (gradio_app,) = [app for app in mounts if isinstance(app, gr.routes.App)]
        guard = Guard(
            mounted,
            folder,
            Payloads(page, folder).routes(),
            hosts=_names(reached_by),
            any_address=not is_loopback(reached_by[0]),
            framed_by=tuple(framed_by),
        )
        yield _App(guard, page, gradio_app.stop_event)


def _names(reached_by: Sequence[str]) -> frozenset[str]:
    names = {"localhost", "127.0.0.1", "::1", *(name.lower() for name in reached_by)}
    if not is_loopback(reached_by[0]):
        names |= {socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
    return frozenset(names)


@contextmanager
def _private_folder() -> Iterator[Path]:
    """Give gradio a folder of its own, which only this user can read, and which is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="nexus-app-")).resolve()
    settings = {
        "GRADIO_TEMP_DIR": str(folder / "files"),
        "GRADIO_EXAMPLES_CACHE": str(folder / "examples"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "1",  # gradio's statistics of events are not shown, and need pandas
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**12),
    }
    before = {name: os.environ.get(name) for name in settings}
    (folder / "files").mkdir()
    os.environ.update(settings)
    try:
        yield folder / "files"
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
