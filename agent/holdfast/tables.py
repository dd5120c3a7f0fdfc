"""What every table of TOML that we read has in common: strict types, short forms, units, and errors in plain words.

A `Table` is a pydantic model of what a person may write. `read_table` runs one over data and says everything that is
wrong with it, each with its key path. Called by `spec` and `config`, which own the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from holdfast.grammar import quantities
from holdfast.toml import KeyPath, suggestion

JsonSchema = dict[str, Any]
T = TypeVar("T", bound="Table")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong at a key path."""

    path: KeyPath
    message: str


class Contradiction(ValueError):
    """Fields of one table that don't go together: what `Table.conflicts` found, key by key."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__(found)
        self.found = found


class Table(BaseModel):
    """A table as it is written: strict types, unknown keys refused.

    not_yet: keys that later work brings, which are refused as such. hints: words of neighbouring languages → what
    to write here.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=False)

    not_yet: ClassVar[tuple[str, ...]] = ()
    hints: ClassVar[Mapping[str, str]] = {}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Which fields contradict each other: (key, message) pairs; ("", message) speaks of the whole table."""
        yield from ()

    @model_validator(mode="after")
    def _agree(self) -> Table:
        found = list(self.conflicts())
        if found:
            raise Contradiction(found)
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Short:
    """Marks a field that also takes a shorter form: `read` turns that into the long one and leaves others alone.

    read raises ValueError with a message for people. schema: the JSON Schemas of the short forms.
    """

    read: Callable[[Any], Any]
    schema: tuple[JsonSchema, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        return {"anyOf": [*self.schema, handler(schema)]}


@dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """Marks a field whose value `check` reads once its type is right; it returns the canonical value or raises."""

    check: Callable[[Any], Any]
    schema: JsonSchema

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        return {**handler(schema), **self.schema}


def read_table(kind: type[T], data: Mapping[str, Any], known: Iterable[Fault] = ()) -> tuple[T | None, list[Fault]]:
    """The data as a table, and everything that is wrong with it, the known faults first.

    With faults, the table is of what is left when the faulty parts are cut out, so that what stands beside them can
    still be checked; None if nothing usable is left.
    """
    faults = list(known)
    rest = Remainder(data)
    rest.cut(faults)
    for _ in range(_ROUNDS):
        try:
            return kind.model_validate(rest.data), faults
        except ValidationError as error:
            details = error.errors(include_url=False)
        if len(details) > MOST_FAULTS:  # cutting out so many would take longer than anybody waits
            few = [fault for detail in details[: MOST_FAULTS - 1] for fault in _faults(kind, dict(detail))]
            return None, [
                *faults,
                *few,
                Fault((), f"{len(details) - MOST_FAULTS + 1} more problems (mend these first)"),
            ]
        found = [fault for detail in details for fault in _faults(kind, dict(detail))]
        faults.extend(fault for fault in found if not rest.tore(fault.path))
        rest.cut(found)
    return None, faults


MOST_FAULTS = 200  # in one document; nobody reads more
_ROUNDS = 5  # types, contradictions within tables, and those that cutting them out brings to light


class Remainder:
    """Data without its faulty parts."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data: Any = data
        self.torn: set[KeyPath] = set()

    def tore(self, path: KeyPath) -> bool:
        """Whether a fault may come of the cutting: its table lost another key."""
        return path in self.torn or path[:-1] in self.torn

    def cut(self, faults: Iterable[Fault]) -> None:
        gone: set[KeyPath] = set()  # with one of several faults of a key, or of a table, the others are cut out too
        for fault in faults:
            steps = [*takewhile(lambda step: isinstance(step, str), fault.path)]
            if any(tuple(steps[:length]) in gone for length in range(1, len(steps) + 1)):
                continue
            gone.add(tuple(steps))
            if steps[:-1] and steps[-1] not in self._table(steps[:-1]):
                gone.add(tuple(steps[:-1]))
            self.data = self._without(self.data, steps, ())

    def _table(self, steps: list[Any]) -> Any:
        """What the data has at these steps; nothing where they lead nowhere."""
        table = self.data
        for step in steps:
            table = table.get(step) if isinstance(table, dict) else None
        return table if isinstance(table, dict) else ()

    def _without(self, table: Any, steps: list[Any], at: KeyPath) -> Any:
        """table without what steps lead to: the key, or what it is missing from; the original stays as it is."""
        inner = table.get(steps[0]) if steps else None
        if len(steps) > 1 and isinstance(inner, dict) and steps[1] in inner:
            return {**table, steps[0]: self._without(inner, steps[1:], (*at, steps[0]))}
        self.torn.add(at)
        return {key: value for key, value in table.items() if key not in steps[:1]}


