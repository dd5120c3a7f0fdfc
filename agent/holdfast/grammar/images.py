"""Image references, as Docker and containers-transports(5) read them, and what else is said of an image in a word."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

from holdfast.grammar.names import absolute

Transport = Literal["docker", "oci", "oci-archive", "docker-archive"]

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
TRANSPORTS = ("oci", "oci-archive", "docker-archive")  # of archives of the host
_OTHER_TRANSPORTS = ("containers-storage", "docker-daemon", "dir", "ostree", "sif", "tarball")
_DOCKER_HUB = "docker.io"

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
        """The full name without the digest: `docker.io/library/app:latest`; an archive's with its transport."""
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
        """Return the full name of one manifest: `docker.io/library/app@sha256:…`."""
        return f"{self.repository}@{digest}"


def parse(text: str) -> Reference:
    """Read a reference. Raises ValueError with the reason alone.

    `app` is `docker.io/library/app:latest`. The first component is a host where it has a dot or a port, or is
    `localhost` (the distribution project's reference grammar). `docker://` before a name changes nothing.
    """
    transport, colon, rest = text.partition(":")
    if colon and transport in TRANSPORTS:
        path, _, tag = rest.partition(":")
        return Reference(cast(Any, transport), "", _archive(transport, path), tag, "")
    return _docker(text.removeprefix("docker://"))


def _archive(transport: str, path: str) -> str:
    try:
        return absolute(path)
    except ValueError:
        raise ValueError(f"no absolute path (expected {transport}:/PATH[:REF])") from None


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
    if host == _DOCKER_HUB and "/" not in path:
        path = f"library/{path}"
    return Reference("docker", host, path, tag or "latest", digest)


def _check_outside(text: str) -> None:
    """Refuse what people often write around a name, and what is no name in a registry."""
    scheme, _, rest = text.partition(":")
    if scheme in ("http", "https") and rest.startswith("//"):
        raise ValueError(f"an address, not a name (leave {scheme}:// out)")
    if rest.startswith("//") or (scheme in _OTHER_TRANSPORTS and rest.startswith(("/", "."))):
        raise ValueError(f"the transport {scheme!r} is not known ({_FORM}, or {', '.join(TRANSPORTS)})")
    if re.search(r"\s", text):
        raise ValueError(f"has a space in it ({_FORM})")
    if not text:
        raise ValueError(f"is empty ({_FORM})")


def _split_host(name: str) -> tuple[str, str]:
    host, slash, rest = name.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        return _DOCKER_HUB, name
    port = re.search(r":(\d+)$", host)
    if not _HOST.fullmatch(host) or (port and not 0 < int(port[1]) < 1 << 16):
        raise ValueError(f"{host[:300]!r} is no host ({_FORM})")
    return (_DOCKER_HUB if host == "index.docker.io" else host), rest


def familiar(name: str) -> str:
    """Shorten a full name as people write it; `parse` reads the short form as the same name."""
    for prefix in ("docker.io/library/", "docker.io/"):
        short = name.removeprefix(prefix)
        with suppress(ValueError):
            if short != name and parse(short).name == parse(name).name:
                return short
    return name


def built(image: str) -> str | None:
    """Return the `[app/]name` of an image that the state files build; None for any other.

    Without a tag or a digest: an image of a registry whose name begins with `images.` is written with its tag.
    """
    rest = image.removeprefix("images.")
    return rest if rest != image and not re.search("[:@]|/.*/", rest) else None


def archive_path(image: str) -> str | None:
    """Return the path of the host that an image is read from; None for an image of a registry."""
    transport, _, path = image.partition(":")
    return path.partition(":")[0] if transport in TRANSPORTS else None


def is_version(image: str) -> bool:
    """Say whether the tag of a reference starts like a version."""
    tag = image.rpartition("/")[2].partition(":")[2]
    return re.match(r"v?\d", tag) is not None


def platform(text: str) -> str:
    """Check `linux/ARCHITECTURE[/VARIANT]`, as images name them (GOARCH, GOARM)."""
    if not re.fullmatch(r"linux/[a-z0-9]+(/v[0-9]+)?", text):
        raise ValueError(f"'{text}' is not a platform (expected linux/ARCHITECTURE[/VARIANT], as linux/amd64)")
    return text
