"""Make a route of each question: read its arguments, call the agent in a thread, write what it returns.

Archives come in frames, because their length is not known in advance: a line with the size of what follows, in
hexadecimal; after 0 comes the result, or an error, as a line.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import structlog
from aiohttp import web

from holdfast import __version__
from holdfast.api.arguments import arguments_of
from holdfast.errors import Conflict, HoldfastError, NotFound, NotPermitted, TryAgain, UnfitHost, WrongCall
from holdfast.questions import QUESTIONS, ROOT_HEADER, Json, Lines, Question, Questions, Sink, Steps
from holdfast.workers import in_background

HTTP_STATUS = {NotFound: 404, WrongCall: 400, NotPermitted: 403, Conflict: 409, TryAgain: 503, UnfitHost: 503}
UNPROCESSABLE = 422  # for all other errors
AGENT: web.AppKey[Questions] = web.AppKey("agent")
ROOT: web.AppKey[Path] = web.AppKey("root")
STALLED = 60.0  # seconds until a reader who does not read is given up: a container may be frozen for it
FRAME = 1 << 18  # bytes, about
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger("holdfast")


def routes() -> list[web.RouteDef]:
    """A route for each question."""
    return [web.route(each.method, each.path, handler(each)) for each in QUESTIONS]


def handler(question: Question) -> Handler:
    """Make the handler of a question, by the way in which its result travels."""
    hints = question.hints()
    write = lines if hints["return"] in (Lines, Steps) else frames if Sink in hints.values() else value

    async def handle(request: web.Request) -> web.StreamResponse:
        return await write(request, question, await arguments_of(request, question))

    return handle


@web.middleware
async def report(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn deliberate errors into their JSON."""
    try:
        _refuse_other_root(request)
        return await handler(request)
    except HoldfastError as error:
        codes = (HTTP_STATUS[kind] for kind in type(error).__mro__ if kind in HTTP_STATUS)
        return web.json_response(error_json(error), status=next(codes, UNPROCESSABLE))
    except web.HTTPException as error:
        told = f"{request.method} '{request.path}': {error.reason.lower()}"
        if error.status in (404, 405):
            told = f"{told}: this agent is holdfast {__version__}, and has no such request (is the command another?)"
        return web.json_response(error_json(WrongCall(told)), status=error.status)


def _refuse_other_root(request: web.Request) -> None:
    """Raise Conflict if the caller means the agent of another root: two agent.toml can name one socket."""
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
    return web.json_response(await in_thread(lambda: call(**given)))


async def in_thread(call: Callable[[], T]) -> T:
    """Call in a new thread: many callers may wait for long at the same time, and a pool of threads has an end."""
    return await asyncio.wrap_future(in_background(call, "answer"))


# -- lines ---------------------------------------------------------------------------------------------------


async def lines(request: web.Request, question: Question, given: dict[str, Any]) -> web.StreamResponse:
    """Write what an iterator yields, line by line, until the caller goes; an error is the last line."""
    call = getattr(request.app[AGENT], question.name)
    found = await in_thread(lambda: call(**given))
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    stop = threading.Event()
    queue, line = pumped(found, stop), b"\n"
    try:
        while line := await queue.get():
            await response.write(line)
    except ConnectionError:
        pass  # the reader has gone
    finally:
        stop.set()
        while line:  # so that the thread is never held up by a full queue
            line = await queue.get()
    return response


def pumped(found: Iterator[Json | None], stop: threading.Event) -> asyncio.Queue[bytes]:
    """Read a blocking iterator in a new thread until `stop` is set; b"" is the end."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue(256)

    def put(line: bytes) -> None:
        asyncio.run_coroutine_threadsafe(queue.put(line), loop).result()

    def pump() -> None:
        try:
            for each in found:
                if stop.is_set():
                    break
                put(b"\n" if each is None else line_of(each))
        except HoldfastError as error:
            put(line_of(error_json(error)))
        except Exception as error:
            log.error("bug", what="an answer", exc_info=error)
        finally:
            put(b"")

    threading.Thread(target=pump, name="line reader", daemon=True).start()
    return queue


def line_of(found: Json) -> bytes:
    return json.dumps(found).encode() + b"\n"


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
        end = await in_thread(work)
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
