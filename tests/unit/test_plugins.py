"""Plugins are loaded and called one by one; the manual tells the truth."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import re
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from holdfast import hookspecs
from holdfast.drivers import CgroupWant, Driver, EndpointWant, Host, MountWant, NetworkWant, OfContainer, VolumeWant
from holdfast.errors import UnfitHost, WrongState
from holdfast.guard import Guarded, breach, found_by
from holdfast.hookspecs import API_VERSION, OLDEST_API, hookimpl
from holdfast.kinds import KINDS, MOUNT, POLICY, ROOTFS, VOLUME, DriverKind, kind_of, kind_of_want
from holdfast.observed import Finding, Receipt
from holdfast.patches import merge_patch
from holdfast.plugins import HOOKS, Plugins, PluginState, load_plugins
from holdfast.spec.model import Mount, Resources
from holdfast.testing import MountConformance, temporary_host
from holdfast.workers import NoAnswer, Worker

MANUAL = Path(__file__).parents[2] / "plugins/README.md"
BLOCKS = re.findall(r"^```python([^\n]*)\n(.*?)^```", MANUAL.read_text(), re.DOTALL | re.MULTILINE)
EXAMPLE = types.ModuleType("manual_example")
exec(next(code for label, code in BLOCKS if not label), EXAMPLE.__dict__)
conformance = {**EXAMPLE.__dict__}
exec(next(code for label, code in BLOCKS if label.strip() == "conformance"), conformance)


MOUNTS = types.ModuleType("manual_mount")
exec(next(code for label, code in BLOCKS if label.strip() == "mount"), MOUNTS.__dict__)
EXAMPLES = MANUAL.parents[1] / "examples"


def block(label: str) -> str:
    """The only block of code in the manual with a label."""
    (code,) = [code for each, code in BLOCKS if each.strip() == label]
    return str(code)


@pytest.mark.usefixtures("mounts_alone")
class TestTheManualsMount(MountConformance):
    def make_driver(self, host: Host) -> Driver[MountWant]:
        driver: Driver[MountWant] = MOUNTS.EmptyMount(host)
        return driver

    def make_want(self, host: Host, number: int) -> MountWant:
        return MountWant(instance=f"{host.id}-{number:08}", mount=Mount(kind="empty", target="/work"))


TestTheManualsExample: Any = pytest.mark.usefixtures("mounts_alone")(conformance["TestPlainVolume"])


Register = Callable[[Any], None]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return temporary_host(tmp_path)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, host: Host) -> Callable[..., Plugins]:
    """Load plugins given as keyword arguments: their functions, or (name, value), None for what can't be imported."""

    def load(**plugins: Any) -> Plugins:
        entry_points = []
        for name, functions in plugins.items():
            if functions is not None:
                module = types.ModuleType(f"plugin_{name}")
                named = [each if isinstance(each, tuple) else (each.__name__, each) for each in functions]
                module.__dict__.update(named)
                monkeypatch.setitem(sys.modules, module.__name__, module)
            entry_points.append(EntryPoint(name, f"plugin_{name}", "holdfast"))
        return load_plugins(host, entry_points=entry_points)

    return load


def offering(name: str) -> Callable[..., None]:
    class Volume(EXAMPLE.PlainVolume):  # type: ignore[misc, name-defined]
        pass

    Volume.name = name

    @hookimpl
    def register_volume_drivers(register: Callable[[Driver[VolumeWant]], None], host: Host) -> None:
        register(Volume(host))

    return register_volume_drivers


def state(plugins: Plugins, name: str) -> PluginState:
    return next(state for state in plugins.states if state.name == name)


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

    assert [kind.name for kind in KINDS if kind.conformance not in testing.__all__] == []
    assert [kind_of_want(object.__new__(kind.want)) for kind in KINDS] == [*KINDS]
    made = [kind for kind in KINDS if kind.receipt]
    receipts = [Receipt(kind.receipt, "d", "id", "instance" if kind.owned else "") for kind in KINDS if kind.receipt]
    assert list(map(kind_of, receipts)) == made
    offered = [name for name in HOOKS if name.startswith("register_")]
    assert offered == [*dict.fromkeys(kind.hook.__name__ for kind in KINDS)]


