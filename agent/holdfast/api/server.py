"""Listen on the socket of the agent, and limit the connections of each user."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
from aiohttp import web

from holdfast.api.arguments import user_of
from holdfast.api.routes import AGENT, ROOT, error_json, report, routes
from holdfast.errors import Conflict, TryAgain, UnfitHost, WrongConfig
from holdfast.questions import API, API_HEADER, Questions

PER_USER = 128  # connections that one user may have open

log = structlog.get_logger("holdfast")


@asynccontextmanager
async def serving(agent: Questions, path: Path, *, root: Path, group: str | None = None) -> AsyncIterator[None]:
    """Answer on a unix socket at `path` until the block ends. root: callers who mean another root are refused.

    Only the owner can connect (0600), or also the group (0660). A socket without a listener is replaced; raises
    Conflict if an agent listens.
    """
    application = web.Application(middlewares=[report])
    application[AGENT], application[ROOT] = agent, root
    application.add_routes(routes())
    application.on_response_prepare.append(say_api)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        listener = listen(path, group=group)
        server = runner.server
        assert server is not None  # since setup
        accepting = asyncio.create_task(accept(listener, server))
        try:
            yield
        finally:
            accepting.cancel()
            listener.close()
    finally:
        await runner.cleanup()
        await asyncio.to_thread(path.unlink, missing_ok=True)


async def say_api(_: web.Request, response: web.StreamResponse) -> None:
    """Say in each answer which questions this agent knows: a command may be newer than it."""
    response.headers[API_HEADER] = str(API)


async def accept(listener: socket.socket, server: web.Server) -> None:
    """Hand connections to the server, at most PER_USER for each user, so that no user can block the others."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    while True:
        try:
            connection, _ = await loop.sock_accept(listener)
        except OSError as error:  # no descriptor is left, say
            log.warning("connection not accepted", error=str(error))
            await asyncio.sleep(0.1)
            continue
        connection.setblocking(False)
        uid = user_of(connection)
        open_ = sum(
            user_of(each.transport.get_extra_info("socket")) == uid for each in server.connections if each.transport
        )
        if open_ < PER_USER:
            await loop.connect_accepted_socket(server, connection)
        else:
            refuse(connection, open_)


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
