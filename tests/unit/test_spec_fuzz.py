"""Whatever a state file holds, reading it never raises: all that is wrong is a problem with a line."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.keys import keys_of
from holdfast.spec import NodeFacts, load
from holdfast.spec.authored import ContainerTable, ImageTable, PortTable, StateFile
from holdfast.spec.model import Mount, Resources

FACTS = NodeFacts("node", vars={"a": "b"}, bind_roots=("/srv",), forbid=frozenset({"privileged"}))
BASE = b"""
[app]
name = "shop"
depends_on = ["db"]
[containers.web]
image = "nginx:1.27"
entrypoint = ["sh", "-c"]
ports = ["127.0.0.1:8000-8010:80-90/tcp", { target = 80, published = "81" }]
environment = { A = "${vars.a:-x}", B = "$$" }
volumes = ["./page:/srv/page:ro", "data:/data", { type = "tmpfs", target = "/t", size = "1MiB" }]
tmpfs = "/tmp:size=2m,mode=1777,uid=3"
restart = "on-failure:3"
stop_signal = "SIGRTMIN+3"
networks = { front = { ipv4_address = "10.9.0.7" } }
sysctls = { "net.core.somaxconn" = 5 }
ulimits = { nofile = { soft = 1, hard = 2 } }
devices = ["/dev/null:/dev/zero:rw"]
[containers.web.resources]
cpuset = "0-3,6"
memory = "64MiB"
[networks.front]
subnet = "10.9.0.0/24"
[volumes.data]
[configs.k]
content = "x"
[images.i]
context = "./i"
"""
SHAPES = "0123456789²٣-:/.,+=$\\{}[]\"' \t\n\r\x7f\ufeffaSIGMiB~%\U0001f600"
WORDS = st.one_of(
    st.text(SHAPES, max_size=12),
    st.sampled_from(["0-", "-", ":", "1-2-3", "9" * 5000, "²", "0-²", "on-failure:²", "x" * 300, "${", "/" * 300]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
SCALARS = st.one_of(
    WORDS,
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.dates(),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)


def toml(value: Any) -> str:
    """A value as TOML writes it, on one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return '"' + "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in value) + '"'
        case dict():
            return "{" + ", ".join(f"{toml(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
        case float():
            return repr(value) if "." in repr(value) or "e" in repr(value) else f"{value}.0"
        case _:
            return str(value)


def tables(kind: Any, extra: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(list(keys_of(kind))), extra, max_size=4)


CONTAINERS = tables(
    ContainerTable,
    VALUES
    | tables(Resources)
    | st.lists(tables(Mount) | WORDS, max_size=3)
    | st.lists(tables(PortTable) | WORDS, max_size=3),
)
FILES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(StateFile.model_fields, VALUES),
        "containers": st.dictionaries(st.just("web") | WORDS, CONTAINERS, max_size=2),
        "images": st.dictionaries(st.just("i"), tables(ImageTable), max_size=1),
    },
)


def read(content: bytes) -> None:
    """Read it as a state file, and as the vars of all files."""
    files = {
        "shop.toml": content,
        "vars.toml": content,
        "page": b"",
        "i/Dockerfile": content,
        "i/.dockerignore": content,
    }
    spec = load(files, FACTS)
    assert all(problem.line > 0 and problem.message.isprintable() for problem in spec.problems)


@settings(max_examples=100, deadline=None)
@given(FILES)
def test_any_values_of_known_keys_are_read_or_refused(data: dict[str, Any]) -> None:
    read("\n".join(f"{toml(key)} = {toml(value)}" for key, value in data.items()).encode())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(BASE)), st.integers(0, 8), st.binary(max_size=6) | WORDS.map(str.encode))
def test_any_damage_to_a_state_file_is_read_or_refused(at: int, cut: int, put: bytes) -> None:
    read(BASE[:at] + put + BASE[at + cut :])