def test_a_plugin_that_can_not_be_imported_stops_no_other(load: Callable[..., Plugins]) -> None:
    plugins = load(broken=None, good=[offering("good")])
    assert state(plugins, "broken").state == "failed"
    assert "No module named 'plugin_broken'" in state(plugins, "broken").error
    assert state(plugins, "good") == PluginState(
        "good", "", "", hooks=("register_volume_drivers",), drivers=("volume good",)
    )


def test_a_plugin_that_raises_while_it_offers_offers_nothing(load: Callable[..., Plugins]) -> None:
    @hookimpl
    def register_mount_drivers(register: Register) -> None:
        raise RuntimeError("no such luck")

    plugins = load(half=[offering("half"), register_mount_drivers], good=[offering("good")])
    assert state(plugins, "half").error == "RuntimeError: no such luck"
    assert state(plugins, "half").drivers == ()
    assert list(plugins.of_kind(VOLUME)) == ["good"]


def test_unknown_hooks_and_wrong_parameters_are_named(load: Callable[..., Plugins]) -> None:
    @hookimpl
    def after_lunch() -> None: ...

    @hookimpl
    def after_start(weather: str) -> None: ...

    plugins = load(unknown=[after_lunch], wrong=[after_start], good=[offering("good")])
    assert "after_lunch" in state(plugins, "unknown").error
    assert "weather" in state(plugins, "wrong").error
    assert "there is no such hook (expected one of register_rootfs_drivers, " in state(plugins, "unknown").error
    assert [each.state for each in plugins.states] == ["failed", "failed", "ok"]


def test_async_hooks_and_wrappers_are_refused(load: Callable[..., Plugins]) -> None:
    @hookimpl
    async def after_start() -> None: ...

    @hookimpl(wrapper=True)
    def after_pass() -> Any:
        yield

    plugins = load(asynchronous=[after_start], wrapper=[after_pass])
    assert "is async" in state(plugins, "asynchronous").error
    assert "is a wrapper" in state(plugins, "wrapper").error
    plugins.tell("after_start", app="a", container="c", instance="i", pid=1)


def test_the_second_driver_of_a_name_is_refused_and_the_first_stays(load: Callable[..., Plugins]) -> None:
    first, second = offering("same"), offering("same")
    plugins = load(first=[first], second=[second])
    assert state(plugins, "first").drivers == ("volume same",)
    assert state(plugins, "second").drivers == ()
    assert "volume driver 'same': refused" in state(plugins, "second").error


def test_two_plugins_of_one_name_are_both_listed(load: Callable[..., Plugins], host: Host) -> None:
    load(twin=[offering("one")])
    entry = EntryPoint("twin", "plugin_twin", "holdfast")
    plugins = load_plugins(host, entry_points=[entry, entry])
    assert [each.state for each in plugins.states] == ["ok", "failed"]
    assert "the name is taken" in plugins.states[1].error


def test_an_unknown_driver_names_the_known_ones(load: Callable[..., Plugins]) -> None:
    plugins = load(good=[offering("good")], broken=None)
    with pytest.raises(WrongState, match=r"volume driver 'gold'.*\(known: good; failed plugins: broken\)"):
        plugins.driver(VOLUME, "gold")
    assert plugins.driver(VOLUME, "good").name == "good"


def test_a_hook_that_raises_is_recorded_and_the_others_are_told(load: Callable[..., Plugins]) -> None:
    told: list[int] = []

    def telling(number: int) -> Callable[..., None]:
        @hookimpl
        def after_start(pid: int) -> None:
            told.append(number)
            if number == 2:
                raise ValueError("out of order")

        return after_start

    plugins = load(a=[telling(1)], b=[telling(2)], c=[telling(3)])
    plugins.tell("after_start", app="a", container="c", instance="i", pid=1)
    assert plugins.wait_told(5)
    assert sorted(told) == [1, 2, 3]
    assert (state(plugins, "b").state, state(plugins, "b").error) == (
        "raised",
        "after_start: ValueError: out of order",
    )
    assert state(plugins, "c").state == "ok"


def test_a_returned_coroutine_is_closed_and_recorded(load: Callable[..., Plugins]) -> None:
    async def later() -> None: ...

    @hookimpl
    def after_pass(status: dict[str, Any]) -> Any:
        return later()

    plugins = load(late=[after_pass])
    plugins.tell("after_pass", status={})
    assert plugins.wait_told(5)
    assert "returned a coroutine" in state(plugins, "late").error


