"""Make a route of each question: read its arguments, call the agent, write what it returns.

`sync` and `events` wait for the agent's loop and have handlers of their own; all others block, and run in threads.

Archives come in frames, because their length is not known in advance: a line with the size of what follows, in
hexadecimal; after 0 comes the result, or an error, as a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import structlog
from aiohttp import web

from holdfast import __version__
from holdfast.api.agent import Agent
from holdfast.api.arguments import arguments_of
from holdfast.errors import (
    Conflict,
    HoldfastError,
    NoProgram,
    NotExecutable,
    NotFound,
    NotPermitted,
    TryAgain,
    UnfitHost,
    WrongCall,
    WrongState,
)
from holdfast.questions import QUESTIONS, ROOT_HEADER, Json, Lines, Question, Questions, Sink, Steps, question_of

HTTP_STATUS: tuple[tuple[type[HoldfastError], int], ...] = (
    (NotFound, 404),
    (WrongCall, 400),
    (WrongState, 422),
    (NotPermitted, 403),
    (Conflict, 409),
    (NotExecutable, 422),
    (NoProgram, 404),
    (TryAgain, 503),
    (UnfitHost, 503),
)
AGENT: web.AppKey[Agent] = web.AppKey("agent")
ROOT: web.AppKey[Path] = web.AppKey("root")
HEARTBEAT = 1.0  # seconds: a reader of lines gets an empty one that often, and so knows that the agent lives
SHORTEST_BEAT = 0.05
STALLED = 60.0  # seconds until a reader who takes nothing is given up: a container may be frozen meanwhile
FRAME = 1 << 18  # bytes, about
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger("holdfast")


def routes() -> list[web.RouteDef]:
    """A route for each question."""
    return [web.route(each.method, each.path, handler(each)) for each in QUESTIONS]


def handler(question: Question) -> Handler:
    """What answers a question, by the way in which its result travels."""
    match question:
        case _ if question == question_of(Questions.sync):
            return sync
        case _ if question == question_of(Questions.events):
            return events
    hints = question.hints()
    write = lines if hints["return"] in (Lines, Steps) else frames if Sink in hints.values() else value

    async def handle(request: web.Request) -> web.StreamResponse:
        return await write(request, question, await arguments_of(request, question))

    return handle


@web.middleware
async def report(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what a handler raises on purpose into its JSON."""
    try:
        _refuse_other_root(request)
        return await handler(request)
    except HoldfastError as error:
        code = next((code for kind, code in HTTP_STATUS if isinstance(error, kind)), 500)
        return web.json_response(error_json(error), status=code)
    except web.HTTPException as error:
        told = f"{request.method} '{request.path}': {error.reason.lower()}"
        if error.status in (404, 405):
            told = f"{told}: this agent is holdfast {__version__}, and has no such request (is the command another?)"
        return web.json_response(error_json(WrongCall(told)), status=error.status)


def _refuse_other_root(request: web.Request) -> None:
    """Raise Conflict for a caller who means the agent of another root: two agent.toml may lead to one socket."""
    meant, root = Path(unquote(request.headers.get(ROOT_HEADER, ""))), request.app[ROOT]
    if ROOT_HEADER in request.headers and meant != root and os.path.realpath(meant) != os.path.realpath(root):
        raise Conflict(
            f"ask the agent that holds '{root}': agent.toml says root = '{meant}' "
            "(another name in agent.toml, or restart the agent if its root was changed)"
        )


def error_json(error: HoldfastError) -> dict[str, Any]:
    """An error as the API writes it."""
    return {"error": str(error), "class": type(error).__name__, "exit_code": error.exit_code}


# -- one value -----------------------------------------------------------------------------------------------


async def value(request: web.Request, question: Question, given: dict[str, Any]) -> web.StreamResponse:
    """Write one JSON value."""
    call = getattr(request.app[AGENT], question.name)
    return web.json_response(await asyncio.to_thread(call, **given))


async def sync(request: web.Request) -> web.StreamResponse:
    given = await arguments_of(request, question_of(Questions.sync))
    return web.json_response(await request.app[AGENT].wait_sync(given.get("accept_rewrite", False)))


# -- lines ---------------------------------------------------------------------------------------------------


