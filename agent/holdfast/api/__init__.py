"""The agent → HTTP over a unix socket: what the CLI, and anyone in the agent's group, may ask of it.

`daemon` serves it with `serving(agent, …)`; `cli.client` speaks it. Bodies are JSON; an error is
`{"error": line, "class": name, "exit_code": number}`, so that a caller sees the very error that was raised here.

    GET    /v1/status                              GET    /v1/events?after=&limit=[&follow=1[&beat=]]  (JSON lines)
    GET    /v1/plan                                POST   /v1/sync         {"accept_rewrite": bool}
    GET    /v1/containers/APP/NAME                 POST   /v1/containers/APP/NAME/{stop,start,restart,release}
    GET    /v1/containers/APP/NAME/logs?tail=N&since=EPOCH&until=EPOCH[&follow=1]            (JSON lines)
    GET    /v1/logs?target=APP/NAME&target=…&tail=N&since=EPOCH&until=EPOCH[&follow=1]       (JSON lines, merged)
    GET    /v1/containers/APP/NAME/files           POST   /v1/containers/APP/NAME/exec   {"command": […], …}
    GET    /v1/volumes[/APP/NAME]                  DELETE /v1/volumes/APP/NAME?force=
    POST   /v1/volumes/prune                       GET    /v1/networks[/ID]
    GET    /v1/stats                               GET    /v1/plugins
                                                   POST   /v1/plugins/NAME/forget

Images, and the disk: see `api.images`.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import pwd
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import structlog
from aiohttp import web

from holdfast.api.agent import Agent
from holdfast.api.images import IMAGE_ROUTES
from holdfast.api.wire import (
    AGENT,
    ROOT,
    answer,
    body,
    count,
    error_json,
    flag,
    number,
    report,
    target_of,
    text,
    words,
    yes,
)
from holdfast.errors import Conflict, TryAgain, UnfitHost, WrongCall, WrongConfig
from holdfast.identity import API, API_HEADER
from holdfast.runtime.execs import ExecWant
from holdfast.runtime.logs import LogLine, Wanted
from holdfast.runtime.output import output

PER_USER = 128  # connections that one user may have open
HEARTBEAT = 1.0  # seconds: a follower hears an empty line that often (or each `beat`), and so knows that we live

log = structlog.get_logger("holdfast")

HOLDS: dict[str, Literal["stopped", "started", "restarted"]] = {
    "stop": "stopped",
    "start": "started",
    "restart": "restarted",
}


@asynccontextmanager
async def serving(agent: Agent, path: Path, *, root: Path, group: str | None = None) -> AsyncIterator[None]:
    """Answer on a unix socket at `path` until the block ends. root: the agent's; who means another one is refused.

    The socket is its owner's alone (0600), or also its group's (0660). A socket that nobody listens on is replaced;
    raises Conflict when somebody does.
    """
    application = web.Application(middlewares=[report])
    application[AGENT], application[ROOT] = agent, root
    application.add_routes(ROUTES)
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
    """Say with each answer what this agent can be asked: a command may be newer than it."""
    response.headers[API_HEADER] = str(API)


async def accept(listener: socket.socket, server: web.Server) -> None:
    """Hand connections to the server, at most PER_USER of each user's: nobody can keep others from asking."""
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
    """Say that there are too many connections, as any other error is said, and hang up."""
    error = TryAgain(f"ask the agent: {count} connections of this user are open already (at most {PER_USER})")
    text = json.dumps(error_json(error))
    with connection, contextlib.suppress(OSError):
        connection.send(f"HTTP/1.0 503 Busy\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())


def user_of(connection: socket.socket) -> int:
    """The uid of the process at the other end, from the kernel (SO_PEERCRED, unix(7))."""
    uid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return uid


def listen(path: Path, *, group: str | None = None) -> socket.socket:
    """Bind a unix socket that nobody but the owner and the group can connect to."""
    if answers(path):
        raise Conflict(f"listen on '{path}': another agent answers there (two agents need two names in agent.toml)")
    gid = group_id(group) if group else -1
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # Linux gives the file this mode at bind: a chmod after it leaves a gap
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


def caller(request: web.Request) -> str:
    """Who asks, from the kernel (SO_PEERCRED, unix(7)): a user's name, or `uid N`."""
    transport = request.transport
    peer = transport.get_extra_info("socket") if transport else None
    if peer is None:
        return ""
    uid = user_of(peer)
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


async def sync(request: web.Request) -> web.Response:
    value = await body(request)
    return web.json_response(await request.app[AGENT].sync(yes(value, "accept_rewrite")))


async def hold(request: web.Request) -> web.Response:
    agent, target, verb = request.app[AGENT], target_of(request), request.match_info["verb"]
    if verb == "release":
        await asyncio.to_thread(agent.release, target)
    else:
        await asyncio.to_thread(agent.hold, target, HOLDS[verb], caller(request))
    return web.json_response({})


async def exec_argv(request: web.Request) -> web.Response:
    value = await body(request)
    pairs = (entry.partition("=") for entry in words(value, "env"))
    want = ExecWant(
        argv=words(value, "command"),
        user=text(value, "user"),
        environment={name: content for name, _, content in pairs},
        workdir=text(value, "workdir"),
        tty=yes(value, "tty"),
        detach=yes(value, "detach"),
    )
    argv = await asyncio.to_thread(request.app[AGENT].exec_of, target_of(request), want)
    return web.json_response({"argv": list(argv)})


async def events(request: web.Request) -> web.StreamResponse:
    """Events as JSON lines; with follow=1 until the caller goes, with an empty line when nothing happens."""
    agent = request.app[AGENT]
    after, limit = count(request, "after", 0), count(request, "limit", 1000)
    beat, quiet, follow = max(number(request, "beat", HEARTBEAT), 0.05), True, flag(request, "follow")
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            found = await asyncio.to_thread(agent.events, after, limit)
            after = max((int(event["seq"]) for event in found), default=after)
            if found or quiet:
                await response.write("".join(json.dumps(event) + "\n" for event in found).encode() or b"\n")
            if not follow:
                break
            quiet = not await arrives(agent, after, beat)
    return response


async def arrives(agent: Agent, after: int, beat: float) -> bool:
    """Whether there is another event before the next heartbeat."""
    try:
        await asyncio.wait_for(agent.wait_events(after), beat)
    except TimeoutError:
        return False
    return True


async def logs(request: web.Request) -> web.StreamResponse:
    """A container's output as JSON lines; with follow=1 until the caller goes, empty ones in silence."""
    return await written(request, [("", target_of(request))])


async def merged_logs(request: web.Request) -> web.StreamResponse:
    """The output of several containers, merged by time."""
    targets = request.query.getall("target", [])
    if not targets or not all("/" in target for target in targets):
        raise WrongCall("query 'target': names no container (expected target=APP/NAME, once or several times)")
    return await written(request, [(target, target) for target in targets])


async def written(request: web.Request, targets: list[tuple[str, str]]) -> web.StreamResponse:
    """The output of containers, each with what its lines are to call it."""
    agent, stop = request.app[AGENT], threading.Event()
    wanted = Wanted(
        tail=count(request, "tail", 0) if "tail" in request.query else None,
        since=number(request, "since", 0) if "since" in request.query else None,
        until=number(request, "until", 0) if "until" in request.query else None,
    )
    found = [(name, await asyncio.to_thread(agent.logs_of, target)) for name, target in targets]
    sources = [(name, Path(path)) for name, paths in found for path in paths["paths"]]
    lines = output(sources, wanted, stop if flag(request, "follow") else None)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    queue = pumped(lines, stop)
    try:
        while (line := await next_line(queue)) is not None:
            await response.write((json.dumps(line.json()) if line else "").encode() + b"\n")
    except ConnectionError:
        pass  # the reader has gone, as readers do
    finally:
        stop.set()
        while await queue.get() is not None:
            pass
    return response


def pumped(lines: Iterator[LogLine | None], stop: threading.Event) -> asyncio.Queue[LogLine | None]:
    """Read blocking lines in a thread of their own: a silent log must not hold one of the pool's. None ends them."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[LogLine | None] = asyncio.Queue(256)

    def put(line: LogLine | None) -> None:
        asyncio.run_coroutine_threadsafe(queue.put(line), loop).result()

    def pump() -> None:
        try:
            for line in lines:
                if stop.is_set():
                    break
                if line is not None:
                    put(line)
        finally:
            put(None)

    threading.Thread(target=pump, name="log reader", daemon=True).start()
    return queue


async def next_line(queue: asyncio.Queue[LogLine | None]) -> LogLine | Literal[""] | None:
    """The next line; "" when there was none for a while; None at the end, which stays in the queue."""
    try:
        line = await asyncio.wait_for(queue.get(), HEARTBEAT)
    except TimeoutError:
        return ""
    if line is None:
        queue.put_nowait(None)
    return line


ROUTES = [
    web.get("/v1/status", answer(lambda agent, _: agent.status())),
    web.get("/v1/plan", answer(lambda agent, _: agent.plan())),
    web.post("/v1/sync", sync),
    web.get("/v1/events", events),
    web.get("/v1/containers/{app}/{name}", answer(lambda agent, request: agent.inspect(target_of(request)))),
    web.get("/v1/containers/{app}/{name}/files", answer(lambda agent, request: agent.logs_of(target_of(request)))),
    web.get("/v1/containers/{app}/{name}/logs", logs),
    web.get("/v1/logs", merged_logs),
    web.post("/v1/containers/{app}/{name}/exec", exec_argv),
    web.post("/v1/containers/{app}/{name}/{verb:stop|start|restart|release}", hold),
    web.get("/v1/stats", answer(lambda agent, _: agent.stats())),
    web.get("/v1/volumes", answer(lambda agent, _: agent.volumes())),
    web.post("/v1/volumes/prune", answer(lambda agent, _: agent.prune_volumes())),
    web.get("/v1/volumes/{id:.*}", answer(lambda agent, request: agent.volume(request.match_info["id"]))),
    web.delete(
        "/v1/volumes/{id:.*}",
        answer(lambda agent, request: agent.remove_volume(request.match_info["id"], flag(request, "force"))),
    ),
    web.get("/v1/networks", answer(lambda agent, _: agent.networks())),
    web.get("/v1/networks/{id:.+}", answer(lambda agent, request: agent.network(request.match_info["id"]))),
    web.get("/v1/plugins", answer(lambda agent, _: agent.plugins())),
    web.post(
        "/v1/plugins/{name}/forget",
        answer(lambda agent, request: agent.forget_plugin(request.match_info["name"])),
    ),
    *IMAGE_ROUTES,
]
