"""Receivers on loopback that answer as the world does: well, slowly, wrongly, or not at all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gradwatch import alerts
from gradwatch.records import Finding, RunInfo, Severity

INFO = RunInfo((), host="gpu7", pid=4711)


def finding(
    name: str = "exploding@5", *, severity: Severity = "critical", resolved: int | None = None, **fields: Any
) -> Finding:
    """A finding whose rule is the first part of its name."""
    rule = name.partition("@")[0]
    given = {
        "layers": ("conv1",),
        "message": f"{rule} it is",
        "cause": "a rate too high",
        "advice": ("lower it",),
        **fields,
    }
    return Finding(name, rule, severity, 5, 7, resolved_step=resolved, **given)


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Return when the condition holds; fail when it does not come to hold."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Receiver:
    """An HTTP server that keeps what it gets.

    Attributes:
        behave: `ok`, `slow`, `hang`, `refuse` (status 500), `redirect`, or `cut` (closes without an answer).
    """

    def __init__(self) -> None:
        self.behave = "ok"
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.tried = 0
        self.released = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.answer(self)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.port = self._server.server_port

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.tried += 1
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        if self.behave == "hang":
            self.released.wait(30)
        if self.behave in ("hang", "cut"):
            handler.close_connection = True
            return
        if self.behave == "slow":
            time.sleep(0.3)
        if self.behave in ("ok", "slow"):
            self.requests.append((dict(handler.headers), body))
        handler.send_response({"refuse": 500, "redirect": 302}.get(self.behave, 200))
        if self.behave == "redirect":
            handler.send_header("Location", f"http://127.0.0.1:{self.port}/elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.requests]

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    try:
        yield server
    finally:
        server.close()


class Collector(alerts.Channel):
    """Keeps its messages; fails as long as it is told to."""

    def __init__(self, **routing: Any) -> None:
        super().__init__(**{"group_seconds": 0.05, **routing})
        self.messages: list[alerts.Message] = []
        self.fails = 0
        self.tried = 0

    def send(self, message: alerts.Message) -> None:
        self.tried += 1
        if self.fails:
            self.fails -= 1
            raise ConnectionError("token=hunter2 is refused")
        self.messages.append(message)

    @property
    def secrets(self) -> tuple[str, ...]:
        return ("hunter2",)
