"""JSON merge patches (RFC 7396) that plugins make for a container's config.json, and what such a patch may not do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from holdfast.observed import Json


def merge_patch(target: Any, patch: Any) -> Any:
    """Apply a merge patch: tables merge, None deletes, all else replaces. Neither is changed."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def unfit_patch(config: Json, patch: Any) -> str:
    """Say why a patch can't be merged into a config.json, "" if it can."""
    if patch is None:
        return ""
    if not isinstance(patch, Mapping):
        return f"returned {type(patch).__name__} (expected a table or None)"
    try:
        json.dumps(patch)
    except (TypeError, ValueError) as error:
        return f"returned what is not JSON-able: {error}"
    adjusted = merge_patch(config, patch)
    for path, form, fits in FORMS:
        found = _at(adjusted, path)
        if found != _at(config, path) and not fits(found):
            return f"makes {'.'.join(path)} {found!r} (expected {form})"
    for path in OURS:
        if _at(adjusted, path) != _at(config, path):
            return f"changes {'.'.join(path)}, by which the agent finds the container (leave it as it is)"
    return ""


def _at(config: Any, path: Sequence[str]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, Mapping) for each in value)


def _table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _table_or_none(value: Any) -> bool:
    return value is None or _table(value)


#: What a patch may make of the keys that no container runs without (config.md of the OCI runtime spec).
FORMS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("process",), "a table", _table),
    (("process", "args"), "a list of texts that is not empty", lambda value: bool(value) and _texts(value)),
    (("process", "env"), "a list of texts", _texts),
    (("process", "cwd"), "an absolute path", lambda value: isinstance(value, str) and value.startswith("/")),
    (("root",), "a table", _table),
    (("mounts",), "a list of tables", _tables),
    (("hooks",), "a table", _table_or_none),
    (("annotations",), "a table", _table_or_none),
    (("linux",), "a table", _table),
    (("linux", "namespaces"), "a list of tables", _tables),
    (("linux", "resources"), "a table", _table_or_none),
)
OURS = (("linux", "cgroupsPath"), ("process", "terminal"), ("root", "path"))
