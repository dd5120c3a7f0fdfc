"""What state files say of volumes, mounts and confinement, seen from inside the containers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from ground import patient
from live.agent import HOLDFAST, LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]  # a busy machine takes its time

SLEEPER = """
image = "busybox:1"
init = true
command = "sleep 1000"
networks = ["none"]
"""


def orphans(agent: LiveAgent) -> list[str]:
    return [each["id"] for each in json.loads(agent.cli("volume", "list", "--json").stdout) if each["orphan"]]


def test_volumes_are_filled_shared_kept_listed_and_pruned(agent: LiveAgent) -> None:
    text = f"""
[containers.one]{SLEEPER}volumes = ["data:/etc", "gone:/gone"]
[containers.two]{SLEEPER}volumes = ["data:/data:ro", "shop/gone:/gone"]
[volumes.data]
[volumes.gone]
on_remove = "delete"
"""
    agent.write("shop.toml", text.replace('"shop/gone:/gone"', '"gone:/gone"'))
    agent.write("reader.toml", f'[containers.web]{SLEEPER}volumes = ["shop/data:/data"]')
    agent.converge()
    assert "root:x:0:0" in agent.exec("shop/two", "cat", "/data/passwd")  # filled from the image's /etc
    agent.exec("shop/one", "sh", "-c", "echo kept > /etc/mark; echo lost > /gone/mark")
    assert agent.exec("shop/two", "cat", "/data/mark") == "kept\n"
    assert agent.exec("reader/web", "cat", "/data/mark") == "kept\n"
    assert agent.cli("exec", "shop/two", "touch", "/data/x", check=False).returncode != 0
    assert orphans(agent) == []
    agent.remove("reader.toml")
    agent.remove("shop.toml")
    agent.converge()
    assert orphans(agent) == ["shop/data"]
    agent.write("shop.toml", text.replace('"shop/gone:/gone"', '"gone:/gone"'))
    agent.converge()
    assert agent.exec("shop/one", "cat", "/etc/mark") == "kept\n"
    assert agent.exec("shop/one", "ls", "/gone") == ""
    assert agent.cli("volume", "remove", "shop/data", check=False).returncode != 0
    agent.remove("shop.toml")
    agent.converge()
    assert "shop/data" in agent.cli("volume", "prune", "--force").stdout
    assert agent.cli("volume", "list").stdout.strip() == "no volumes"


def test_a_prune_spares_what_an_agent_mounts_by_the_time_the_question_is_answered(agent: LiveAgent) -> None:
    text = f'[containers.one]{SLEEPER}volumes = ["data:/data"]\n[volumes.data]\n'
    agent.write("shop.toml", text)
    agent.converge()
    agent.remove("shop.toml")
    agent.converge()
    agent.stop()
    prune = subprocess.Popen(
        [HOLDFAST, "volume", "prune"], env={**os.environ, "HOLDFAST_CONFIG": str(agent.config)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert prune.stdout is not None
    assert prune.stdout.read(len("delete shop/data")) == "delete shop/data"
    agent.write("shop.toml", text)
    agent.start()
    agent.converge()
    agent.exec("shop/one", "touch", "/data/kept")
    assert "removed" not in prune.communicate("y\n", timeout=patient(60))[0]
    assert agent.exec("shop/one", "ls", "/data") == "kept\n"


def test_mounts_are_as_they_were_asked_for(agent: LiveAgent, tmp_path: Path) -> None:
    source = tmp_path / "media"
    source.mkdir()
    (source / "song").write_text("la")
    agent.write(
        "shop.toml",
        f"""
[containers.web]{SLEEPER}
volumes = [
  "{source}:/media:ro",
  "{source}:/rw",
  {{ type = "bind", source = "{tmp_path}/made", target = "/made", create_host_path = true }},
  {{ type = "tmpfs", target = "/scratch", size = "1MiB", mode = "0700" }},
  "./page.html:/srv/page.html:ro",
]
tmpfs = "/tmp:size=2m"
shm_size = "8MiB"
""",
    )
    agent.write("page.html", "<p>hello")
    agent.converge()
    assert agent.exec("web", "cat", "/media/song", "/srv/page.html") == "la<p>hello"
    assert agent.cli("exec", "web", "touch", "/media/x", check=False).returncode != 0
    agent.exec("web", "sh", "-c", "echo out > /rw/new; echo out > /made/new")
    assert (source / "new").read_text() == (tmp_path / "made" / "new").read_text() == "out\n"
    sizes = agent.exec("web", "sh", "-c", "df -k /scratch /tmp /dev/shm | awk 'NR>1 {print $2}'").split()
    assert sizes == ["1024", "2048", "8192"]
    assert agent.exec("web", "stat", "-c", "%a", "/scratch") == "700\n"
    assert agent.cli("exec", "web", "dd", "if=/dev/zero", "of=/scratch/x", "bs=1M", "count=2", check=False).returncode


def test_confinement_is_as_it_was_asked_for(agent: LiveAgent) -> None:
    agent.write(
        "shop.toml",
        f"""
[containers.plain]{SLEEPER}
[containers.bound]{SLEEPER}
read_only = true
user = "nobody"
group_add = ["4242"]
cap_drop = ["ALL"]
cap_add = ["NET_BIND_SERVICE"]
hostname = "harbour"
sysctls = {{ "net.ipv4.ip_unprivileged_port_start" = "0" }}
ulimits = {{ nofile = 512 }}
working_dir = "/var"
environment = {{ NODE = "${{node.name}}", PRICE = "5$$" }}
[containers.almighty]{SLEEPER}
privileged = true
devices = ["/dev/null:/dev/nothing:rw"]
""",
    )
    agent.converge()

    def caps(name: str) -> int:
        (line,) = [
            line for line in agent.exec(name, "cat", "/proc/1/status").splitlines() if line.startswith("CapEff")
        ]
        return int(line.split()[1], 16)

    def field(name: str, key: str) -> str:
        found = agent.exec(name, "cat", "/proc/1/status").splitlines()
        return next(line.partition(":")[2].strip() for line in found if line.startswith(f"{key}:"))

    assert caps("plain") == 0xA80405FB  # Docker's default set without NET_RAW
    assert field("plain", "Seccomp") == "2"
    assert field("plain", "NoNewPrivs") == "1"
    assert agent.exec("plain", "hostname").strip() == "plain"
    assert (caps("bound") | 1 << 10) == 1 << 10
    assert field("bound", "Uid").split()[0] == "65534"
    assert "4242" in field("bound", "Groups").split()
    script = "hostname; ulimit -n; pwd; echo $NODE $PRICE; cat /proc/sys/net/ipv4/ip_unprivileged_port_start"
    assert agent.exec("bound", "sh", "-c", script).split() == ["harbour", "512", "/var", "node", "5$", "0"]
    assert agent.cli("exec", "bound", "touch", "/var/x", check=False).returncode != 0
    assert caps("almighty") > caps("plain")
    assert field("almighty", "Seccomp") == "0"
    assert agent.exec("almighty", "sh", "-c", "test -c /dev/nothing && test -e /dev/kmsg && echo yes") == "yes\n"
    assert "sleep" not in field("plain", "Name")  # but an init
