"""Edits of big revisions: reading what has changed comes to the same as reading all of it, and reads no more."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from holdfast.spec import Cache, NodeFacts, Spec, load

FACTS = NodeFacts(name="n1", vars={"x": "1"})
LINES = (
    'image = "b:2"',
    'image = "images.a0/own"',
    'command = ["/x", "[containers.c1]"]',
    "command = [\n[1],\n]",
    "command = [",
    'environment = { A = "${vars.x}", B = "${vars.none}" }',
    'ports = ["80:80"]',
    'networks = ["none"]',
    'networks = ["a1/default"]',
    'depends_on = ["c0"]',
    'depends_on = ["nobody"]',
    'volumes = ["./f:/f"]',
    'volumes_from = ["c0"]',
    'labels.a = """\n[containers.c0]\nimage = "b:9"\n"""',
    '[containers.c0.resources]\nmemory = "1MiB"',
    '[containers.c1.resources]\nmemory = "1MiB"',
    '[containers.more]\nimage = "b:1"',
    "[networks.front]",
    "# a comment",
    "nonsense",
    '[app]\nwhen = { nodes = ["other"] }',
    "\ufeff",
)


def written(app: Mapping[str, list[str]]) -> bytes:
    return "\n".join(line for name, lines in app.items() for line in (f"[containers.{name}]", *lines)).encode()


def same(one: Spec, other: Spec) -> bool:
    return one == other and [one.apps[name].digest for name in one.apps] == [
        each.digest for each in other.apps.values()
    ]


def revision() -> dict[str, dict[str, list[str]]]:
    return {
        f"a{number}.toml": {f"c{each}": ['image = "b:1"', 'restart = "always"'] for each in range(3)}
        for number in range(3)
    }


edits = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 2),
        st.sampled_from(("append", "replace", "drop", "first")),
        st.sampled_from(LINES),
        st.booleans(),
    ),
    max_size=6,
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None, phases=(Phase.generate,))
@given(edits)
def test_what_is_read_after_edits_is_what_a_whole_reading_finds(steps: list[tuple[int, int, str, str, bool]]) -> None:
    apps, cache = revision(), Cache()
    load({path: written(app) for path, app in apps.items()} | {"f": b""}, FACTS, cache=cache)
    for number, container, how, line, read_now in steps:
        lines = apps[f"a{number}.toml"][f"c{container}"]
        match how:
            case "append":
                lines.append(line)
            case "replace":
                lines[-1:] = [line]
            case "first":
                lines.insert(0, line)
            case _:
                del lines[-1:]
        if not read_now:  # then the next reading finds several edits
            continue
        files = {path: written(app) for path, app in apps.items()} | {"f": b""}
        assert same(load(files, FACTS, cache=cache), load(files, FACTS))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are read as TOML."""
    texts: list[str] = []
    loads = tomllib.loads

    def noting(text: str) -> dict[str, Any]:
        texts.append(text)
        return loads(text)

    monkeypatch.setattr(tomllib, "loads", noting)
    return texts


@pytest.mark.parametrize("count", [10, 1000])
def test_an_edit_reads_one_file_of_many(count: int, read: list[str]) -> None:
    files = {f"a{number}.toml": b'[containers.c]\nimage = "b:1"\n' for number in range(count)}
    cache = Cache()
    before = load(files, FACTS, cache=cache).apps
    read.clear()
    after = load({**files, "a3.toml": b'[containers.c]\nimage = "b:2"\n'}, FACTS, cache=cache).apps
    assert len("".join(read)) < 100
    assert [name for name in before if after[name] is not before[name]] == ["a3"]


@pytest.mark.parametrize("count", [10, 1000])
def test_an_edit_reads_one_container_of_many(count: int, read: list[str]) -> None:
    app = {f"c{number}": ['image = "b:1"'] for number in range(count)}
    cache = Cache()
    before = load({"a.toml": written(app)}, FACTS, cache=cache).apps["a"].containers
    read.clear()
    app["c3"] = ['image = "b:2"']
    after = load({"a.toml": written(app)}, FACTS, cache=cache).apps["a"].containers
    assert len("".join(read)) < 100
    assert [name for name in app if after[name] is not before[name]] == ["c3"]
    assert after["c3"].image == "b:2"


def test_several_edits_read_their_containers_only(read: list[str]) -> None:
    app = {f"c{number}": ['image = "b:1"'] for number in range(100)}
    cache = Cache()
    before = load({"a.toml": written(app)}, FACTS, cache=cache).apps["a"].containers
    read.clear()
    app |= {"c3": ['image = "b:1"', 'environment = { A = "1" }'], "c90": ['image = "b:2"', 'ports = ["81:80"]']}
    after = load({"a.toml": written(app)}, FACTS, cache=cache).apps["a"].containers
    assert len("".join(read)) < 400
    assert [name for name in app if after[name] is not before[name]] == ["c3", "c90"]
