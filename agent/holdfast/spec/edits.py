"""What an edit of containers leaves as it was, so that only the tables of these containers are read again.

Two steps, and each gives up (None) as soon as anything else may have changed: then the whole is read. `load` calls
them; `tests/unit/test_spec_edits.py` holds their results against those of a whole load.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from holdfast.grammar.images import built
from holdfast.spec.model import App, Container
from holdfast.spec.resolve import Draft
from holdfast.toml import MAX_SIZE, Document, Unreadable

_TABLE = re.compile(r"^(?=\[)", re.MULTILINE)
_HEADER = re.compile(r"\[containers\.([A-Za-z0-9_-]+)[^\[\]\n\"']*\]")
_LONG_STRINGS = ('"""', "'''")

Read = Callable[[Document, dict[str, Any]], Draft | None]  # document, the data to make a draft of


def edited_draft(before: Draft, raw: bytes, read: Read) -> Draft | None:
    """The draft of a state file in which only tables of containers have changed since before.

    read: makes a draft of some of a document's data; None where anything is wrong with it.
    """
    tables = _changed_tables(before.document, raw)
    if tables is None:
        return None
    data = before.document.data
    document = Document.of(raw.decode(), {**data, "containers": {**data["containers"], **tables}})
    part = read(document, {**data, "containers": tables})
    app = before.app
    if part is None or any(each.volumes_from for each in app.containers.values()):
        return None
    edited = part.app.containers
    if any(each.volumes_from or each.networks != app.containers[name].networks for name, each in edited.items()):
        return None
    elsewhere = {
        path: file for path, file in before.wanted.items() if path[0] != "containers" or path[1] not in tables
    }
    fields = {key: getattr(app, key) for key in App.model_fields}
    made = App.model_construct(**{**fields, "containers": {**app.containers, **edited}})
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


def _changed_tables(before: Document, raw: bytes) -> dict[str, Any] | None:
    """The new data of the containers whose tables alone have changed.

    Each table must be readable by itself, before and after: then it is all that the file says of its container, and
    no string or list of several lines reaches into another table.
    """
    try:
        old, new = before.text, raw.decode()
    except UnicodeDecodeError:
        return None
    if len(raw) > MAX_SIZE or any(mark in text for mark in _LONG_STRINGS for text in (old, new)):
        return None
    (order, then), (new_order, now) = _texts(old), _texts(new)
    if order != new_order or then[""] != now[""]:
        return None
    tables: dict[str, Any] = {}
    for name in (name for name, text in now.items() if then[name] != text):
        try:
            known, found = (Document(texts[name].encode()).data.get("containers") for texts in (then, now))
        except Unreadable:
            return None
        if known != {name: before.data["containers"].get(name)} or found is None or found.keys() != {name}:
            return None
        tables |= found
    return tables


def _texts(text: str) -> tuple[list[str], dict[str, str]]:
    """The containers in the order of a file's tables, and the text of each; "" has what belongs to none."""
    parts = [(header[1] if (header := _HEADER.match(part)) else "", part) for part in _TABLE.split(text)]
    found: dict[str, list[str]] = {"": []}
    for name, part in parts:
        found.setdefault(name, []).append(part)
    return [name for name, _ in parts], {name: "".join(texts) for name, texts in found.items()}
