"""Send questions to the agent on its unix socket (see `holdfast.questions`).

Speaks HTTP/1.0 with one connection for each request, so that an answer ends where the connection does. That takes
twenty lines; to import an HTTP library would take a fifth of the time that `holdfast status` may take.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode

from holdfast import errors
from holdfast.errors import HoldfastError, NoAgent, NotPermitted, OlderAgent, UnfitHost, WrongCall
from holdfast.questions import API, API_HEADER, PLACE, ROOT_HEADER, Lines, Question, Questions, Sink, Steps

REMEDY = "restart it: systemctl restart holdfast"
UNKNOWN = ("404", "405")  # HTTP statuses of a route that is not there
ERROR = {"error", "class", "exit_code"}  # the keys of an error
Reply = AbstractContextManager[IO[bytes]]  # opens an answer


class Answer(dict[str, Any]):
    """An object of an answer. Raises OlderAgent for a missing key: agents of this version send all of them."""

    def __missing__(self, key: str) -> Any:
        raise OlderAgent(
            f"read the agent's answer: it has no '{key}': the agent is older than this command ({REMEDY})"
        )


def decoded(text: bytes | str) -> Any:
    """The value of a JSON text from the agent. Raises the error that it may be."""
    value = json.loads(text, object_hook=Answer)
    if isinstance(value, dict) and value.keys() == ERROR:
        raise error_of(value)
    return value


class Client(Questions):
    """The agent behind a socket. All calls block.

    root: whose agent is meant. The agent of another root refuses every request (`api.routes`).
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path, self.root = path, root

    def listens(self) -> bool:
        """Whether an agent listens on the socket. Raises NotPermitted if this user may not ask."""
        try:
            self.connect().close()
        except NoAgent:
            return False
        return True

    def ask(self, question: Question, given: dict[str, Any]) -> Any:
        """Send a question and read its answer in the way in which its result travels."""
        out: Sink | None = given.pop("out", None)
        rest = {name: value for name, value in given.items() if value is not None}
        path = PLACE.sub(lambda place: quote(rest.pop(place[1])), question.path)
        needs = max([level for name, level in question.since.items() if rest.get(name)], default=1)
        body = rest if question.method == "POST" else None
        if rest and body is None:
            flags = {name: int(value) if isinstance(value, bool) else value for name, value in rest.items()}
            path = f"{path}?{urlencode(flags, doseq=True)}"
        answer = self._answer(question.method, path, body, needs)
        match question.hints()["return"]:
            case _ if out is not None:
                return self._archive(answer, out)
            case result if result == Steps:
                return self._steps(answer)
            case result if result == Lines:
                return self._lines(answer)
            case _:
                with answer as whole:
                    return decoded(whole.read())

    def _lines(self, answer: Reply) -> Lines:
        with answer as lines:
            for line in lines:
                yield decoded(line) if line.strip() else None

    def _steps(self, answer: Reply) -> Steps:
        """The lines of an answer that takes long; raise NoAgent if the last one is no result."""
        last = None
        for last in filter(None, self._lines(answer)):
            yield last
        if last is None or "transfers" in last:
            raise self._hung_up()

    def _archive(self, answer: Reply, out: Sink) -> Any:
        """Write what comes in frames (see `holdfast.api.routes`); return what comes at their end."""
        with answer as frames:
            while size := int(frames.readline() or b"-1", 16):
                data = frames.read(size) if size > 0 else b""
                if len(data) != size:
                    raise self._hung_up()
                out.write(data)
            if not (end := frames.readline()):
                raise self._hung_up()
            return decoded(end)

    def _hung_up(self) -> NoAgent:
        return NoAgent(self._failed("it hung up in the middle of an answer"))

    @contextmanager
    def _answer(self, method: str, target: str, body: Any, needs: int) -> Iterator[IO[bytes]]:
        """Send a request and yield the body of its answer; raise the error that the agent answered with.

        needs: the lowest `API` of an agent that knows all parts of this request.
        """
        payload = b"" if body is None else json.dumps(body).encode()
        meant = f"{ROOT_HEADER}: {quote(str(self.root))}\r\n" if self.root else ""
        head = f"{method} {target} HTTP/1.0\r\nHost: holdfast\r\n{meant}Content-Length: {len(payload)}\r\n\r\n"
        with self.connect() as connection, connection.makefile("rb") as answer:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has refused before reading all
                connection.sendall(head.encode() + payload)
            words = answer.readline().split()
            lines = (line.decode(errors="replace") for line in iter(lambda: answer.readline().strip(), b""))
            head_of = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            if len(words) < 2:
                raise NoAgent(self._failed("it hung up without an answer (see its log)"))
            known = int(head_of.get(API_HEADER.lower(), "1"))
            error = None
            if not words[1].startswith(b"2"):
                error = error_in(answer.read(int(head_of.get("content-length", "-1"))))
            unknown = type(error) is WrongCall and words[1].decode() in UNKNOWN and known < API
            if unknown or (error is None and known < needs):
                raise OlderAgent(self._failed(f"it is older than this command ({REMEDY})"))
            if error is not None:
                raise error
            yield answer

    def connect(self) -> socket.socket:
        """Connect to the agent; raises NoAgent, NotPermitted or UnfitHost."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(self.path))
        except OSError as error:
            connection.close()
            match error:
                case FileNotFoundError() | ConnectionRefusedError():
                    raise NoAgent(self._failed("nobody answers (start it with 'holdfast agent')")) from error
                case PermissionError():
                    raise NotPermitted(self._failed("permission denied (become root, or join its group)")) from error
            raise UnfitHost(self._failed(error.strerror or str(error))) from error
        return connection

    def _failed(self, why: str) -> str:
        return f"ask the agent on '{self.path}': {why}"


def error_of(told: dict[str, Any]) -> HoldfastError:
    """The error that the agent raised."""
    kind = getattr(errors, told["class"], HoldfastError)
    return kind(told["error"]) if issubclass(kind, HoldfastError) else HoldfastError(told["error"])


def error_in(answer: bytes) -> HoldfastError:
    """The error in an answer that is not a success, whatever it looks like."""
    try:
        return error_of(json.loads(answer))
    except (ValueError, KeyError, TypeError):
        return HoldfastError(f"the agent answered: {answer.decode(errors='replace').strip()[:200] or 'nothing'}")
