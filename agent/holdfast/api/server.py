"""Listen on the socket of the agent, and limit the connections of each user."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from holdfast.api.arguments import user_of
from holdfast.api.routes import Request, error_json
from holdfast.errors import Conflict, TryAgain, UnfitHost, WrongConfig
from holdfast.questions import Questions

PER_USER = 128  # connections that one user may have open
REST = 0.1  # seconds until the next try to accept a connection, after one that failed
LAST_WORDS = 1.0  # seconds that answers have when the agent ends

log = structlog.get_logger("holdfast")


@contextmanager
def serving(agent: Questions, path: Path, *, root: Path, group: str | None = None) -> Iterator[None]:
    """Answer on a unix socket at `path` until the block ends. root: callers who mean another root are refused.

    Only the owner can connect (0600), or also the group (0660). A socket without a listener is replaced; raises
    Conflict if an agent listens.
    """
    listener = listen(path, group=group)
    server = Server(listener, agent, root)
    threading.Thread(target=server.accept, name="accept", daemon=True).start()
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


class Server:
    """Answers each connection in a thread: many callers may wait for long at the same time."""

    def __init__(self, listener: socket.socket, agent: Questions, root: Path) -> None:
        self._listener, self._agent, self._root = listener, agent, root
        self._open: dict[socket.socket, int] = {}  # → its user
        self._over = threading.Event()

    def accept(self) -> None:
        """Accept connections, at most PER_USER of each user, so that no user can block the others."""
        while not self._over.is_set():
            try:
                connection, _ = self._listener.accept()
                uid = user_of(connection)
                count = list(self._open.values()).count(uid)
                if count >= PER_USER:
                    refuse(connection, count)
                    continue
                self._open[connection] = uid
                try:
                    threading.Thread(target=self._serve, args=(connection,), name="answer", daemon=True).start()
                except RuntimeError:  # no thread is left
                    del self._open[connection]
                    connection.close()
                    raise
            except (OSError, RuntimeError) as error:  # no descriptor is left, say
                if not self._over.is_set():
                    log.warning("connection not accepted", error=str(error))
                    time.sleep(REST)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):  # the caller has gone
                Request(connection, self._agent, self._root, self._over)
        finally:
            self._open.pop(connection)

    def close(self) -> None:
        """Accept nothing more; what is being answered has a moment, and ends with the process at the latest."""
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        deadline = time.monotonic() + LAST_WORDS
        while self._open and time.monotonic() < deadline:
            time.sleep(0.01)


def refuse(connection: socket.socket, count: int) -> None:
    """Answer that there are too many connections, and hang up."""
    error = TryAgain(f"ask the agent: {count} connections of this user are open already (at most {PER_USER})")
    text = json.dumps(error_json(error))
    with connection, contextlib.suppress(OSError):
        connection.send(f"HTTP/1.0 503 Busy\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())


def listen(path: Path, *, group: str | None = None) -> socket.socket:
    """Bind a unix socket that only the owner and the group can connect to."""
    if answers(path):
        raise Conflict(f"listen on '{path}': another agent answers there (two agents need two names in agent.toml)")
    gid = group_id(group) if group else -1
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # the file gets this mode at bind; a chmod afterwards would leave a gap
        listener.bind(str(path))
        if group:
            os.chown(path, -1, gid)
            path.chmod(0o660)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise UnfitHost(f"listen on '{path}': {error.strerror}") from error
    return listener


def answers(path: Path) -> bool:
    """Whether a process listens on the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as error:
            raise UnfitHost(f"connect to '{path}': {error.strerror}") from error
        return True


def group_id(name: str) -> int:
    """The number of a group that agent.toml names."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise WrongConfig(f"socket group '{name}': there is no such group on this host") from None
