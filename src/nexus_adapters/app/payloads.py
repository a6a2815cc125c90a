"""Bodies of requests: checked, and rewritten to what the page takes, before gradio sees them."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.block_function import BlockFunction
from pydantic import ValidationError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from nexus_adapters.app.answers import Refused
from nexus_adapters.app.guard import Route, is_inside
from nexus_adapters.app.uploads import MAX_BYTES, MAX_EVENT_MEGAPIXELS, check_upload
from nexus_adapters.errors import InvalidArgument, is_unicode

JSON_BYTES = 32 * 1024 * 1024
"""Of an event: the page sends its canvases as text."""
SMALL_BYTES = 64 * 1024
DEEPEST = 24
MOST_VALUES = 10_000
MOST_FILES = 8
LONGEST_NAME = 255

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KEY = r"[A-Za-z0-9_-]{1,64}"
_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "array": list,
}


def _bad(message: str, status: int = HTTPStatus.BAD_REQUEST) -> Refused:
    return Refused(status, message)


class Payloads:
    """Checks of the requests that a page's functions get.

    Files are those that this server has stored itself: a path outside of `folder` is refused, and a URL is
    dropped, since gradio would download from it.

    Args:
        page: the page, built.
        folder: uploads and generated files.
    """

    def __init__(self, page: gr.Blocks, folder: Path) -> None:
        self.page = page
        self.folder = folder

    def routes(self) -> tuple[Route, ...]:
        """Return the routes for `Guard`, each with its check."""
        return (
            Route("POST", r"/gradio_api/queue/join/?", (), self.join, JSON_BYTES),
            Route("POST", rf"/gradio_api/(?:run|api)/{_KEY}/?", (), self.direct, JSON_BYTES),
            Route("POST", rf"/gradio_api/call/v2/{_KEY}/?", (), self.call_by_name, JSON_BYTES),
            Route("POST", rf"/gradio_api/call/{_KEY}/?", (), self.call, JSON_BYTES),
            Route("POST", r"/gradio_api/cancel", (), self.cancel, SMALL_BYTES),
            Route("POST", r"/gradio_api/reset/?", (), self.reset, SMALL_BYTES),
            Route("POST", r"/gradio_api/upload", ("upload_id",), self.upload, MOST_FILES * MAX_BYTES),
        )

    async def join(self, body: bytes, kind: str, path: str) -> bytes:
        """An event for the queue, from the page or a client."""
        given = parse(body, kind)
        function = self._function(_integer(given, "fn_index"))
        event = await self._event(given, function)
        event["session_hash"] = _name(given, "session_hash")
        return _dumped(event)

    async def direct(self, body: bytes, kind: str, path: str) -> bytes:
        """An event of a function that does not use the queue."""
        given = parse(body, kind)
        if given.get("fn_index") is not None:
            function = self._function(_integer(given, "fn_index"))
        else:
            function = self._named(path)
        if function.queue:
            raise _bad("This function is called through the queue", HTTPStatus.NOT_FOUND)
        event = await self._event(given, function)
        if given.get("session_hash") is not None:
            event["session_hash"] = _name(given, "session_hash")
        return _dumped(event)

    async def call(self, body: bytes, kind: str, path: str) -> bytes:
        """A call of a named endpoint with a list of values."""
        given = parse(body, kind)
        function = self._named(path)
        data = _list(given, "data")
        blocks = [block for block in function.inputs if not block.skip_api]
        if len(data) == len(function.inputs):
            blocks = list(function.inputs)
        passed: dict[str, Any] = {"data": await self._values(data, blocks)}
        if given.get("session_hash") is not None:
            passed["session_hash"] = _name(given, "session_hash")
        return _dumped(passed)

    async def call_by_name(self, body: bytes, kind: str, path: str) -> bytes:
        """A call of a named endpoint with named values."""
        given = parse(body, kind)
        function = self._named(path)
        described = self.page.get_api_info()["named_endpoints"].get(f"/{function.api_name}")
        if described is None:
            raise _bad("There is no such endpoint", HTTPStatus.NOT_FOUND)
        blocks = [block for block in function.inputs if not block.skip_api]
        passed = {}
        for parameter, block in zip(described["parameters"], blocks, strict=True):
            name = parameter["parameter_name"]
            if name in given:
                (passed[name],) = await self._values([given[name]], [block])
            elif not parameter.get("parameter_has_default"):
                raise _bad(f"{name} is required")
        if unknown := sorted(set(given) - set(passed)):
            raise _bad(f"'{unknown[0][:64]}' is not a parameter of this endpoint")
        return _dumped(passed)

    async def cancel(self, body: bytes, kind: str, path: str) -> bytes:
        """The end of an event."""
        given = parse(body, kind)
        index = _integer(given, "fn_index")
        self._function(index)
        names = {key: _name(given, key) for key in ("session_hash", "event_id")}
        return _dumped({"fn_index": index, **names})

    async def reset(self, body: bytes, kind: str, path: str) -> bytes:
        """The end of an event, as old clients say it."""
        return _dumped({"event_id": _name(parse(body, kind), "event_id")})

    async def upload(self, body: bytes, kind: str, path: str) -> bytes:
        """Pictures, checked by their content."""
        form = await _form(body, kind, MOST_FILES)
        try:
            files = form.getlist("files")
            if not files or len(files) != len(form.multi_items()):
                raise _bad("Files are expected in the field 'files'")
            for file in files:
                await _check_picture(file)
        finally:
            await form.close()
        return body

    def _function(self, index: int) -> BlockFunction:
        function = self.page.fns.get(index)
        if function is None:
            raise _bad("There is no such function", HTTPStatus.NOT_FOUND)
        return function

    def _named(self, path: str) -> BlockFunction:
        name = path.rstrip("/").rpartition("/")[2]
        for function in self.page.fns.values():
            if function.api_name == name and function.api_visibility != "private":
                return function
        raise _bad("There is no such endpoint", HTTPStatus.NOT_FOUND)

    async def _event(self, given: dict[str, Any], function: BlockFunction) -> dict[str, Any]:
        event: dict[str, Any] = {"fn_index": function._id}
        event["data"] = await self._values(_list(given, "data"), list(function.inputs))
        if given.get("event_data") is not None:
            event["event_data"] = self._files(given["event_data"])
        if given.get("trigger_id") is not None:
            trigger = _integer(given, "trigger_id")
            if trigger not in self.page.blocks:
                raise _bad("There is no such component")
            event["trigger_id"] = trigger
        return event

    async def _values(self, values: list[Any], blocks: list[Any]) -> list[Any]:
        if len(values) != len(blocks):
            raise _bad(f"{len(blocks)} values are expected, and {len(values)} were sent")
        passed = [self._files(value) for value in values]
        for place, (value, block) in enumerate(zip(passed, blocks, strict=True), start=1):
            if value is not None and not block.stateful and not fits(value, block):
                raise _bad(f"Value {place} has the wrong type", HTTPStatus.UNPROCESSABLE_ENTITY)
        await asyncio.to_thread(_check_pixels, passed)
        return passed

    def _files(self, value: Any) -> Any:
        """Return a value whose files are stored by this server, and have no URL."""
        if isinstance(value, list):
            return [self._files(item) for item in value]
        if not isinstance(value, dict):
            return value
        if not {"path", "url", "meta"} & set(value):
            return {key: self._files(item) for key, item in value.items()}
        path, name = value.get("path"), value.get("orig_name")
        if not isinstance(path, str) or not is_inside(path, self.folder):
            raise _bad("A file must be uploaded first")
        if name is not None and not (isinstance(name, str) and len(name) <= LONGEST_NAME):
            raise _bad("A file has a name that is too long")
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def _check_pixels(values: list[Any]) -> None:
    """Refuse an event whose files would take too much memory once they are decoded."""
    pixels = 0
    for path in _paths(values):
        with suppress(InvalidArgument, OSError):  # not an image, or gone: for the function to say
            pixels += check_upload(Path(path))
    if pixels > MAX_EVENT_MEGAPIXELS * 1_000_000:
        raise _bad(
            f"The pictures together have more than {MAX_EVENT_MEGAPIXELS} megapixels",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        )


def _paths(value: Any) -> list[str]:
    if isinstance(value, dict):
        return (
            [value["path"]] if "meta" in value else [path for item in value.values() for path in _paths(item)]
        )
    return [path for item in value for path in _paths(item)] if isinstance(value, list) else []


def parse(body: bytes, kind: str) -> dict[str, Any]:
    """Return the object in a JSON body.

    Raises:
        Refused: for another type of content, what is not JSON or no object, numbers that are not finite or
            too large, text that is not Unicode, and values nested too deep or too many.
    """
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise _bad("JSON is expected", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    try:
        value = json.loads(body.decode(), parse_constant=_no_number, parse_int=_small, parse_float=_finite)
    except (ValueError, RecursionError):
        raise _bad("The request is not JSON") from None
    _check_values(value)
    if not isinstance(value, dict):
        raise _bad("A JSON object is expected")
    return value


def _no_number(text: str) -> float:
    raise ValueError(text)


def _small(text: str) -> int:
    if len(text) > len("-9007199254740991"):
        raise ValueError(text)
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _check_values(value: Any) -> None:
    left = [(value, 0)]
    seen = 0
    while left:
        item, depth = left.pop()
        seen += 1
        if depth > DEEPEST or seen > MOST_VALUES:
            raise _bad("The request is nested too deep or has too many values")
        if isinstance(item, str) and not is_unicode(item):
            raise _bad("The request has text that is not Unicode")
        if isinstance(item, list):
            left += [(inner, depth + 1) for inner in item]
        elif isinstance(item, dict):
            left += [(inner, depth + 1) for pair in item.items() for inner in pair]


def fits(value: Any, block: Any) -> bool:
    """Return whether a value other than null has the type that a component takes."""
    if isinstance(block, gr.HTML):  # the page's own canvases, which check what they get
        return isinstance(value, str | dict)
    model = getattr(block, "data_model", None)
    if model is not None:
        try:
            model.model_validate(value, context={"validate_meta": True})
        except ValidationError:
            return False
        return True
    try:
        wanted = _JSON_TYPES.get(block.api_info().get("type", ""))
    except (NotImplementedError, TypeError):  # buttons have no value; "type" of JSON is a dict
        return True
    if wanted is None or isinstance(value, bool):
        return wanted in (None, bool)
    return isinstance(value, wanted)


def _integer(given: dict[str, Any], key: str) -> int:
    value = given.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _bad(f"{key}: a number is expected")
    return value


def _name(given: dict[str, Any], key: str) -> str:
    value = given.get(key)
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _bad(f"{key}: letters and digits are expected")
    return value


def _list(given: dict[str, Any], key: str) -> list[Any]:
    value = given.get(key)
    if not isinstance(value, list):
        raise _bad(f"{key}: a list is expected")
    return value


def _dumped(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


async def _form(body: bytes, kind: str, most_files: int) -> FormData:
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise _bad("A form with files is expected", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    if not body.rstrip().endswith(b"--"):
        raise _bad("The form is incomplete")

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    parser = MultiPartParser(Headers({"Content-Type": kind}), stream(), max_files=most_files, max_fields=16)
    try:
        return await parser.parse()
    except (MultiPartException, ValueError, LookupError, RuntimeError):
        raise _bad("The form is malformed") from None


async def _check_picture(file: UploadFile | str) -> None:
    if isinstance(file, str):
        raise _bad("Files are expected in the field 'files'")
    if not is_unicode(file.filename or "") or len(file.filename or "") > LONGEST_NAME:
        raise _bad("The file's name cannot be used")
    content = await file.read()
    try:
        await asyncio.to_thread(check_upload, content, file.filename or "")
    except InvalidArgument as error:
        large = len(content) > MAX_BYTES
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if large else HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        raise Refused(status, str(error)) from None