def patching(patch: Any) -> Callable[..., Any]:
    @hookimpl
    def adjust_oci_config(config: dict[str, Any]) -> Any:
        config.get("process", {}).get("args", []).append("tampered")
        if isinstance(patch, BaseException):
            raise patch
        return patch

    return adjust_oci_config


OPTIONAL = ("ADJUST_OCI_CONFIG", "optional")


def test_patches_are_applied_one_after_the_other_and_leave_the_original(load: Callable[..., Plugins]) -> None:
    plugins = load(
        a=[patching({"process": {"cwd": "/a", "tty": None}})],
        b=[patching(KeyError("b")), OPTIONAL],
        c=[patching("nonsense"), OPTIONAL],
        d=[patching({"process": {"cwd": "/d"}, "new": {"deep": [1]}})],
        e=[patching(None)],
    )
    config = {"process": {"args": ["x"], "tty": True, "cwd": "/"}}
    made = plugins.adjust_oci_config("app", "web", config)
    assert made.config == {"process": {"args": ["x"], "cwd": "/d"}, "new": {"deep": [1]}}
    assert config == {"process": {"args": ["x"], "tty": True, "cwd": "/"}}
    assert (made.asked, made.by) == (("a", "d", "e"), ("a", "d"))
    assert made.warnings == (
        "plugin 'b': adjust_oci_config: KeyError: 'b'",
        "plugin 'c': adjust_oci_config: returned str (expected a table or None)",
    )
    assert [each.state for each in plugins.states] == ["ok", "raised", "raised", "ok", "ok"]


@pytest.mark.parametrize("patch", [KeyError("b"), SystemExit(1), "nonsense", {"process": {"args": []}}])
def test_no_container_is_configured_without_a_required_patch(load: Callable[..., Plugins], patch: Any) -> None:
    plugins = load(mine=[patching(patch)])
    with pytest.raises(UnfitHost, match=r"^configure 'shop/web': plugin 'mine': adjust_oci_config: "):
        plugins.adjust_oci_config("shop", "web", {"process": {"args": ["x"]}})
    assert plugins.lacking(()) == [], "one that fails now would fail at the next start, too"


@pytest.mark.parametrize(
    ("patch", "error"),
    [
        ({"process": None}, "makes process None (expected a table)"),
        ({"process": {"args": "sh"}}, "makes process.args 'sh' (expected a list of texts that is not empty)"),
        ({"process": {"env": [1]}}, "makes process.env [1] (expected a list of texts)"),
        ({"process": {"cwd": "data"}}, "makes process.cwd 'data' (expected an absolute path)"),
        ({"mounts": {"destination": "/x"}}, "makes mounts {'destination': '/x'} (expected a list of tables)"),
        ({"hooks": []}, "makes hooks [] (expected a table)"),
        ({"linux": {"cgroupsPath": "/"}}, "changes linux.cgroupsPath, by which the agent finds the container"),
        ({"process": {"terminal": True}}, "changes process.terminal"),
        ({"root": {"path": "/"}}, "changes root.path"),
    ],
)
def test_a_patch_that_no_runtime_could_use_is_blamed_on_its_plugin(
    load: Callable[..., Plugins], patch: Any, error: str
) -> None:
    plugins = load(mine=[patching(patch)])
    config = {"process": {"args": ["x"], "env": [], "cwd": "/"}, "root": {"path": "/r"}, "linux": {"namespaces": []}}
    with pytest.raises(UnfitHost) as raised:
        plugins.adjust_oci_config("shop", "web", config)
    assert error in str(raised.value)
    assert error in state(plugins, "mine").error


def test_a_plugin_says_whether_its_patch_is_required(load: Callable[..., Plugins]) -> None:
    plugins = load(
        must=[patching(None)], may=[patching(None), OPTIONAL], odd=[patching(None), ("ADJUST_OCI_CONFIG", "maybe")]
    )
    assert set(plugins.adjusting()) == {"must"}
    assert plugins.lacking(()) == ["must"]
    assert plugins.lacking(("must",)) == []
    assert "ADJUST_OCI_CONFIG is 'maybe'" in state(plugins, "odd").error


