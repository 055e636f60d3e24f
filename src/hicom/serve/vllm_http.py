"""What stands before vLLM's server: limits for requests, and the fields that only this package knows.

It goes into vLLM's own server (`--middleware`), so all that vLLM offers stays as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .media import MediaLimits
from .requests import RequestError, RequestLimits, check_characters, check_counts, split_fields
from .responses import has_key, parse_json, read_bytes, refusal

VARIABLE = "HICOM_SERVE"
CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
MEDIA_OPTIONS = ("mm_processor_kwargs", "media_io_kwargs")


@dataclass(frozen=True, kw_only=True)
class VLLMSettings:
    """What the parts inside vLLM's processes need to know; it reaches them through the environment.

    Attributes:
        max_body_bytes: of a request.
        media: what is taken from clients.
        requests: what they may ask for.
        toy_note: what every answer tells of a model that is a toy (`HIComConfig.toy_note`); "" for other models.
    """

    max_body_bytes: int = 400 * 2**20
    media: MediaLimits = field(default_factory=MediaLimits)
    requests: RequestLimits = field(default_factory=RequestLimits)
    toy_note: str = ""

    def to_environment(self) -> None:
        """Keep this for processes that are started from here."""
        os.environ[VARIABLE] = json.dumps(asdict(self), default=str)

    @classmethod
    def from_environment(cls) -> VLLMSettings:
        """Return what was kept, or the defaults."""
        found = json.loads(os.environ.get(VARIABLE, "{}"))
        if not found:
            return cls()
        media = found["media"] | {
            "allowed_hosts": tuple(found["media"]["allowed_hosts"]),
            "allowed_folders": tuple(map(Path, found["media"]["allowed_folders"])),
        }
        return cls(
            max_body_bytes=found["max_body_bytes"],
            media=MediaLimits(**media),
            requests=RequestLimits(**found["requests"]),
            toy_note=found["toy_note"],
        )


class RequestGuard:
    """Reads requests no further than is allowed, and puts our fields where vLLM has them.

    `instruction`, `window`, `max_visual_tokens`, `num_frames` and `fps` are checked and become vLLM's
    `mm_processor_kwargs` and `media_io_kwargs`; anything else there is refused, since it would decide over the server's
    memory.

    Args:
        app: vLLM's server.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.settings = VLLMSettings.from_environment()
        self.api_key = os.environ.get("VLLM_API_KEY")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "http" and self.settings.toy_note:
            send = noting(send, self.settings.toy_note, scope["path"])
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            if self.api_key and not has_key(request, self.api_key):  # before anything of it is read
                raise RequestError("the API key is missing or wrong", None, "invalid_api_key", 401)
            content = await read_bytes(request, self.settings.max_body_bytes)
            if content:
                content = self.translated(content, request.url.path)
        except RequestError as error:
            await refusal(error)(scope, receive, send)
            return
        headers = [each for each in scope["headers"] if each[0] not in (b"content-length", b"transfer-encoding")]
        headers.append((b"content-length", str(len(content)).encode()))
        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()  # tells when the client goes away
            is_read = True
            return {"type": "http.request", "body": content, "more_body": False}

        await self.app(dict(scope, headers=headers), replay, send)

    def translated(self, content: bytes, path: str) -> bytes:
        """Return the body as vLLM takes it.

        Raises:
            RequestError: it is no JSON, or one of our fields is wrong.
        """
        body = parse_json(content)
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object")
        if path != CHAT:
            for name in MEDIA_OPTIONS:
                if body.get(name):
                    raise RequestError(f"{name!r} is for {CHAT}", name)
            return content
        if body.get("media_io_kwargs"):
            raise RequestError("'media_io_kwargs' is not taken; num_frames or fps choose frames", "media_io_kwargs")
        self.check_size(body)
        fields, options, choice = split_fields(body, self.settings.requests)
        if not options and not choice:
            return content
        if options:
            fields["mm_processor_kwargs"] = options
        if choice:
            fields["media_io_kwargs"] = {"video": choice}
        return json.dumps(fields).encode()

    def check_size(self, body: Mapping[str, Any]) -> None:
        """Refuse a chat with too many turns or media, or too long texts; their form is vLLM's to check."""
        messages = body.get("messages")
        if not isinstance(messages, list):
            return
        contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        media = sum(isinstance(part, Mapping) and part.get("type", "text") != "text" for part in parts)
        check_counts(len(messages), media, self.settings.requests)
        texts = [part.get("text") for part in parts if isinstance(part, Mapping)] + contents
        check_characters(sum(len(text) for text in texts if isinstance(text, str)), self.settings.requests)


def noting(send: Send, note: str, path: str) -> Send:
    """Return a `send` that puts a note into answers; vLLM has no hook for that.

    A chat's answer gets a field `notes`, of a streamed one its first piece; the first listed model a `description`.

    Args:
        send: what sends a response.
        note: the note.
        path: that was asked.
    """
    places = {CHAT: (b"{", {"notes": [note]}), MODELS: (b'"data":[{', {"description": note})}
    if path not in places:
        return send
    mark, fields = places[path]
    added = json.dumps(fields)[1:-1].encode() + b","
    start: Message | None = None

    async def sending(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start" and message["status"] == 200:
            start = message  # its length is known with the first of its body
            return
        if start is not None:
            head, found, rest = message.get("body", b"").partition(mark)
            if found:
                message = {**message, "body": head + found + added + rest}
                start["headers"] = [
                    (name, str(int(value) + len(added)).encode() if name == b"content-length" else value)
                    for name, value in start["headers"]
                ]
            await send(start)
            start = None
        await send(message)

    return sending
