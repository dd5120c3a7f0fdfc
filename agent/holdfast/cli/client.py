"""Calls → requests on the agent's unix socket (see `holdfast.api`), and back: what every command asks the agent with.

Speaks HTTP/1.0, one connection a request, so that an answer ends where the connection does: twenty lines instead of
an HTTP library, whose import alone would take a fifth of the time that `holdfast status` may take.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlencode

from holdfast import errors
from holdfast.errors import HoldfastError, NoAgent, NotPermitted, OlderAgent, UnfitHost, WrongCall
from holdfast.identity import API, API_HEADER, ROOT_HEADER

if TYPE_CHECKING:
    from holdfast.runtime.execs import ExecWant

Json = Any
REMEDY = "restart it: systemctl restart holdfast"
UNKNOWN = ("404", "405")  # HTTP statuses of a route that is not there


class Answer(dict[str, Any]):
    """An object of an answer. Raises OlderAgent for a key that it lacks: no agent of this version leaves one out."""

    def __missing__(self, key: str) -> Any:
        raise OlderAgent(
            f"read the agent's answer: it has no '{key}': the agent is older than this command ({REMEDY})"
        )


def decoded(text: bytes | str) -> Json:
    """The value of a JSON text from the agent."""
    return json.loads(text, object_hook=Answer)


class Out(Protocol):
    """Where an archive goes."""

    def write(self, data: bytes, /) -> object:
        """Take all of data."""
        ...


class Client:
    """The agent behind a socket; the methods are those of `holdfast.api.Agent`, all of them blocking.

    root: whose agent is meant. One that holds another root refuses whatever it is asked (`api.wire.report`).
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path, self.root = path, root

    def answers(self) -> bool:
        """Whether an agent listens on the socket. Raises NotPermitted if this user may not ask."""
        try:
            self._connect().close()
        except NoAgent:
            return False
        return True

    def status(self) -> Json:
        found = self._call("GET", "/v1/status")
        found["transfers"] = one_each(found["transfers"])
        return found

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

    def logs(self, targets: Sequence[str], **query: Any) -> Iterator[Json | None]:
        """Lines of output as the agent reads them, for those who may not read its files; None when it is silent."""
        asked = [("target", target) for target in targets] if len(targets) > 1 else []
        asked += [(key, value) for key, value in query.items() if value is not None]
        path = "/v1/logs" if len(targets) > 1 else f"/v1/containers/{quote(targets[0])}/logs"
        return self._lines(f"{path}?{urlencode(asked)}", needs=1 if query.get("until") is None else 2)

    def exec_of(self, target: str, want: ExecWant) -> Sequence[str]:
        asked = {"command": list(want.argv), "user": want.user, "workdir": want.workdir, "tty": want.tty}
        env = [f"{name}={value}" for name, value in want.environment.items()]
        body = {**asked, "env": env, "detach": want.detach}
        answer = self._call("POST", f"/v1/containers/{quote(target)}/exec", body, needs=2 if want.detach else 1)
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

    def image(self, ref: str) -> Json:
        return self._call("GET", f"/v1/images/inspect?{urlencode({'ref': ref})}")

    def image_history(self, ref: str) -> Json:
        return self._call("GET", f"/v1/images/history?{urlencode({'ref': ref})}")

    def outdated(self) -> Json:
        return self._call("GET", "/v1/images/outdated")

    def pull_image(self, ref: str) -> Iterator[Json]:
        """Transfers as they come, and at last the image."""
        return self._steps("/v1/images/pull", {"ref": ref})

    def push_image(self, ref: str, to: str = "") -> Iterator[Json]:
        """Transfers as they go, and at last what was pushed."""
        return self._steps("/v1/images/push", {"ref": ref, "to": to})

    def import_image(self, path: str, ref: str, changes: Sequence[str] = ()) -> Json:
        return self._call("POST", "/v1/images/import", {"path": path, "ref": ref, "changes": list(changes)})

    def load_image(self, path: str) -> Json:
        return self._call("POST", "/v1/images/load", {"path": path})

    def load_bundle(self, path: str) -> Json:
        return self._call("POST", "/v1/bundles/load", {"path": path})

    def tag_image(self, ref: str, name: str) -> Json:
        return self._call("POST", "/v1/images/tag", {"ref": ref, "name": name})

    def remove_image(self, ref: str) -> Json:
        return self._call("DELETE", f"/v1/images?{urlencode({'ref': ref})}")

    def prune_images(self, all: bool = False) -> Json:
        return self._call("POST", "/v1/images/prune", {"all": all})

    def save_images(self, refs: Sequence[str], format: str, out: Out) -> Json:
        asked = urlencode([*(("ref", ref) for ref in refs), ("format", format)])
        return self._frames(f"/v1/images/save?{asked}", out)

    def export_image(self, ref: str, out: Out) -> Json:
        return self._frames(f"/v1/images/export?{urlencode({'ref': ref})}", out)

    def commit(self, target: str, name: str, **options: Any) -> Json:
        return self._call("POST", f"/v1/containers/{quote(target)}/commit", {"name": name, **options})

    def export(self, target: str, out: Out, pause: bool = True) -> Json:
        return self._frames(f"/v1/containers/{quote(target)}/export?pause={int(pause)}", out)

    def usage(self) -> Json:
        return self._call("GET", "/v1/usage")

    def prune(self, all: bool = False, volumes: bool = False) -> Json:
        return self._call("POST", "/v1/prune", {"all": all, "volumes": volumes})

    def plugins(self) -> Json:
        return self._call("GET", "/v1/plugins")

    def forget_plugin(self, name: str) -> None:
        self._call("POST", f"/v1/plugins/{quote(name, safe='')}/forget")

    def _call(self, method: str, target: str, body: Json = None, *, needs: int = 1) -> Json:
        with self._answer(method, target, body, needs=needs) as answer:
            return decoded(answer.read())

    def _lines(self, target: str, *, needs: int = 1) -> Iterator[Json | None]:
        with self._answer("GET", target, needs=needs) as answer:
            for line in answer:
                yield decoded(line) if line.strip() else None

    def _steps(self, target: str, body: Json) -> Iterator[Json]:
        """The lines of an answer that takes long; the last one is its result, or the error that is raised."""
        with self._answer("POST", target, body) as answer:
            last = None
            for line in answer:
                if last is not None:
                    yield last
                last = decoded(line)
            yield self._end(last)

    def _frames(self, target: str, out: Out) -> Json:
        """Write what comes in frames (see `holdfast.api.images`); return what comes at their end."""
        with self._answer("GET", target) as answer:
            while size := int(answer.readline() or b"-1", 16):
                data = answer.read(size) if size > 0 else b""
                if len(data) != size:
                    raise NoAgent(f"ask the agent on '{self.path}': it hung up in the middle of an answer")
                out.write(data)
            return self._end(decoded(answer.readline() or b"null"))

    def _end(self, last: Json) -> Json:
        if last is None or (isinstance(last, dict) and "transfers" in last):  # no result followed: a bug ended it
            raise NoAgent(f"ask the agent on '{self.path}': it hung up in the middle of an answer")
        if isinstance(last, dict) and "exit_code" in last:
            raise error_of(json.dumps(last).encode())
        return last

    @contextmanager
    def _answer(self, method: str, target: str, body: Json = None, *, needs: int = 1) -> Iterator[IO[bytes]]:
        """Send a request and hand out the body of its answer; raise the error that the agent answered with.

        needs: the lowest `API` of an agent that does not overlook a part of this.
        """
        payload = b"" if body is None else json.dumps(body).encode()
        meant = f"{ROOT_HEADER}: {quote(str(self.root))}\r\n" if self.root else ""
        head = f"{method} {target} HTTP/1.0\r\nHost: holdfast\r\n{meant}Content-Length: {len(payload)}\r\n\r\n"
        with self._connect() as connection, connection.makefile("rb") as answer:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has answered already: it refuses
                connection.sendall(head.encode() + payload)
            words = answer.readline().split()
            head_of = dict(_header(line) for line in iter(lambda: answer.readline().strip(), b""))
            if len(words) < 2:
                raise NoAgent(f"ask the agent on '{self.path}': it hung up without an answer (see its log)")
            known = int(head_of.get(API_HEADER.lower(), "1"))
            error = None
            if not words[1].startswith(b"2"):
                error = error_of(answer.read(int(head_of.get("content-length", "-1"))))
            unknown = type(error) is WrongCall and words[1].decode() in UNKNOWN and known < API
            if unknown or (error is None and known < needs):
                raise OlderAgent(f"ask the agent on '{self.path}': it is older than this command ({REMEDY})")
            if error is not None:
                raise error
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


def _header(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode(errors="replace").partition(":")
    return name.lower(), value.strip()


def one_each(transfers: Sequence[Json]) -> list[Json]:
    """Of several transfers of one reference, which share their layers, the one that has come farthest."""
    found: dict[str, Json] = {}
    for each in transfers:
        best = found.get(each["ref"])
        if best is None or (each["state"] == "pulling", each["done"]) > (best["state"] == "pulling", best["done"]):
            found[each["ref"]] = each
    return list(found.values())


def error_of(answer: bytes) -> HoldfastError:
    """The error that the agent raised, as it was raised there."""
    try:
        told = json.loads(answer)
        kind = getattr(errors, told["class"], HoldfastError)
        return kind(told["error"]) if issubclass(kind, HoldfastError) else HoldfastError(told["error"])
    except (ValueError, KeyError, TypeError):
        return HoldfastError(f"the agent answered: {answer.decode(errors='replace').strip()[:200] or 'nothing'}")
