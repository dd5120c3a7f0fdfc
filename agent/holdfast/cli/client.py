"""Calls → requests on the agent's unix socket (see `holdfast.api`), and back: what every command asks the agent with.

Speaks HTTP/1.0, one connection a request, so that an answer ends where the connection does: twenty lines instead of
an HTTP library, whose import alone would take a fifth of the time that `holdfast status` may take.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode

from holdfast import errors
from holdfast.errors import HoldfastError, NoAgent, NotPermitted, UnfitHost

Json = Any


class Client:
    """The agent behind a socket; the methods are those of `holdfast.api.Agent`, all of them blocking."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def answers(self) -> bool:
        """Whether an agent listens on the socket. Raises NotPermitted if this user may not ask."""
        try:
            self._connect().close()
        except NoAgent:
            return False
        return True

    def status(self) -> Json:
        return self._call("GET", "/v1/status")

    def plan(self) -> Json:
        return self._call("GET", "/v1/plan")

    def sync(self, accept_rewrite: bool = False) -> Json:
        return self._call("POST", "/v1/sync", {"accept_rewrite": accept_rewrite})

    def events(self, after: int = 0, limit: int = 1000) -> Sequence[Json]:
        return [event for event in self._lines(f"/v1/events?after={after}&limit={limit}") if event]

    def follow(self, after: int = 0, limit: int = 1000, beat: float = 1.0) -> Iterator[Json | None]:
        """Events as they happen, and None each `beat` seconds while nothing does."""
        return self._lines(f"/v1/events?after={after}&limit={limit}&follow=1&beat={beat}")

    def act(self, target: str, verb: str) -> None:
        """stop, start, restart or release a container."""
        self._call("POST", f"/v1/containers/{quote(target)}/{verb}")

    def inspect(self, target: str) -> Json:
        return self._call("GET", f"/v1/containers/{quote(target)}")

    def logs_of(self, target: str) -> Json:
        return self._call("GET", f"/v1/containers/{quote(target)}/files")

    def logs(self, target: str, **query: Any) -> Iterator[Json | None]:
        """Lines of output as the agent reads them, for those who may not read its files; None when it is silent."""
        asked = urlencode({key: value for key, value in query.items() if value is not None})
        return self._lines(f"/v1/containers/{quote(target)}/logs?{asked}")

    def exec_of(self, target: str, command: Sequence[str], **options: Any) -> Sequence[str]:
        answer = self._call("POST", f"/v1/containers/{quote(target)}/exec", {"command": list(command), **options})
        return [str(word) for word in answer["argv"]]

    def stats(self) -> Json:
        return self._call("GET", "/v1/stats")

    def volumes(self) -> Json:
        return self._call("GET", "/v1/volumes")

    def volume(self, id: str) -> Json:
        return self._call("GET", f"/v1/volumes/{quote(id)}")

    def remove_volume(self, id: str, force: bool = False) -> None:
        self._call("DELETE", f"/v1/volumes/{quote(id)}" + ("?force=1" if force else ""))

    def prune_volumes(self) -> Json:
        return self._call("POST", "/v1/volumes/prune")

    def networks(self) -> Json:
        return self._call("GET", "/v1/networks")

    def network(self, id: str) -> Json:
        return self._call("GET", f"/v1/networks/{quote(id)}")

    def images(self) -> Json:
        return self._call("GET", "/v1/images")

    def import_image(self, path: str, ref: str, changes: Sequence[str] = ()) -> Json:
        return self._call("POST", "/v1/images/import", {"path": path, "ref": ref, "changes": list(changes)})

    def load_image(self, path: str) -> Json:
        return self._call("POST", "/v1/images/load", {"path": path})

    def outdated(self) -> Json:
        return self._call("GET", "/v1/images/outdated")

    def remove_image(self, ref: str) -> Json:
        return self._call("DELETE", f"/v1/images?{urlencode({'ref': ref})}")

    def load_bundle(self, path: str) -> Json:
        return self._call("POST", "/v1/bundles/load", {"path": path})

    def plugins(self) -> Json:
        return self._call("GET", "/v1/plugins")

    def _call(self, method: str, target: str, body: Json = None) -> Json:
        with self._answer(method, target, body) as answer:
            return json.loads(answer.read())

    def _lines(self, target: str) -> Iterator[Json | None]:
        with self._answer("GET", target) as answer:
            for line in answer:
                yield json.loads(line) if line.strip() else None

    @contextmanager
    def _answer(self, method: str, target: str, body: Json = None) -> Iterator[IO[bytes]]:
        """Send a request and hand out the body of its answer; raise the error that the agent answered with."""
        payload = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {target} HTTP/1.0\r\nHost: holdfast\r\nContent-Length: {len(payload)}\r\n\r\n"
        with self._connect() as connection, connection.makefile("rb") as answer:
            connection.sendall(head.encode() + payload)
            words = answer.readline().split()
            while answer.readline().strip():
                pass
            if len(words) < 2:
                raise NoAgent(f"ask the agent on '{self.path}': it hung up without an answer (see its log)")
            if not words[1].startswith(b"2"):
                raise error_of(answer.read())
            yield answer

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(self.path))
        except OSError as error:
            connection.close()
            raise self._unreachable(error) from error
        return connection

    def _unreachable(self, error: OSError) -> HoldfastError:
        match error:
            case FileNotFoundError() | ConnectionRefusedError():
                return NoAgent(f"ask the agent on '{self.path}': nobody answers (start it with 'holdfast agent')")
            case PermissionError():
                return NotPermitted(
                    f"ask the agent on '{self.path}': permission denied (become root, or join its group)"
                )
            case _:
                return UnfitHost(f"ask the agent on '{self.path}': {error.strerror or error}")


def error_of(answer: bytes) -> HoldfastError:
    """The error that the agent raised, as it was raised there."""
    try:
        told = json.loads(answer)
        kind = getattr(errors, told["class"], HoldfastError)
        return kind(told["error"]) if issubclass(kind, HoldfastError) else HoldfastError(told["error"])
    except (ValueError, KeyError, TypeError):
        return HoldfastError(f"the agent answered: {answer.decode(errors='replace').strip()[:200] or 'nothing'}")
