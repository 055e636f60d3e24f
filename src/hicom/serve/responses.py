"""Bodies of requests and errors, as the servers of this package read and write them."""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..video import VideoError
from .media import MediaError
from .requests import RequestError

MAX_DIGITS = 18
"""Of a length that is read as a number."""
MAX_MESSAGE = 1_000
"""Characters of an error, which quotes what the client wrote."""


def has_key(request: Request, key: str) -> bool:
    """Return whether a request brings the API key."""
    return hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {key}".encode())


async def read_bytes(request: Request, most: int) -> bytes:
    """Return the body of a request, read no further than is allowed.

    Raises:
        RequestError: it is too long.
    """
    too_long = RequestError(f"the request has more than {most:,} bytes", None, "request_too_large", 413)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > MAX_DIGITS or int(length) > most):
        raise too_long
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > most:
            raise too_long
    return bytes(content)


def parse_json(content: bytes) -> Any:
    """Return what a body holds.

    Raises:
        RequestError: it is no JSON, or has texts that no Unicode text can be (half of a surrogate pair).
    """
    try:
        body = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON") from None
    if not all(map(_is_unicode, _texts(body))):
        raise RequestError("the body has half of a surrogate pair (\\ud800 to \\udfff), which is no Unicode text")
    return body


def _refuse(name: str) -> None:
    """Refuse NaN and Infinity, which Python's reader takes and JSON has not."""
    raise ValueError(name)


def _texts(body: Any) -> Iterator[str]:
    """Yield all texts of a body, names of fields included."""
    left = [body]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value


def _is_unicode(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())  # media are long, and their base64 is ASCII
    except UnicodeEncodeError:
        return False


def refusal(error: Exception) -> Response:
    """Return the response to a request that is wrong; errors of ours have texts made for clients."""
    if isinstance(error, RequestError):
        return error_response(str(error), error.status, param=error.param, code=error.code)
    if isinstance(error, MediaError):
        return error_response(str(error), 413 if error.code == "media_too_large" else 400, "messages", error.code)
    if isinstance(error, VideoError):  # its text names what was read, which is the client's own
        return error_response("a video cannot be read as it is asked for", 400, "messages", "invalid_media")
    return error_response(str(error), 400)


def error_response(
    message: str, status: int, param: str | None = None, code: str = "invalid_request", kind: str = ""
) -> Response:
    """Return an error in OpenAI's form."""
    kind = kind or ("authentication_error" if status == 401 else "invalid_request_error")
    content = json.dumps(error_body(message, kind, param, code))  # in ASCII, whatever a text holds
    return Response(content, status, media_type="application/json")


def error_body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    """Return the body of an error in OpenAI's form. What a client wrote comes back shortened."""
    return {"error": {"message": _short(message), "type": kind, "param": param and _short(param), "code": code}}


def _short(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."