def _faults(table: type[Table], detail: dict[str, Any]) -> Iterator[Fault]:
    path: KeyPath = tuple(step for step in detail["loc"] if step != "[key]")
    match detail["type"], detail.get("ctx", {}).get("error"):
        case "value_error", Contradiction() as several:
            yield from (Fault((*path, *filter(None, [key])), message) for key, message in several.found)
        case "value_error", error:
            yield Fault(path, str(error))
        case "extra_forbidden", _:
            yield Fault(path, _unknown_key(_table_at(table, path[:-1]), str(path[-1])))
        case kind, _:
            yield Fault(path, _plain(kind, detail))


def _unknown_key(table: type[Table] | None, key: str) -> str:
    if table is None:
        return f"unknown key '{key}'"
    if key in table.not_yet:
        return "not supported yet (leave it out)"
    if key in table.hints:
        return f"unknown key '{key}' (write {table.hints[key]})"
    known = [field.alias or name for name, field in table.model_fields.items()]
    few = (
        f" (expected one of {', '.join(known)})" if len(known) <= 12 else " ('holdfast schema' lists the known ones)"
    )
    return f"unknown key '{key}'" + (suggestion(key, known) or few)


def _table_at(kind: Any, path: KeyPath) -> type[Table] | None:
    """The table that stands at a key path below a type."""
    for step in path:
        table = _table_in(kind)
        if table is not None:
            fields = {field.alias or name: field.annotation for name, field in table.model_fields.items()}
            kind = fields.get(str(step))
        else:
            kind = _item_of(kind)
    return _table_in(kind)


def _table_in(kind: Any) -> type[Table] | None:
    """The table that a type is, seen through Annotated and Optional."""
    if isinstance(kind, type) and get_origin(kind) is None:
        return kind if issubclass(kind, Table) else None
    if get_origin(kind) in (list, dict, Literal):
        return None
    return next((found for part in get_args(kind) if (found := _table_in(part))), None)


def _item_of(kind: Any) -> Any:
    """What a list or dict type, seen through Annotated and Optional, holds."""
    if get_origin(kind) in (list, dict):
        return get_args(kind)[-1]
    return next((item for part in get_args(kind) if (item := _item_of(part)) is not None), None)


_EXPECTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}


def _plain(kind: str, detail: Mapping[str, Any]) -> str:
    """pydantic's finding in our words."""
    context = detail.get("ctx", {})
    match kind:
        case "missing":
            return "is missing"
        case "literal_error":
            return f"{shown(detail['input'])} is not known (expected {context['expected']})"
        case "greater_than_equal":
            return f"{_number(detail['input'])} is too small (expected at least {_number(context['ge'])})"
        case "greater_than":
            return f"{_number(detail['input'])} is too small (expected more than {_number(context['gt'])})"
        case "less_than_equal":
            return f"{_number(detail['input'])} is too large (expected at most {_number(context['le'])})"
        case _ if kind in _EXPECTED:
            return f"expected {_EXPECTED[kind]}, not {named(detail['input'])}"
        case _:
            return f"{shown(detail['input'])}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def named(value: Any) -> str:
    """What TOML calls the kind of a value: `a string`, `a table`."""
    match value:
        case bool():
            return "a boolean"
        case str():
            return f"the string {value!r}" if len(value) < 60 else "a string"
        case int() | float():
            return f"the number {value}"
        case list() | tuple():
            return "a list"
        case dict() | BaseModel():
            return "a table"
        case _:
            return "a date or time"


def shown(value: Any) -> str:
    """A value as an error quotes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"'{value}'" if isinstance(value, str) else str(value) if isinstance(value, int | float) else named(value)


def size(value: Any) -> Any:
    """A size as `quantities` reads it; a number is bytes."""
    return quantities.size(value) if isinstance(value, str) else value


def duration(value: Any) -> Any:
    """A duration as `quantities` reads it; a number is refused, since its unit would be a guess."""
    if isinstance(value, str):
        return quantities.duration(value)
    raise ValueError(f"{shown(value)} {quantities.NO_DURATION}")


def text_of(value: Any) -> Any:
    """A scalar as text: whole numbers, booleans as true and false; anything else is left to be refused.

    Raises ValueError for other numbers: 1.50 would arrive as 1.5, and 1e3 as 1000.0.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        wrong = f"the number {value} would lose how it is written"
        raise ValueError(f'{wrong} (expected quotes around it, as "1.50")')  # noqa: TRY004 - pydantic's terms
    return str(value) if isinstance(value, int) else value


Size = Annotated[
    int,
    Short(size, ({"title": "size", "type": "string", "examples": ["64MiB", "64MB", "64m"]},)),
]
Duration = Annotated[
    float,
    Short(duration, ()),
    WithJsonSchema({"title": "duration", "type": "string", "examples": ["100ms", "10s", "1m30s"]}),
]
Text = Annotated[str, Short(text_of, ({"title": "text", "type": ["integer", "boolean"]},))]