def test_nothing_is_configured_while_an_expected_plugin_is_gone(load: Callable[..., Plugins]) -> None:
    plugins = load(broken=None)
    plugins.expected = {"broken": "holdfast-broken"}
    with pytest.raises(UnfitHost, match="plugin 'broken': could not be loaded: ModuleNotFoundError"):
        plugins.adjust_oci_config("shop", "web", {})
    plugins.expected = {"gone": "holdfast-gone"}
    with pytest.raises(UnfitHost, match="install holdfast-gone again, or 'holdfast plugin forget gone'"):
        plugins.adjust_oci_config("shop", "web", {})
    assert state(plugins, "gone").state == "missing"


def test_disabled_plugins_are_not_loaded(load: Callable[..., Plugins], host: Host) -> None:
    load(good=[offering("good")])
    entry = EntryPoint("good", "plugin_good", "holdfast")
    assert load_plugins(host, entry_points=[entry], disabled=["good"]).states == ()


def test_a_volume_of_another_driver_is_refused(load: Callable[..., Plugins]) -> None:
    class Elsewhere(EXAMPLE.PlainVolume):  # type: ignore[misc, name-defined]
        name = "elsewhere"

        def __init__(self) -> None: ...

        def observe(self) -> Iterable[Receipt]:
            return [Receipt("volume", "elsewhere", "a/v")]

    @hookimpl
    def register_volume_drivers(register: Register) -> None:
        register(Elsewhere())

    plugins = load(good=[offering("good")], other=[register_volume_drivers])
    with pytest.raises(WrongState, match="'elsewhere' made it"):
        plugins.check_volume("good", VolumeWant(id="a/v"))
    plugins.check_volume("good", VolumeWant(id="a/w"))


def test_one_that_blocks_holds_up_neither_the_agent_nor_other_plugins(load: Callable[..., Plugins]) -> None:
    go_on, heard = threading.Event(), threading.Event()

    @hookimpl
    def after_pass() -> None:
        go_on.wait(30)

    def blocking() -> Callable[..., None]:
        return after_pass

    def listening() -> Callable[..., None]:
        @hookimpl
        def after_pass() -> None:
            heard.set()

        return after_pass

    plugins = load(slow=[blocking()], quick=[listening()])
    plugins.tell("after_pass", status={})
    assert heard.wait(5)
    assert not plugins.wait_told(0.01)
    go_on.set()
    assert plugins.wait_told(5)


def test_a_fault_is_told_when_it_is_new_and_forgotten_when_it_is_over(load: Callable[..., Plugins]) -> None:
    @hookimpl
    def adjust_oci_config(app: str) -> Any:
        return {"annotations": {"path": Path("/")}} if app == "bad" else None

    plugins = load(mine=[adjust_oci_config, OPTIONAL])
    noticed: list[tuple[str, str]] = []
    plugins.noticed = lambda plugin, error: noticed.append((plugin, error))
    for app in ("good", "bad", "bad"):
        assert plugins.adjust_oci_config(app, "web", {"x": 1}).config == {"x": 1}
    assert state(plugins, "mine").state == "raised"
    assert "adjust_oci_config: returned what is not JSON-able" in state(plugins, "mine").error
    assert [plugin for plugin, _ in noticed] == ["mine"]
    plugins.adjust_oci_config("good", "web", {"x": 1})
    assert (state(plugins, "mine").state, state(plugins, "mine").error) == ("ok", "")


def test_a_plugin_that_exits_stops_no_other(load: Callable[..., Plugins]) -> None:
    @hookimpl
    def register_volume_drivers() -> None:
        sys.exit("no licence")

    plugins = load(leaving=[register_volume_drivers], good=[offering("good")])
    assert [each.state for each in plugins.states] == ["failed", "ok"]


class Loose(EXAMPLE.PlainVolume):  # type: ignore[misc, name-defined]
    """A driver whose verbs do what a test puts in their place."""

    def __init__(self, host: Host, **verbs: Any) -> None:
        super().__init__(host)
        self.__dict__.update(verbs)


@pytest.fixture
def offer(load: Callable[..., Plugins], host: Host) -> Callable[..., Plugins]:
    """Load a plugin `mine` with one volume driver, which has these verbs instead of its own."""

    def offer(**verbs: Any) -> Plugins:
        @hookimpl
        def register_volume_drivers(register: Register) -> None:
            register(Loose(host, **verbs))

        return load(mine=[register_volume_drivers], good=[offering("good")])

    return offer


