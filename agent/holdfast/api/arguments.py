"""Read the arguments of a request, and check them against the types of the question's parameters."""

from __future__ import annotations

import inspect
import json
import pwd
import socket
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

from aiohttp import web
from pydantic import BaseModel, Field, ValidationError, create_model

from holdfast.errors import WrongCall
from holdfast.questions import Caller, Question, Sink

EXACT = 2**53  # the largest whole number that a float has exactly; larger ones overflow clocks


@cache
def model_of(question: Question) -> type[BaseModel]:
    """The arguments of a question as a model, without those that no caller gives."""
    fields: dict[str, Any] = {}
    for name, declared in inspect.signature(question.declared).parameters.items():
        hint = question.hints().get(name)
        if hint is None or hint in (Caller, Sink):  # self, and what the agent fills in
            continue
        required = declared.default is inspect.Parameter.empty
        limits: dict[str, Any] = {"min_length": 1} if required else {}
        if hint in (int, float, int | None, float | None):
            limits = {"ge": 0, "le": EXACT}
        fields[name] = (hint, Field(... if required else declared.default, **limits))
    return create_model(question.name, **fields)


async def arguments_of(request: web.Request, question: Question) -> dict[str, Any]:
    """The arguments of a request. Raises WrongCall for one that is missing or of another type."""
    posted, hints = question.method == "POST", question.hints()
    if posted:
        given = await body(request)
    else:
        lists = {name for name, hint in hints.items() if hint == Sequence[str]}
        given = {name: request.query.getall(name) if name in lists else request.query[name] for name in request.query}
    given = {name: value for name, value in given.items() if value is not None} | request.match_info
    try:
        found = model_of(question).model_validate(given, strict=posted)
    except ValidationError as error:
        wrong = [f"'{each['loc'][0]}': {each['msg'][:1].lower()}{each['msg'][1:]}" for each in error.errors()]
        raise WrongCall(f"{request.method} '{request.path}': {'; '.join(wrong)}") from error
    seen = {name: Caller(caller(request)) for name, hint in hints.items() if hint is Caller}
    return {name: getattr(found, name) for name in found.model_fields_set} | seen


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


def caller(request: web.Request) -> str:
    """Who asks: a user's name, or `uid N`."""
    peer = request.transport.get_extra_info("socket") if request.transport else None
    if peer is None:
        return ""
    uid = user_of(peer)
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def user_of(connection: socket.socket) -> int:
    """The uid of the process at the other end, from the kernel (SO_PEERCRED, unix(7))."""
    uid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return uid
