"""The real application under the real server, in a thread, on a loopback port of its own."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any, Self

import httpx

from service.api.app import create_app
from service.api.server import Server
from service.settings import Settings


class Api:
    """One API process' worth of service. Use as a context manager; `client` speaks to it."""

    def __init__(self, redis_url: str, **settings: Any) -> None:
        defaults: dict[str, Any] = {
            "port": 0,
            "redis_url": redis_url,
            "models": ["blocks-continuous", "blocks-discrete", "not-started"],
            "default_model": "blocks-continuous",
            "media_workers": 1,
            "shutdown_s": 5,
        }
        self.settings = Settings(**(defaults | settings))
        self.app = create_app(self.settings)
        self.server = Server(self.app, self.settings)
        self._thread = threading.Thread(target=self.server.run, name="api")

    def __enter__(self) -> Self:
        self._thread.start()
        give_up = time.monotonic() + 20.0
        while not self.server.started:
            assert self._thread.is_alive(), "the server ended"
            assert time.monotonic() < give_up, "the server did not start"
            time.sleep(0.01)
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60.0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.client.close()
        self.server.should_exit = True
        self._thread.join(30.0)
        assert not self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        """Whether the service is still ready for work."""
        return self.client.get("/health/ready").status_code == 200
