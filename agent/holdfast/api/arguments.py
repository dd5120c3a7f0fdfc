"""Check the arguments of a request against the types of the question's parameters."""

from __future__ import annotations

import inspect
import json
import pwd
import socket
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import parse_qs

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


def arguments_of(question: Question, given: Mapping[str, Any], request: str) -> dict[str, Any]:
    """The arguments of a question. Raises WrongCall, with the request, for one that is missing or of another type."""
    said = {name: value for name, value in given.items() if value is not None}
    try:
        found = model_of(question).model_validate(said, strict=question.method == "POST")
    except ValidationError as error:
        wrong = [f"'{each['loc'][0]}': {each['msg'][:1].lower()}{each['msg'][1:]}" for each in error.errors()]
        raise WrongCall(f"{request}: {'; '.join(wrong)}") from error
    return {name: getattr(found, name) for name in found.model_fields_set}


def in_query(question: Question, query: str) -> dict[str, Any]:
    """The arguments in the query of a request, as texts."""
    hints = question.hints()
    given = parse_qs(query, keep_blank_values=True)
    return {name: texts if hints.get(name) == Sequence[str] else texts[0] for name, texts in given.items()}


def in_body(data: bytes, request: str) -> dict[str, Any]:
    """The arguments in the JSON object that a request carries; {} without one. Raises WrongCall."""
    try:
        value = json.loads(data or b"{}")
    except RecursionError:
        raise WrongCall(f"{request}: body is nested too deeply") from None
    except ValueError as error:
        raise WrongCall(f"{request}: body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WrongCall(f"{request}: body is not a JSON object")
    return value


def caller(connection: socket.socket) -> str:
    """Who asks: a user's name, or `uid N`."""
    uid = user_of(connection)
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def user_of(connection: socket.socket) -> int:
    """The uid of the process at the other end, from the kernel (SO_PEERCRED, unix(7))."""
    uid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return uid
