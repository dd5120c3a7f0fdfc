"""Resolve `user[:group]` and `group_add` to numbers, by the container's own passwd and group.

Docker's rules: a name must be known, a number need not be. Without a group, a known user has its group of passwd and
the groups that list it; an unknown number has group 0. The node passes a function that reads the files: for a start
those of the image, for `exec` those of the running container.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from holdfast.errors import WrongState

ReadFile = Callable[[str], bytes | None]

_LARGEST_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class User:
    """The user of a process. groups: the additional ones. home: "" if not known."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = ""


class _Account(NamedTuple):
    name: str
    uid: int
    gid: int
    home: str


class _Group(NamedTuple):
    name: str
    gid: int
    members: tuple[str, ...]


def resolve(text: str, group_add: Iterable[str], read_file: ReadFile) -> User:
    """Resolve `user`, `user:group`, `uid` or `uid:gid` ("" is root) and additional groups.

    read_file: the content of a file of the container, None if there is none. Raises WrongState for an unknown name.
    """
    name, _, group_name = text.partition(":")
    accounts = [
        _Account(name, int(uid), int(gid), home)
        for name, _, uid, gid, _, home, *_ in _records(read_file("/etc/passwd"), 6)
        if _is_number(uid) and _is_number(gid)
    ]
    groups = [
        _Group(name, int(gid), tuple(rest[0].split(",")) if rest else ())
        for name, _, gid, *rest in _records(read_file("/etc/group"), 3)
        if _is_number(gid)
    ]
    account = _account(name or "0", accounts)
    gid, extra = account.gid, {_gid(entry, groups) for entry in group_add}
    if group_name:
        gid = _gid(group_name, groups)
    elif account.name:
        extra |= {group.gid for group in groups if account.name in group.members}
    return User(account.uid, gid, tuple(sorted(extra - {gid})), account.home)


def _account(name: str, accounts: list[_Account]) -> _Account:
    if named := next((each for each in accounts if each.name == name), None):
        return named
    uid = _number("user", name, "/etc/passwd")
    unknown = _Account("", uid, 0, "/root" if uid == 0 else "/")
    return next((each for each in accounts if each.uid == uid), unknown)


def _gid(name: str, groups: list[_Group]) -> int:
    known = next((group.gid for group in groups if group.name == name), None)
    return _number("group", name, "/etc/group") if known is None else known


def _number(what: str, text: str, file: str) -> int:
    """Read a number that stands for what the file does not name."""
    if not text.isdecimal():
        raise WrongState(f"{what} '{text}': not in the container's {file} (expected a name in it, or a number)")
    if not _is_number(text) or int(text) > _LARGEST_ID:
        raise WrongState(f"{what} '{text[:40]}': number out of range (0 to {_LARGEST_ID})")
    return int(text)


def _is_number(text: str) -> bool:
    """Whether a text from the container is a number that is short enough to read."""
    return text.isdecimal() and len(text) <= len(str(_LARGEST_ID))


def _records(content: bytes | None, least: int) -> Iterator[list[str]]:
    """The records of a file like passwd(5). Other lines are skipped, as the C library does."""
    for line in (content or b"").decode(errors="replace").splitlines():
        fields = line.strip().split(":")
        if len(fields) >= least and not line.startswith("#"):
            yield fields
