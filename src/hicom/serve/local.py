"""A small server with the chat completions API of OpenAI, on `VideoChat`: for development and for one machine.

Requests wait in a bounded queue and are answered one after the other, each as if it was alone. Videos that were asked
about lately stay encoded, so that another question about one costs no vision encoder.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from ..encoding import EncodedVideo
from ..inference import Answer, StopsWhenSet, VideoChat
from ..model.generation import PromptError
from ..video import VideoError
from .kept import KeptVideos
from .media import Account, MediaError, MediaLimits, load_media
from .memory import Hold, Memory
from .requests import ChatRequest, RequestError, RequestLimits, parse_request
from .responses import check_form, error_body, error_response, has_key, parse_json, read_bytes, refusal, unread

logger = logging.getLogger(__name__)
T = TypeVar("T")
CLIENT_GONE = 499
"""Status in metrics of a request whose client went away before its answer; nobody receives it."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server behaves.

    Attributes:
        name: of the model, for clients.
        api_key: that clients must send; None: none.
        max_waiting: requests that may wait; more are refused with status 429.
        max_body_bytes: of a request.
        upload_timeout_s: for the body of a request to arrive.
        kept_videos: encoded videos that are kept.
        media: what is taken from clients.
        requests: what they may ask for.
    """

    name: str
    api_key: str | None = None
    max_waiting: int = 64
    max_body_bytes: int = 400 * 2**20
    upload_timeout_s: float = 300.0
    kept_videos: int = 8
    media: MediaLimits = field(default_factory=MediaLimits)
    requests: RequestLimits = field(default_factory=RequestLimits)


class Engine:
    """The model and what waits for it. All its work is done in one thread, which lives as long as the process.

    Args:
        chat: the model.
        settings: of the server.
    """

    def __init__(self, chat: VideoChat, settings: ServerSettings) -> None:
        self.chat, self.settings = chat, settings
        self.waiting = 0
        self.limits = replace(settings.media, max_listed=settings.requests.max_frames)
        self.memory = Memory(self.limits.max_held_bytes)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hicom-serve")
        self._fetchers = ThreadPoolExecutor(8, thread_name_prefix="hicom-fetch")
        self._kept = KeptVideos(chat, settings.kept_videos)

    def enter(self) -> Place | None:
        """Return a place for a request, None where all are taken."""
        return None if self.waiting >= self.settings.max_waiting else Place(self)

    async def media(self, request: ChatRequest, hold: Hold) -> list[Any]:
        """Return the media of a request, fetched side by side, of which only the kinds stay in it."""
        loop, account = asyncio.get_running_loop(), Account(self.limits, hold.take)

        def load(kind: str, url: str) -> Any:
            return load_media(url, self.limits, kind=kind, account=account)

        jobs = [loop.run_in_executor(self._fetchers, load, kind, url) for kind, url in request.media]
        request.media = [(kind, "") for kind, _ in request.media]
        return list(await asyncio.gather(*jobs))

    async def run(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, done in the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def videos(self, request: ChatRequest, sources: list[Any]) -> list[EncodedVideo]:
        """Return the encoded media of a request."""
        videos = []
        for (kind, _), source in zip(request.media, sources, strict=True):
            choice = request.choice if kind == "video" else {"num_frames": 1}
            if isinstance(source, list):  # frames that the client chose
                choice = {"num_frames": len(source)}
            videos.append(self._kept.encode(source, **choice))
        return videos

    def reply(self, request: ChatRequest, sources: list[Any], closed: threading.Event) -> Answer | None:
        """Return the whole answer; None where the client went away."""
        if closed.is_set():
            return None
        self.chat.check_texts([request.messages])  # before the videos are read
        videos = self.videos(request, sources)
        if closed.is_set():
            return None
        return self.chat.reply(request.messages, videos, **request.options, stopping_criteria=[StopsWhenSet(closed)])

    def stream(
        self, request: ChatRequest, sources: list[Any], send: Callable[[str], None], closed: threading.Event
    ) -> Answer | None:
        """Send the pieces of the answer, and return it; None where the client went away."""
        if closed.is_set():
            return None
        self.chat.check_texts([request.messages])
        pieces = self.chat.stream_reply(request.messages, self.videos(request, sources), **request.options)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as stop:
                answer: Answer = stop.value
                return answer
            if closed.is_set():
                pieces.close()  # stops the generation
                return None
            send(piece)


class Place:
    """One of the places for requests that are read, wait or are answered, and what is held for it.

    Args:
        engine: whose place.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.hold = Hold(engine.memory)
        engine.waiting += 1

    def leave(self) -> None:
        """Make it free."""
        self.hold.close()
        self.engine.waiting -= 1


