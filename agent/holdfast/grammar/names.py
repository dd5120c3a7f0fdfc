"""Names and paths: of what state files define, of hosts and their neighbours, of users."""

from __future__ import annotations

import posixpath
import re

from holdfast.grammar.quantities import number

LARGEST_ID = 2**32 - 2  # of users and groups; the next one means nobody in chown(2)
LONGEST_LOGIN = 256  # LOGIN_NAME_MAX of Linux
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_LABEL = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")


def name(value: str) -> str:
    """Check the name of an app, container, network, volume or config."""
    if not NAME.fullmatch(value):
        raise ValueError(
            f"'{value}' is not a name (expected a-z, 0-9, '_', '.', '-', at most 63, first a letter or digit)"
        )
    return value


def reference(value: str) -> str:
    """Check a name, or `app/name` for what another app defines."""
    app, slash, inner = value.rpartition("/")
    if slash:
        name(app)
    name(inner)
    return value


def variable(value: str) -> str:
    """Check the name of an environment variable."""
    if not value or "=" in value or "\0" in value:
        raise ValueError(f"'{value}' is not the name of a variable (expected no '=' and at least one character)")
    return value


def absolute(value: str) -> str:
    """Normalise an absolute path."""
    if not value.startswith("/"):
        raise ValueError(f"'{value}' is not an absolute path (expected it to start with /)")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise ValueError(f"{value!r} holds control characters (expected a path that can be printed)")
    return posixpath.normpath(f"/{value.lstrip('/')}")  # with two at the beginning, POSIX means something else


def hostname(value: str) -> str:
    """Check a host name: RFC 1123 labels, at most 64 characters in all (HOST_NAME_MAX of Linux)."""
    if len(value) > 64 or not all(map(_LABEL.fullmatch, value.split("."))):
        raise ValueError(f"'{value}' is not a host name (expected letters, digits, '-' and '.', at most 64)")
    return value


def alias(value: str) -> str:
    """Check an alias in a network: one word of a hosts file, which other containers read."""
    if not re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?", value) or value == "localhost":
        raise ValueError(f"'{value}' is not a name for a network (expected letters, digits, '-', '_' and '.')")
    return value


def user(value: str) -> str:
    """Check `USER[:GROUP]`, names or numbers."""
    if not re.fullmatch(r"[^\s:/]+(:[^\s:/]+)?", value):
        raise ValueError(f"'{value}' is not a user (expected USER[:GROUP], names or numbers)")
    for part in value.split(":"):
        check_id(part)
    return value


def group(value: str) -> str:
    """Check a group, name or number."""
    if not re.fullmatch(r"[^\s:/]+", value):
        raise ValueError(f"'{value}' is not a group (expected a name or a number)")
    check_id(value)
    return value


def check_id(text: str) -> None:
    """Refuse what can be neither the number nor the name of a user or group."""
    if text.isascii() and text.isdigit() and (not number(text) or int(text) > LARGEST_ID):
        raise ValueError(f"'{text}' is out of range (expected a number up to {LARGEST_ID})")
    if len(text) > LONGEST_LOGIN:
        raise ValueError(f"a name of {len(text)} characters is too long (expected at most {LONGEST_LOGIN})")
