"""The routes of images, of what is made of containers, and of the disk.

    GET    /v1/images                              DELETE /v1/images?ref=
    GET    /v1/images/{inspect,history}?ref=       GET    /v1/images/outdated
    POST   /v1/images/pull  {"ref"}                POST   /v1/images/push  {"ref", "to"}           (JSON lines)
    POST   /v1/images/{import,load}  {"path", …}   POST   /v1/images/tag   {"ref", "name"}
    GET    /v1/images/save?ref=&ref=&format=       GET    /v1/images/export?ref=                   (frames)
    POST   /v1/images/prune  {"all"}               POST   /v1/bundles/load  {"path"}
    POST   /v1/containers/APP/NAME/commit          GET    /v1/containers/APP/NAME/export?pause=    (frames)
    GET    /v1/usage                               POST   /v1/prune  {"all", "volumes"}

What takes long ends with a line of its own, which is the result, or an error in the words of all answers. Archives
come in frames, because their length is not known in advance: a line with the size of what follows, in hexadecimal;
after 0 comes that last line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import web

from holdfast.api.agent import Agent
from holdfast.api.wire import AGENT, Handler, answer, asked, body, error_json, flag, target_of, text, words, yes
from holdfast.errors import HoldfastError, UnfitHost, WrongCall
from holdfast.images.outgoing.write import Sink
from holdfast.observed import Json

STALLED = 60.0  # seconds until a reader who takes nothing is given up: a container may stand still meanwhile
FRAME = 1 << 18  # bytes, about

Call = Callable[[Agent, dict[str, Any]], Any]


def reference(request: web.Request) -> str:
    """The image that a query names."""
    if not (ref := request.query.get("ref", "")):
        raise WrongCall(f"{request.method} '{request.path}': no image is named (expected ?ref=NAME)")
    return ref


def told(call: Call) -> Handler:
    """A handler that makes one blocking call with the body of its request, in a thread."""

    async def handle(request: web.Request) -> web.Response:
        value = await body(request)
        return web.json_response(await asyncio.to_thread(call, request.app[AGENT], value))

    return handle


def steps(call: Callable[[Agent, dict[str, Any]], Iterator[Json]]) -> Handler:
    """A handler that writes what an iterator gives, line by line; what it raises is the last line."""

    async def handle(request: web.Request) -> web.StreamResponse:
        agent, value = request.app[AGENT], await body(request)
        lines = await asyncio.to_thread(call, agent, value)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):  # the caller has gone; what was begun goes on
            while (line := await asyncio.to_thread(_next, lines)) is not None:
                await response.write(json.dumps(line).encode() + b"\n")
        return response

    return handle


def _next(lines: Iterator[Json]) -> Json | None:
    try:
        return next(lines, None)
    except HoldfastError as error:
        return error_json(error)


def frames(call: Callable[[Agent, web.Request, Sink], Json]) -> Handler:
    """A handler that writes what a call in a thread writes, and at the end what it returns or raises."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        out = _Frames(response, asyncio.get_running_loop())

        def work() -> Json:
            try:
                found = call(request.app[AGENT], request, out)
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
            await asyncio.wait_for(response.write(b"0\n" + json.dumps(end).encode() + b"\n"), STALLED)
        except (ConnectionError, TimeoutError):
            if request.transport is not None:  # the reader has gone, or reads no more
                request.transport.abort()
        return response

    return handle


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


def import_image(agent: Agent, value: dict[str, Any]) -> Json:
    return agent.import_image(asked(value, "path"), asked(value, "ref"), words(value, "changes"))


async def commit(request: web.Request) -> web.Response:
    value = await body(request)
    made = await asyncio.to_thread(
        request.app[AGENT].commit,
        target_of(request),
        asked(value, "name"),
        changes=words(value, "changes"),
        message=text(value, "message"),
        author=text(value, "author"),
        pause=yes(value, "pause", default=True),
    )
    return web.json_response(made)


def save(agent: Agent, request: web.Request, out: Sink) -> Json:
    refs = request.query.getall("ref", [])
    if not refs:
        raise WrongCall("save images: no image is named (expected ?ref=NAME)")
    return agent.save_images(refs, request.query.get("format", "oci-archive"), out)


IMAGE_ROUTES = [
    web.get("/v1/images", answer(lambda agent, _: agent.images())),
    web.delete("/v1/images", answer(lambda agent, request: agent.remove_image(reference(request)))),
    web.get("/v1/images/inspect", answer(lambda agent, request: agent.image(reference(request)))),
    web.get("/v1/images/history", answer(lambda agent, request: agent.image_history(reference(request)))),
    web.get("/v1/images/outdated", answer(lambda agent, _: agent.outdated())),
    web.post("/v1/images/pull", steps(lambda agent, value: agent.pull_image(asked(value, "ref")))),
    web.post(
        "/v1/images/push",
        steps(lambda agent, value: agent.push_image(asked(value, "ref"), text(value, "to"))),
    ),
    web.post("/v1/images/import", told(import_image)),
    web.post("/v1/images/load", told(lambda agent, value: agent.load_image(asked(value, "path")))),
    web.post("/v1/images/tag", told(lambda agent, value: agent.tag_image(asked(value, "ref"), asked(value, "name")))),
    web.post("/v1/images/prune", told(lambda agent, value: agent.prune_images(yes(value, "all")))),
    web.get("/v1/images/save", frames(save)),
    web.get("/v1/images/export", frames(lambda agent, request, out: agent.export_image(reference(request), out))),
    web.post("/v1/bundles/load", told(lambda agent, value: agent.load_bundle(asked(value, "path")))),
    web.post("/v1/containers/{app}/{name}/commit", commit),
    web.get(
        "/v1/containers/{app}/{name}/export",
        frames(
            lambda agent, request, out: agent.export(target_of(request), out, flag(request, "pause", default=True))
        ),
    ),
    web.get("/v1/usage", answer(lambda agent, _: agent.usage())),
    web.post(
        "/v1/prune",
        told(lambda agent, value: agent.prune(yes(value, "all"), yes(value, "volumes"))),
    ),
]
