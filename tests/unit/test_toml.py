"""TOML text → the line of every key path."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.toml import Document, KeyPath, Unreadable, dotted
from holdfast.words import suggestion

TEXT = '''\
top = 1
[a.b]  # comment with [brackets] and "quotes"
plain = "x"
many.dots.deep = true
"quoted.key" = 'lit'
list = [
  1,            # one
  "two ]",
  [3,
   4],
]
inline = { x = 1, y = { z = [5, 6] } }
text = """
[not.a.table]
nor = "a key" \\""" still
"""
raw = \'\'\'
x = [\'\'\'
after = 1979-05-27 07:32:00

[[things]]
name = "first"
[things.inner]
k = 1

[[things]]
[[things.more]]
n = 1
[[things.more]]
n = 2
'''

LINES = {
    ("top",): 1,
    ("a",): 2,
    ("a", "b"): 2,
    ("a", "b", "plain"): 3,
    ("a", "b", "many"): 4,
    ("a", "b", "many", "dots", "deep"): 4,
    ("a", "b", "quoted.key"): 5,
    ("a", "b", "list"): 6,
    ("a", "b", "list", 0): 7,
    ("a", "b", "list", 1): 8,
    ("a", "b", "list", 2): 9,
    ("a", "b", "list", 2, 1): 10,
    ("a", "b", "inline", "y", "z", 1): 12,
    ("a", "b", "text"): 13,
    ("a", "b", "raw"): 17,
    ("a", "b", "after"): 19,
    ("things",): 21,
    ("things", 0, "name"): 22,
    ("things", 0, "inner", "k"): 24,
    ("things", 1): 26,
    ("things", 1, "more", 0, "n"): 28,
    ("things", 1, "more", 1, "n"): 30,
}


@pytest.mark.parametrize(("path", "line"), LINES.items(), ids=[dotted(path) for path in LINES])
def test_every_kind_of_key_path_has_its_line(path: KeyPath, line: int) -> None:
    assert Document(TEXT.encode()).line(path) == line


def test_lines_are_the_same_with_carriage_returns() -> None:
    document = Document(TEXT.replace("\n", "\r\n").encode())
    assert {path: document.line(path) for path in LINES} == LINES


def test_what_is_missing_has_the_line_of_the_table_that_it_is_missing_from() -> None:
    document = Document(TEXT.encode())
    assert document.line(("a", "b", "absent", "deeper")) == 2
    assert document.line(("absent",)) == 1


def test_a_name_under_a_list_of_names_becomes_its_index() -> None:
    document = Document(b'networks = [\n  "a",\n  "b",\n]\n')
    assert document.written(("networks", "b", "x")) == ("networks", 1)
    assert document.line(("networks", "b", "x")) == 3
    assert document.written(("networks", "c")) == ("networks",)


def test_a_key_path_is_written_as_toml_has_it() -> None:
    assert dotted(("a", "b c", 0, "d")) == 'a."b c"[0].d'


def test_a_suggestion_is_near_or_nothing() -> None:
    assert suggestion("comand", ["command", "image"]) == " (did you mean 'command'?)"
    assert suggestion("frobnicate", ["command", "image"]) == ""


def test_an_error_at_the_end_has_the_last_line() -> None:
    with pytest.raises(Unreadable) as caught:
        Document(b"a = 1\nb = [\n")
    assert (caught.value.line, str(caught.value)) == (3, "invalid value")


KEYS = st.sampled_from(["a", "b-c", "0", "x y", "é", 'q"u', "d.e", ""])
SCALARS = st.one_of(
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text("a#[]{}\"'=\n\\é", max_size=5),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


def quoted(text: str) -> str:
    return '"' + "".join(f"\\U{ord(character):08x}" for character in text) + '"'


def written(value: object, path: KeyPath, lines: dict[KeyPath, int], text: list[str]) -> None:
    """Write a value over as many lines as TOML allows, and note where each part begins."""
    lines[path] = "".join(text).count("\n") + 1
    match value:
        case bool():
            text.append(str(value).lower())
        case str():
            text.append(quoted(value))
        case list():
            text.append("[ # ]\n")
            for index, inner in enumerate(value):
                written(inner, (*path, index), lines, text)
                text.append(" , # [\n")
            text.append("]")
        case dict():
            text.append("{ ")
            for index, (key, inner) in enumerate(value.items()):
                text.append(", " * bool(index) + f"{quoted(key)} = ")
                written(inner, (*path, key), lines, text)
            text.append(" }")
        case _:
            text.append(repr(value))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=4), max_size=4))
def test_places_are_found_in_any_document(tables: dict[str, dict[str, object]]) -> None:
    text: list[str] = ["# top\n"]
    lines: dict[KeyPath, int] = {}
    for name, table in tables.items():
        lines[(name,)] = "".join(text).count("\n") + 1
        text.append(f"[ {quoted(name)} ] # [x]\n")
        for key, value in table.items():
            text.append(f"  {quoted(key)}\t= ")
            written(value, (name, key), lines, text)
            text.append(" # a = 1\n\n")
    document = Document("".join(text).encode())
    assert document.data == tables
    assert {path: document.line(path) for path in lines} == lines
