"""What drivers return, raise and keep for themselves is looked at before it counts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.drivers import CgroupWant, EndpointWant, Host, NetworkWant, VolumeWant
from holdfast.errors import UnfitHost, WrongState
from holdfast.guard import Guarded, breach, found_by
from holdfast.hookspecs import hookimpl
from holdfast.kinds import MOUNT, POLICY, VOLUME
from holdfast.observed import Finding, Receipt
from holdfast.plugins import Plugins
from holdfast.spec.model import Resources
from holdfast.workers import NoAnswer, Worker
from paper_plugins import Loose, Register, state


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