async def lines(request: web.Request, question: Question, given: dict[str, Any]) -> web.StreamResponse:
    """Write what an iterator yields, line by line, until the caller goes; an error is the last line."""
    found = await asyncio.to_thread(getattr(request.app[AGENT], question.name), **given)
    response = await begun(request)
    stop = threading.Event()
    queue = pumped(found, stop)
    try:
        while line := await next_line(queue):
            await response.write(line)
    except ConnectionError:
        pass  # the reader has gone, as readers do
    finally:
        stop.set()
        while await queue.get():
            pass
    return response


async def begun(request: web.Request) -> web.StreamResponse:
    """An answer of JSON lines."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    return response


END = b""  # of a queue of lines


def pumped(found: Iterator[Json | None], stop: threading.Event) -> asyncio.Queue[bytes]:
    """Read a blocking iterator in a thread of its own: a silent log must not hold one of the pool's. END ends it."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue(256)

    def put(line: bytes) -> None:
        asyncio.run_coroutine_threadsafe(queue.put(line), loop).result()

    def pump() -> None:
        try:
            for each in found:
                if stop.is_set():
                    break
                if each is not None:
                    put(line_of(each))
        except HoldfastError as error:
            put(line_of(error_json(error)))
        except Exception as error:
            log.error("bug", what="an answer", exc_info=error)
        finally:
            put(END)

    threading.Thread(target=pump, name="line reader", daemon=True).start()
    return queue


def line_of(found: Json) -> bytes:
    return json.dumps(found).encode() + b"\n"


async def next_line(queue: asyncio.Queue[bytes]) -> bytes:
    """The next line, an empty one when there was none for a while; END stays in the queue."""
    try:
        line = await asyncio.wait_for(queue.get(), HEARTBEAT)
    except TimeoutError:
        return b"\n"
    if not line:
        queue.put_nowait(END)
    return line


async def events(request: web.Request) -> web.StreamResponse:
    """Write events, with follow until the caller goes, and an empty line when nothing happens for a beat."""
    agent, given = request.app[AGENT], await arguments_of(request, question_of(Questions.events))
    follow, beat = given.pop("follow", False), max(given.pop("beat", HEARTBEAT), SHORTEST_BEAT)
    quiet = follow
    response = await begun(request)
    with contextlib.suppress(ConnectionError):
        while True:
            found = await asyncio.to_thread(lambda: [each for each in agent.events(**given) if each])
            given["after"] = max((int(event["seq"]) for event in found), default=given.get("after", 0))
            if found or quiet:
                await response.write(b"".join(map(line_of, found)) or b"\n")
            if not follow:
                break
            quiet = not await arrives(agent, given["after"], beat)
    return response


async def arrives(agent: Agent, after: int, beat: float) -> bool:
    """Whether there is another event before the next heartbeat."""
    try:
        await asyncio.wait_for(agent.wait_events(after), beat)
    except TimeoutError:
        return False
    return True


# -- archives ------------------------------------------------------------------------------------------------


async def frames(request: web.Request, question: Question, given: dict[str, Any]) -> web.StreamResponse:
    """Write what a call in a thread writes, and at the end what it returns or raises."""
    call = getattr(request.app[AGENT], question.name)
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    await response.prepare(request)
    out = _Frames(response, asyncio.get_running_loop())

    def work() -> Json:
        try:
            found: Json = call(**given, out=out)
            out.flush()
        except HoldfastError as error:
            return error_json(error)
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:
            words = (error.strerror or str(error)).lower()
            return error_json(UnfitHost(f"{request.method} '{request.path}': {words}"))
        return found

    try:
        end = await asyncio.to_thread(work)
        await asyncio.wait_for(response.write(b"0\n" + line_of(end)), STALLED)
    except (ConnectionError, TimeoutError):
        if request.transport is not None:  # the reader has gone, or reads no more
            request.transport.abort()
    return response


class _Frames:
    """Bytes that a thread writes → frames of the answer, as fast as they are read."""

    def __init__(self, response: web.StreamResponse, loop: asyncio.AbstractEventLoop) -> None:
        self._response, self._loop = response, loop
        self._waiting: list[bytes] = []
        self._size = 0

    def write(self, data: bytes, /) -> int:
        self._waiting.append(bytes(data))
        self._size += len(data)
        if self._size >= FRAME:
            self.flush()
        return len(data)

    def flush(self) -> None:
        if self._size:
            data = b"%x\n" % self._size + b"".join(self._waiting)
            self._waiting, self._size = [], 0
            asyncio.run_coroutine_threadsafe(self._response.write(data), self._loop).result(STALLED)
