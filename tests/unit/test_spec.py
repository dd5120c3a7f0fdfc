"""State files that are right → the nouns of the model, and the schema of what may be written."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from holdfast.grammar import signals
from holdfast.grammar.quantities import size_text
from holdfast.keys import Table, duration, size
from holdfast.spec import App, Cache, Container, NodeFacts, Spec, json_schema, load
from holdfast.spec.authored import ContainerTable
from holdfast.spec.model import Attachment, Device, Mount, Network, Port, RestartPolicy, Ulimit, digest_of

EXAMPLES = Path(__file__).parents[2] / "examples/state"
NODE = NodeFacts("edge-1", labels={"region": "eu"}, vars={"domain": "example.org"}, env={"HOME": "/root"})

FULL = """
[app]
name = "shop"
depends_on = ["databases"]
when = { nodes = ["edge-*"], labels = { region = "eu" } }

[containers.web]
image = "registry.example:5000/shop/web:1.27"
command = "serve --port '8 0'"
entrypoint = ["/entry"]
working_dir = "/srv/"
user = 1000
environment = { LOG_LEVEL = "info", NODE = "${node.name}", DEBUG = true, N = 3, PRICE = "$$5 $HOME" }
hostname = "web-1.example.org"
labels = ["a=b=c"]
ports = ["8080:80", "127.0.0.1:9090:9090/udp", "8000-8010:9000-9010", "0.0.0.0:1:1",
  { target = 443, published = 8443 }]
networks."databases/back" = {}
networks.front = { aliases = ["www"], ipv4_address = "10.90.1.5", mac_address = "02:42:AC:11:00:02" }
volumes = [
  "data:/data",
  "databases/dump:/dump:ro",
  "./nginx.conf:/etc/nginx/nginx.conf:ro",
  "/srv/./media/:/media:ro",
  { source = "./site", target = "/site", on_change = "HUP" },
  { source = "/var/spool/x", target = "/spool", create_host_path = true },
  { type = "tmpfs", target = "/run", size = "64MiB", mode = "1777" },
]
tmpfs = "/tmp:size=64m,mode=0700,uid=5"
configs = ["motd", { source = "nginx", target = "/n", mode = "0440", uid = 1, gid = 2, on_change = "none" }]
cap_drop = ["ALL"]
cap_add = ["net_bind_service", "CAP_CHOWN"]
privileged = false
no_new_privileges = false
seccomp = "unconfined"
read_only = true
devices = ["/dev/fuse", "/dev/null:/dev/zilch", "/dev/zero:/dev/nought:r",
  { source = "/dev/full", permissions = "rw" }]
sysctls = { "net.core.somaxconn" = 1024 }
ulimits = { nofile = 1024, core = { soft = 0, hard = -1 } }
group_add = ["audio", 44]
init = true
shm_size = "128m"
pid = "host"
ipc = "host"
stop_signal = 15
stop_grace_period = "1m30s"
depends_on = ["api"]
restart = "on-failure:5"
logging = { max_size = "1MB", max_files = 2 }

[containers.web.resources]
memory = "128MiB"
memory_swap = "unlimited"
memory_reservation = "64MiB"
cpus = 0.5
cpu_weight = 1024
cpuset = "0-1"
pids = 200
io_weight = 500
device_read_bps = { "/dev/vda" = "10MiB" }
device_write_bps = { "/dev/vda" = "1MB" }
device_read_iops = { "/dev/vda" = 100 }
device_write_iops = { "/dev/vda" = 1000 }
oom_score_adj = 100
class = "guaranteed"
policy = "limits"

[containers.api]
rootfs = "/srv/root"
command = ["/bin/api"]
depends_on = { job = "completed" }
networks = ["host"]

[containers.api.restart_policy]
policy = "on-failure"
max_attempts = 5
delay = "200ms"
factor = 3
max_delay = "2m"
reset_after = "1h"
jitter = 0.0

[containers.job]
image = "job@sha256:0000000000000000000000000000000000000000000000000000000000000000"
networks = ["none"]

