"""Plugins are loaded and called one by one; the manual tells the truth."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from holdfast import hookspecs
from holdfast.drivers import Driver, Host, VolumeWant
from holdfast.errors import WrongState
from holdfast.hookspecs import hookimpl
from holdfast.observed import Receipt
from holdfast.plugins import HOOKS, Plugins, PluginState, load_plugins, merge_patch
from holdfast.testing import DriverConformance, temporary_host

MANUAL = Path(__file__).parents[2] / "plugins/README.md"
BLOCKS = re.findall(r"^```python([^\n]*)\n(.*?)^```", MANUAL.read_text(), re.DOTALL | re.MULTILINE)
EXAMPLE = types.ModuleType("manual_example")
exec(next(code for label, code in BLOCKS if not label), EXAMPLE.__dict__)
conformance = {**EXAMPLE.__dict__}
exec(next(code for label, code in BLOCKS if label.strip() == "conformance"), conformance)


class TestTheManualsExample(conformance["TestPlainVolume"], DriverConformance):  # type: ignore[misc]
    """The conformance class that the manual shows, as it stands there."""


Register = Callable[[Any], None]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return temporary_host(tmp_path)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, host: Host) -> Callable[..., Plugins]:
    """Load plugins given as keyword arguments: functions by name, or an exception that importing raises."""

    def load(**plugins: Any) -> Plugins:
        entry_points = []
        for name, functions in plugins.items():
            if functions is not None:
                module = types.ModuleType(f"plugin_{name}")
                module.__dict__.update({function.__name__: function for function in functions})
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
    listed = [line for label, code in BLOCKS if label.strip() == "hooks" for line in code.splitlines()]
    exact = []
    for name in HOOKS:
        signature = str(inspect.signature(getattr(hookspecs, name))).replace("'", "")
        exact.append(f"def {name}{signature}: ...")
    assert listed == exact


def test_the_manual_names_every_field_of_every_want() -> None:
    from holdfast import drivers

    for name in drivers.__all__:
        if name.endswith("Want") and name != "CgroupWant":
            fields = ", ".join(getattr(drivers, name).__dataclass_fields__)
            assert f"`{name}({fields})`" in MANUAL.read_text()


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
    assert list(plugins.volumes) == ["good"]


def test_unknown_hooks_and_wrong_parameters_are_named(load: Callable[..., Plugins]) -> None:
    @hookimpl
    def after_lunch() -> None: ...

    @hookimpl
    def after_start(weather: str) -> None: ...

    plugins = load(unknown=[after_lunch], wrong=[after_start], good=[offering("good")])
    assert "after_lunch" in state(plugins, "unknown").error
    assert "weather" in state(plugins, "wrong").error
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
        plugins.driver("volume", "gold")
    assert plugins.driver("volume", "good").name == "good"


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
    assert told == [1, 2, 3]
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
    assert "returned a coroutine" in state(plugins, "late").error


def test_patches_are_applied_one_after_the_other_and_leave_the_original(load: Callable[..., Plugins]) -> None:
    def patching(patch: Any) -> Callable[..., Any]:
        @hookimpl
        def adjust_oci_config(config: dict[str, Any]) -> Any:
            config["process"]["args"].append("tampered")
            if isinstance(patch, Exception):
                raise patch
            return patch

        return adjust_oci_config

    plugins = load(
        a=[patching({"process": {"cwd": "/a", "tty": None}})],
        b=[patching(KeyError("b"))],
        c=[patching("nonsense")],
        d=[patching({"process": {"cwd": "/d"}, "new": {"deep": [1]}})],
        e=[patching(None)],
    )
    config = {"process": {"args": ["x"], "tty": True, "cwd": "/"}}
    adjusted = plugins.adjust_oci_config("app", "web", config)
    assert adjusted == {"process": {"args": ["x"], "cwd": "/d"}, "new": {"deep": [1]}}
    assert config == {"process": {"args": ["x"], "tty": True, "cwd": "/"}}
    assert [each.state for each in plugins.states] == ["ok", "raised", "raised", "ok", "ok"]


def test_disabled_plugins_are_not_loaded(load: Callable[..., Plugins], host: Host) -> None:
    load(good=[offering("good")])
    entry = EntryPoint("good", "plugin_good", "holdfast")
    assert load_plugins(host, entry_points=[entry], disabled=["good"]).states == ()


def test_a_volume_of_another_driver_is_refused(load: Callable[..., Plugins]) -> None:
    class Elsewhere:
        name = "elsewhere"

        def observe(self) -> Iterable[Receipt]:
            return [Receipt("volume", "elsewhere", "a/v")]

    @hookimpl
    def register_volume_drivers(register: Register) -> None:
        register(Elsewhere())

    plugins = load(good=[offering("good")], other=[register_volume_drivers])
    with pytest.raises(WrongState, match="'elsewhere' made it"):
        plugins.check_volume("good", VolumeWant(id="a/v"))
    plugins.check_volume("good", VolumeWant(id="a/w"))


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
