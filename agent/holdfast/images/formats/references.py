"""Parse image references, digests, and the Dockerfile instructions that change an image, with errors for users."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from holdfast.errors import WrongCall, WrongState
from holdfast.grammar import images
from holdfast.grammar.images import DIGEST, Reference


def parse(text: str) -> Reference:
    """Read a reference as `grammar.images` does. Raises WrongCall with what is wrong."""
    try:
        return images.parse(text)
    except ValueError as error:
        raise WrongCall(f"image name {text[:300]!r}: {error}") from None


def to_digest(value: object) -> str:
    """Check that a value is a digest, and return it. Raises WrongState."""
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise WrongState(f"read digest {value!r}: not a digest (expected sha256: and 64 hexadecimal digits)")
    return value


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Turn Dockerfile instructions into the `config` of an OCI image configuration. Raises WrongCall."""
    config: dict[str, Any] = {}
    for change in changes:
        word, _, value = change.strip().partition(" ")
        try:
            _apply(config, word, value.strip())
        except ValueError as error:
            raise WrongCall(f"change {change!r}: {error}") from error
    return config


def _apply(config: dict[str, Any], word: str, value: str) -> None:
    match word.upper():
        case "CMD" | "ENTRYPOINT":
            config[word.title()] = _arguments(value)
        case "ENV":
            config.setdefault("Env", []).extend(f"{key}={text}" for key, text in _pairs(value))
        case "LABEL":
            config.setdefault("Labels", {}).update(_pairs(value))
        case "WORKDIR" | "USER" | "STOPSIGNAL":
            config[{"WORKDIR": "WorkingDir", "USER": "User", "STOPSIGNAL": "StopSignal"}[word.upper()]] = value
        case "EXPOSE":
            ports = (port if "/" in port else f"{port}/tcp" for port in value.split())
            config.setdefault("ExposedPorts", {}).update({port: {} for port in ports})
        case "VOLUME":
            paths = json.loads(value) if value.startswith("[") else value.split()
            config.setdefault("Volumes", {}).update({path: {} for path in paths})
        case _:
            raise ValueError(
                f"unknown instruction {word!r} (expected CMD, ENTRYPOINT, ENV, WORKDIR, USER, EXPOSE, LABEL, VOLUME "
                "or STOPSIGNAL)"
            )


def _arguments(value: str) -> list[str]:
    """Read a command: a JSON list as it is, anything else as a line for a shell, as in a Dockerfile."""
    with suppress(ValueError):
        words = json.loads(value)
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            return words
    return ["/bin/sh", "-c", value] if value else []


def _pairs(value: str) -> list[tuple[str, str]]:
    words = shlex.split(value)
    if not words:
        raise ValueError("nothing to set (expected KEY=VALUE)")
    if "=" not in words[0]:  # the old form: KEY VALUE
        key, _, text = value.partition(" ")
        return [(key, text)]
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word!r} is no KEY=VALUE")
    return [(key, text) for key, _, text in (word.partition("=") for word in words)]
