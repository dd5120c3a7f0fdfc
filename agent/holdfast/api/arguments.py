"""Read and check the arguments of a request by the types of the question's parameters."""

from __future__ import annotations

import inspect
import json
import pwd
import socket
import struct
from collections.abc import Sequence
from typing import Any, get_args

from aiohttp import web

from holdfast.errors import WrongCall
from holdfast.questions import Caller, Question, Sink

WRONG = {
    str: "not a string",
    bool: "neither true nor false",
    int: "not a whole number of 0 or more",
    float: "not a number",
    Sequence[str]: "not a list of strings",
}
LARGEST = 2**53  # a larger float is not exact; nan, which confuses timers, is not below it either


async def arguments_of(request: web.Request, question: Question) -> dict[str, Any]:
    """The arguments of a request. Raises WrongCall for one of another type, or that is missing."""
    given = await body(request) if question.method == "POST" else {}
    hints, declared = question.hints(), inspect.signature(question.declared).parameters
    found: dict[str, Any] = {}
    for name in question.names:
        hint = get_args(hints[name])[0] if type(None) in get_args(hints[name]) else hints[name]
        if hint is Caller:
            found[name] = caller(request)
        elif name in request.match_info:
            found[name] = request.match_info[name]
        elif hint is not Sink:
            place = f"body '{name}'"
            value = given.get(name)
            if question.method != "POST" and name in request.query:
                place, value = from_query(request, name, hint)
            if declared[name].default is inspect.Parameter.empty and value in (None, "", []):
                raise WrongCall(f"{request.method} '{request.path}': '{name}' is missing")
            if value is not None:
                found[name] = checked(value, hint, place)
    return found


def from_query(request: web.Request, name: str, hint: Any) -> tuple[str, Any]:
    """A value of the query as JSON would have it, and where it stands; one of another type stays text."""
    text = request.query[name]
    place = f"query '{name}={text}'"
    if hint == Sequence[str]:
        return place, request.query.getall(name)
    if hint is bool:
        return f"{place} (1 or 0)", {"1": True, "0": False}.get(text, text)
    if hint in (int, float):
        try:
            return place, float(text)
        except ValueError:
            return place, text
    return place, text


def checked(value: Any, hint: Any, place: str) -> Any:
    """The value, if it is of the type. Raises WrongCall."""
    if hint == Sequence[str]:
        right = isinstance(value, list) and all(isinstance(each, str) for each in value)
    elif hint in (int, float):
        right = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
        right = right and (hint is float or (value >= 0 and value == int(value)))
    else:
        right = isinstance(value, hint)
    if not right:
        raise WrongCall(f"{place}: {WRONG[hint]}")
    return int(value) if hint is int else value


async def body(request: web.Request) -> dict[str, Any]:
    """The JSON object that a request carries; {} without one."""
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


def caller(request: web.Request) -> Caller:
    """Who asks: a user's name, or `uid N`."""
    transport = request.transport
    peer = transport.get_extra_info("socket") if transport else None
    if peer is None:
        return Caller("")
    uid = user_of(peer)
    try:
        return Caller(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return Caller(f"uid {uid}")


def user_of(connection: socket.socket) -> int:
    """The uid of the process at the other end, from the kernel (SO_PEERCRED, unix(7))."""
    uid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return uid