[networks.front]
subnet = "10.90.1.0/24"
gateway = "10.90.1.254"
internal = true
driver_opts = { mtu = 1400 }

[volumes.data]
driver = "managed"
driver_opts = { size = "1G" }
on_remove = "delete"

[configs.motd]
content = "welcome to ${vars.domain}"

[configs.nginx]
file = "./nginx.conf"
"""

DATABASES = """
[networks.back]
[volumes.dump]
"""

FILES = {
    "apps/shop.toml": FULL.encode(),
    "apps/nginx.conf": b"conf",
    "apps/site/index.html": b"<p>",
    "apps/site/deep/x": b"\xff",
    "databases.toml": DATABASES.encode(),
    ".git/config.toml": b"not a state file",
    "apps/.hidden.toml": b"nor this",
    "README.md": b"nor this",
}


def loaded(files: dict[str, bytes], facts: NodeFacts = NODE) -> Spec:
    spec = load(files, facts)
    assert [str(problem) for problem in spec.problems] == []
    return spec


def container(more: str, facts: NodeFacts = NODE) -> Container:
    text = f'[containers.web]\nimage = "a"\n{more}\n'
    return loaded({"shop.toml": text.encode()}, facts).apps["shop"].containers["web"]


@pytest.fixture(scope="module")
def shop() -> App:
    return loaded(FILES).apps["shop"]


@pytest.fixture(scope="module")
def web(shop: App) -> Container:
    return shop.containers["web"]


def test_every_visible_toml_file_is_an_app() -> None:
    assert set(loaded(FILES).apps) == {"shop", "databases"}


def test_an_app_knows_its_path_and_what_it_depends_on(shop: App) -> None:
    assert (shop.path, shop.depends_on) == ("apps/shop.toml", ("databases",))


def test_commands_are_split_as_a_shell_would(web: Container) -> None:
    assert web.command == ("serve", "--port", "8 0")
    assert web.entrypoint == ("/entry",)


def test_scalars_of_the_environment_become_text(web: Container) -> None:
    assert web.environment == {
        "LOG_LEVEL": "info",
        "NODE": "edge-1",
        "DEBUG": "true",
        "N": "3",
        "PRICE": "$5 $HOME",
    }
    assert web.labels == {"a": "b=c"}
    assert (web.user, web.group_add) == ("1000", ("audio", "44"))


def test_ports_have_hosts_ranges_and_protocols(web: Container) -> None:
    assert web.ports == (
        Port(host_port=8080, container_port=80),
        Port(host_ip="127.0.0.1", host_port=9090, container_port=9090, protocol="udp"),
        Port(host_port=8000, container_port=9000, count=11),
        Port(host_port=1, container_port=1),
        Port(host_port=8443, container_port=443),
    )


def test_networks_are_qualified(web: Container) -> None:
    assert web.networks == {
        "shop/front": Attachment(aliases=("www",), ipv4_address="10.90.1.5", mac_address="02:42:ac:11:00:02"),
        "databases/back": Attachment(),
    }


def test_containers_without_networks_join_the_network_of_their_app() -> None:
    app = load_one("[containers.web]\nimage = 'a'\n[containers.db]\nimage = 'b'\n")
    assert [want.networks for want in app.containers.values()] == [{"shop/default": Attachment()}] * 2
    assert app.networks == {"default": Network()}


def test_default_network_of_an_app_may_be_defined_like_any_other() -> None:
    app = load_one("[containers.web]\nimage = 'a'\n[networks.default]\ninternal = true\n")
    assert app.containers["web"].networks == {"shop/default": Attachment()}
    assert app.networks == {"default": Network(internal=True)}


def test_app_has_no_default_network_when_no_container_joins_it() -> None:
    app = load_one("[containers.web]\nimage = 'a'\nnetworks = ['front']\n[networks.front]\n")
    assert app.networks == {"front": Network()}


def test_an_app_or_the_node_may_ask_for_the_shared_bridge() -> None:
    text = "[containers.web]\nimage = 'a'\n"
    shared = load_one(f"[app]\nnetwork = 'bridge'\n{text}")
    assert (shared.containers["web"].networks, shared.networks) == ({"bridge": Attachment()}, {})
    facts = replace(NODE, network="bridge")
    assert load_one(text, facts).containers["web"].networks == {"bridge": Attachment()}
    own = load_one(f"[app]\nnetwork = 'default'\n{text}", facts)
    assert own.containers["web"].networks == {"shop/default": Attachment()}


def test_default_network_of_another_app_is_joined_by_its_name() -> None:
    files = {
        "shop.toml": b"[containers.web]\nimage = 'a'\nnetworks = ['default', 'base/default']\n",
        "base.toml": b"[containers.db]\nimage = 'a'\n",
    }
    spec = load(files, NODE)
    assert spec.problems == ()
    assert list(spec.apps["shop"].containers["web"].networks) == ["shop/default", "base/default"]
    files["base.toml"] = b"[app]\nnetwork = 'bridge'\n" + files["base.toml"]
    (problem,) = load(files, NODE).problems
    assert problem.message == (
        "no network of app 'base' is called 'default' (expected [networks.default] in base.toml)"
    )


def load_one(text: str, facts: NodeFacts | None = None) -> App:
    spec = load({"shop.toml": text.encode()}, facts or NODE)
    assert spec.problems == ()
    return spec.apps["shop"]


def test_host_and_none_stay_as_they_are(shop: App) -> None:
    assert shop.containers["api"].networks == {"host": Attachment()}
    assert shop.containers["job"].networks == {"none": Attachment()}


def test_mounts_are_told_apart_by_their_source(web: Container) -> None:
    assert web.mounts == (
        Mount(kind="volume", source="shop/data", target="/data"),
        Mount(kind="volume", source="databases/dump", target="/dump", read_only=True),
        Mount(kind="file", source="apps/nginx.conf", target="/etc/nginx/nginx.conf", read_only=True),
        Mount(kind="bind", source="/srv/media", target="/media", read_only=True),
        Mount(kind="file", source="apps/site", target="/site", on_change="SIGHUP"),
        Mount(kind="bind", source="/var/spool/x", target="/spool", create_host_path=True),
        Mount(kind="tmpfs", target="/run", size=64 << 20, mode=0o1777),
        Mount(kind="tmpfs", target="/tmp", size=64 << 20, mode=0o700, uid=5),
        Mount(kind="file", source="apps/shop.toml/configs/motd", target="/motd", read_only=True),
        Mount(
            kind="file",
            source="apps/nginx.conf",
            target="/n",
            read_only=True,
            on_change="none",
            mode=0o440,
            uid=1,
            gid=2,
        ),
    )


def test_every_mounted_file_is_in_the_app_with_its_content_beside_it() -> None:
    spec = loaded(FILES)
    contents = {path: spec.blobs[digest] for path, digest in spec.apps["shop"].files.items()}
    assert contents == {
        "apps/nginx.conf": b"conf",
        "apps/site/index.html": b"<p>",
        "apps/site/deep/x": b"\xff",
        "apps/shop.toml/configs/motd": b"welcome to example.org",
    }


def test_a_changed_file_changes_the_digest_of_the_app() -> None:
    before = loaded(FILES).apps["shop"].digest
    after = loaded({**FILES, "apps/site/index.html": b"<h1>"}).apps["shop"].digest
    assert before != after


def test_capabilities_are_spelled_as_the_runtime_spells_them(web: Container) -> None:
    assert (web.cap_add, web.cap_drop) == (("CAP_NET_BIND_SERVICE", "CAP_CHOWN"), ("ALL",))


def test_devices_limits_and_kernel_settings(web: Container) -> None:
    assert web.devices == (
        Device(source="/dev/fuse", target="/dev/fuse"),
        Device(source="/dev/null", target="/dev/zilch"),
        Device(source="/dev/zero", target="/dev/nought", permissions="r"),
        Device(source="/dev/full", target="/dev/full", permissions="rw"),
    )
    assert web.ulimits == {"nofile": Ulimit(soft=1024, hard=1024), "core": Ulimit(soft=0, hard=-1)}
    assert web.sysctls == {"net.core.somaxconn": "1024"}
    assert web.shm_size == 128 << 20


def test_resources_come_in_bytes_and_cores(web: Container) -> None:
    assert web.resources.model_dump() == {
        "memory": 128 << 20,
        "memory_swap": -1,
        "memory_reservation": 64 << 20,
        "cpus": 0.5,
        "cpu_weight": 1024,
        "cpuset": "0-1",
        "pids": 200,
        "io_weight": 500,
        "device_read_bps": {"/dev/vda": 10 << 20},
        "device_write_bps": {"/dev/vda": 1_000_000},
        "device_read_iops": {"/dev/vda": 100},
        "device_write_iops": {"/dev/vda": 1000},
        "oom_score_adj": 100,
        "service_class": "guaranteed",
        "policy": ("limits",),
    }


def test_the_end_of_a_container_is_described(shop: App, web: Container) -> None:
    assert (web.stop_signal, web.stop_grace_period) == ("SIGTERM", 90.0)
    assert web.restart_policy == RestartPolicy(policy="on-failure", max_attempts=5)
    assert shop.containers["api"].restart_policy == RestartPolicy(
        policy="on-failure", max_attempts=5, delay=0.2, factor=3.0, max_delay=120.0, reset_after=3600.0, jitter=0.0
    )
    assert (web.depends_on, shop.containers["api"].depends_on) == ({"api": "started"}, {"job": "completed"})


def test_networks_and_volumes_keep_their_settings(shop: App) -> None:
    front, data = shop.networks["front"], shop.volumes["data"]
    assert (front.subnet, front.gateway, front.internal) == ("10.90.1.0/24", "10.90.1.254", True)
    assert front.driver_opts == {"mtu": "1400"}
    assert (data.driver, data.driver_opts, data.on_remove) == ("managed", {"size": "1G"}, "delete")


def test_what_is_not_said_is_the_models_default() -> None:
    assert container("") == Container(image="a", networks={"shop/default": Attachment()})


def test_an_app_goes_through_json_and_back(shop: App) -> None:
    again = App.model_validate(json.loads(json.dumps(shop.model_dump(mode="json"))))
    assert again == shop
    assert again.digest == shop.digest == digest_of(shop.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("64MiB", 64 << 20),
        ("64m", 64 << 20),
        ("64MB", 64_000_000),
        ("1.5g", 3 << 29),
        ("7", 7),
        ("2 KiB", 2048),
        (5, 5),
    ],
)
def test_sizes_are_read_as_docker_reads_them(text: str | int, number: int) -> None:
    assert size(text) == number


def test_sizes_are_shown_in_their_largest_whole_unit() -> None:
    assert [size_text(number) for number in (64 << 20, 1536, 1000, 0)] == [
        "64MiB",
        "1536 bytes",
        "1000 bytes",
        "0 bytes",
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("100ms", 0.1), ("1m30s", 90), ("2h", 7200), ("1d", 86400), ("0.5s", 0.5), ("0", 0), ("3650d", 315_360_000)],
)
def test_durations_add_their_parts_up(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["3651d", "3650d1ms", "300000d", "99999999999999d"])
def test_a_duration_that_no_clock_counts_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^'{text}' is longer than .* \(expected at most 3650d\)$"):
        duration(text)


@pytest.mark.parametrize(
    ("written", "name", "number"),
    [
        ('"term"', "SIGTERM", 15),
        ("9", "SIGKILL", 9),
        ('"SIGRTMIN+3"', "SIGRTMIN+3", 37),
        ('"RTMAX-1"', "SIGRTMAX-1", 63),
    ],
)
def test_signals_have_one_spelling_and_a_number(written: str, name: str, number: int) -> None:
    assert container(f"stop_signal = {written}").stop_signal == name
    assert signals.number_of(name) == number


@pytest.mark.parametrize(
    "image",
    [
        "busybox",
        "busybox:1.36",
        "localhost/app:dev",
        "localhost:5000/app",
        "ghcr.io/a/b/c:v1",
        "a__b/c--d.e:X_1",
        "[::1]:5000/app",
        "docker/compose:1",
        "library/app@sha256:" + "0" * 64,
    ],
)
def test_image_references_of_all_kinds_are_taken(image: str) -> None:
    text = f'[containers.web]\nimage = "{image}"\n'.encode()
    assert loaded({"a.toml": text}).apps["a"].containers["web"].image == image


def test_variables_have_defaults_and_the_nodes_vars_win() -> None:
    text = '[containers.web]\nimage = "${vars.image}:${vars.tag:-1}"\nhostname = "${node.labels.region}"\n'
    text += 'environment = { H = "${env.HOME}", D = "${vars.domain}", E = "a${vars.none:-}b", L = "$${x}" }\n'
    files = {"a.toml": text.encode(), "vars.toml": b'image = "app"\ndomain = "shared"\n'}
    web = loaded(files).apps["a"].containers["web"]
    assert (web.image, web.hostname) == ("app:1", "eu")
    assert web.environment == {"H": "/root", "D": "example.org", "E": "ab", "L": "${x}"}


def test_an_app_of_other_nodes_is_left_out() -> None:
    text = b'[app]\nwhen = { nodes = ["core-*"] }\n[containers.web]\nimage = "a"\nports = ["80:80"]\n'
    spec = loaded({"other.toml": text, "mine.toml": text.replace(b"core", b"edge")})
    assert list(spec.apps) == ["mine"]


def test_one_name_may_be_two_apps_of_two_nodes() -> None:
    text = b'[app]\nname = "web"\nwhen = { labels = { region = "eu" } }\n[containers.web]\nimage = "eu"\n'
    spec = loaded({"a.toml": text.replace(b'"eu"', b'"us"'), "b.toml": text})
    assert spec.apps["web"].containers["web"].image == "eu"


def test_one_port_may_be_published_at_two_addresses() -> None:
    web = container('ports = ["127.0.0.1:80:80", "127.0.0.2:80:80", "127.0.0.1:80:80/udp"]')
    assert len(web.ports) == 3


def many(count: int) -> dict[str, bytes]:
    app = '[containers.c{0}]\nimage = "a:1"\nports = ["{1}:80"]\nnetworks = ["front"]\n'
    head = "[networks.front]\n[volumes.data]\n"
    return {
        f"app{n}.toml": (head + "".join(app.format(i, 10_000 + n * 10 + i) for i in range(10))).encode()
        for n in range(count // 10)
    }


def test_a_thousand_unchanged_containers_are_not_read_again() -> None:
    files, cache = many(1000), Cache()
    first = load(files, NODE, cache=cache)
    assert not first.problems
    again = {path: bytes(bytearray(text)) for path, text in files.items()}  # equal, not the same
    assert load(again, NODE, cache=cache) is first


def test_only_a_changed_file_is_read_again() -> None:
    files, cache = dict(FILES), Cache()
    first = load(files, NODE, cache=cache)
    files["databases.toml"] += b"[networks.other]\n"
    second = load(files, NODE, cache=cache)
    assert second.apps["shop"] is first.apps["shop"]
    assert set(second.apps["databases"].networks) == {"back", "other"}


def test_other_facts_are_other_values() -> None:
    cache = Cache()
    load(FILES, NODE, cache=cache)
    other = NodeFacts("edge-2", labels=NODE.labels, vars=NODE.vars)
    assert load(FILES, other, cache=cache).apps["shop"].containers["web"].environment["NODE"] == "edge-2"


def test_changed_shared_vars_reach_every_file() -> None:
    text = b'[containers.web]\nimage = "${vars.x}"\n'
    cache = Cache()
    for tag in (b"a", b"b"):
        spec = load({"s.toml": text, "vars.toml": b'x = "' + tag + b'"\n'}, NODE, cache=cache)
        assert spec.apps["s"].containers["web"].image == tag.decode()


SCHEMA = json_schema()


def valid(text: str) -> bool:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return not list(validator.iter_errors(tomllib.loads(text)))


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("text", [FULL, DATABASES], ids=["everything", "little"])
def test_what_loads_is_valid(text: str) -> None:
    assert valid(text)


def test_every_example_loads_and_is_valid() -> None:
    found = sorted(EXAMPLES.rglob("*.toml"))
    assert found
    assert all(valid(path.read_text()) for path in found if path.name != "vars.toml")
    files = {str(path.relative_to(EXAMPLES)): path.read_bytes() for path in EXAMPLES.rglob("*") if path.is_file()}
    loaded(files)


@pytest.mark.parametrize(
    "more",
    [
        "comand = 'x'",
        "healthcheck = {}",
        "ports = [true]",
        "read_only = 'yes'",
        "[containers.web.resources]\ncpus = 'x'",
    ],
)
def test_the_schema_refuses_what_the_language_refuses(more: str) -> None:
    assert not valid(f'[containers.web]\nimage = "a"\n{more}\n')


def tables_of(kind: type[Table]) -> set[str]:
    return {key for key, _ in kind.names()}


def every_table(kind: type[Table]) -> Iterator[type[Table]]:
    for each in kind.__subclasses__():
        yield each
        yield from every_table(each)


def test_every_key_of_every_table_is_in_the_schema() -> None:
    schemas: dict[str, Any] = {**SCHEMA["$defs"], "StateFile": SCHEMA}
    found = {name: set(schema["properties"]) for name, schema in schemas.items() if "properties" in schema}
    tables = {kind.__name__: kind for kind in every_table(Table)}
    assert found == {name: tables_of(tables[name]) for name in found}
    assert {"ContainerTable", "Mount", "Resources", "RestartTable", "ImageTable", "Volume"} <= found.keys()
    assert all(schema["additionalProperties"] is False for schema in schemas.values() if "properties" in schema)


def test_every_field_of_a_container_can_be_written() -> None:
    named_otherwise = {"mounts": {"volumes", "tmpfs", "configs"}, "restart_policy": {"restart", "restart_policy"}}
    written = set().union(*(named_otherwise.get(name, {name}) for name in Container.model_fields))
    assert written == tables_of(ContainerTable)


LEFT_OUT = {
    "conf/sub": "a git submodule",
    "conf/big": "a git LFS pointer",
    "away": "a symbolic link that leads out",
    "elsewhere/x": "a pipe",
    "src/skipped/link": "a symbolic link that leads nowhere",
    "bad/link": "a symbolic link that leads nowhere",
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'volumes = ["./conf:/c"]',
            "it lacks: 'conf/big', a git LFS pointer, 'conf/sub', a git submodule",
        ),
        (
            'volumes = ["./conf/sub/file:/c"]',
            "is not in this revision: 'conf/sub' is a git submodule",
        ),
        ('volumes = ["./away:/c"]', "'away' is not in this revision: 'away' is a symbolic link that leads out"),
        ('configs = ["k"]\n[configs.k]\nfile = "./conf/big"', "'conf/big' is a git LFS pointer"),
        (
            '[images.i]\ncontext = "./bad"',
            "it lacks: 'bad/link', a symbolic link that leads nowhere",
        ),
        ('[images.i]\ncontext = "./conf/sub"', "'conf/sub' is a git submodule"),
    ],
)
def test_what_lacks_something_of_the_revision_is_refused_with_the_reason(text: str, said: str) -> None:
    files = {
        "shop.toml": f'[containers.web]\nimage = "nginx"\n{text}\n'.encode(),
        "conf/own": b"x",
        "bad/Dockerfile": b"FROM scratch\n",
    }
    (problem,) = load(files, NodeFacts("node"), left_out=LEFT_OUT).problems
    assert said in problem.message


def test_what_a_context_does_not_need_may_be_left_out() -> None:
    files = {
        "shop.toml": b'[images.i]\ncontext = "./src"\n[containers.web]\nimage = "images.i"\nvolumes = ["./ok:/c"]\n',
        "src/Dockerfile": b"FROM scratch\n",
        "src/.dockerignore": b"skipped\n",
        "ok": b"x",
    }
    assert load(files, NodeFacts("node"), left_out=LEFT_OUT).problems == ()


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ({"apps/shop.toml": "a git LFS pointer"}, "is not in this revision: 'apps/shop.toml' is a git LFS pointer"),
        ({"apps": "a symbolic link that leads out"}, "is not in this revision: 'apps' is a symbolic link that leads"),
    ],
)
def test_an_app_whose_state_file_is_left_out_stays_as_it_is(left_out: dict[str, str], said: str) -> None:
    here = load(
        {"apps/shop.toml": b'[app]\nname = "store"\n[containers.web]\nimage = "nginx"\n'}, NodeFacts("node")
    ).apps
    spec = load({}, NodeFacts("node"), left_out=left_out, in_force=here)
    assert spec.broken == {"apps/shop.toml": "store"}
    (problem,) = spec.problems
    assert said in problem.message


def test_a_state_file_that_was_never_here_and_is_left_out_is_told() -> None:
    spec = load({}, NodeFacts("node"), left_out={"shop.toml": "a symbolic link that leads nowhere", "x": "a socket"})
    assert spec.broken == {"shop.toml": "shop"}
    assert [problem.path for problem in spec.problems] == ["shop.toml"]


def test_a_toml_file_that_a_context_leaves_out_is_no_app() -> None:
    files = {
        "shop.toml": b'[images.i]\ncontext = "./src"\n[containers.web]\nimage = "images.i"\n',
        "src/Dockerfile": b"FROM scratch\n",
        "src/.dockerignore": b"tests\n",
    }
    left_out = {"src/tests/pyproject.toml": "a symbolic link that leads nowhere"}
    assert load(files, NodeFacts("node"), left_out=left_out).problems == ()


def test_vars_that_are_left_out_do_not_become_their_defaults() -> None:
    files = {"shop.toml": b'[containers.web]\nimage = "nginx:${vars.tag:-old}"\n'}
    spec = load(files, NodeFacts("node"), left_out={"vars.toml": "a git LFS pointer"})
    assert spec.broken == {"shop.toml": "shop"}
    assert [(problem.path, problem.message) for problem in spec.problems] == [
        ("vars.toml", "is not in this revision: it is a git LFS pointer")
    ]


@pytest.mark.parametrize(
    "text",
    [
        '[app\nname = "store"\n',
        '[app]\nname = "market"\n[containers.web]\nimag = "nginx"\n',
        '[app]\nname = "market"\n[containers.web]\nimage = "nginx"\ndepends_on = ["gone/db"]\n',
    ],
)
def test_an_app_with_a_name_of_its_own_stays_when_its_file_does_not_load_any_more(text: str) -> None:
    here = load({"shop.toml": b'[app]\nname = "store"\n[containers.web]\nimage = "nginx"\n'}, NodeFacts("node")).apps
    spec = load({"shop.toml": text.encode()}, NodeFacts("node"), in_force=here)
    assert spec.broken == {"shop.toml": "store"}
    assert spec.apps == {}


def test_a_file_that_becomes_a_program_is_another_file() -> None:
    files = {"shop.toml": b'[containers.web]\nimage = "nginx"\nvolumes = ["./run:/run.sh"]\n', "run": b"x"}
    cache = Cache()
    before = load(files, NodeFacts("node"), cache=cache).apps["shop"]
    after = load(files, NodeFacts("node"), cache=cache, executable=frozenset({"run"})).apps["shop"]
    assert before.files != after.files
    assert before.digest != after.digest


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('ports = ["27000-:80"]', "host port is not a number"),
        ('ports = ["27000:80-"]', "container port is not a number"),
        ('ports = [{ published = "1-", target = 80 }]', "'1-' is not a number"),
        ('resources = { cpuset = "0-" }', "not a list of CPUs"),
        ('restart = "on-failure:²"', "on-failure:N"),
        ("environment = { V = 1.50 }", "the number 1.5 would lose how it is written"),
        ("labels = { V = 1e3 }", "the number 1000.0 would lose how it is written"),
        ('hostname = "a\\u001b[2Jb"', r"'a\\x1b[2Jb' is not a host name"),
    ],
)
def test_values_that_only_look_right_are_refused(line: str, said: str) -> None:
    text = f'[containers.web]\nimage = "nginx"\n{line}\n'
    (problem,) = load({"shop.toml": text.encode()}, NodeFacts("node")).problems
    assert said.replace(r"\\", "\\") in problem.message
    assert problem.line == 3


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    text = b'\xef\xbb\xbf[containers.web]\nimage = "nginx"\n'
    assert load({"shop.toml": text}, NodeFacts("node")).problems == ()
    (problem,) = load({"shop.toml": "[app]".encode("utf-16")}, NodeFacts("node")).problems
    assert "UTF-16 (expected UTF-8)" in problem.message


def test_yaml_files_that_nobody_mounts_are_named() -> None:
    files = {
        "shop.toml": b'[containers.web]\nimage = "nginx"\nvolumes = ["./conf:/c", "./one.yml:/one.yml"]\n',
        **dict.fromkeys(("compose.yaml", "conf/a.yaml", "one.yml", ".github/ci.yml"), b"x: y"),
    }
    (hint,) = load(files, NodeFacts("node")).hints
    assert hint.startswith("compose.yaml: this is YAML")


CLASH = b'[containers.web]\nimage = "shop/web:1"\nports = ["8080:80"]\n'


def test_of_two_that_want_one_port_the_newcomer_is_refused() -> None:
    here = load({"zebra.toml": CLASH}, NodeFacts(name="node")).apps
    both = {"ant.toml": CLASH, "zebra.toml": CLASH}
    assert load(both, NodeFacts(name="node")).broken == {"zebra.toml": "zebra"}
    assert load(both, NodeFacts(name="node"), in_force=here).broken == {"ant.toml": "ant"}


def test_an_app_that_wants_one_more_port_keeps_the_one_it_has() -> None:
    here = load({"zebra.toml": CLASH}, NodeFacts(name="node")).apps
    more = CLASH.replace(b'"8080:80"', b'"8080:80", "9090:90"')
    spec = load({"ant.toml": CLASH, "zebra.toml": more}, NodeFacts(name="node"), in_force=here)
    assert spec.broken == {"ant.toml": "ant"}


def test_a_driver_that_no_plugin_offers_is_refused_where_that_is_known() -> None:
    files = {
        "shop.toml": b'[containers.web]\nimage = "a:1"\nresources = { policy = ["limits", "quota"] }\n'
        b'[volumes.data]\ndriver = "manged"\n[networks.front]\ndriver = "macvlan"\n'
    }
    assert not load(files, NodeFacts(name="node")).problems
    drivers = {
        kind: dict.fromkeys(names)
        for kind, names in {"volume": ["managed"], "network": ["bridge"], "policy": ["limits"]}.items()
    }
    lines = [str(problem) for problem in load(files, NodeFacts(name="node", drivers=drivers)).problems]
    none, hint = "no plugin offers the", "or its plugin to be installed)"
    assert lines == [
        f"shop.toml:3: containers.web.resources.policy[1]: {none} policy driver 'quota' (expected limits, {hint}",
        f"shop.toml:5: volumes.data.driver: {none} volume driver 'manged' (did you mean 'managed'?)",
        f"shop.toml:7: networks.front.driver: {none} network driver 'macvlan' (expected bridge, {hint}",
    ]
