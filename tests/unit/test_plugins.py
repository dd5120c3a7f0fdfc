"""Plugins are loaded and called one by one, and none of them hinders another."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from holdfast.drivers import Host, VolumeWant
from holdfast.errors import UnfitHost, WrongState
from holdfast.hookspecs import hookimpl
from holdfast.kinds import VOLUME
from holdfast.observed import Receipt
from holdfast.patches import merge_patch
from holdfast.plugins import Plugins, PluginState, load_plugins
from manual import EXAMPLE
from paper_plugins import Register, offering, state


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
