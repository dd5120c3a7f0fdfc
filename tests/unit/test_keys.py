"""How keys are declared: one class for what a person writes and for what is kept, options of drivers included."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from holdfast.keys import Checked, Duration, Items, Size, Table, shown_as, within
from holdfast.spec.authored import ContainerTable, ImageTable
from holdfast.spec.model import Build, BuildKeys, Container, ContainerKeys
from holdfast.tables import Fault, WrongOptions, read_options, read_table


class Kept(Table):
    """What is kept."""

    size: Annotated[Size, within(1, 100)] = Field(10, description="bytes")
    wait: Duration = Field(1.0, description="seconds")
    names: Items[Annotated[str, Checked(str.upper, {})]] = Field((), description="in upper case")
    other: str = Field("", alias="else", description="a word that Python has for itself")

    @cached_property
    def total(self) -> int:
        return self.size * len(self.names)


class Authored(Kept):
    """What is written."""

    extra: int = Field(0, description="becomes something else")


def test_what_is_written_is_read_from_its_short_forms_and_checked() -> None:
    table, faults = read_table(Authored, {"size": "64b", "wait": "1m", "names": ["a"], "else": "b"})
    assert (table, faults) == (Authored(size=64, wait=60.0, names=("A",), other="b"), [])
    _, faults = read_table(Authored, {"size": 101, "wait": 5, "names": "a", "other": "b"})
    assert {fault.path: fault.message.partition(" (")[0] for fault in faults} == {
        ("size",): "101 is too large",
        ("wait",): "5 is not a duration",
        ("names",): "expected a list, not the string 'a'",
        ("other",): "unknown key 'other'",
    }


def test_what_an_earlier_version_kept_is_taken_as_it_is() -> None:
    assert Kept.model_validate_json('{"size": 1000, "names": ["a"], "other": "b"}').size == 1000


def test_keys_that_both_have_pass_from_what_is_written_to_what_is_kept() -> None:
    assert Authored(size=5, extra=7).passed_to(Kept, names=("x",)) == Kept(size=5, names=("x",))


@pytest.mark.parametrize(
    ("shared", "written", "kept"), [(ContainerKeys, ContainerTable, Container), (BuildKeys, ImageTable, Build)]
)
def test_a_key_that_needs_no_resolving_is_declared_once(
    shared: type[Table], written: type[Table], kept: type[Table]
) -> None:
    for each in (written, kept):
        own = each.__annotations__.keys()
        assert {name for name in shared.model_fields if name in own} == set()


def test_a_copy_computes_its_own_properties() -> None:
    table = Kept(size=5, names=("x",))
    assert (table.total, table.model_copy(update={"size": 7}).total) == (5, 7)


def test_a_value_is_shown_as_its_key_declares_it() -> None:
    assert {name: show(2048) for name in Kept.model_fields if (show := shown_as(Kept, name))} == {
        "size": "2KiB",
        "wait": "2048s",
    }


class Options(Table):
    """Options of a driver."""

    mtu: Annotated[int, within(68)] = Field(1500, description="bytes")
    fast: bool = Field(False, description="whether to hurry")
    room: Size | None = Field(None, description="how much")
    servers: Items[str] = Field((), description="where")


def test_options_of_a_driver_may_be_text() -> None:
    read = read_options(Options, {"mtu": "1400", "fast": "true", "room": "1KiB", "servers": ["a"]})
    assert read == Options(mtu=1400, fast=True, room=1024, servers=("a",))


def test_wrong_options_are_told_key_by_key() -> None:
    with pytest.raises(WrongOptions) as caught:
        read_options(Options, {"mtu": "5", "fast": "perhaps", "servers": [["a"]], "mut": "1"})
    assert caught.value.faults == [
        Fault(("mtu",), "5 is too small (expected at least 68)"),
        Fault(("fast",), "expected true or false, not the string 'perhaps'"),
        Fault(("servers", 0), "expected a string, not a list"),
        Fault(("mut",), "unknown key 'mut' (did you mean 'mtu'?)"),
    ]
    assert str(caught.value).startswith("driver_opts.mtu: 5 is too small (expected at least 68); driver_opts.fast: ")


def test_a_plain_model_will_do_for_options() -> None:
    class Plain(BaseModel):
        level: int = 0

    assert read_options(Plain, {"level": "3"}).level == 3
    with pytest.raises(WrongOptions, match=r"^driver_opts.levle: unknown key 'levle'$"):
        read_options(Plain, {"levle": "3"})
