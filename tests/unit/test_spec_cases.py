"""What state files come to, one data file per behaviour: tests/unit/spec/*.toml, named by the sentence it proves.

A file gives a revision in, and what a person reads or what the node is asked for out:

    state    the text of shop.toml, or
    files    path → text, where there are several
    drivers  "installed": those of PLUGINS are known; absent: which there are is not known
    lines    what is wrong, line by line; absent: nothing is
    broken   the state files that do not load; absent: shop.toml where something is wrong
    apps     name → what the app has at least; `files` are their contents. What loads is valid by the JSON Schema, too
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from holdfast.keys import Items, Size, Table
from holdfast.spec import NodeFacts, json_schema, load
from holdfast.spec.authored import ContainerTable
from holdfast.spec.load import is_state
from holdfast.spec.values import Absolute
from holdfast.toml import MAX_SIZE

CASES = sorted((Path(__file__).parent / "spec").glob("*.toml"))
SCHEMA = jsonschema.Draft202012Validator(json_schema())
FACTS = NodeFacts(
    "edge-1",
    labels={"region": "eu"},
    vars={"domain": "example.org"},
    env={"LANG": "C"},
    forbid=frozenset({"privileged"}),
    bind_roots=("/srv", "/opt"),
)


class Tune(Table):
    """Options within an option."""

    block: int = Field(description="bytes")


class Striped(Table):
    """Options of a volume driver."""

    size: Size | None = Field(None, description="how much it holds")
    level: int = Field(0, description="of RAID")
    fast: bool = Field(False, description="whether to be fast")
    disks: Items[Absolute] = Field((), description="what it is made of")
    tune: Tune | None = Field(None, description="how it is written")


class Nfs(Table):
    """Options of a mount driver."""

    servers: Items[str] = Field((), description="where it is")


PLUGINS: dict[str, dict[str, type[BaseModel] | None]] = {
    "volume": {"managed": None, "striped": Striped},
    "network": {"bridge": None},
    "mount": {"bind": None, "tmpfs": None, "file": None, "nfs": Nfs},
    "policy": {"limits": None},
}


def cut(found: Any, expected: Any) -> Any:
    """What was found, as far as something is expected of it."""
    match found, expected:
        case dict(), dict():
            return {key: cut(found[key], each) for key, each in expected.items() if key in found}
        case list(), list() if len(found) == len(expected):
            return [cut(one, each) for one, each in zip(found, expected, strict=True)]
    return found


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_revision_comes_to_what_its_case_says(path: Path) -> None:
    case = tomllib.loads(path.read_text())
    assert case.keys() <= {"state", "files", "drivers", "lines", "broken", "apps"}
    files = case.get("files") or {"shop.toml": case["state"]}
    facts = replace(FACTS, drivers=PLUGINS) if case.get("drivers") == "installed" else FACTS
    spec = load({path: text.encode() for path, text in files.items()}, facts)
    lines = case.get("lines", [])
    assert [str(problem) for problem in spec.problems] == lines
    assert sorted(spec.broken) == case.get("broken", ["shop.toml"] if lines else [])
    found = {name: app.model_dump(mode="json") for name, app in spec.apps.items()}
    for app in found.values():
        app["files"] = {path: spec.blobs[digest].decode() for path, digest in app["files"].items()}
    if expected := case.get("apps"):
        assert cut(found, expected) == expected
        assert found.keys() == expected.keys()
        assert [path for path, text in files.items() if is_state(path) and not valid(text)] == []
    else:
        assert lines, "a case that expects nothing proves nothing"


def valid(text: str) -> bool:
    return not list(SCHEMA.iter_errors(tomllib.loads(text)))


def test_text_that_is_not_utf_8_is_told_by_its_byte() -> None:
    spec = load({"shop.toml": b'[containers.web]\nimage = "\xff"\n'}, FACTS)
    assert [str(problem) for problem in spec.problems] == ["shop.toml:2:10: byte 0xff is not UTF-8"]


def test_an_absurdly_large_file_is_refused() -> None:
    spec = load({"shop.toml": b"#" * (MAX_SIZE + 1)}, FACTS)
    assert [str(problem) for problem in spec.problems] == [
        "shop.toml:1: 1048577 bytes are too many (expected at most 1048576)"
    ]


def test_a_deeply_nested_file_is_refused() -> None:
    spec = load({"shop.toml": b"x = " + b"[" * 100_000 + b"]" * 100_000}, FACTS)
    assert [str(problem) for problem in spec.problems] == ["shop.toml:1: is nested too deeply"]


def test_a_file_with_faults_stops_no_other() -> None:
    good = b'[containers.web]\nimage = "a"\n'
    spec = load({"bad.toml": b"x = \n", "good.toml": good, "worse.toml": b"[containers.x]\n"}, FACTS)
    assert list(spec.apps) == ["good"]
    assert spec.broken == {"bad.toml": "bad", "worse.toml": "worse"}


def test_a_broken_file_is_known_by_the_name_that_it_gives_its_app() -> None:
    assert load({"a.toml": b'image = 1\n[app]\nname = "shop"\n'}, FACTS).broken == {"a.toml": "shop"}


def test_problems_come_in_file_and_line_order() -> None:
    text = b"[networks.a]\nx = 1\n[containers.web]\ny = 1\n"
    spec = load({"b.toml": text, "a.toml": text}, FACTS)
    assert [(problem.path, problem.line) for problem in spec.problems] == [
        ("a.toml", 2),
        ("a.toml", 4),
        ("b.toml", 2),
        ("b.toml", 4),
    ]


SCRAPS = st.sampled_from(
    [
        "",
        "a",
        "web",
        "80:80",
        "/x",
        "./x",
        "../x",
        "a:b:c",
        "${",
        "${vars.domain}",
        "-1",
        "\u00e9",
        "SIGTERM+1",
        0,
        -1,
        1.5,
        True,
    ]
)
NAMES = st.sampled_from(
    ["web", "api", "", "X", "image", "source", "target", "app", "ipv4_address", "policy", "class"]
)
JUNK = st.recursive(SCRAPS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=3))
CONTAINER = st.dictionaries(st.sampled_from([*ContainerTable.model_fields, "comand"]), JUNK, max_size=4)
STATE = st.fixed_dictionaries(
    {"containers": st.dictionaries(NAMES, CONTAINER, max_size=2)},
    optional={
        name: JUNK | st.dictionaries(NAMES, JUNK, max_size=2)
        for name in ("app", "networks", "volumes", "configs", "images")
    },
)


def inline(value: object) -> str:
    match value:
        case dict():
            return "{ " + ", ".join(f"{inline(key)} = {inline(inner)}" for key, inner in value.items()) + " }"
        case list():
            return "[" + ", ".join(map(inline, value)) + "]"
        case _:
            return json.dumps(value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STATE)
def test_nothing_that_is_written_raises(state: dict[str, object]) -> None:
    text = "".join(f"{key} = {inline(value)}\n" for key, value in state.items())
    spec = load({"shop.toml": text.encode()}, FACTS)
    assert ("shop.toml" in spec.broken) == bool(spec.problems)
    assert ("shop" in spec.apps) != bool(spec.problems)