async def later(*_: Any) -> None: ...


@pytest.mark.parametrize(
    ("verbs", "error"),
    [
        ({"name": None}, "has no name"),
        ({"observe": None}, "has no verb 'observe'"),
        ({"ensure": later}, "ensure is async"),
    ],
)
def test_what_is_no_driver_is_refused(offer: Callable[..., Plugins], verbs: dict[str, Any], error: str) -> None:
    plugins = offer(**verbs)
    assert state(plugins, "mine").state == "failed"
    assert error in state(plugins, "mine").error
    assert list(plugins.of_kind(VOLUME)) == ["good"]


def volume_receipt(**fields: Any) -> Receipt:
    return Receipt(**{"kind": "volume", "driver": "plain", "id": "a/v", "data": {"path": "/p"}, **fields})


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (None, "returned NoneType (expected a Receipt)"),
        ({"path": "/p"}, "returned dict"),
        (volume_receipt(kind="network"), "a receipt of network driver 'plain' (expected volume 'plain')"),
        (volume_receipt(driver="other"), "driver 'other'"),
        (volume_receipt(id="a/w"), "a receipt of 'a/w', owner '' (expected 'a/v', '')"),
        (volume_receipt(owner="x"), "owner 'x'"),
        (volume_receipt(data={}), "data['path'] is None (expected text)"),
        (volume_receipt(data={"path": "/p", "more": Path("/")}), "not JSON-able"),
    ],
)
def test_what_ensure_returns_is_looked_at(offer: Callable[..., Plugins], made: Any, error: str) -> None:
    plugins = offer(ensure=lambda want: made)
    with pytest.raises(UnfitHost, match="volume driver 'plain': ensure: returned") as raised:
        plugins.driver(VOLUME, "plain").ensure(VolumeWant(id="a/v"))
    assert error in str(raised.value)
    assert error in state(plugins, "mine").error


def test_addresses_are_looked_at_before_they_get_into_everybodys_firewall() -> None:
    data = {"interface": "x", "subnet": "10.1.0.0/24", "gateway": "10.1.0.1", "internal": False}
    network = Receipt("network", "n", "a/net", data=data)
    want = NetworkWant(id="a/net")
    assert breach("n", want, network) == ""
    assert "no subnet" in breach("n", want, replace(network, data={**data, "subnet": "10.1.0.0/24 }"}))
    end = {"address": "10.1.0.2", "interface": "eth0", "host_interface": "x"}
    endpoint = Receipt("endpoint", "n", "i/a/net", "i", end)
    attach = EndpointWant(instance="i", network=network, netns=Path("/x"), interface="eth0", default_route=True)
    assert breach("n", attach, endpoint) == ""
    assert "no address" in breach("n", attach, replace(endpoint, data={**end, "address": "10.1.0.2/24"}))


@pytest.mark.parametrize("verb", ["check", "ensure", "remove"])
def test_what_a_driver_raises_by_mistake_bears_its_name_until_it_works_again(
    offer: Callable[..., Plugins], verb: str
) -> None:
    broken = True

    def raising(_: Any) -> Any:
        if broken:
            raise KeyError("x")
        return volume_receipt() if verb == "ensure" else None

    plugins = offer(**{verb: raising})
    call = getattr(plugins.driver(VOLUME, "plain"), verb)
    with pytest.raises(KeyError) as raised:
        call(VolumeWant(id="a/v"))
    assert raised.value.__notes__ == [f"volume driver 'plain': {verb}"]
    assert state(plugins, "mine").error == f"volume driver 'plain': {verb}: KeyError: 'x'"
    broken = False
    call(VolumeWant(id="a/v"))
    assert state(plugins, "mine").state == "ok"


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


@pytest.mark.parametrize("raised", [SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit()])
@pytest.mark.parametrize("verb", ["check", "ensure", "observe", "remove"])
def test_what_ends_programs_ends_no_agent(offer: Callable[..., Plugins], verb: str, raised: BaseException) -> None:
    def raising(*_: Any) -> Any:
        raise raised

    plugins = offer(**{verb: raising})
    call = getattr(plugins.driver(VOLUME, "plain"), verb)
    argument = () if verb == "observe" else (VolumeWant(id="a/v"),)
    with ThreadPoolExecutor(1) as lane, pytest.raises(UnfitHost, match=f"{verb}: raised {type(raised).__name__}"):
        lane.submit(call, *argument).result()
    assert type(raised).__name__ in state(plugins, "mine").error


