"""The JSON Schema of state files: it has every key, and takes and refuses what the language does."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from holdfast.keys import Table, keys_of
from holdfast.spec import Container, NodeFacts, json_schema, load
from holdfast.spec.authored import ContainerTable

FACTS = NodeFacts("edge-1", labels={"region": "eu"}, vars={"domain": "example.org"}, env={"HOME": "/root"})


def valid(text: str) -> bool:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return not list(validator.iter_errors(tomllib.loads(text)))


EXAMPLES = Path(__file__).parents[2] / "examples/state"


SCHEMA = json_schema()


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_example_loads_and_is_valid() -> None:
    found = sorted(EXAMPLES.rglob("*.toml"))
    assert found
    assert all(valid(path.read_text()) for path in found if path.name != "vars.toml")
    files = {str(path.relative_to(EXAMPLES)): path.read_bytes() for path in EXAMPLES.rglob("*") if path.is_file()}
    assert load(files, FACTS).problems == ()


@pytest.mark.parametrize(
    "more",
    [
        "comand = 'x'",
        "healthcheck = {}",
        "ports = [true]",
        "read_only = 'yes'",
        "[containers.web.resources]\ncpus = 'x'",
    ],
)
def test_the_schema_refuses_what_the_language_refuses(more: str) -> None:
    assert not valid(f'[containers.web]\nimage = "a"\n{more}\n')


def tables_of(kind: type[Table]) -> set[str]:
    return set(keys_of(kind))


def every_table(kind: type[Table]) -> Iterator[type[Table]]:
    for each in kind.__subclasses__():
        yield each
        yield from every_table(each)


def test_every_key_of_every_table_is_in_the_schema() -> None:
    schemas: dict[str, Any] = {**SCHEMA["$defs"], "StateFile": SCHEMA}
    found = {name: set(schema["properties"]) for name, schema in schemas.items() if "properties" in schema}
    tables = {kind.__name__: kind for kind in every_table(Table)}
    assert found == {name: tables_of(tables[name]) for name in found}
    assert {"ContainerTable", "Mount", "Resources", "RestartTable", "ImageTable", "Volume"} <= found.keys()
    assert all(schema["additionalProperties"] is False for schema in schemas.values() if "properties" in schema)


def test_every_field_of_a_container_can_be_written() -> None:
    named_otherwise = {"mounts": {"volumes", "tmpfs", "configs"}, "restart_policy": {"restart", "restart_policy"}}
    written = set().union(*(named_otherwise.get(name, {name}) for name in Container.model_fields))
    assert written == tables_of(ContainerTable)
