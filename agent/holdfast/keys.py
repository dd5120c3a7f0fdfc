"""How the keys of a TOML table are declared: type, default, meaning, and how each may be written.

A `Table` is declared once and used twice. `tables.read_table` reads what a person wrote: types are strict, short
forms become long ones, and every value is checked. Everybody else (the store, drivers, tests) makes it of values as
they are, without these checks, so that what an earlier version has stored can always be read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from holdfast.grammar import quantities
from holdfast.words import named, shown

JsonSchema = dict[str, Any]
T = TypeVar("T")
TableT = TypeVar("TableT", bound="Table")

WRITTEN = object()  # the context in which pydantic reads what a person wrote


class Contradiction(ValueError):
    """Keys of one table that don't go together: what `Table.conflicts` found, key by key."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__(found)
        self.found = found


class Table(BaseModel):
    """A frozen record whose fields are the keys of a table; unknown keys are refused.

    not_yet: keys that are planned and refused as such. hints: words of neighbouring languages → what to write here.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
        ignored_types=(cached_property,),
    )

    not_yet: ClassVar[tuple[str, ...]] = ()
    hints: ClassVar[Mapping[str, str]] = {}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Find keys that contradict each other: (key, message) pairs; the key "" stands for the whole table."""
        yield from ()

    @model_validator(mode="after")
    def _agree(self, info: ValidationInfo) -> Self:
        if info.context is WRITTEN and (found := list(self.conflicts())):
            raise Contradiction(found)
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the table with some fields changed; the copy computes its cached properties itself."""
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied

    def passed_to(self, kind: type[TableT], /, **resolved: Any) -> TableT:
        """Make a table of another kind: the keys that both have keep their values, the others are given."""
        own = type(self).model_fields
        shared = {name: getattr(self, name) for name in kind.model_fields if name in own}
        return kind.model_validate({**shared, **resolved})


def keys_of(kind: type[BaseModel]) -> dict[str, str]:
    """Every key of a table as it is written → the name of its field."""
    return {field.alias or name: name for name, field in kind.model_fields.items()}


class _Marker:
    """Says more about how a field is written than its type does; `read` turns a value into another, or raises."""

    read: Callable[[Any], Any]

    def read_if_written(self, value: Any, info: ValidationInfo) -> Any:
        """The value as `read` has it, where a person wrote it."""
        return self.read(value) if info.context is WRITTEN else value


@dataclass(frozen=True, slots=True, eq=False)
class Short(_Marker):
    """Marks a field that also takes a shorter form: `read` turns that into the long one and leaves others alone.

    read raises ValueError with a message for people. schema: the JSON Schemas of the short forms. show: a value as
    people read it, where `str` is not good enough.
    """

    read: Callable[[Any], Any]
    schema: tuple[JsonSchema, ...]
    show: Callable[[Any], str] | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_before_validator_function(self.read_if_written, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        return {"anyOf": [*self.schema, handler(schema)]} if self.schema else handler(schema)


@dataclass(frozen=True, slots=True, eq=False)
class Checked(_Marker):
    """Marks a field whose value `read` takes once its type is right; it returns the canonical value or raises."""

    read: Callable[[Any], Any]
    schema: JsonSchema

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self.read_if_written, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        return {**handler(schema), **self.schema}


class _Listed:
    """Marks a tuple that is written as a list."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        items = handler(source)
        strict = core_schema.no_info_before_validator_function(_tuple_of, items)
        return core_schema.lax_or_strict_schema(items, strict)