def test_an_exception_that_can_not_be_printed_is_named_by_its_class(offer: Callable[..., Plugins]) -> None:
    def observe() -> Any:
        raise Unspeakable

    plugins = offer(observe=observe)
    assert found_by(plugins.driver(VOLUME, "plain")) is None
    assert state(plugins, "mine").error == "volume driver 'plain': observe: Unspeakable"


def test_a_plugin_that_exits_while_it_is_told_or_offers_is_at_fault(load: Callable[..., Plugins]) -> None:
    @hookimpl
    def after_start() -> None:
        raise SystemExit(4)

    @hookimpl
    def register_mount_drivers(register: Register) -> None:
        sys.exit("offers nothing")

    plugins = load(tells=[after_start], offers=[register_mount_drivers])
    plugins.tell("after_start", app="a", container="c", instance="i", pid=1)
    plugins.tell("after_start", app="a", container="c", instance="i", pid=1)
    assert plugins.wait_told(10)
    assert state(plugins, "tells").error == "after_start: SystemExit: 4"
    assert state(plugins, "offers").error == "SystemExit: offers nothing"


def test_a_driver_that_does_not_answer_is_waited_for_once(host: Host) -> None:
    answer, faults = threading.Event(), dict[str, str]()
    hanging = [False]

    def observe() -> list[Receipt]:
        if hanging[0]:
            assert answer.wait(60)
        return [volume_receipt()]

    driver = Guarded(Loose(host, observe=observe), VOLUME, faults.__setitem__, Worker("observe", 0.2))
    assert found_by(driver) == [volume_receipt()]
    hanging[0] = True
    assert found_by(driver) is None
    began = time.monotonic()
    for _ in range(100):
        assert found_by(driver) is None
    assert time.monotonic() - began < 10, "a driver that hangs already is not waited for again"
    assert "has not answered since" in faults["volume driver 'plain': observe"]
    assert driver.last == [volume_receipt()]
    hanging[0] = False
    answer.set()
    deadline = time.monotonic() + 10
    while found_by(driver) is None:
        assert time.monotonic() < deadline
    assert faults["volume driver 'plain': observe"] == ""


