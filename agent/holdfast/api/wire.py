"""What the routes of the API share: bodies, queries, answers, and errors as JSON."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from holdfast.api.agent import Agent
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
from holdfast.identity import ROOT_HEADER

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
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error_json(error: HoldfastError) -> dict[str, Any]:
    """An error as the API writes it."""
    return {"error": str(error), "class": type(error).__name__, "exit_code": error.exit_code}


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
        wrong = WrongCall(f"{request.method} '{request.path}': {error.reason.lower()}")
        return web.json_response(error_json(wrong), status=error.status)


def _refuse_other_root(request: web.Request) -> None:
    """Raise Conflict for a caller who means the agent of another root: two agent.toml may lead to one socket."""
    meant, root = Path(unquote(request.headers.get(ROOT_HEADER, ""))), request.app[ROOT]
    if ROOT_HEADER in request.headers and meant != root and os.path.realpath(meant) != os.path.realpath(root):
        raise Conflict(
            f"ask the agent that holds '{root}': agent.toml says root = '{meant}' "
            "(another name in agent.toml, or restart the agent if its root was changed)"
        )


def target_of(request: web.Request) -> str:
    return f"{request.match_info['app']}/{request.match_info['name']}"


def number(request: web.Request, name: str, default: float) -> float:
    """A number of the query."""
    text = request.query.get(name, "")
    try:
        found = float(text) if text else default
        if abs(found) < 2**53:  # false for nan, which would confuse the loop's timers, and for what is no integer
            return found
    except ValueError:
        pass
    raise WrongCall(f"query '{name}={text}': not a number")


async def body(request: web.Request) -> dict[str, Any]:
    """The JSON object that a request carries; none is an empty one."""
    text = await request.text()
    try:
        value = json.loads(text) if text else {}
    except RecursionError:
        raise WrongCall(f"{request.method} '{request.path}': body is nested too deeply") from None
    except ValueError as error:
        raise WrongCall(f"{request.method} '{request.path}': body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WrongCall(f"{request.method} '{request.path}': body is not a JSON object")
    return value


def asked(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text:
        raise WrongCall(f"body '{key}': a string is needed")
    return text


def answer(call: Callable[[Agent, web.Request], Any]) -> Handler:
    """A handler that makes one blocking call in a thread and writes what it returns."""

    async def handle(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(call, request.app[AGENT], request))

    return handle
