"""Describe a command in a running container as `process` of the OCI runtime spec, as `docker exec` does. Pure.

It imports little, because `holdfast exec` waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.runtime.users import User

if TYPE_CHECKING:
    from holdfast.observed import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecWant:
    """The command. user: "" is the first process's. environment: in addition to the first process's."""

    argv: Sequence[str]
    user: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    tty: bool = False


def exec_process(first: Json, want: ExecWant, user: User | None, *, home_is_set: bool) -> dict[str, Any]:
    """Describe the process of a command. first: the container's first process, whose limits and confinement it has.

    user: None is the first process's. home_is_set: the image or the state file sets HOME, for every user.
    """
    environment = dict(entry.partition("=")[::2] for entry in first["env"])
    changed: dict[str, Any] = {"args": list(want.argv), "terminal": want.tty}
    if user is not None:
        changed["user"] = {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)}
        if user.home and not home_is_set:
            environment["HOME"] = user.home
    if want.tty:
        environment.setdefault("TERM", "xterm")
    environment |= want.environment
    changed["env"] = [f"{name}={value}" for name, value in environment.items()]
    if want.workdir:
        changed["cwd"] = want.workdir
    return {**first, **changed}


def user_of(process: Json) -> User:
    """The user of a process."""
    found = process["user"]
    return User(found["uid"], found["gid"], tuple(found.get("additionalGids") or ()))


def path_of(process: Json) -> str:
    """The PATH of a process."""
    environment: dict[str, str] = dict(entry.partition("=")[::2] for entry in process["env"])
    return environment.get("PATH", "")
