"""What plugins are promised and held to: versions of the contract and of receipts, settings, what hooks hear."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import AfterValidator, Field

from holdfast.config import Config, load_config
from holdfast.drivers import EndpointWant, Host, VolumeWant
from holdfast.errors import UnfitHost, WrongConfig, WrongState
from holdfast.hookspecs import API_VERSION, hookimpl
from holdfast.keys import Size, Table
from holdfast.kinds import KINDS, MOUNT, VOLUME
from holdfast.node.installed import migrate, refuse_newer
from holdfast.node.stage import predecessor
from holdfast.observed import Instance, InstanceId, Receipt
from holdfast.plugins import Plugins, load_plugins
from holdfast.spec import NodeFacts
from holdfast.spec import load as load_state
from holdfast.spec.model import App, Attachment, Container
from holdfast.store import Store
from holdfast.tables import read_options
from holdfast.testing import temporary_host

Load = Callable[..., Plugins]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return temporary_host(tmp_path)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, host: Host) -> Load:
    """Load one plugin, `mine`, made of these functions and values; settings: the tables [plugins.NAME]."""

    def load(*functions: Any, settings: Mapping[str, Any] | None = None, **values: Any) -> Plugins:
        module = types.ModuleType("plugin_mine")
        module.__dict__.update({each.__name__: each for each in functions} | values)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        found = [EntryPoint("mine", "plugin_mine", "holdfast")]
        return load_plugins(host, entry_points=found, settings=settings or {})

    return load


class PlainVolume:
    """A volume driver whose receipts are what a test says."""

    name = "plain"

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def check(self, want: VolumeWant) -> None: ...

    def ensure(self, want: VolumeWant) -> Receipt:
        return Receipt("volume", self.name, want.id, data={"path": f"/volumes/{want.id}"})

    def observe(self) -> Iterable[Receipt]:
        return ()

    def remove(self, receipt: Receipt) -> None: ...


def offering(driver: Any, kind: str = "volume") -> Callable[..., None]:
    def register(register: Callable[[Any], None]) -> None:
        register(driver)

    register.__name__ = f"register_{kind}_drivers"
    return hookimpl(register)


# -- api_version ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, API_VERSION])
def test_a_plugin_for_an_offered_version_is_loaded(load: Load, version: int) -> None:
    plugins = load(offering(PlainVolume()), api_version=version)
    assert [each.state for each in plugins.states] == ["ok"]


@pytest.mark.parametrize(
    ("version", "cure"),
    [(API_VERSION + 1, "a newer holdfast"), (0, "a newer plugin"), ("2", "a newer plugin"), (True, "a newer plugin")],
)
def test_a_plugin_for_another_version_is_refused_with_one_line(load: Load, version: Any, cure: str) -> None:
    plugins = load(offering(PlainVolume()), api_version=version)
    (state,) = plugins.states
    assert state.state == "failed"
    assert state.error == f"api_version {version!r}: this holdfast offers 1 to {API_VERSION} (install {cure})"
    assert plugins.of_kind(VOLUME) == {}


# -- settings and the arguments of hooks ---------------------------------------------------------------------


class Settings(Table):
    server: Annotated[str, Field(description="where it is")]
    port: Annotated[int, Field(description="its port", ge=1)] = 80


def test_settings_of_agent_toml_reach_every_hook_as_the_plugins_own_model(load: Load, host: Host) -> None:
    heard: list[Any] = []

    @hookimpl
    def register_volume_drivers(register: Callable[[Any], None], host: Host, settings: Settings) -> None:
        heard.append((host, settings))

    @hookimpl
    def adjust_oci_config(labels: Mapping[str, str], host: Host, settings: Settings) -> Any:
        heard.append((host, settings))
        return {"annotations": dict(labels)}

    @hookimpl
    def after_pass(host: Host, settings: Settings) -> None:
        heard.append((host, settings))

    hooks = (register_volume_drivers, adjust_oci_config, after_pass)
    plugins = load(*hooks, Settings=Settings, settings={"mine": {"server": "srv"}})
    made = plugins.adjust_oci_config("shop", "web", {}, {"tier": "front"})
    assert made.config == {"annotations": {"tier": "front"}}
    plugins.tell("after_pass", status={})
    assert plugins.wait_told(10)
    assert heard == [(host, Settings(server="srv"))] * 3


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        ({"server": "srv", "prot": 8}, "plugins.mine.prot: unknown key 'prot' (did you mean 'port'?)"),
        ({"server": "srv", "port": 0}, "plugins.mine.port: 0: input should be greater than or equal to 1"),
        (None, "plugins.mine.server: is missing"),
    ],
)
def test_wrong_settings_name_the_key_and_load_nothing(load: Load, table: Any, wrong: str) -> None:
    plugins = load(offering(PlainVolume()), Settings=Settings, settings={} if table is None else {"mine": table})
    (state,) = plugins.states
    assert (state.state, state.error) == ("failed", f"agent.toml: {wrong}")
    key, _, message = wrong.partition(": ")
    assert [(".".join(map(str, each.path)), each.message) for each in plugins.wrong] == [(key, message)]


def test_settings_that_no_plugin_takes_are_told(load: Load) -> None:
    plugins = load(offering(PlainVolume()), settings={"mine": {}, "mien": {}})
    assert [(each.path, each.message) for each in plugins.wrong] == [
        (("plugins", "mine"), "plugin 'mine' takes no settings (leave the table out)"),
        (("plugins", "mien"), "no plugin is called 'mien' (did you mean 'mine'?)"),
    ]
    assert [each.state for each in plugins.states] == ["ok"]


# -- options of drivers, and the drivers that agent.toml chooses ----------------------------------------------


class Tier(Table):
    name: Annotated[str, Field(description="what it is called")]
    replicas: Annotated[int, Field(description="how many copies")] = 1


class Options(Table):
    size: Annotated[Size, Field(description="how much it holds")]
    fast: Annotated[bool, Field(description="whether it is fast")] = False
    tiers: Annotated[tuple[Tier, ...], Field(description="where it is kept")] = ()


class Choosy(PlainVolume):
    options = Options

    def check(self, want: VolumeWant) -> None:
        self.read = read_options(Options, want.driver_opts)


STATE = """
[containers.web]
image = "busybox:1"
volumes = ["data:/data"]
[volumes.data]
driver = "plain"
driver_opts = {opts}
"""


def problems(plugins: Plugins, opts: str) -> list[str]:
    facts = NodeFacts(name="node", drivers=plugins.names())
    return [str(each) for each in load_state({"shop.toml": STATE.format(opts=opts).encode()}, facts).problems]


@pytest.mark.parametrize(
    ("opts", "wrong"),
    [
        ('{ size = "1GiB", colour = "red" }', "colour: unknown key 'colour' (expected one of size, fast, tiers)"),
        ("{ fast = true }", "size: is missing"),
        (
            '{ size = "big" }',
            "size: 'big' is not a size (expected a number and one of KiB, MiB, GiB, KB, MB, GB, k, m, g)",
        ),
        (
            '{ size = "1GiB", tiers = [{ name = "a", replicas = "two" }] }',
            "tiers[0].replicas: expected a whole number",
        ),
        ('{ size = "1GiB", tiers = "a" }', "tiers: expected a list, not the string 'a'"),
    ],
)
def test_options_are_checked_by_the_drivers_own_model_without_a_host(load: Load, opts: str, wrong: str) -> None:
    (found,) = problems(load(offering(Choosy())), opts)
    assert found.startswith("shop.toml:7")
    assert f"volumes.data.driver_opts.{wrong}" in found


def test_options_may_be_tables_and_lists_and_are_anything_for_a_driver_without_a_model(load: Load) -> None:
    opts = '{ size = "1GiB", fast = true, tiers = [{ name = "a", replicas = 2 }] }'
    assert problems(load(offering(Choosy())), opts) == []
    assert problems(load(offering(PlainVolume())), '{ any = [1, { thing = "x" }], b = 2 }') == []


def test_a_driver_reads_its_options_and_is_never_asked_with_others(load: Load) -> None:
    raw = Choosy()
    driver = load(offering(raw)).driver(VOLUME, "plain")
    opts = {"size": "1KiB", "fast": "true", "tiers": [{"name": "a"}]}
    driver.check(VolumeWant(id="a/v", driver_opts=opts))
    assert raw.read == Options(size=1024, fast=True, tiers=(Tier(name="a"),))
    for verb in (driver.check, driver.ensure):
        with pytest.raises(WrongState, match=r"volume 'a/v': driver_opts\.size: is missing"):
            verb(VolumeWant(id="a/v"))


def test_the_models_that_the_manual_shows_read_what_it_says() -> None:
    manual = (Path(__file__).parents[2] / "plugins/README.md").read_text()
    shown: dict[str, Any] = {"__name__": "manual"}
    code = manual.partition("```python options\n")[2].partition("```")[0]
    exec(compile(code, "plugins/README.md", "exec", dont_inherit=True), shown)
    options = read_options(shown["Options"], {"size": "1GiB", "copies": ["a"]})
    assert (options.size, options.timeout, options.copies) == (1 << 30, 5.0, ("a",))


class Broken(Table):
    size: Annotated[str, Field(description="how much it holds"), AfterValidator(lambda size: {}[size])]


def test_a_model_that_fails_is_a_problem_of_what_uses_it_and_of_nothing_else(load: Load) -> None:
    (found,) = problems(load(offering(PlainVolume(options=Broken))), '{ size = "1" }')
    assert found.endswith("volumes.data.driver_opts: its plugin fails to read them: KeyError: '1'")
    plugins = load(offering(PlainVolume()), Settings=Broken, settings={"mine": {"size": "1"}})
    assert [(each.state, each.error) for each in plugins.states] == [("failed", "KeyError: '1'")]


def test_a_driver_whose_options_are_no_model_is_refused(load: Load) -> None:
    assert "options is {'size': 'text'}" in load(offering(PlainVolume(options={"size": "text"}))).states[0].error


def test_options_of_the_built_in_drivers_are_known_before_anything_is_made(host: Host) -> None:
    found = problems(load_plugins(host), '{ size = "0" }') + [
        str(each)
        for each in load_state(
            {"net.toml": b"[networks.front]\ndriver_opts = { mtu = 20, port_security = 'maybe' }\n"},
            NodeFacts(name="node", drivers=load_plugins(host).names()),
        ).problems
    ]
    assert "no plugin offers the volume driver 'plain'" in found[0]
    assert ["driver_opts.mtu: 20 is too small" in found[1], "'maybe' is not known" in found[2]] == [True, True]


def config(folder: Path, text: str) -> Config:
    (folder / "agent.toml").write_text(text)
    return load_config(folder / "agent.toml")


def test_agent_toml_is_held_against_the_plugins_with_file_line_and_key(host: Host, tmp_path: Path) -> None:
    written = config(
        tmp_path,
        """
