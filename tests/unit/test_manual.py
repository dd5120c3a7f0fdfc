"""The manual for driver authors tells the truth, and its code runs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
from pathlib import Path
from typing import Any

import pytest

from holdfast import hookspecs
from holdfast.drivers import Driver, Host, MountWant, OfContainer
from holdfast.hookspecs import API_VERSION, OLDEST_API
from holdfast.kinds import KINDS, MOUNT, POLICY, ROOTFS, DriverKind, kind_of, kind_of_want
from holdfast.observed import Receipt
from holdfast.plugins import HOOKS
from holdfast.spec.model import Mount
from holdfast.testing import MountConformance
from manual import BLOCKS, EXAMPLE, MANUAL, block

EXAMPLES = MANUAL.parents[1] / "examples"
MOUNTS = types.ModuleType("manual_mount")
exec(block("mount"), MOUNTS.__dict__)
CONFORMANCE = {**EXAMPLE.__dict__}
exec(block("conformance"), CONFORMANCE)


@pytest.mark.usefixtures("mounts_alone")
class TestTheManualsMount(MountConformance):
    def make_driver(self, host: Host) -> Driver[MountWant]:
        driver: Driver[MountWant] = MOUNTS.EmptyMount(host)
        return driver

    def make_want(self, host: Host, number: int) -> MountWant:
        return MountWant(instance=f"{host.id}-{number:08}", mount=Mount(kind="empty", target="/work"))


TestTheManualsExample: Any = pytest.mark.usefixtures("mounts_alone")(CONFORMANCE["TestPlainVolume"])


def test_the_manual_lists_every_hook_in_call_order_with_its_exact_signature() -> None:
    listed = [each for label, code in BLOCKS if label.strip() == "hooks" for each in ast.parse(code).body]
    exact = []
    for name in HOOKS:
        signature = str(inspect.signature(getattr(hookspecs, name))).replace("'", "")
        exact.append(f"def {name}{signature}: ...")
    assert [ast.unparse(each) for each in listed] == [ast.unparse(ast.parse(each)) for each in exact]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_manual_has_a_row_for_each_kind_with_all_that_its_receipt_must_have(kind: DriverKind[Any]) -> None:
    (row,) = [line for line in MANUAL.read_text().splitlines() if f"| `{kind.want.__name__}` |" in line]
    assert kind.receipt is None or f"| `{kind.receipt}` |" in row
    assert [key for key in kind.required if f"`{key}`" not in row] == []
    (suite,) = [line for line in MANUAL.read_text().splitlines() if line.startswith(f"| `{kind.conformance}` |")]
    assert kind is POLICY or kind is ROOTFS or f"`{kind.want.__name__}`" in suite


def test_the_manual_lists_every_field_of_every_want() -> None:
    about = [field.name for field in dataclasses.fields(OfContainer)]
    fields = {kind.want.__name__: [each.name for each in dataclasses.fields(kind.want)] for kind in KINDS}
    exact = [f"{want}({', '.join(name for name in names if name not in about)})" for want, names in fields.items()]
    assert [ast.unparse(each) for each in ast.parse(block("wants")).body] == exact
    assert [field for field in about if f"`{field}`" not in MANUAL.read_text()] == []


def test_the_manual_says_what_a_driver_may_have_besides_and_which_errors_it_raises() -> None:
    text = MANUAL.read_text()
    besides = {"watch", "findings", "options", "migrate", "receipt_version", *MOUNT.optional}
    errors = {"WrongState", "UnfitHost", "Conflict", "TryAgain"}
    assert [name for name in besides if not re.search(rf"`{name}\b", text)] == []
    assert [name for name in errors if f"| `{name}` |" not in text] == []
    assert f"this holdfast offers {OLDEST_API} and {API_VERSION}" in text


def test_the_code_of_the_manual_runs(tmp_path: Path) -> None:
    exec(block("leases"), {"folder": tmp_path / "leases"})
    model: dict[str, Any] = {}
    exec(compile(block("options"), "manual", "exec", dont_inherit=True), model)
    assert model["read_options"](model["Options"], {"size": "2KiB"}).size == 2048
    assert {label.strip() for label, _ in BLOCKS} == {
        "",
        "wants",
        "mount",
        "leases",
        "options",
        "hooks",
        "conformance",
    }


def test_lines_of_the_manual_have_at_most_120_columns() -> None:
    assert [line for line in MANUAL.read_text().splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*/holdfast_*.py")), ids=lambda path: path.stem)
def test_the_examples_are_in_the_manual_and_import_only_what_it_says(example: Path) -> None:
    text = MANUAL.read_text()
    assert f"`{example.relative_to(EXAMPLES.parent)}`" in text
    imported = {each.module for each in ast.walk(ast.parse(example.read_text())) if isinstance(each, ast.ImportFrom)}
    ours = {module for module in imported if module and module.partition(".")[0].startswith("holdfast")}
    assert [module for module in ours if not re.search(rf"^\| .*`{module}`.* \|", text, re.MULTILINE)] == []


def test_a_new_kind_of_driver_is_an_entry_that_leaves_nothing_open() -> None:
    from holdfast import testing

    assert [kind.name for kind in KINDS if not hasattr(testing, kind.conformance)] == []
    assert [kind_of_want(object.__new__(kind.want)) for kind in KINDS] == [*KINDS]
    made = [kind for kind in KINDS if kind.receipt]
    receipts = [Receipt(kind.receipt, "d", "id", "instance" if kind.owned else "") for kind in KINDS if kind.receipt]
    assert list(map(kind_of, receipts)) == made
    offered = [name for name in HOOKS if name.startswith("register_")]
    assert offered == [*dict.fromkeys(kind.hook.__name__ for kind in KINDS)]
