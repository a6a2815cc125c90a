"""What users and the log learn of an error: one line, without a traceback, folders or secrets."""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gradio as gr

from nexus_adapters.errors import InvalidArgument, one_line

logger = logging.getLogger("nexus_adapters.app")

FAILED = "The server failed on this request. Its log says why"

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST_SECRET = 6
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_QUOTED_PATH = re.compile(r"(['\"])(?:[A-Za-z]:)?[/\\]([^'\"\n]*[/\\])?([^'\"/\\\n]*)\1")
_PATH = re.compile(r"(?<![\w/\\.:])(?:[A-Za-z]:)?[/\\](?:[^\s'\"/\\]+[/\\])+([^\s'\"/\\]*)")


def private(text: str) -> str:
    """Return a text without what may be private: folders of paths, tokens, secrets of the environment."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    text = _HUB_TOKEN.sub("***", text)
    text = _QUOTED_PATH.sub(r"\1\3\1", text)
    return _PATH.sub(r"\1", text)


def log_failure(place: str, error: BaseException) -> None:
    """Log an unexpected error as one line; its traceback only at level DEBUG, since it can hold anything."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = one_line(error)
    what = text if text == type(error).__name__ else f"{type(error).__name__}: {text}"
    logger.error("%s failed: %s%s", place, private(what), where)
    logger.debug("%s failed", place, exc_info=error)


def report_errors(page: gr.Blocks) -> None:
    """Make every error of a page's functions a `gr.Error` of one line.

    `InvalidArgument` and `gr.Error` keep their message. Others are logged, and the user sees that the server
    failed. Gradio would print their tracebacks.
    """
    inner: Callable[..., Awaitable[dict[str, Any]]] = page.process_api

    async def process_api(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await inner(*args, **kwargs)
        except Exception as error:
            raise _for_users(error, _name(args, kwargs)) from None

    vars(page)["process_api"] = process_api


def _for_users(error: Exception, function: str) -> gr.Error:
    cause: BaseException | None = error
    while cause is not None:  # gradio wraps errors of components
        if isinstance(cause, gr.Error):
            cause.print_exception = False
            cause.message = private(str(cause.message))
            return cause
        if isinstance(cause, InvalidArgument):
            return gr.Error(private(str(cause)), print_exception=False)
        cause = cause.__cause__
    log_failure(function, error)
    return gr.Error(FAILED, print_exception=False)


def _name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    block_fn = kwargs.get("block_fn", args[0] if args else None)
    return str(getattr(block_fn, "name", None) or "a function of the page")
