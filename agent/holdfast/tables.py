"""TOML data → a `Table`, and everything that is wrong with it in plain words, each with its key path.

Called by `spec` and `config` for what people write, and by drivers for their options.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from holdfast.errors import WrongState
from holdfast.keys import WRITTEN, Contradiction, Table, keys_of
from holdfast.toml import KeyPath, dotted
from holdfast.words import named, shown, suggestion

T = TypeVar("T", bound=BaseModel)

MOST_FAULTS = 200  # in one document; nobody reads more
_ROUNDS = 5  # types, contradictions within tables, and those that cutting them out brings to light


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong at a key path."""

    path: KeyPath
    message: str


def read_table(kind: type[T], data: Mapping[str, Any], known: Iterable[Fault] = ()) -> tuple[T | None, list[Fault]]:
    """Read data as a table; return it with everything that is wrong, the known faults first.

    With faults, the table is of what is left when the faulty parts are cut out, so that what stands beside them can
    still be checked; None if nothing usable is left.
    """
    faults = list(known)
    rest = Remainder(data)
    rest.cut(faults)
    for _ in range(_ROUNDS):
        try:
            return kind.model_validate(rest.data, strict=True, by_name=False, context=WRITTEN), faults
        except ValidationError as error:
            details = _details(error)
        if len(details) > MOST_FAULTS:  # cutting out so many would take longer than anybody waits
            few = [fault for detail in details[: MOST_FAULTS - 1] for fault in _faults(kind, detail)]
            left = f"{len(details) - MOST_FAULTS + 1} more problems (correct these first)"
            return None, [*faults, *few, Fault((), left)]
        found = [_of_short_form(fault, rest.data) for detail in details for fault in _faults(kind, detail)]
        faults.extend(fault for fault in found if not rest.tore(fault.path))
        rest.cut(found)
    return None, faults


def _of_short_form(fault: Fault, data: Any) -> Fault:
    """Make a fault within a text that stands for a table one of the text, and name the part."""
    for length, step in enumerate(fault.path):
        if isinstance(data, str):
            where = "" if f"'{data}'" in fault.message else f"'{data}': {dotted(fault.path[length:])}: "
            return Fault(fault.path[:length], f"{where}{fault.message}")
        match data, step:
            case dict(), str():
                data = data.get(step)
            case list(), int():
                data = data[step]
            case _:
                break
    return fault


class WrongOptions(WrongState):
    """Options that a driver does not take."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{dotted(('driver_opts', *fault.path))}: {fault.message}" for fault in faults))
        self.faults = faults


def read_options(kind: type[T], driver_opts: Mapping[str, Any]) -> T:
    """Read the options of a driver, whose numbers and booleans may be text. Raises WrongOptions."""
    try:
        return kind.model_validate(dict(driver_opts), extra="forbid", by_name=False, context=WRITTEN)
    except ValidationError as error:
        faults = [fault for detail in _details(error) for fault in _faults(kind, detail)]
    except Exception as error:  # a plugin's model may do anything
        faults = [Fault((), f"its plugin fails to read them: {type(error).__name__}: {error}")]
    raise WrongOptions(faults)


class Remainder:
    """Data without its faulty parts."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data: Any = data
        self.torn: set[KeyPath] = set()

    def tore(self, path: KeyPath) -> bool:
        """Say whether a fault may come from the cutting, because its table lost another key."""
        return path in self.torn or path[:-1] in self.torn

    def cut(self, faults: Iterable[Fault]) -> None:
        """Leave out what the faults are about."""
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
        """Return the table at these steps; an empty one if there is none."""
        table = self.data
        for step in steps:
            table = table.get(step) if isinstance(table, dict) else None
        return table if isinstance(table, dict) else ()

    def _without(self, table: Any, steps: list[Any], at: KeyPath) -> Any:
        """Return a table without what the steps lead to: the key, or what it is missing from. The original stays."""
        inner = table.get(steps[0]) if steps else None
        if len(steps) > 1 and isinstance(inner, dict) and steps[1] in inner:
            return {**table, steps[0]: self._without(inner, steps[1:], (*at, steps[0]))}
        self.torn.add(at)
        return {key: value for key, value in table.items() if key not in steps[:1]}


def _details(error: ValidationError) -> list[dict[str, Any]]:
    """Return pydantic's findings, without those that only follow from others."""
    found = [dict(detail) for detail in error.errors(include_url=False)]
    return [detail for detail in found if detail["type"] != "default_factory_not_called"]


def _faults(table: type[BaseModel], detail: Mapping[str, Any]) -> Iterator[Fault]:
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
    known = list(keys_of(table))
    few = (
        f" (expected one of {', '.join(known)})" if len(known) <= 12 else " ('holdfast schema' lists the known ones)"
    )
    return f"unknown key '{key}'" + (suggestion(key, known) or few)


def _table_at(kind: Any, path: KeyPath) -> type[Table] | None:
    """Return the table at a key path below a type."""
    for step in path:
        table = _table_in(kind)
        if table is not None:
            name = keys_of(table).get(str(step))
            kind = table.model_fields[name].annotation if name else None
        else:
            kind = _item_of(kind)
    return _table_in(kind)


def _table_in(kind: Any) -> type[Table] | None:
    """Return the table that a type is, seen through Annotated and Optional."""
    if isinstance(kind, type) and get_origin(kind) is None:
        return kind if issubclass(kind, Table) else None
    if get_origin(kind) in (tuple, dict, Literal):
        return None
    return next((found for part in get_args(kind) if (found := _table_in(part))), None)


def _item_of(kind: Any) -> Any:
    """Return what a tuple or dict type holds, seen through Annotated and Optional."""
    if get_origin(kind) in (tuple, dict):
        return next(part for part in reversed(get_args(kind)) if part is not Ellipsis)
    return next((item for part in get_args(kind) if (item := _item_of(part)) is not None), None)


_EXPECTED = {
    "string_type": "a string",
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type"), "a table"),
}


def _plain(kind: str, detail: Mapping[str, Any]) -> str:
    """Say pydantic's finding in our words."""
    match kind:
        case "missing":
            return "is missing"
        case "literal_error":
            return f"{shown(detail['input'])} is not known (expected {detail['ctx']['expected']})"
        case _ if kind in _EXPECTED:
            return f"expected {_EXPECTED[kind]}, not {named(detail['input'])}"
        case _:
            return f"{shown(detail['input'])}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"
