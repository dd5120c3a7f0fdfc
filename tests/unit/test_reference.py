"""docs/reference.md is what the models say, and says something about every key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli.reference import reference
from holdfast.config import AgentTable
from holdfast.keys import Table
from holdfast.spec import json_schema
from holdfast.spec.authored import StateFile
from holdfast.tables import read_table
from holdfast.toml import Document

DOCUMENT = Path(__file__).parents[2] / "docs/reference.md"


def properties() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every key of every table: (table, key, schema)."""
    for whole in (json_schema(), AgentTable.model_json_schema()):
        for name, table in ((whole["title"], whole), *whole["$defs"].items()):
            yield from ((name, key, value) for key, value in table["properties"].items())


def tables() -> str:
    """The reference without its introduction."""
    return reference().partition("## State files")[2]


def test_the_committed_reference_is_what_the_models_say() -> None:
    wrong = "out of date: holdfast schema --markdown > docs/reference.md"
    assert DOCUMENT.read_text() == reference(), wrong


def test_every_key_says_what_it_means() -> None:
    assert [f"{table}.{key}" for table, key, value in properties() if not value.get("description")] == []


def test_every_key_of_every_table_has_a_line() -> None:
    rows = [re.split(r"(?<!\\)\|", line) for line in tables().splitlines() if line.startswith("| `")]
    assert all(len(cells) == 6 for cells in rows)
    named = {cells[1].strip(" `") for cells in rows}
    assert {key for _, key, _ in properties()} - named == set()


def test_links_lead_to_headings() -> None:
    text = reference()
    headings = {re.sub(r"[^\w -]", "", each).lower() for each in re.findall(r"^### (.*)", text, re.MULTILINE)}
    assert {*re.findall(r"\]\(#(.*?)\)", text)} <= headings


@pytest.mark.parametrize("kind", [StateFile, AgentTable])
def test_defaults_are_written_as_the_files_take_them(kind: type[Table]) -> None:
    title = {StateFile: "## State files", AgentTable: "## agent.toml"}[kind]
    part = reference().partition(title)[2].partition("\n## ")[0]
    lines: list[str] = []
    for header, body in re.findall(r"^(?:### `(.*?)`)?\n(.*?)(?=^### |\Z)", part, re.MULTILINE | re.DOTALL):
        rows = re.findall(r"^\| `(\w+)` \|.*\| `([^`|]+)` \| [^|]*\|$", body, re.MULTILINE)
        if rows and "| required |" not in body and header != "[state]":  # which needs git beside it
            lines += [header, *(f"{key} = {value}" for key, value in rows)]
    table, faults = read_table(kind, Document("\n".join(lines).replace("NAME", "some").encode()).data)
    assert faults == []
    assert table is not None
    assert len(lines) > 15
