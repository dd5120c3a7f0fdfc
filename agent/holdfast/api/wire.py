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


def count(request: web.Request, name: str, default: int) -> int:
    """A whole number of the query, 0 or more."""
    found = number(request, name, default)
    if found < 0 or found != int(found):
        raise WrongCall(f"query '{name}={request.query[name]}': not a whole number of 0 or more")
    return int(found)


def flag(request: web.Request, name: str, *, default: bool = False) -> bool:
    """A yes or no of the query."""
    text = request.query.get(name)
    if text not in (None, "0", "1"):
        raise WrongCall(f"query '{name}={text}': neither yes nor no (expected 1 or 0)")
    return default if text is None else text == "1"


async def body(request: web.Request) -> dict[str, Any]:
    """The JSON object that a request carries; none is an empty one."""
    data = await request.read()
    try:
        value = json.loads(data) if data else {}
    except RecursionError:
        raise WrongCall(f"{request.method} '{request.path}': body is nested too deeply") from None
    except ValueError as error:
        raise WrongCall(f"{request.method} '{request.path}': body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WrongCall(f"{request.method} '{request.path}': body is not a JSON object")
    return value


def asked(value: dict[str, Any], key: str) -> str:
    """A string of a body that has to be there."""
    if not (found := text(value, key)):
        raise WrongCall(f"body '{key}': a string is needed")
    return found


def text(value: dict[str, Any], key: str) -> str:
    """A string of a body, "" where there is none."""
    found = value.get(key)
    if not isinstance(found, str | None):
        raise WrongCall(f"body '{key}': not a string")
    return found or ""


def words(value: dict[str, Any], key: str) -> list[str]:
    """A list of strings of a body, empty where there is none."""
    found = value.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise WrongCall(f"body '{key}': not a list of strings")
    return found


def yes(value: dict[str, Any], key: str, *, default: bool = False) -> bool:
    """A boolean of a body."""
    found = value.get(key)
    if not isinstance(found, bool | None):
        raise WrongCall(f"body '{key}': neither true nor false")
    return default if found is None else found


def answer(call: Callable[[Agent, web.Request], Any]) -> Handler:
    """A handler that makes one blocking call in a thread and writes what it returns."""

    async def handle(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(call, request.app[AGENT], request))

    return handle