[storage]
driver = "overlai"
[network]
firewall = "iptables"
[cgroup]
policy = ["limits", "golden"]
[plugins.storage]
x = 1
[plugins.stroage]
""",
    )
    with pytest.raises(WrongConfig) as raised:
        load_plugins(host, settings=written.plugins).check_config(written)
    assert str(raised.value).splitlines() == [
        f"{tmp_path}/agent.toml:8: plugins.storage: plugin 'storage' takes no settings (leave the table out)",
        f"{tmp_path}/agent.toml:10: plugins.stroage: no plugin is called 'stroage' (did you mean 'storage'?)",
        f"{tmp_path}/agent.toml:3: storage.driver: no plugin offers the rootfs driver 'overlai' "
        "(did you mean 'overlay'?)",
        f"{tmp_path}/agent.toml:5: network.firewall: no plugin offers the firewall driver 'iptables' "
        "(did you mean 'nftables'?)",
        f"{tmp_path}/agent.toml:7: cgroup.policy[1]: no plugin offers the policy driver 'golden' "
        "(expected limits or qos, or its plugin to be installed)",
    ]


def test_an_agent_starts_without_a_driver_that_was_there_when_it_ran_before(host: Host, tmp_path: Path) -> None:
    written = config(tmp_path, 'storage.driver = "copy"')
    plugins = load_plugins(host)
    plugins.check_config(written, {"rootfs copy": "holdfast-copy"})
    with pytest.raises(WrongConfig, match="no plugin offers the rootfs driver 'copy'"):
        plugins.check_config(written, {"volume copy": "holdfast-copy"})


# -- versions of receipts ------------------------------------------------------------------------------------


class Renaming(PlainVolume):
    """Version 3 of a driver whose receipts once called the path `where`."""

    receipt_version = 3

    def migrate(self, receipt: Receipt) -> Receipt:
        self.seen = receipt
        return replace(receipt, data={"path": receipt.data["where"]})


OLD = Receipt("volume", "plain", "a/v", data={"where": "/old", "content": "settled", "asked": {"x": "1"}})


@pytest.fixture
def store(tmp_path: Path) -> Iterable[Store]:
    store = Store(tmp_path / "state.db")
    yield store
    store.close()


def test_receipts_are_stored_with_the_version_of_their_driver(load: Load) -> None:
    made = load(offering(Renaming())).driver(VOLUME, "plain").ensure(VolumeWant(id="a/v"))
    assert made.version == 3
    assert load(offering(PlainVolume())).driver(VOLUME, "plain").ensure(VolumeWant(id="a/v")).version == 1


def test_receipts_of_older_versions_are_migrated_and_keep_what_the_core_added(load: Load, store: Store) -> None:
    driver = Renaming()
    store.put_receipt(OLD)
    migrate(store, load(offering(driver)))
    assert driver.seen == replace(OLD, data={"where": "/old"})
    made = replace(OLD, version=3, data={"path": "/old", "content": "settled", "asked": {"x": "1"}})
    assert store.receipt("volume", "a/v") == made


def test_a_migration_is_done_once(load: Load, store: Store) -> None:
    store.put_receipt(OLD)
    migrate(store, load(offering(Renaming())))
    again = Renaming()
    migrate(store, load(offering(again)))
    assert not hasattr(again, "seen")


@pytest.mark.parametrize(
    ("migrated", "error"),
    [
        (RuntimeError("no idea"), "RuntimeError: no idea"),
        (OLD, "data['path'] is None"),
        (replace(OLD, id="a/other", data={"path": "/"}), "returned a receipt of 'a/other'"),
        (None, "returned NoneType"),
    ],
)
def test_a_driver_that_can_not_migrate_is_not_used_and_its_receipt_stays(
    load: Load, store: Store, migrated: Any, error: str
) -> None:
    def answer(receipt: Receipt) -> Any:
        if isinstance(migrated, Exception):
            raise migrated
        return migrated

    store.put_receipt(OLD)
    plugins = load(offering(Renaming(migrate=answer)))
    migrate(store, plugins)
    assert plugins.of_kind(VOLUME) == {}
    assert "the receipt of 'a/v' stays at version 1" in plugins.states[0].error
    assert error in plugins.states[0].error
    assert store.receipt("volume", "a/v") == OLD


def test_a_driver_older_than_its_receipts_is_not_used_and_they_stay(load: Load, store: Store) -> None:
    newer = replace(OLD, version=3)
    store.put_receipt(newer)
    plugins = load(offering(PlainVolume()))
    refuse_newer(store, plugins)
    migrate(store, plugins)
    assert store.receipt("volume", "a/v") == newer
    with pytest.raises(WrongState, match="no plugin offers it"):
        plugins.driver(VOLUME, "plain")
    (state,) = plugins.states
    assert (state.state, state.drivers) == ("refused", ())
    assert "has receipts of version 3, and it knows 1 (install the newer plugin again)" in state.error


def test_receipts_of_a_mount_and_of_a_volume_have_versions_of_their_own(load: Load, store: Store) -> None:
    mounted = Receipt("volume", "plain", "i:/x", "i", {"type": "bind", "source": "/", "options": []}, version=2)
    store.put_receipt(mounted)
    plugins = load(offering(PlainVolume()), offering(PlainVolume(), "mount"))
    refuse_newer(store, plugins)
    assert (list(plugins.of_kind(VOLUME)), list(plugins.of_kind(MOUNT))) == (["plain"], [])


@pytest.mark.parametrize(
    ("driver", "error"),
    [
        (PlainVolume(receipt_version=2), "has no verb 'migrate'"),
        (PlainVolume(receipt_version="2"), "receipt_version is '2'"),
        (PlainVolume(receipt_version=0), "receipt_version is 0"),
    ],
)
def test_a_driver_with_versions_has_to_say_how_they_follow(load: Load, driver: Any, error: str) -> None:
    assert error in load(offering(driver)).states[0].error


# -- what an endpoint replaces -------------------------------------------------------------------------------


def attached(store: Store, id: str, container: str, address: str, app: str = "shop") -> Receipt:
    """Note an instance, and its endpoint on shop/front."""
    store.put_instance(
        Instance(id=InstanceId(id), app=app, container=container, generation=1, want=Container(), image="")
    )
    data = {"address": address, "interface": "eth0", "host_interface": f"veth-{id}"}
    made = Receipt("endpoint", "bridge", f"{id}/shop/front", id, data)
    store.put_receipt(made)
    return made


def app_of(**addresses: str) -> App:
    """An app whose containers are to have these addresses on its network."""
    joined = {
        name: Container(networks={"shop/front": Attachment(ipv4_address=address or None)})
        for name, address in addresses.items()
    }
    return App(name="shop", path="shop.toml", containers=joined)


def asked(container: str, address: str) -> EndpointWant:
    return EndpointWant(
        instance="check",
        network=Receipt("network", "bridge", "shop/front"),
        netns=Path("/"),
        interface="eth0",
        default_route=True,
        ipv4_address=address or None,
        app="shop",
        container=container,
    )


def test_an_endpoint_replaces_that_of_the_container_before_it(store: Store) -> None:
    attached(store, "1", "db", "10.0.0.3")
    web = attached(store, "2", "web", "10.0.0.2")
    attached(store, "3", "web", "10.0.0.9", app="other")
    assert predecessor(store, app_of(web="10.0.0.2", db=""), asked("web", "10.0.0.2")) == web
    assert predecessor(store, app_of(web=""), asked("web", "")) == web
    assert predecessor(store, app_of(new=""), asked("new", "")) is None


def test_an_address_that_another_container_gives_up_in_the_same_commit_is_free(store: Store) -> None:
    web = attached(store, "1", "web", "10.0.0.2")
    db = attached(store, "2", "db", "10.0.0.3")
    swapped = app_of(web="10.0.0.3", db="10.0.0.2")
    assert predecessor(store, swapped, asked("web", "10.0.0.3")) == db
    assert predecessor(store, swapped, asked("db", "10.0.0.2")) == web
    assert predecessor(store, app_of(web="10.0.0.3"), asked("web", "10.0.0.3")) == db  # db goes
    both = app_of(web="10.0.0.3", db="10.0.0.3")
    assert predecessor(store, both, asked("web", "10.0.0.3")) == web


# -- names that are taken ------------------------------------------------------------------------------------


def test_no_plugin_takes_the_name_of_what_the_core_mounts_itself(load: Load) -> None:
    plugins = load(offering(PlainVolume(name="volume"), "mount"))
    assert plugins.of_kind(MOUNT) == {}
    assert plugins.states[0].error == "mount driver 'volume': refused, that name is taken by the core"


def test_architecture_names_the_files_that_a_new_kind_of_driver_touches() -> None:
    top = Path(__file__).parents[2]
    section = (top / "ARCHITECTURE.md").read_text().partition("## Add a kind of driver")[2].partition("\n## ")[0]
    files = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert [
        name for name in files if not any((place / name).exists() for place in (top, top / "agent/holdfast"))
    ] == []
    for kind in KINDS:
        entry = {"drivers.py": kind.want.__name__, "hookspecs.py": kind.hook.__name__, "kinds.py": kind.want.__name__}
        for name, word in (*entry.items(), ("plugins/README.md", kind.want.__name__), ("node/wants.py", "Want")):
            assert name in files
            place = top if name.startswith("plugins") else top / "agent/holdfast"
            assert word in (place / name).read_text()


def test_a_verb_that_migrates_wrongly_is_a_fault_of_the_plugin(load: Load) -> None:
    plugins = load(offering(Renaming(migrate=lambda receipt: "done")))
    driver: Any = plugins.driver(VOLUME, "plain")
    with pytest.raises(UnfitHost, match="migrate: returned str"):
        driver.migrate(OLD)
    assert plugins.states[0].state == "raised"