class Metrics:
    """What `/metrics` tells, in the form of Prometheus.

    Args:
        engine: whose queue is watched.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("hicom_requests", "Requests by status", ["status"], registry=self.registry)
        self.tokens = Counter("hicom_tokens", "Tokens by kind", ["kind"], registry=self.registry)
        self.seconds = Histogram("hicom_request_seconds", "Seconds a request took", registry=self.registry)
        waiting = Gauge("hicom_requests_waiting", "Requests that wait or are answered", registry=self.registry)
        waiting.set_function(lambda: engine.waiting)

    def count(self, answer: Answer) -> None:
        """Count the tokens of an answer."""
        self.tokens.labels("prompt").inc(answer.num_prompt_tokens)
        self.tokens.labels("visual").inc(answer.num_visual_tokens)
        self.tokens.labels("completion").inc(answer.num_new_tokens)


def create_app(chat: VideoChat, settings: ServerSettings) -> FastAPI:
    """Return the application: `/v1/chat/completions`, `/v1/models`, `/health` and `/metrics`."""
    app = FastAPI(title="hicom", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    engine = Engine(chat, settings)
    metrics = Metrics(engine)
    chat.model.is_toy_told = True  # every answer brings it along
    created = int(time.time())

    app.add_middleware(Door, key=settings.api_key)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return error_response(str(error.detail), error.status_code, code="http_error")

    @app.get("/health")
    async def health() -> Response:
        return PlainTextResponse("ok")

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return PlainTextResponse(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        model = {"id": settings.name, "object": "model", "created": created, "owned_by": "hicom"}
        if chat.notes():  # of the model, whatever is asked
            model["description"] = "; ".join(chat.notes())
        return JSONResponse({"object": "list", "data": [model]})

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        start = time.perf_counter()
        response = await answer(request)
        metrics.requests.labels(str(response.status_code)).inc()
        metrics.seconds.observe(time.perf_counter() - start)
        return response

    async def answer(request: Request) -> Response:
        place = engine.enter()  # before anything of it is read
        if place is None:
            return error_response("too many requests are waiting; try again later", 429, code="overloaded")
        is_streaming = False
        closed = threading.Event()
        try:
            content = await read_bytes(request, settings.max_body_bytes, place.hold, settings.upload_timeout_s)
            parsed = parse_request(parse_json(content), settings.requests)
            del content
            if parsed.model != settings.name:
                text = f"there is no model {parsed.model!r} here; there is {settings.name!r}"
                raise RequestError(text, "model", "model_not_found", 404)
            async with leaving(request, closed) as unless_gone:
                sources = await unless_gone(engine.media(parsed, place.hold))
                if parsed.is_stream:
                    # The first piece comes before the headers, so that what is wrong with a request is still an error.
                    pieces = stream(parsed, sources, closed)
                    first = await unless_gone(anext(pieces))
                else:
                    whole = await unless_gone(engine.run(lambda: engine.reply(parsed, sources, closed)))
            if parsed.is_stream:
                is_streaming = True
                return Stream(rest(first, pieces), pieces, place)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except PromptError as error:
            return error_response(str(error), 400, "messages", "context_length_exceeded")
        except (RequestError, MediaError, VideoError, ValueError) as error:
            return refusal(error)
        except Exception:
            logger.exception("a request failed")
            return error_response("the server failed at this request", 500, kind="server_error", code="internal")
        finally:
            if not is_streaming:
                place.leave()
        if whole is None:
            return Response(status_code=CLIENT_GONE)
        metrics.count(whole)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": whole.text},
            "finish_reason": "length" if whole.is_cut else "stop",
        }
        body = envelope(parsed, "chat.completion") | {"choices": [choice], "usage": usage(whole)} | noted(whole)
        return JSONResponse(body)

    async def stream(parsed: ChatRequest, sources: list[Any], closed: threading.Event) -> AsyncGenerator[str]:
        """Yield the events of a streamed answer."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[str | None] = asyncio.Queue()

        def send(piece: str | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        def work() -> Answer | None:
            try:
                return engine.stream(parsed, sources, send, closed)
            finally:
                send(None)

        job = asyncio.ensure_future(engine.run(work))
        head = envelope(parsed, "chat.completion.chunk")
        try:
            started = False
            while (piece := await queue.get()) is not None:
                delta = {"content": piece} if started else {"role": "assistant", "content": piece}
                started = True
                yield event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            whole = await job
            if whole is None:
                return
            metrics.count(whole)
            nothing = {} if started else {"role": "assistant", "content": ""}
            last = {"index": 0, "delta": nothing, "finish_reason": "length" if whole.is_cut else "stop"}
            yield event(head | {"choices": [last]} | noted(whole))
            if parsed.with_usage:
                yield event(head | {"choices": [], "usage": usage(whole)})
            yield "data: [DONE]\n\n"
        finally:
            closed.set()
            job.cancel()  # takes it back where it has not begun

    async def rest(first: str, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            yield first
            async for piece in pieces:
                yield piece
        except (MediaError, VideoError, ValueError) as error:
            yield event(error_body(str(error), "invalid_request_error", None, "invalid_request"))
        except Exception:
            logger.exception("a streamed request failed")
            yield event(error_body("the server failed at this request", "server_error", None, "internal"))

    return app


@asynccontextmanager
async def leaving(
    request: Request, closed: threading.Event
) -> AsyncIterator[Callable[[Awaitable[T]], Coroutine[Any, Any, T]]]:
    """Watch for the client to go away while a request is worked on, whose body has been read.

    Args:
        request: the request.
        closed: set when the client is gone, or the block is left by an error, for work in threads.

    Yields:
        A function that awaits work. It raises ClientDisconnect as soon as the client is gone; work that waits for its
        turn is then taken back, and other work is told by `closed`.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        closed.set()

    gone = asyncio.ensure_future(watch())

    async def unless_gone(work: Awaitable[T]) -> T:
        job = asyncio.ensure_future(work)
        await asyncio.wait((job, gone), return_when=asyncio.FIRST_COMPLETED)
        if job.done():
            return job.result()
        job.cancel()
        raise ClientDisconnect

    try:
        yield unless_gone
    except BaseException:
        closed.set()
        raise
    finally:
        gone.cancel()  # what a response sends listens for itself


class Door:
    """Lets requests through that bring the key, where there is one, and those for `/health`.

    Args:
        app: that it stands before.
        key: the key.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            request = Request(scope)
            try:
                check_form(request)
                if self.key is not None and scope["path"] != "/health" and not has_key(request, self.key):
                    raise RequestError("the API key is missing or wrong", None, "invalid_api_key", 401)
            except RequestError as error:
                await unread(refusal(error))(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Stream(StreamingResponse):
    """A streamed answer; when it ends, in whatever way, so does its generation.

    Generators clean up after themselves only if they were started, and a client may be gone before that.

    Args:
        content: what is sent.
        pieces: what makes it.
        place: of the request.
    """

    def __init__(self, content: AsyncIterator[str], pieces: AsyncGenerator[str], place: Place) -> None:
        super().__init__(content, media_type="text/event-stream")
        self.pieces, self.place = pieces, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.place.leave()
            await self.pieces.aclose()


def envelope(request: ChatRequest, kind: str) -> dict[str, Any]:
    """Return what every response has."""
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": request.model}


def usage(answer: Answer) -> dict[str, Any]:
    """Return what an answer cost."""
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_new_tokens,
        "total_tokens": answer.num_prompt_tokens + answer.num_new_tokens,
        "prompt_tokens_details": {
            "visual_tokens": answer.num_visual_tokens,
            "uncompressed_visual_tokens": answer.num_uncompressed_tokens,
        },
    }


def noted(answer: Answer) -> dict[str, Any]:
    """Return what to know before an answer is believed, as a field that clients of OpenAI's API keep."""
    return {"notes": list(answer.notes)} if answer.notes else {}


def event(body: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
