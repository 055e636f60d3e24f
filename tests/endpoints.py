"""A real HTTP server that speaks the chat completions of OpenAI, with answers of the test's own."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], str | int]
"""Takes a request; returns the text of the answer, or the status of an error."""


@dataclass
class Served:
    """A running server."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def serve(answer: Answer) -> Iterator[Served]:
    """Serve until the block ends."""
    served = Served("")
    lock = threading.Lock()
    running = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal running
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                served.requests.append(request)
                running += 1
                served.most_at_once = max(served.most_at_once, running)
            found = answer(request)
            with lock:
                running -= 1
            if isinstance(found, int):
                status, body = found, {"error": {"message": "no"}}
            else:
                message = {"role": "assistant", "content": found}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
                status = 200
                body = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
                body |= {"choices": [choice], "usage": usage}
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