def _tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def within(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Checked:
    """Mark a number that is bounded; above: a lower bound that is itself too small."""

    def check(value: float) -> float:
        if low is not None and value < low:
            raise ValueError(f"{_number(value)} is too small (expected at least {_number(low)})")
        if above is not None and value <= above:
            raise ValueError(f"{_number(value)} is too small (expected more than {_number(above)})")
        if high is not None and value > high:
            raise ValueError(f"{_number(value)} is too large (expected at most {_number(high)})")
        return value

    bounds = {"minimum": low, "maximum": high, "exclusiveMinimum": above}
    return Checked(check, {name: bound for name, bound in bounds.items() if bound is not None})


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def or_text(read: Callable[[str], Any], form: str) -> Short:
    """Mark a table, or a list, that may be written as one string instead; form: how."""
    return Short(
        lambda value: read(value) if isinstance(value, str) else value, ({"type": "string", "description": form},)
    )


def size(value: Any) -> Any:
    """Read a size in text; a number is bytes."""
    if isinstance(value, str):
        return quantities.size(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected a size as '64MiB', not {named(value)}")  # noqa: TRY004
    return value


def duration(value: Any) -> Any:
    """Read a duration in text. A number is refused, because its unit would be a guess."""
    if isinstance(value, str):
        return quantities.duration(value)
    raise ValueError(f"{shown(value)} {quantities.NO_DURATION}")


def text_of(value: Any) -> Any:
    """Read a scalar as text: whole numbers, and booleans as true and false; others are left to be refused.

    Raises ValueError for other numbers: 1.50 would arrive as 1.5, and 1e3 as 1000.0.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        wrong = f"the number {value} would lose how it is written"
        raise ValueError(f'{wrong} (expected quotes around it, as "1.50")')  # noqa: TRY004 - pydantic's terms
    return str(value) if isinstance(value, int) else value


def _option(value: Any) -> Any:
    """Read an option of a driver: a scalar as text, a list or a table as it is."""
    found = text_of(value)
    try:
        json.dumps(found)
    except TypeError:
        raise ValueError("a date or time is no option (expected quotes around it)") from None
    return found


def _nonempty(value: str) -> str:
    if not value:
        raise ValueError("is empty (expected text, or leave it out)")
    return value


def size_text(value: int) -> str:
    """A size as people read it; -1 is no limit."""
    return "unlimited" if value < 0 else quantities.size_text(value)


Items = Annotated[tuple[T, ...], _Listed()]
Unique = Annotated[tuple[T, ...], _Listed(), Checked(lambda items: tuple(dict.fromkeys(items)), {})]
OrOne = Short(lambda value: [value] if isinstance(value, str) else value, ({"type": "string"},))
Strings = Annotated[tuple[str, ...], _Listed(), OrOne]
Size = Annotated[
    int, Short(size, ({"title": "size", "type": "string", "examples": ["64MiB", "64MB", "64m"]},), show=size_text)
]
Duration = Annotated[
    float,
    Short(duration, (), show=lambda value: f"{value:g}s"),
    WithJsonSchema({"title": "duration", "type": "string", "examples": ["100ms", "10s", "1m30s"]}),
]
Text = Annotated[str, Short(text_of, ({"title": "text", "type": ["integer", "boolean"]},))]
NonEmpty = Annotated[str, Checked(_nonempty, {"minLength": 1})]
#: What a driver takes: values that are neither lists nor tables are text, whatever their type is in TOML.
DriverOpts = dict[
    str,
    Annotated[
        Any,
        Short(_option, ()),
        WithJsonSchema(
            {
                "anyOf": [
                    {"title": "text", "type": ["string", "integer", "boolean"]},
                    {"title": "list", "type": "array"},
                    {"title": "table", "type": "object"},
                ]
            }
        ),
    ],
]


def shown_as(kind: type[Table], name: str) -> Callable[[Any], str] | None:
    """How a field's values are shown to people, where its declaration says so."""
    field = kind.model_fields.get(name)
    marks = (*field.metadata, *_marks(field.annotation)) if field else ()
    return next((mark.show for mark in marks if isinstance(mark, Short) and mark.show), None)


def _marks(annotation: Any) -> Iterator[Any]:
    """The markers of a type, seen through Optional."""
    yield from getattr(annotation, "__metadata__", ())
    for part in get_args(annotation):
        if part is not Ellipsis:
            yield from _marks(part)
