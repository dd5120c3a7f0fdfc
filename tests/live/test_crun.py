"""The whole agent on crun, also where crun refuses the host: there it runs in a mount namespace that hides why.

A v2 tree that owns a controller beside v1 hierarchies makes crun refuse (see `runtime.binaries`). In a mount
namespace of its own the v2 tree is shown without controllers, and nothing else differs; the host is left as it is.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from ground import patient
from holdfast.drivers import Host
from holdfast.runtime.binaries import obstacle_for
from live.agent import LiveAgent

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("mounts_alone"), pytest.mark.timeout(600)]

CONTROLLERS = "/sys/fs/cgroup/unified/cgroup.controllers"
HIDE = f'mount --bind /dev/null {CONTROLLERS} && exec "$@"'
HIDDEN = ("unshare", "--mount", "--propagation", "slave", "sh", "-c", HIDE, "sh")


def test_crun_carries_an_app_from_its_first_start_to_nothing(
    new_agent: Callable[[Host], LiveAgent], site: Host, free_port: Callable[[], int]
) -> None:
    agent, port = new_agent(site), free_port()
    agent.through = HIDDEN if obstacle_for("crun") else ()
    agent.configure(more='runtime = "crun"' if not agent.through else 'runtime = "auto"')
    agent.start()
    agent.image("busybox:1")
    agent.write("index.html", "hello")
    text = f"""
        [containers.web]
        image = "busybox:1"
        init = true
        command = ["httpd", "-f", "-p", "80", "-h", "/www"]
        ports = ["{port}:80"]
        networks = ["front"]
        volumes = ["data:/data", "./index.html:/www/index.html:ro"]
        restart = "always"
        read_only = true
        user = "1000:1000"
        sysctls = {{ "net.ipv4.ip_unprivileged_port_start" = "0", "kernel.domainname" = "shop" }}
        [containers.web.resources]
        memory = "32MiB"
        pids = 50
        [networks.front]
        [volumes.data]
        on_remove = "delete"
    """
    agent.write("shop.toml", text)
    agent.converge()
    agent.wait(lambda: page(port) == "hello", "the page is served")
    first = agent.pid("shop/web")

    agent.write("shop.toml", text.replace("32MiB", "48MiB"))
    agent.converge()
    assert agent.pid("shop/web") == first
    assert memory_limit(site, agent) == 48 << 20

    agent.write("index.html", "changed")
    agent.converge()
    agent.wait(lambda: page(port) == "changed", "the new page is served")
    assert agent.pid("shop/web") != first
    assert "Seccomp:\t2" in Path(f"/proc/{agent.pid('shop/web')}/status").read_text()  # by the filter of the first

    agent.remove("shop.toml")
    agent.converge()
    assert not agent.status()["apps"]


def page(port: int) -> str:
    """What is served, "" while nobody listens: a container that runs need not do so yet."""
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=patient(5)) as answer:
        text: bytes = answer.read()
        return text.decode()
    return ""


def memory_limit(site: Host, agent: LiveAgent) -> int:
    (instance,) = agent.instances("shop/web")
    v1 = Path(f"/sys/fs/cgroup/memory{site.cgroup}/{instance['id']}/memory.limit_in_bytes")
    v2 = Path(f"/sys/fs/cgroup{site.cgroup}/{instance['id']}/memory.max")
    return int((v1 if v1.exists() else v2).read_text())
