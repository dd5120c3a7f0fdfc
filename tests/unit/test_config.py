"""agent.toml → Config, or one line for each thing that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from socket import gethostname

import pytest

from holdfast import config as settings
from holdfast.config import (
    CgroupTable,
    Config,
    EnvTable,
    LimitsTable,
    NetworkSettings,
    NodeTable,
    PolicyTable,
    StateSource,
    StorageTable,
    load_config,
)
from holdfast.errors import WrongConfig
from holdfast.spec import NodeFacts

EVERYTHING = """
name = "edge"
state = { git = "https://git.example/state.git", branch = "prod", path = "./nodes/edge/", interval = "1m" }
root = "/srv/edge"
run_root = "/run/edge-agent"
runtime = "/opt/bin/crun"
socket = "/run/edge.sock"
group = "operators"
on_invalid = "reject-revision"
full_pass_interval = "5m"
debounce = "50ms"

[node]
name = "edge-7"
labels = { region = "eu", rack = 4 }

[vars]
domain = "example.org"
debug = true

[env]
allow = ["TOKEN", "ABSENT"]

[network]
pool = "10.77.0.0/16"
allowed_subnets = ["198.51.100.0/24"]
firewall = "mine"

[limits]
start_concurrency = 2

[cgroup]
policy = ["limits", "qos"]

[storage]
driver = "copy"

[policy]
forbid = ["privileged", "host-network"]
bind_roots = ["/srv/media/", "/opt"]

[plugins.nfs]
timeout = 5
servers = ["a"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def wrong(folder: Path, text: str) -> list[str]:
    path = write(folder, text)
    with pytest.raises(WrongConfig) as caught:
        load_config(path, {})
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


def test_every_setting_is_read(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, EVERYTHING), {"TOKEN": "t", "SECRET": "s"}) == Config(
        name="edge",
        state=StateSource(git="https://git.example/state.git", branch="prod", path="nodes/edge", interval=60.0),
        root=Path("/srv/edge"),
        run_root=Path("/run/edge-agent"),
        runtime="/opt/bin/crun",
        socket=Path("/run/edge.sock"),
        group="operators",
        on_invalid="reject-revision",
        full_pass_interval=300.0,
        debounce=0.05,
        node=NodeTable(name="edge-7", labels={"region": "eu", "rack": "4"}),
        vars={"domain": "example.org", "debug": "true"},
        env=EnvTable(allow=("TOKEN", "ABSENT")),
        environment={"TOKEN": "t"},
        network=NetworkSettings(pool="10.77.0.0/16", allowed_subnets=("198.51.100.0/24",), firewall="mine"),
        limits=LimitsTable(start_concurrency=2),
        cgroup=CgroupTable(policy=("limits", "qos")),
        storage=StorageTable(driver="copy"),
        policy=PolicyTable(forbid=("privileged", "host-network"), bind_roots=("/srv/media", "/opt")),
        plugins={"nfs": {"timeout": 5, "servers": ["a"]}},
    )


def test_a_setting_of_a_plugin_is_found_in_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, EVERYTHING)
    where = load_config(path, {}).where(("plugins", "nfs", "servers", 0))
    line = EVERYTHING.splitlines().index('servers = ["a"]') + 1
    assert where == f"{path}:{line}: plugins.nfs.servers[0]"


def test_what_only_a_restart_changes_stays_when_the_file_is_read_again(tmp_path: Path) -> None:
    old = load_config(write(tmp_path, 'name = "a"\nnetwork.pool = "10.1.0.0/16"\n'), {})
    text = 'name = "b"\nnetwork = { pool = "10.2.0.0/16", allowed_subnets = [] }\ndebounce = "1s"\n'
    config, waiting = old.reloaded(load_config(write(tmp_path, text), {}))
    assert waiting == ["name", "root", "run_root", "socket", "network.pool"]
    assert (config.name, config.root, config.network.pool) == ("a", Path("/var/lib/a"), "10.1.0.0/16")
    assert (config.network.allowed_subnets, config.debounce) == ((), 1.0)


def test_capabilities_for_all_containers_are_read_and_checked(tmp_path: Path) -> None:
    found = load_config(write(tmp_path, 'defaults.cap_add = ["net_raw"]\n'), {})
    assert found.facts().cap_add == ("CAP_NET_RAW",)
    assert wrong(tmp_path, 'defaults.cap_add = ["NET_ROW"]\n') == [
        "1: defaults.cap_add[0]: 'NET_ROW' is not a capability (did you mean 'NET_RAW'?)"
    ]


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), {}) == Config(node=NodeTable(name=gethostname()))


def test_places_are_named_after_the_agent(tmp_path: Path) -> None:
    found = load_config(write(tmp_path, 'name = "b"\n'), {})
    assert (found.root, found.run_root, found.socket) == (
        Path("/var/lib/b"),
        Path("/run/b"),
        Path("/run/b/agent.sock"),
    )


