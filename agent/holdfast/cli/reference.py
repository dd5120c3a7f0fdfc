"""The tables of state files and of agent.toml → a reference of every key in Markdown, docs/reference.md.

Called by `holdfast schema --markdown`. What it says is taken from the models that check the files, so it can't differ
from them; `tests/unit/test_reference.py` fails where the committed text does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import core_schema

from holdfast.config import AgentTable
from holdfast.grammar.quantities import size_text
from holdfast.keys import Table
from holdfast.spec.authored import StateFile
from holdfast.spec.schema import AsWritten

Schema = Mapping[str, Any]

INTRODUCTION = """\
# Reference

Every key of state files and of agent.toml. Made from the program itself by `holdfast schema --markdown`; do not edit.
The [README](../README.md) explains how they are used. Keys that are not here are errors.

| value | written as |
|---|---|
| text | a string in quotes. In tables such as `environment` and `labels`, `8080` and `true` are texts, too |
| size | text with a unit: `"64MiB"`, `"64m"` (1024-based), `"64MB"` (1000-based); a whole number is bytes |
| duration | text with a unit of `ms`, `s`, `m`, `h`, `d`: `"100ms"`, `"1m30s"`, at most `"3650d"`; or `"0"` |
| name | `a-z`, `0-9`, `_`, `.`, `-`, at most 63 characters, the first a letter or digit |
| `NAME = …` | a table whose keys are names of your own |

Texts of state files may have `${node.name}`, `${node.labels.NAME}`, `${vars.NAME}` and `${env.NAME}` in them, with
`${vars.NAME:-default}` for what may be missing; `$$` is a dollar sign.
"""


def reference() -> str:
    """The whole document."""
    state = _document("State files", "One file is one app: `NAME.toml`.", StateFile)
    settings = _document("agent.toml", "The agent's settings, `/etc/holdfast/agent.toml`.", AgentTable)
    return "\n".join([INTRODUCTION, *state, *settings])


class _WithDefaults(AsWritten):
    """The schema of what is written, with all defaults: sizes in bytes, durations in seconds."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> dict[str, Any]:
        inner = self.generate_inner(schema["schema"])
        return {**inner, "default": self.encode_default(schema.get("default"))}


def _document(title: str, about: str, table: type[Table]) -> Iterator[str]:
    whole = table.model_json_schema(schema_generator=_WithDefaults)
    yield f"## {title}\n\n{about}\n"
    yield from _section("", whole, whole.get("$defs", {}))


def _section(path: str, table: Schema, tables: Mapping[str, Schema]) -> Iterator[str]:
    """The keys of one table, then the tables in it, each under its path."""
    required = table.get("required", ())
    if path:
        yield f"### `{path}`\n\n{table['description']}\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    inner: list[tuple[str, Schema]] = []
    for key, value in table["properties"].items():
        found = [(_path(path, key, steps), tables[name]) for name, steps in _tables_in(value)]
        inner += found
        kind = "; or ".join(_forms(value))
        links = "".join(f", see [`{place}`](#{_anchor(place)})" for place, _ in found)
        default = "required" if key in required else _default(value)
        cells = [f"`{key}`", kind + links + _example(value), default, value.get("description", "")]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for place, each in inner:
        yield from _section(place, each, tables)


def _path(path: str, key: str, steps: str) -> str:
    """The header of a table in TOML: `[containers.NAME.resources]`, `[[containers.NAME.ports]]` for one in a list."""
    whole = f"{path.strip('[]')}.{key}{steps.removesuffix('[]')}".removeprefix(".")
    return f"[[{whole}]]" if steps.endswith("[]") else f"[{whole}]"


def _anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")


def _members(value: Schema) -> Iterator[Schema]:
    """The forms that a value may have."""
    if "anyOf" in value:
        for each in value["anyOf"]:
            yield from _members(each)
    else:
        yield value


def _tables_in(value: Schema, steps: str = "") -> Iterator[tuple[str, str]]:
    """The tables that a value is made of, each with how it is got at: `.NAME` in a table, `[]` in a list."""
    for each in _members(value):
        if "$ref" in each:
            yield each["$ref"].rpartition("/")[2], steps
        if "items" in each:
            yield from _tables_in(each["items"], f"{steps}[]")
        for item in _items(each):
            yield from _tables_in(item, f"{steps}.NAME")


def _items(table: Schema) -> list[Schema]:
    """What the keys of a table with free keys hold."""
    found = [table.get("additionalProperties"), *table.get("patternProperties", {}).values()]
    return [each for each in found if isinstance(each, Mapping)]


def _one_of(values: Sequence[Schema]) -> str:
    return " or ".join(_forms({"anyOf": values}))


def _forms(value: Schema) -> list[str]:
    """Each form of a value in words, once; a size may be a number of bytes, as the introduction says."""
    found: dict[str, None] = {}
    for each in _members(value):
        # The description of the whole value is its meaning; that of one of several forms is how it is written.
        form = f" ({each['description']})" if each is not value and "description" in each else ""
        found[each["title"] if "title" in each else _kind(each) + form] = None
    return ["size"] if "size" in found else list(found)


def _kind(value: Schema) -> str:
    match value:
        case {"const": constant}:
            return f"`{json.dumps(constant)}`"
        case {"enum": words}:
            return ("one of " if len(words) > 1 else "") + ", ".join(f"`{json.dumps(word)}`" for word in words)
        case {"$ref": _}:
            return "table"
        case {"type": "array", "items": items}:
            return f"list, each {_one_of([items])}"
        case {"type": "object"}:
            return f"`NAME = …`, each {_one_of(_items(value))}"
        case {"type": kind}:
            return _WORDS[kind] + "".join(text.format(value[key]) for key, text in _BOUNDS.items() if key in value)
    raise AssertionError(f"no words for {value}")


_WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`"}


_BOUNDS = {"minimum": " from {}", "exclusiveMinimum": " above {:g}", "maximum": " to {}"}


def _example(value: Schema) -> str:
    """An example, where the value has a format of its own."""
    parts = [part for each in _members(value) for part in (each, *_members(each.get("items", {})))]
    for shown in (*parts, value):
        if "examples" in shown and shown.get("title") not in ("size", "duration"):
            return f", as `{json.dumps(shown['examples'][0])}`"
    return ""


def _default(value: Schema) -> str:
    default = value.get("default")
    titles = {each.get("title") for each in _members(value)}
    match default:
        case None | "" | [] | {}:
            return ""
        case int() | float() if "duration" in titles:
            default = f"{default:g}s" if default >= 1 else f"{default * 1000:g}ms"
        case int() if "size" in titles:
            default = size_text(default)
        case float():
            return f"`{default:g}`"
    return f"`{json.dumps(default)}`"
