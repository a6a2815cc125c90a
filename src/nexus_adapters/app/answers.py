"""What the web app answers: gradio's responses with headers of ours, and errors in our own words."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(Exception):  # noqa: N818  # an answer, not a fault
    """A request that is answered with an error instead of being passed on.

    Args:
        status: the HTTP status, 4xx or 503.
        message: one line for the user.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


class Answer:
    """Sends the response: gradio's with headers added, or an error in our own words.

    Gradio's errors can name paths and exceptions, so that only their status is kept, with two exceptions
    that are meant for users: a full queue, and what a function of the page raises as `gr.Error`.
    """

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]], head: bool) -> None:
        self._send = send
        self._headers = headers
        self._head = head
        self._started = False
        self._done = False
        self._failed: int | None = None
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= HTTPStatus.BAD_REQUEST:
                self._failed = int(message["status"])
                return
            ours = {name for name, _ in self._headers} | {b"access-control-allow-credentials", b"server"}
            kept = [pair for pair in message["headers"] if pair[0].lower() not in ours]
            self._started = True
            await self._send({**message, "headers": [*kept, *self._headers]})
        elif self._failed is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self.error(*_in_our_words(self._failed, bytes(self._body)))
        else:
            self._done = not message.get("more_body", False)
            await self._send(message)

    def ended_early(self, error: BaseException) -> bool:
        """Return whether this is a stream's end: gradio ends those of unknown sessions by an HTTP error."""
        causes = (error, error.__cause__)  # starlette wraps it
        return self._started and any(hasattr(each, "status_code") for each in causes)

    async def error(self, status: int, message: str) -> None:
        if self._done:
            return
        self._done = True
        if self._started:  # too late for an error: end what was begun
            return await self._send({"type": "http.response.body", "body": b""})
        text = {"error": message, "detail": message}
        body = json.dumps(text).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        start = {"type": "http.response.start", "status": int(status), "headers": [*headers, *self._headers]}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": b"" if self._head else body})


def _in_our_words(status: int, body: bytes) -> tuple[int, str]:
    """Return the status and the message for an error of gradio's."""
    said: object = ""
    try:
        content = json.loads(body)
        said = content.get("error") or "" if isinstance(content, dict) else ""
    except ValueError:
        pass
    if status == HTTPStatus.INTERNAL_SERVER_ERROR and isinstance(said, str) and said:
        return HTTPStatus.UNPROCESSABLE_ENTITY, said  # a `gr.Error`: the user's input
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return status, "The queue is full. Try again in a moment"
    if status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.NOT_FOUND):
        return status, HTTPStatus(status).phrase
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return status, "The server failed on this request"
    if status == HTTPStatus.FORBIDDEN:
        return HTTPStatus.NOT_FOUND, HTTPStatus.NOT_FOUND.phrase
    return status, "The server cannot use this request"
