"""A registry that does wrong, byte by byte: it serves an OCI layout, but for what a test has it answer otherwise."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol

from layouts import Layout, digest_of

MEDIA = "application/vnd.oci.image.manifest.v1+json"


@dataclass(slots=True)
class Answer:
    """What is answered instead. length: announced, where it is not the body's. drip: bytes at once, with a pause.

    hang: after the body, nothing more comes and the connection stays. mute: nothing comes at all.
    times: how often, None: always.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
    drip: int = 0
    hang: bool = False
    mute: bool = False
    times: int | None = None


class Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


class FaultyRegistry:
    """Listens on 127.0.0.1 until `close`. paths: all it was asked, in order. peak: slow answers at once."""

    def __init__(self, layout: Path | None = None) -> None:
        self.layout = Layout(layout) if layout else None
        self.paths: list[str] = []
        self.peak = self._now = 0
        self.released = threading.Event()
        self._rules: list[tuple[str, Answer]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Let go of whoever hangs, and listen no more."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, pattern: str, answer: Answer) -> None:
        """Answer so wherever the path matches; the latest rule counts."""
        self._rules.insert(0, (pattern, answer))

    def mend(self) -> None:
        """Answer properly from now on."""
        self._rules.clear()

    def asked(self, pattern: str) -> int:
        """How many requests matched so far."""
        return len([path for path in self.paths if re.search(pattern, path)])

    def _find(self, path: str) -> Answer:
        with self._lock:
            self.paths.append(path)
            for pattern, answer in self._rules:
                if re.search(pattern, path) and answer.times != 0:
                    if answer.times is not None:
                        answer.times -= 1
                    return answer
        return self._proper(path)

    def _drip(self, answer: Answer, file: Writable) -> bytes:
        """Write all but the last drop, which is returned: who has that may begin with something else."""
        with self._lock:
            self._now += 1
            self.peak = max(self.peak, self._now)
        try:
            last = len(answer.body) - answer.drip
            for start in range(0, max(last, 0), answer.drip):
                file.write(answer.body[start : min(start + answer.drip, last)])
                self.released.wait(0.01)
        finally:
            with self._lock:
                self._now -= 1
        return answer.body[max(last, 0) :]

    def _proper(self, path: str) -> Answer:
        if path == "/v2/":
            return Answer(body=b"{}")
        kind, _, name = path.rpartition("/")
        layout = self.layout
        if layout is not None:
            with suppress(FileNotFoundError, StopIteration):
                digest = name if name.startswith("sha256:") else str(layout.find(name)["digest"])
                body = layout.read(digest)
                if not kind.endswith("/manifests"):
                    return Answer(body=body)
                media = json.loads(body).get("mediaType", MEDIA)
                return Answer(body=body, headers={"Content-Type": media, "Docker-Content-Digest": digest_of(body)})
        return Answer(404, error("MANIFEST_UNKNOWN", "manifest unknown"))

    def _handler(self) -> Callable[..., BaseHTTPRequestHandler]:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer = registry._find(self.path)
                if answer.mute:
                    registry.released.wait(60)
                length = len(answer.body) if answer.length is None else answer.length
                with suppress(OSError):
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(length))
                    self.end_headers()
                    self.wfile.write(registry._drip(answer, self.wfile) if answer.drip else answer.body)
                    if answer.hang:
                        self.wfile.flush()
                        registry.released.wait(60)
                if length != len(answer.body):
                    self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def error(code: str, message: str) -> bytes:
    """A body as the OCI distribution spec has it for errors."""
    return json.dumps({"errors": [{"code": code, "message": message}]}).encode()
