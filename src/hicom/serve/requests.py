"""Requests of the chat completions API: what may be in them, and what they ask of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..model.instruction import MAX_INSTRUCTION
from ..model.ops import Window

ROLES = ("system", "user", "assistant")
SAMPLING = ("temperature", "top_p")
CONDITIONING = ("instruction", "window", "max_visual_tokens", "num_frames", "fps")
"""Fields that OpenAI does not know."""
IGNORED = frozenset({"user", "n", "stream", "stream_options", "model", "messages", "seed", "store", "metadata", "stop"})
"""Known fields that are read elsewhere, or change nothing here."""
GREEDY = 1e-5
"""Temperatures below are 0, as in vLLM: logits divided by much smaller ones are no numbers any more."""


class RequestError(ValueError):
    """A request is refused; the text goes to the client.

    Args:
        message: what is wrong.
        param: the field that it is about.
        code: a short name for programs.
        status: of HTTP.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_request", status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class RequestLimits:
    """What a request may ask for.

    Attributes:
        max_media: videos and pictures of a request.
        max_frames: frames of a video.
        max_tokens: longest answer.
        max_messages: turns.
        max_characters: of all texts.
        max_instruction: characters of an instruction that is stated.
    """

    max_media: int = 8
    max_frames: int = 256
    max_tokens: int = 2048
    max_messages: int = 64
    max_characters: int = 100_000
    max_instruction: int = MAX_INSTRUCTION


@dataclass
class ChatRequest:
    """A request, checked.

    Attributes:
        model: that is asked for.
        messages: turns of text.
        media: `video` or `image` and URL, in order.
        options: arguments of `VideoChat.reply`.
        choice: frames of each video: `num_frames` or `fps`.
        is_stream: pieces are wanted as they come.
        with_usage: the last piece tells what it cost.
    """

    model: str
    messages: list[dict[str, str]]
    media: list[tuple[str, str]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)
    is_stream: bool = False
    with_usage: bool = False


def parse_request(body: Any, limits: RequestLimits) -> ChatRequest:
    """Return a request of `POST /v1/chat/completions`, checked.

    Beside OpenAI's fields there are `instruction`, `window`, `max_visual_tokens`, `num_frames` and `fps`, also inside
    `mm_processor_kwargs`, where vLLM has them.

    Raises:
        RequestError: something is missing, unknown, out of bounds or contradicts itself.
    """
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise RequestError("'model' must name a model", "model")
    request = ChatRequest(model, *_messages(body.get("messages"), limits))
    request.is_stream = _flag(body, "stream")
    stream_options = body.get("stream_options") or {}
    request.with_usage = isinstance(stream_options, Mapping) and stream_options.get("include_usage") is True
    if body.get("n") not in (None, 1):
        raise RequestError("'n' must be 1", "n")
    if body.get("stop") not in (None, [], ""):
        raise RequestError("'stop' is not supported", "stop")
    fields, request.options, request.choice = split_fields(body, limits)
    for name in ("max_tokens", "max_completion_tokens"):  # the first is the old name of the second
        value = fields.pop(name, None)
        if value is not None:
            request.options["max_new_tokens"] = _whole(value, name, limits.max_tokens)
    request.options.setdefault("max_new_tokens", min(512, limits.max_tokens))
    for name in SAMPLING:
        value = fields.pop(name, None)
        if value is not None:
            request.options[name] = _number(value, name, 0, 2 if name == "temperature" else 1)
    if request.options.get("temperature", 1.0) < GREEDY:
        request.options.pop("temperature")
        request.options.pop("top_p", None)
    elif "temperature" in request.options or request.options.get("top_p", 1) < 1:
        request.options["do_sample"] = True
    # Clients send defaults of fields that are not supported; only what would change something is refused.
    unknown = sorted(name for name in set(fields) - IGNORED if fields[name])
    if unknown:
        raise RequestError(f"unknown fields: {', '.join(unknown)}", unknown[0])
    return request


