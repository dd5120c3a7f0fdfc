"""What an edit of one container leaves as it was, so that only that container's table is read again.

Two steps, and each gives up (None) as soon as anything else than one container's table may have changed: then the
whole is read. `load` calls them; `tests/unit/test_spec_edits.py` holds their results against those of a whole load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from holdfast.grammar.images import built
from holdfast.spec.model import App, Container
from holdfast.spec.resolve import Draft
from holdfast.toml import Document, Unreadable

_HEADER = re.compile(r"\[containers\.([A-Za-z0-9_-]+)\][ \t]*(?:#[^\n]*)?\n")
_LONG_STRINGS = ('"""', "'''")

Read = Callable[[Document, dict[str, Any]], Draft | None]  # document, the data to make a draft of


def edited_draft(before: Draft, raw: bytes, read: Read) -> Draft | None:
    """The draft of a state file in which the table of one container has changed since before.

    read: makes a draft of some of a document's data; None where anything is wrong with it.
    """
    found = _changed_table(before.document, raw)
    if found is None:
        return None
    name, table, text = found
    containers = before.document.data["containers"]
    document = Document.of(text, {**before.document.data, "containers": {**containers, name: table}})
    part = read(document, {**document.data, "containers": {name: table}})
    app = before.app
    if part is None or any(each.volumes_from for each in app.containers.values()):
        return None
    own = part.app.containers[name]
    if own.volumes_from or own.networks != app.containers[name].networks:
        return None
    elsewhere = {path: wanted for path, wanted in before.wanted.items() if path[:2] != ("containers", name)}
    fields = {key: getattr(app, key) for key in App.model_fields}
    made = App.model_construct(**{**fields, "containers": {**app.containers, name: own}})
    return replace(before, app=made, document=document, wanted=elsewhere | dict(part.wanted))


def looks_alike(before: Draft, after: Draft) -> bool:
    """Whether two drafts of a file differ in nothing that the rest of the revision sees, or is asked for."""
    one, other = before.app, after.app
    if (before.when, before.wanted, before.inline) != (after.when, after.wanted, after.inline):
        return False
    if any(getattr(one, key) != getattr(other, key) for key in App.model_fields if key != "containers"):
        return False
    return one.containers.keys() == other.containers.keys() and all(
        each is other.containers[name] or _outside(each) == _outside(other.containers[name])
        for name, each in one.containers.items()
    )


def _outside(container: Container) -> tuple[object, ...]:
    """What of a container concerns others: what it joins, publishes, mounts, waits for and is built from."""
    mounts = [mount for mount in container.mounts if mount.kind in ("volume", "file")]
    image = container.image if built(container.image or "") else None
    return container.networks, container.ports, mounts, container.depends_on, container.volumes_from, image


def _changed_table(before: Document, raw: bytes) -> tuple[str, Mapping[str, Any], str] | None:
    """The container whose table alone has changed, its new table, and the whole new text.

    A line `[containers.NAME]` begins a table wherever it stands, unless in a string of several lines; such files are
    read as a whole. What lies between it and the next table must be all that the file says of the container.
    """
    try:
        old, new = before.text, raw.decode()
    except UnicodeDecodeError:
        return None
    if any(mark in text for mark in _LONG_STRINGS for text in (old, new)):
        return None
    same = _common(len(old), len(new), lambda length: old[:length] == new[:length])
    left = _common(
        len(old) - same, len(new) - same, lambda length: old[len(old) - length :] == new[len(new) - length :]
    )
    begin = _first_header(old, same)
    header = _HEADER.match(old, begin) if begin >= 0 else None
    if header is None or header.end() > same:
        return None
    name = header[1]
    end = _next_table(old, max(len(old) - left, header.end()), name)
    tail = len(old) - end
    try:
        then, now = (Document(text[begin : len(text) - tail].encode()).data for text in (old, new))
    except Unreadable:
        return None
    if then != {"containers": {name: before.data["containers"].get(name)}} or now.keys() != {"containers"}:
        return None
    containers = now["containers"]
    return (name, containers[name], new) if containers.keys() == {name} else None


def _common(one: int, other: int, alike: Callable[[int], bool]) -> int:
    """The greatest length up to which two texts are alike."""
    low, high = 0, min(one, other)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if alike(middle) else (low, middle - 1)
    return low


def _first_header(text: str, at: int) -> int:
    """Where the table of the container begins that a place of the text belongs to; -1 if there is none."""
    while True:
        begin = 0 if text.startswith("[containers.") and text.find("\n[", 0, at) < 0 else text.rfind("\n[", 0, at) + 1
        if not text.startswith("[containers.", begin):
            return -1
        if _HEADER.match(text, begin):
            return begin
        at = begin - 1  # a table within it, as [containers.NAME.resources]
        if at <= 0:
            return -1


def _next_table(text: str, at: int, name: str) -> int:
    """Where the next table begins that is not within a container's."""
    end = text.find("\n[", max(at - 1, 0))
    while end >= 0 and text.startswith(f"[containers.{name}.", end + 1):
        end = text.find("\n[", end + 1)
    return len(text) if end < 0 else end + 1
