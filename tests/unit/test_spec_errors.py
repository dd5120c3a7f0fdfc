"""What is wrong with state files → the lines that a person reads; the cases are in spec_cases.toml."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.spec import NodeFacts, load
from holdfast.spec.authored import ContainerTable
from holdfast.toml import MAX_SIZE

CASES: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("spec_cases.toml").read_text())["case"]
FACTS = NodeFacts(
    "edge-1", vars={"domain": "example.org"}, forbid=frozenset({"privileged"}), bind_roots=("/srv", "/opt")
)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_what_is_wrong_is_said_line_by_line(case: dict[str, Any]) -> None:
    files = case.get("files") or {"shop.toml": case["state"]}
    spec = load({path: text.encode() for path, text in files.items()}, FACTS)
    assert [str(problem) for problem in spec.problems] == case["lines"]
    assert sorted(spec.broken) == case.get("broken", ["shop.toml"])


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
