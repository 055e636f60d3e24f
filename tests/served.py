"""The development server in a thread of the tests."""

import asyncio
import http.client
import json
import socket
import threading
import time
from typing import Any

import openai
import uvicorn

from hicom import VideoChat
from hicom.serve.local import ServerSettings, create_app
from hicom.serve.media import MediaLimits


class Served:
    """A running server and what it serves."""

    def __init__(self, chat: VideoChat, **settings: Any) -> None:
        options = {"name": "tiny", "media": MediaLimits(allow_private=True), **settings}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        app = create_app(chat, ServerSettings(**options))
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error"))
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.chat = chat

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0)

    def post(self, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/v1/chat/completions", data, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