def test_a_call_that_takes_long_is_shown_while_it_lasts(
    offer: Callable[..., Plugins], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.guard.SLOW", 0.0)
    begun, over = threading.Event(), threading.Event()

    def check(want: VolumeWant) -> None:
        begun.set()
        assert over.wait(60)

    plugins = offer(check=check)
    with ThreadPoolExecutor(1) as lane:
        call = lane.submit(plugins.driver(VOLUME, "plain").check, VolumeWant(id="a/v"))
        assert begun.wait(10)
        shown = state(plugins, "mine")
        over.set()
        call.result()
    assert shown.state == "slow"
    assert shown.error.startswith("volume driver 'plain': check: has been running since ")
    assert state(plugins, "mine").state == "ok"


def test_a_plugin_that_hangs_while_it_is_loaded_hinders_no_other(
    load: Callable[..., Plugins], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.plugins.LOAD_DEADLINE", 0.1)
    over = threading.Event()

    @hookimpl
    def register_mount_drivers(register: Register) -> None:
        assert over.wait(60)

    plugins = load(hangs=[register_mount_drivers], good=[offering("good")])
    over.set()
    assert "has not answered since" in state(plugins, "hangs").error
    assert list(plugins.of_kind(VOLUME)) == ["good"]


def test_what_a_driver_raises_on_purpose_is_no_fault_of_its_plugin(offer: Callable[..., Plugins]) -> None:
    def check(want: VolumeWant) -> None:
        raise WrongState("volume: no")

    plugins = offer(check=check)
    with pytest.raises(WrongState):
        plugins.driver(VOLUME, "plain").check(VolumeWant(id="a/v"))
    assert state(plugins, "mine").state == "ok"


@pytest.mark.parametrize(
    "observe",
    [lambda: None, lambda: ["x"], lambda: 1 / 0, lambda: (1 / 0 for _ in "x"), lambda: [Receipt("volume", "o", "x")]],
)
def test_a_driver_that_can_not_observe_says_so_and_hinders_no_other(
    offer: Callable[..., Plugins], observe: Callable[[], Any]
) -> None:
    plugins = offer(observe=observe)
    assert found_by(plugins.driver(VOLUME, "plain")) is None
    assert "volume driver 'plain': observe: " in state(plugins, "mine").error
    plugins.check_volume("good", VolumeWant(id="a/v"))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "run"},
        {"id": 5},
        {"id": ["a/v"]},
        {"owner": None},
        {"root": b"01234567"},
        {"data": None},
        {"data": {"path": Path("/x")}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_observe_yields_is_looked_at_before_every_pass_reads_it(
    offer: Callable[..., Plugins], fields: dict[str, Any]
) -> None:
    plugins = offer(observe=lambda: [replace(Receipt("volume", "plain", "a/v"), **fields)])
    assert found_by(plugins.driver(VOLUME, "plain")) is None
    assert "volume driver 'plain': observe: yielded " in state(plugins, "mine").error


@pytest.mark.parametrize("fields", [{"subject": None}, {"text": ["x"]}, {"remedy": 1}, {"breaks": "no"}])
def test_what_a_driver_tells_of_the_host_is_looked_at(offer: Callable[..., Plugins], fields: dict[str, Any]) -> None:
    found = Finding("networks", "a route is in the way")
    plugins = offer(findings=lambda: [found, replace(found, **fields)])
    assert plugins.findings() == ()
    assert "volume driver 'plain': findings: yielded a Finding" in state(plugins, "mine").error


@pytest.mark.parametrize("raised", [SystemExit(1), RuntimeError("x")])
def test_what_a_driver_does_beyond_the_four_verbs_ends_no_agent(host: Host, raised: BaseException) -> None:
    def raising(*_: Any) -> Any:
        raise raised

    loose = Loose(host, release=raising, refresh=raising, watch=lambda tell: raising)
    faults: dict[str, str] = {}
    driver = Guarded(loose, MOUNT, faults.__setitem__, Worker("observe", 5.0))
    end = driver.watch(lambda subject, what: None)
    for call, arguments in ((driver.release, ("receipt",)), (driver.refresh, ("receipt", Path())), (end, ())):
        with ThreadPoolExecutor(1) as lane, pytest.raises(Exception, match=r"raised|x"):
            lane.submit(call, *arguments).result()
    assert {*faults} == {f"mount driver 'plain': {verb}" for verb in ("release", "refresh", "watch")}


def test_a_driver_without_the_verbs_beyond_the_four_has_none(host: Host) -> None:
    driver = Guarded(Loose(host), MOUNT, lambda what, error: None, Worker("observe", 5.0))
    assert not hasattr(driver, "release")
    assert not hasattr(driver, "refresh")


def test_a_watch_that_hangs_is_not_waited_for(host: Host) -> None:
    released = threading.Event()
    faults: list[str] = []
    loose = Loose(host, watch=lambda tell: released.wait(60))
    driver = Guarded(loose, VOLUME, lambda what, error: faults.append(error), Worker("observe", 0.05))
    with pytest.raises(NoAnswer):
        driver.watch(lambda subject, what: None)
    released.set()
    assert "has not answered since" in faults[0]


@pytest.mark.parametrize(
    "made", [None, ["x"], {"memory": 1}, {"resources": []}], ids=["nothing", "list", "unknown", "no table"]
)
def test_what_a_policy_returns_is_looked_at(load: Callable[..., Plugins], made: Any) -> None:
    class Policy:
        name = "odd"

        def check(self, want: CgroupWant) -> None: ...

        def settings(self, want: CgroupWant) -> Any:
            return made

    @hookimpl
    def register_cgroup_policies(register: Register) -> None:
        register(Policy())

    plugins = load(mine=[register_cgroup_policies])
    want = CgroupWant(resources=Resources(), version=1, memory_total=1, cpus=1)
    with pytest.raises(UnfitHost, match="cgroup policy 'odd': settings: returned"):
        plugins.driver(POLICY, "odd").settings(want)


@pytest.mark.parametrize(  # RFC 7396, appendix A
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        (["a"], {"b": 1}, {"b": 1}),
    ],
)
def test_merge_patches_as_in_the_rfc(target: Any, patch: Any, result: Any) -> None:
    assert merge_patch(target, patch) == result
