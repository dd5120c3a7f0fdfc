"""The short forms of the state language: one string → its parts or its canonical spelling.

Every reader takes what was written and returns plain values, or raises ValueError with a message that quotes it and
says what would be right. What is not of this language alone is read by `grammar`. Called by the tables in `authored`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

from holdfast.grammar import images, signals
from holdfast.grammar.names import absolute, check_id, reference
from holdfast.grammar.quantities import number
from holdfast.keys import size
from holdfast.words import named as words_for
from holdfast.words import shown

Parts = dict[str, Any]

MOST_CPUS = 8192  # NR_CPUS of Linux
MOST_PIDS = 4_194_304  # PID_MAX_LIMIT of Linux


def words(value: Any) -> Any:
    """Read a command: a list stays, a string is split as a shell would and run by none."""
    if not isinstance(value, str):
        return value
    try:
        return shlex.split(value)
    except ValueError as error:
        raise ValueError(f"'{value}': {str(error).lower()} (expected words as a shell reads them)") from None


def keyed(value: Any, read: Callable[[str], tuple[str, Any]]) -> Any:
    """Turn a list of short forms into a table; read returns the key and value of each. A table stays."""
    if not isinstance(value, list):
        return value
    table: dict[str, Any] = {}
    for item in value:
        if not isinstance(item, str):
            raise ValueError(f"expected a list of text, or a table, not a list with {words_for(item)}")  # noqa: TRY004
        key, inner = read(item)
        if key in table:
            raise ValueError(f"'{key}' is named twice")
        table[key] = inner
    return table


def pairs(value: Any) -> Any:
    """Read `["K=V", …]` as a table; a table stays."""
    return keyed(value, _pair)


def _pair(item: str) -> tuple[str, str]:
    key, equals, text = item.partition("=")
    if not equals:
        raise ValueError(f"'{item}': no value is given (expected NAME=VALUE)")
    return key, text


def volumes_from(value: Any) -> Any:
    """Read `["db", "db:ro"]` as a table; a table stays."""
    return keyed(value, _access)


def _access(item: str) -> tuple[str, str]:
    container, _, access = item.partition(":")
    if access not in ("", "rw", "ro"):
        raise ValueError(f"'{item}': option '{access}' is not known (expected CONTAINER[:ro])")
    return container, access or "rw"


def named(value: Any) -> Any:
    """Read a list of names as a table of them, each without settings; a table stays."""
    return keyed(value, lambda name: (name, {}))


def dependencies(value: Any) -> Any:
    """Read a list of containers as a table in which each must have started; a table stays."""
    table = keyed(value, lambda name: (name, "started"))
    for other, condition in table.items() if isinstance(table, dict) else ():
        if isinstance(condition, dict):
            right = f'{other} = "started" or "completed"'
            raise ValueError(f"'{other}' is a table (expected {right})")  # noqa: TRY004 - pydantic's terms
    return table


def image(value: str) -> str:
    """Read a reference, an archive of the host (`oci:/path[:REF]`), or `images.[APP/]NAME`, which is built here."""
    if (ours := images.built(value)) is not None:
        reference(ours)
        return value
    parsed = _image(value)
    return parsed.name if parsed.transport != "docker" else value.removeprefix("docker://")


def _image(value: str) -> images.Reference:
    try:
        return images.parse(value)
    except ValueError as error:
        raise ValueError(f"'{value}' is not an image reference: {error}") from None


def not_of_a_registry(image: str) -> str:
    """Say in words what an image is that no registry has; "" if a registry may have it."""
    if images.archive_path(image) is not None:
        return "an archive of the host"
    return "" if images.built(image) is None else "an image that is built here"


def tag(value: str) -> str:
    """Read one more name of an image that is built: `[REGISTRY/]PATH[:TAG]`."""
    if "@" in value or not_of_a_registry(value):
        raise ValueError(f"'{value}' is not a name for an image (expected [REGISTRY/]PATH[:TAG], in lower case)")
    _image(value)
    return value


def port(value: str) -> Parts:
    """Take apart `[HOST_IP:]HOST:CONTAINER[/PROTOCOL]`."""
    text, slash, protocol = value.partition("/")
    if ":" not in text:
        raise ValueError(f"'{value}': the host port is missing (expected [HOST_IP:]HOST:CONTAINER[/PROTOCOL])")
    *host_ip, published, target = text.rsplit(":", 2)
    parts = {"published": published, "target": target, **({"host_ip": host_ip[0]} if host_ip else {})}
    return {**parts, "protocol": protocol} if slash else parts


def volume(value: str) -> Parts:
    """Take apart `SOURCE:TARGET[:ro|rw]`."""
    match value.split(":"):
        case [source, target, *option] if source and target and option in ([], ["ro"], ["rw"]):
            return {"source": source, "target": target, "read_only": option == ["ro"]}
        case [source, target, option] if source and target:
            raise ValueError(f"'{value}': option '{option}' is not known (expected ro or rw)")
    raise ValueError(f"'{value}' is not a volume (expected SOURCE:TARGET[:ro])")


def tmpfs(value: str) -> Parts:
    """Read `TARGET[:size=…,mode=…,uid=…,gid=…,ro|rw]`, as in Compose."""
    target, _, options = value.partition(":")
    parts: Parts = {"target": absolute(target)}
    for option in filter(None, options.split(",")):
        key, _, text = option.partition("=")
        match key:
            case "size":
                parts["size"] = size(text)
            case "mode":
                parts["mode"] = mode(text)
            case "uid" | "gid" if text.isascii() and text.isdigit():
                check_id(text)
                parts[key] = int(text)
            case "ro" | "rw" if not text:
                parts["read_only"] = key == "ro"
            case _:
                raise ValueError(f"'{value}': option '{option}' is not known (expected size, mode, uid, gid, ro, rw)")
    return parts


def mode(value: Any) -> Any:
    """Read permission bits as an octal string; a bare number would be decimal."""
    if isinstance(value, str) and re.fullmatch(r"(0o?)?[0-7]{1,4}", value):
        return int(value.removeprefix("0o"), 8)
    raise ValueError(f'{shown(value)} is not a mode (expected an octal string as "0644")')


def device(value: str) -> Parts:
    """Take apart `SOURCE[:TARGET][:PERMISSIONS]`."""
    source, *rest = value.split(":")
    permissions = rest.pop() if rest and not rest[-1].startswith("/") else "rwm"
    if len(rest) > 1 or not source.startswith("/"):
        raise ValueError(f"'{value}' is not a device (expected /dev/NAME[:/dev/NAME[:rwm]])")
    return {"source": source, "target": (rest or [source])[0], "permissions": permissions}


def access(value: str) -> str:
    """Read what may be done with a device: some of r (read), w (write) and m (mknod)."""
    if not value or set(value) - set("rwm") or len(set(value)) != len(value):
        raise ValueError(f"'{value}' is not known (expected some of r, w and m)")
    return value


def stop_signal(value: Any) -> Any:
    """Read a signal's name or number."""
    return value if isinstance(value, bool) or not isinstance(value, str | int) else signals.canonical(value)


