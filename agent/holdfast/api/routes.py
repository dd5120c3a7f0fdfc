"""Answer one request: find its question, read its arguments, call the agent, and write what it returns.

Archives come in frames, because their length is not known in advance: a line with the size of what follows, in
hexadecimal; after 0 comes the result, or an error, as a line.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import structlog

from holdfast import __version__, questions
from holdfast.api.arguments import arguments_of, caller, in_body, in_query
from holdfast.errors import Conflict, HoldfastError, NotFound, NotPermitted, TryAgain, UnfitHost, WrongCall
from holdfast.questions import ROOT_HEADER, Caller, Json, Lines, Questions, Sink, Steps

HTTP_STATUS = {NotFound: 404, WrongCall: 400, NotPermitted: 403, Conflict: 409, TryAgain: 503, UnfitHost: 503}
UNPROCESSABLE = 422  # for all other errors
ROUTES = [(each, re.compile(questions.PLACE.sub(r"(?P<\1>\2)", each.path))) for each in questions.QUESTIONS]
LONGEST = 1 << 20  # bytes of a body
STALLED = 60.0  # seconds until a caller who neither writes nor reads is given up: a container may be frozen for it
GONE = (ConnectionError, TimeoutError)  # what reading and writing raise then
FRAME = 1 << 18  # bytes, about

log = structlog.get_logger("holdfast")


class Request(BaseHTTPRequestHandler):
    """One request, in a thread of its own. HTTP/1.0: the connection ends with the answer.

    over: set when the agent ends. Raises OSError when the caller has gone.
    """

    def __init__(self, connection: socket.socket, agent: Questions, root: Path, over: threading.Event) -> None:
        self._agent, self._root, self._over = agent, root, over
        self._begun = False
        connection.settimeout(STALLED)
        super().__init__(connection, "", None)  # type: ignore[arg-type]  # only logs of requests need a server

    def do_GET(self) -> None:
        """Answer a request of any method."""
        path, _, query = self.path.partition("?")
        self._name = f"{self.command} '{path}'"
        found = {each.method: (each, match) for each, pattern in ROUTES if (match := pattern.fullmatch(path))}
        if self.command not in found:
            return self.send_error(405 if found else 404)
        question, match = found[self.command]
        hints = question.hints()
        places = {name: unquote(text) for name, text in match.groupdict().items()}
        try:
            self._refuse_other_root()
            given = in_body(self._body(), self._name) if question.method == "POST" else in_query(question, query)
            arguments = arguments_of(question, given | places, self._name)
            arguments |= {name: caller(self.connection) for name, hint in hints.items() if hint is Caller}
            call = partial(getattr(self._agent, question.name), **arguments)
            if hints["return"] in (Lines, Steps):
                self._lines(call)
            elif Sink in hints.values():
                self._frames(call)
            else:
                self._reply(200, call())
        except GONE:
            raise
        except Exception as error:
            self._fail(error)

    do_POST = do_DELETE = do_GET

    def _refuse_other_root(self) -> None:
        """Raise Conflict if the caller means the agent of another root: two agent.toml can name one socket."""
        meant = unquote(self.headers.get(ROOT_HEADER, ""))
        if meant and Path(meant) != self._root and os.path.realpath(meant) != os.path.realpath(self._root):
            raise Conflict(
                f"ask the agent that holds '{self._root}': agent.toml says root = '{meant}' "
                "(another name in agent.toml, or restart the agent if its root was changed)"
            )

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or len(length) > len(str(LONGEST)) or int(length) > LONGEST:
            raise WrongCall(f"{self._name}: Content-Length '{length}': not a number of bytes up to {LONGEST}")
        return self.rfile.read(int(length))

    def _lines(self, call: Callable[[], Lines]) -> None:
        """Write what an iterator yields, line by line, until the caller goes; an error is the last line."""
        found = call()
        self.connection.settimeout(None)  # a person may read on later
        self._begin(200, "application/x-ndjson")
        for each in found:
            self.wfile.write(b"\n" if each is None else line_of(each))
            if self._over.is_set():
                break

    def _frames(self, call: Callable[..., Json]) -> None:
        """Write what a call writes, and at the end what it returns or raises."""
        self._begin(200, "application/octet-stream")
        out = _Frames(self.wfile.write)
        try:
            end = call(out=out)
            out.flush()
        except GONE:
            raise
        except Exception as error:
            end = self._error_json(error)
        self.wfile.write(b"0\n" + line_of(end))

    def _fail(self, error: Exception) -> None:
        """Answer with an error; after lines, by a line."""
        if self._begun:
            self.wfile.write(line_of(self._error_json(error)))
        else:
            codes = (HTTP_STATUS[kind] for kind in type(error).__mro__ if kind in HTTP_STATUS)
            self._reply(next(codes, UNPROCESSABLE), self._error_json(error))

    def _error_json(self, error: Exception) -> Json:
        """What the caller reads of an error; a bug is in the log."""
        if isinstance(error, HoldfastError):
            return error_json(error)
        if isinstance(error, OSError):
            return error_json(UnfitHost(f"{self._name}: {(error.strerror or str(error)).lower()}"))
        log.error("bug", what="an answer", exc_info=error)
        return error_json(HoldfastError(f"{self._name}: failed by a bug (see the agent's log)"))

    def _reply(self, status: int, value: object) -> None:
        """Write one JSON value."""
        text = json.dumps(value).encode()
        self._begin(status, "application/json; charset=utf-8", {"Content-Length": str(len(text))})
        self.wfile.write(text)

    def _begin(self, status: int, content_type: str, more: dict[str, str] | None = None) -> None:
        """Write the head of an answer. It says which questions this agent knows: a command may be newer."""
        self._begun = True
        self.send_response_only(status)
        headers = {"Content-Type": content_type, questions.API_HEADER: str(questions.API), **(more or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is none of ours."""
        told = f"'{self.requestline}': {(message or self.responses[code][0]).lower()}"
        if code in (404, 405):
            told = f"{told}: this agent is holdfast {__version__}, and has no such request (is the command another?)"
        self._reply(code, error_json(WrongCall(told)))

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing: requests are not logged."""


class _Frames:
    """Bytes that are written → frames of the answer."""

    def __init__(self, send: Callable[[bytes], object]) -> None:
        self._send, self._waiting = send, bytearray()

    def write(self, data: bytes, /) -> int:
        self._waiting += data
        if len(self._waiting) >= FRAME:
            self.flush()
        return len(data)

    def flush(self) -> None:
        if self._waiting:
            self._send(b"%x\n" % len(self._waiting) + self._waiting)
            self._waiting.clear()


def error_json(error: HoldfastError) -> dict[str, Any]:
    """An error as the API writes it."""
    return {"error": str(error), "class": type(error).__name__, "exit_code": error.exit_code}


def line_of(found: Json) -> bytes:
    return json.dumps(found).encode() + b"\n"
