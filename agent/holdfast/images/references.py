"""What people write about images → what the image store keeps: names, digests, Dockerfile instructions. No I/O."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

from holdfast.errors import WrongCall, WrongState

Transport = Literal["docker", "oci", "oci-archive", "docker-archive"]

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
TRANSPORTS = ("oci", "oci-archive", "docker-archive")  # archives of the host, as containers-transports(5) writes them
OTHER_TRANSPORTS = ("containers-storage", "docker-daemon", "dir", "ostree", "sif", "tarball")
DOCKER_HUB = "docker.io"

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_FORM = "expected [HOST[:PORT]/]NAME[:TAG][@sha256:DIGEST]"
_LONGEST_PATH = 255


@dataclass(frozen=True, slots=True)
class Reference:
    """Where an image is: in a registry (transport `docker`), or in an archive of the host.

    Of a registry: host (with its port, as `docker.io`), path (as `library/app`), tag (`latest` if none is written),
    digest ("" or `sha256:…`, which then decides alone). Of an archive: path in the file system, and tag, the part
    of the archive that is meant ("" for the only one).
    """

    transport: Transport
    host: str
    path: str
    tag: str
    digest: str

    @property
    def name(self) -> str:
        """The full name without the digest: `docker.io/library/app:latest`; an archive's as it is written."""
        if self.transport != "docker":
            return f"{self.transport}:{self.path}" + (f":{self.tag}" if self.tag else "")
        return f"{self.repository}:{self.tag}"

    @property
    def repository(self) -> str:
        """Host and path: all tags of a registry's image."""
        return f"{self.host}/{self.path}"

    @property
    def remote(self) -> str:
        """What a registry is asked for: the digest where there is one, else the tag."""
        return self.at(self.digest) if self.digest else self.name

    def at(self, digest: str) -> str:
        """The full name of one manifest: `docker.io/library/app@sha256:…`."""
        return f"{self.repository}@{digest}"


def parse(text: str) -> Reference:
    """Read a reference as Docker and containers-transports(5) write them. Raises WrongCall with what is wrong.

    `app` is `docker.io/library/app:latest`. The first component is a host where it has a dot or a port, or is
    `localhost` (the distribution project's reference grammar). `docker://` before a name changes nothing.
    """
    transport, colon, rest = text.partition(":")
    if colon and transport in TRANSPORTS:
        return _archive(text, transport, rest)
    try:
        return _docker(text.removeprefix("docker://"))
    except ValueError as error:
        raise WrongCall(f"image name {text[:300]!r}: {error}") from None


def _archive(text: str, transport: str, rest: str) -> Reference:
    path, _, tag = rest.partition(":")
    if not path.startswith("/") or "\0" in text or ".." in path.split("/"):
        raise WrongCall(f"image name {text[:300]!r}: no absolute path (expected {transport}:/PATH[:REF])")
    return Reference(cast(Any, transport), "", path, tag, "")


def _docker(text: str) -> Reference:
    _check_outside(text)
    name, at, digest = text.partition("@")
    if at and not DIGEST.fullmatch(digest):
        raise ValueError(f"{digest[:100]!r} is no digest (expected sha256: and 64 hexadecimal digits)")
    head, slash, last = name.rpartition("/")
    last, colon, tag = last.partition(":")
    if colon and not _TAG.fullmatch(tag):
        wrong = f"{tag[:140]!r} is no tag" if tag else "the tag is empty"
        raise ValueError(f"{wrong} (expected letters, digits, '_', '.' and '-', at most 128)")
    host, path = _split_host(head + slash + last)
    if not _PATH.fullmatch(path):
        if _PATH.fullmatch(path.lower()):
            raise ValueError(f"{path!r} is in upper case (expected {path.lower()!r})")
        raise ValueError(f"not a valid name ({_FORM}, in lower case)")
    if len(path) > _LONGEST_PATH:
        raise ValueError(f"the path has {len(path)} characters (at most {_LONGEST_PATH})")
    if re.fullmatch("[0-9a-f]{64}", name):
        raise ValueError("looks like a digest (expected sha256: before it)")
    if host == DOCKER_HUB and "/" not in path:
        path = f"library/{path}"
    return Reference("docker", host, path, tag or "latest", digest)


def _check_outside(text: str) -> None:
    """What is often written around a name, and what is no name of a registry at all."""
    scheme, _, rest = text.partition(":")
    if scheme in ("http", "https") and rest.startswith("//"):
        raise ValueError(f"an address, not a name (leave {scheme}:// out)")
    if rest.startswith("//") or (scheme in OTHER_TRANSPORTS and rest.startswith(("/", "."))):
        raise ValueError(f"the transport {scheme!r} is not known ({_FORM}, or {', '.join(TRANSPORTS)})")
    if re.search(r"\s", text):
        raise ValueError(f"has a space in it ({_FORM})")
    if not text:
        raise ValueError(f"is empty ({_FORM})")


def _split_host(name: str) -> tuple[str, str]:
    host, slash, rest = name.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        return DOCKER_HUB, name
    port = re.search(r":(\d+)$", host)
    if not _HOST.fullmatch(host) or (port and not 0 < int(port[1]) < 1 << 16):
        raise ValueError(f"{host[:300]!r} is no host ({_FORM})")
    return (DOCKER_HUB if host == "index.docker.io" else host), rest


def to_digest(value: object) -> str:
    """The value, if it is a digest. Raises WrongState."""
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise WrongState(f"read digest {value!r}: not a digest (expected sha256: and 64 hexadecimal digits)")
    return value


def normalize(reference: str) -> str:
    """The full name that a reference stands for, as Docker has it: `app` is `docker.io/library/app:latest`.

    A digest in it is left out. Raises WrongCall, for an archive of the host as well.
    """
    parsed = parse(reference)
    if parsed.transport != "docker":
        raise WrongCall(f"image name {reference[:300]!r}: an archive of this host ({_FORM})")
    return parsed.name


def familiar(name: str) -> str:
    """The short form of a full name, as people write it: what `normalize` makes the same full name of."""
    for prefix in ("docker.io/library/", "docker.io/"):
        short = name.removeprefix(prefix)
        with suppress(WrongCall):
            if short != name and parse(short).name == parse(name).name:
                return short
    return name


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Dockerfile instructions → the `config` object of an OCI image configuration. Raises WrongCall."""
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
        case "WORKDIR":
            config["WorkingDir"] = value
        case "USER":
            config["User"] = value
        case "STOPSIGNAL":
            config["StopSignal"] = value
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
    """JSON is taken as it is; anything else is a line for a shell, as in a Dockerfile."""
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