def split_fields(
    body: Mapping[str, Any], limits: RequestLimits
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the fields of OpenAI, what is asked of the compressor, and which frames are wanted.

    Args:
        body: of a request.
        limits: of the server.

    Raises:
        RequestError: a field of ours is wrong, or contradicts another.
    """
    fields = dict(body)
    options: dict[str, Any] = {}
    choice: dict[str, Any] = {}
    for name, value in (_object(body, "mm_processor_kwargs") or {}).items():
        if name not in CONDITIONING:
            raise RequestError(f"'mm_processor_kwargs' may hold {', '.join(CONDITIONING)}, not {name!r}", name)
        if name in fields and fields[name] != value:
            raise RequestError(f"{name!r} is given twice, and differently", name, "conflict")
        fields[name] = value
    fields.pop("mm_processor_kwargs", None)
    given = {name: value for name in CONDITIONING if (value := fields.pop(name, None)) is not None}
    if "instruction" in given:
        instruction = given["instruction"]
        if not isinstance(instruction, str) or not instruction.strip():
            raise RequestError("'instruction' must be text", "instruction")
        if len(instruction) > limits.max_instruction:
            text = f"'instruction' has {len(instruction):,} characters; at most {limits.max_instruction:,} are taken"
            raise RequestError(text, "instruction", "instruction_too_long")
        options["instruction"] = instruction
    if "window" in given:
        options["window"] = _window(given["window"])
    if "max_visual_tokens" in given:
        options["max_visual_tokens"] = _whole(given["max_visual_tokens"], "max_visual_tokens", 10**6)
    if "num_frames" in given:
        choice["num_frames"] = _whole(given["num_frames"], "num_frames", limits.max_frames)
    if "fps" in given:
        choice |= {"fps": _number(given["fps"], "fps", 0, 120), "max_frames": limits.max_frames}
    if "num_frames" in choice and "fps" in choice:
        raise RequestError("'num_frames' and 'fps' both choose the frames; give one", "fps", "conflict")
    if "window" in options and "max_visual_tokens" in options:
        raise RequestError("'window' and 'max_visual_tokens' both choose the window; give one", "window", "conflict")
    return fields, options, choice


def check_counts(num_messages: int, num_media: int, limits: RequestLimits) -> None:
    """Raise RequestError where a chat has too many turns or media."""
    if num_messages > limits.max_messages:
        raise RequestError(f"there are {num_messages} messages; at most {limits.max_messages} are taken", "messages")
    if num_media > limits.max_media:
        raise RequestError(f"there are {num_media} media; at most {limits.max_media} are taken", "messages")


def check_characters(number: int, limits: RequestLimits) -> None:
    """Raise RequestError where the texts of a chat are too long together."""
    if number > limits.max_characters:
        text = f"the messages have {number:,} characters, more than {limits.max_characters:,} characters"
        raise RequestError(text, "messages", "context_length_exceeded")


def _messages(value: Any, limits: RequestLimits) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    if not isinstance(value, list) or not value:
        raise RequestError("'messages' must be a list of messages", "messages")
    check_counts(len(value), 0, limits)  # before work is put into them
    messages, media = [], []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise RequestError(f"{where} needs a role: {', '.join(ROLES)}", "messages")
        text, found = _content(message.get("content"), where)
        if found and message["role"] != "user":
            raise RequestError(f"{where}: media belong into messages of the user", "messages")
        messages.append({"role": str(message["role"]), "content": text})
        media += found
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise RequestError("the last message must be a question of the user", "messages")
    check_counts(len(value), len(media), limits)
    check_characters(sum(len(message["content"]) for message in messages), limits)
    return messages, media


def _content(value: Any, where: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the media of a message."""
    if isinstance(value, str):
        return value, []
    if not isinstance(value, list):
        raise RequestError(f"{where}.content must be text or a list of parts", "messages")
    texts, media = [], []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            continue
        if kind not in ("video_url", "image_url"):
            raise RequestError(
                f"{where}.content has a part of type {kind!r}; text, video_url and image_url are taken", "messages"
            )
        entry = part.get(kind)
        url = entry.get("url") if isinstance(entry, Mapping) else entry
        if not isinstance(url, str) or not url:
            raise RequestError(f"{where}.content: {kind} needs a 'url'", "messages")
        media.append((kind.removesuffix("_url"), url))
    return "\n".join(texts), media


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    value = body.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise RequestError(f"{name!r} must be an object", name)
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if value not in (None, True, False):
        raise RequestError(f"{name!r} must be true or false", name)
    return bool(value)


def _whole(value: Any, name: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise RequestError(f"{name!r} must be a whole number from 1 to {most:,}", name)
    return value


def _number(value: Any, name: str, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RequestError(f"{name!r} must be a number from {least:g} to {most:g}", name)
    return float(value)


def _window(value: Any) -> Window:
    if not isinstance(value, list) or len(value) != 3:
        raise RequestError("'window' must be three sizes, for example [4, 3, 3]", "window")
    first, second, third = (_whole(size, "window", 10**4) for size in value)
    return first, second, third