def on_change(value: str) -> str:
    """Read what to do when a mounted file changes: restart, none, or a signal's name."""
    if value in ("restart", "none"):
        return value
    try:
        return signals.canonical(value)
    except ValueError:
        raise ValueError(f"'{value}' is not known (expected 'restart', 'none' or a signal as 'SIGHUP')") from None


def restart(value: str) -> Parts:
    """Read `no | on-failure[:N] | always | unless-stopped`."""
    policy, colon, attempts = value.partition(":")
    if policy not in ("no", "on-failure", "always", "unless-stopped"):
        raise ValueError(f"'{value}' is not known (expected no, on-failure[:N], always or unless-stopped)")
    if not colon:
        return {"policy": policy}
    if policy != "on-failure" or not number(attempts) or int(attempts) < 1:
        wrong = "a number of attempts goes with on-failure only (expected on-failure:N, N from 1)"
        raise ValueError(f"'{value}': {wrong}")
    return {"policy": policy, "max_attempts": int(attempts)}


def cpuset(value: str) -> str:
    """Read a list of CPUs as in cpuset(7): `0-3,6`."""
    for part in value.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (number(first) and number(last) and int(first) <= int(last)):
            raise ValueError(f"'{value}' is not a list of CPUs (expected as 0-3,6)")
        if int(last) >= MOST_CPUS:
            raise ValueError(f"'{part}' is out of range (expected CPUs from 0 to {MOST_CPUS - 1})")
    return value


def reached(value: Any) -> Any:
    """Read what a container waits for another to have reached; Compose's words lead to ours."""
    meant = {"service_started": "started", "service_completed_successfully": "completed"}
    if value == "healthy":
        raise ValueError("'healthy' is not supported yet (expected 'started' or 'completed')")
    if isinstance(value, str) and value in meant:
        raise ValueError(f"'{value}' is not known (write '{meant[value]}')")
    return value


def both(value: Any) -> Any:
    """Read one number as both limits, soft and hard."""
    return {"soft": value, "hard": value} if isinstance(value, int) and not isinstance(value, bool) else value


def swap(value: Any) -> Any:
    """Read a size; -1 and `unlimited` are no limit."""
    return -1 if value in ("unlimited", -1) else size(value)


def pids(value: Any) -> Any:
    """Read a number of processes; -1 and `max` are no limit."""
    return -1 if value == "max" else value
