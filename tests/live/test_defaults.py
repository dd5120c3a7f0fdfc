"""What a default container may do: the table of README.md, line by line, tried from inside."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from footprint import profiles
from holdfast.drivers import Host
from holdfast.runtime import apparmor, device_access
from holdfast.runtime.device_access import Rule
from live.agent import LiveAgent

pytestmark = pytest.mark.live

TOP = Path(__file__).parents[2]
HEAD = "| a process, root or not, may … | by default | changed by |"
PROBE = Path(__file__).with_name("probe.py")
#: The host's Python, for system calls that busybox has no word for.
PYTHON = ["/usr:/usr:ro", "/lib:/lib:ro", "/lib64:/lib64:ro"]
DEFAULT = "default"
SLEEPS = 'image = "busybox:1"\ncommand = ["sleep", "1000"]\ninit = true\n'


def table() -> dict[str, tuple[str, str]]:
    """What is tried → whether a default container may, and the TOML lines that change it."""
    lines = (TOP / "README.md").read_text().partition(HEAD)[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {what: (default, "\n".join(re.findall("`([^`]+)`", change))) for what, default, change in rows}


@pytest.fixture
def tried(agent: LiveAgent, tmp_path: Path) -> dict[str, dict[str, bool]]:
    """What the probe found in a default container, and in one for each change of the table."""
    changes = dict.fromkeys(change for _, change in table().values())
    strict = tmp_path / "strict.json"
    allowed = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [refused("ptrace")]}
    strict.write_text(json.dumps(allowed))
    shutil.copy("/bin/busybox", agent.state / "ping")
    subprocess.run(["setcap", "cap_net_raw+ep", agent.state / "ping"], check=True)
    agent.write("probe.py", PROBE.read_text())
    names = {f"c{number}": change for number, change in enumerate(changes)} | {DEFAULT: ""}
    agent.write("a.toml", "".join(container(agent, name, change, strict) for name, change in names.items()))
    agent.converge()
    return {
        names[name]: json.loads(agent.exec(f"a/{name}", "/usr/bin/python3", "/probe.py", "/ping")) for name in names
    }


def refused(name: str) -> dict[str, object]:
    return {"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}


def container(agent: LiveAgent, name: str, change: str, strict: Path) -> str:
    volumes = [*PYTHON, "./probe.py:/probe.py:ro", f"{agent.state}/ping:/ping:ro"]
    change = change.replace("/etc/holdfast/strict.json", str(strict))
    return f"[containers.{name}]\n{SLEEPS}volumes = {volumes}\n{change}\n"


def test_default_container_may_do_what_the_table_says_and_each_change_changes_it(
    tried: dict[str, dict[str, bool]],
) -> None:
    said = {what: default == "yes" for what, (default, _) in table().items()}
    assert tried[""] == said
    assert {what: tried[change][what] for what, (_, change) in table().items()} == {
        what: not default for what, default in said.items()
    }


def test_compose_default_of_net_raw_is_one_line_of_agent_toml(agent: LiveAgent) -> None:
    agent.configure(more='defaults.cap_add = ["NET_RAW"]')
    agent.restart()
    agent.write("a.toml", f"[containers.c]\n{SLEEPS}")
    agent.converge()
    held = next(line for line in agent.exec("a/c", "cat", "/proc/self/status").splitlines() if "CapBnd" in line)
    assert int(held.split()[1], 16) >> 13 & 1


@pytest.mark.parametrize(
    ("rules", "allowed", "works"),
    [
        ([Rule("c", 1, 7, "rwm")], False, "read-zero zero null"),
        ([Rule("c", 1, None, "w")], False, "read-zero read-full"),
        ([Rule("b", None, None, "m"), Rule("c", 1, 5, "rw"), Rule("c", 1, 3, "w")], True, "read-zero zero null"),
        ([Rule("c", 1, 5, "r")], True, "read-zero"),
        ([], True, ""),
    ],
    ids=str,
)
def test_devices_are_taken_away_in_the_v2_tree_too(site: Host, rules: list[Rule], allowed: bool, works: str) -> None:
    tries = {"read-zero": "< /dev/zero", "read-full": "< /dev/full", "zero": "<> /dev/zero", "null": "> /dev/null"}
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    place = Path(next(target for _, target, kind, *_ in mounts if kind == "cgroup2")) / site.name
    place.mkdir()
    try:
        device_access.attach(str(place), rules, allowed=allowed)
        lines = "".join(f"(: {how}) && echo {name}\n" for name, how in tries.items())
        script = f"exec 2>&1; echo $$ > {place}/cgroup.procs\n{lines}"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
        assert [line for line in done.stdout.splitlines() if line in tries] == works.split()
    finally:
        place.rmdir()


def test_apparmor_refuses_what_the_other_barriers_would_let_through(agent: LiveAgent) -> None:
    if not apparmor.enabled():
        pytest.skip("this kernel does not ask AppArmor")
    open_wide = f'{SLEEPS}cap_add = ["SYS_ADMIN"]\nseccomp = "unconfined"\n'
    agent.write("a.toml", f'[containers.held]\n{open_wide}[containers.free]\n{open_wide}apparmor = "unconfined"\n')
    agent.converge()
    mount = ("sh", "-c", "mount -t tmpfs none /tmp 2>&1 && echo mounted; cat /proc/self/attr/current")
    assert agent.exec("a/free", *mount).startswith("mounted\n")
    said = agent.exec("a/held", *mount)
    assert "mount: mounting none on /tmp failed: Permission denied" in said
    (profile,) = profiles(agent.host)
    assert re.search(rf"(^|//&){re.escape(profile)}(//&\S+)? \((enforce|mixed)\)$", said, re.MULTILINE), said
    assert agent.exec("a/held", "sh", "-c", "sleep 1000 & kill -9 $! && echo ended") == "ended\n"
    agent.write("a.toml", "")
    agent.converge()
    agent.wait(lambda: not profiles(agent.host), "the profile goes with the last container")