def test_the_state_may_be_a_directory(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, 'state = "/srv/state"\n'), {}).state == StateSource(
        directory=Path("/srv/state")
    )


def test_facts_are_what_state_files_may_ask(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, EVERYTHING), {"TOKEN": "t"}).facts() == NodeFacts(
        name="edge-7",
        labels={"region": "eu", "rack": "4"},
        vars={"domain": "example.org", "debug": "true"},
        env={"TOKEN": "t"},
        forbid=frozenset({"privileged", "host-network"}),
        bind_roots=("/srv/media", "/opt"),
        subnets=("198.51.100.0/24", "10.77.0.0/16"),
    )


def test_the_argument_comes_before_the_variable_and_that_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\n')
    monkeypatch.setattr(settings, "DEFAULT_PATH", tmp_path / "c.toml")
    env = {"HOLDFAST_CONFIG": str(tmp_path / "b.toml")}
    assert load_config(tmp_path / "a.toml", env).name == "a"
    assert load_config(None, env).name == "b"
    assert load_config(None, {}).name == "c"


def test_the_default_file_alone_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = tmp_path / "absent.toml"
    with pytest.raises(WrongConfig, match=r"read '.*absent.toml': no such file"):
        load_config(absent, {})
    monkeypatch.setattr(settings, "DEFAULT_PATH", absent)
    assert load_config(None, {}).name == "holdfast"


def test_a_directory_is_no_settings_file(tmp_path: Path) -> None:
    with pytest.raises(WrongConfig, match="is a directory"):
        load_config(tmp_path, {})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name = \n", "1:8: invalid value"),
        ('nam = "x"\n', "1: nam: unknown key 'nam' (did you mean 'name'?)"),
        (
            'name = "Edge"\n',
            "1: name: 'Edge' is not an agent's name (expected a-z and 0-9, at most 8, beginning with a letter)",
        ),
        ('state = "state"\n', "1: state: 'state' is not an absolute path (expected it to start with /)"),
        (
            "state = {}\n",
            '1: state: has neither or both of directory and git (expected a directory, or git = "URL or path")',
        ),
        (
            '[state]\ndirectory = "/x"\nbranch = "y"\n',
            "3: state.branch: does not apply to a directory (expected git as well)",
        ),
        (
            'state = { git = "/x", path = "../y" }\n',
            "1: state.path: '../y' leaves the repository (expected a folder inside it)",
        ),
        (
            'state = { git = "/x", interval = "0s" }\n',
            "1: state.interval: 0 is no time at all (expected a duration as 30s)",
        ),
        (
            'runtime = "docker"\n',
            "1: runtime: 'docker' is not a runtime (expected auto, crun, runc or an absolute path)",
        ),
        (
            'on_invalid = "ignore"\n',
            "1: on_invalid: 'ignore' is not known (expected 'keep-app' or 'reject-revision')",
        ),
        ('full_pass_interval = "0s"\n', "1: full_pass_interval: 0 is no time at all (expected a duration as 30s)"),
        (
            "debounce = 20\n",
            "1: debounce: 20 is not a duration (expected a number and a unit, ms, s, m, h or d, as in '1m30s')",
        ),
        (
            '[network]\npool = "10.0.0.0/8x"\n',
            "2: network.pool: '10.0.0.0/8x' is not an IPv4 network (expected as 10.209.0.0/16)",
        ),
        (
            '[network]\nallowed_subnets = ["10.0.0.1/8"]\n',
            "2: network.allowed_subnets[0]: '10.0.0.1/8' is not an IPv4 network (expected as 10.209.0.0/16)",
        ),
        (
            '[network]\npool = "10.0.0.0/25"\n',
            "2: network.pool: '10.0.0.0/25' has no room for subnets (expected /24 or larger)",
        ),
        ("[limits]\nstart_concurrency = 0\n", "2: limits.start_concurrency: 0 is too small (expected at least 1)"),
        (
            '[policy]\nforbid = [\n  "devices",\n  "privilege",\n]\n',
            "4: policy.forbid[1]: no rule is called 'privilege' (did you mean 'privileged'?)",
        ),
        (
            '[policy]\nbind_roots = ["srv"]\n',
            "2: policy.bind_roots[0]: 'srv' is not an absolute path (expected it to start with /)",
        ),
        ("[vars]\na = [1]\n", "2: vars.a: expected a string, not a list"),
    ],
)
def test_what_is_wrong_is_said_at_its_line(tmp_path: Path, text: str, line: str) -> None:
    assert wrong(tmp_path, text) == [line]


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    found = wrong(tmp_path, '[limits]\nworker = 1\n[nod]\nx = 1\n[node]\nname = 3\n[policy]\nforbid = "x"\n')
    assert [line.partition(" ")[0] for line in found] == ["2:", "3:", "6:", "8:"]
