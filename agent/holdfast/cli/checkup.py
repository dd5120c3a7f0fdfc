"""Check this host, for `holdfast doctor`. Only reads; starts programs only to ask for their versions."""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast.cli.command import reach
from holdfast.config import Config
from holdfast.daemon.compose import refused
from holdfast.drivers import Host
from holdfast.errors import HoldfastError, UnfitHost
from holdfast.runtime import apparmor, binaries, delegation

SECCOMP = Path("/usr/share/containers/seccomp.json")
CGROUP = Path("/sys/fs/cgroup")
FILE_SYSTEMS = Path("/proc/filesystems")
MODULES = Path("/lib/modules")
NEEDED_KERNEL = (5, 3)  # pidfd_open(2)
FENCE_KERNEL = (5, 12)  # mount_setattr(2), and overlayfs in a user namespace
SHOWN = 3  # objects that are not ours, by name
LITTLE_SPACE = 1 << 30
FEW_WATCHES = 8192
CONTROLLERS = ("cpu", "memory", "pids", "cpuset", "blkio")


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. warn: containers run, with limitations."""

    subject: str
    verdict: Literal["ok", "warn", "bad"]
    detail: str
    remedy: str = ""


def judged(
    subject: str, good: object, detail: str, otherwise: str, remedy: str, verdict: Literal["warn", "bad"] = "warn"
) -> Check:
    """A check that is ok if `good`, and else `verdict`."""
    return Check(subject, "ok", detail) if good else Check(subject, verdict, otherwise, remedy)


def checkup(config: Config | None) -> Iterator[Check]:
    """Check everything that the agent needs on this host. config: None for its defaults."""
    yield root()
    yield name(config)
    yield kernel()
    yield from cgroups()
    yield from service_manager(config.name if config else "holdfast")
    yield runtime(config.runtime if config else "auto")
    yield from programs()
    yield from builds()
    yield seccomp()
    yield from confinement()
    yield overlay()
    yield firewall()
    yield forwarding()
    yield from other_firewalls()
    yield from findings(config or Config())
    yield resolvers()
    yield space(config.root if config else Path("/var/lib/holdfast"))
    yield watches()
    yield from answers()


def read(path: Path | str) -> str:
    """Read a small file; "" if it does not exist or is not readable."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def root() -> Check:
    if os.geteuid() == 0:
        limits = binaries.host_limits()
        if limits.may_exceed:
            return Check("root", "ok", "with CAP_SYS_RESOURCE")
        told = "without CAP_SYS_RESOURCE: limits are clamped to this process's, oom_score_adj can't be lowered"
        return Check("root", "warn", told, "give the agent CAP_SYS_RESOURCE if state files ask for more")
    return Check("root", "bad", f"uid {os.geteuid()}", "run the agent and this command as root")


def name(config: Config | None) -> Check:
    """Whether the agent's name is free on this host."""
    if config is None:
        return Check("name", "ok", "not looked at")
    if os.geteuid() != 0:
        return Check("name", "ok", f"{config.name}; only root may see who uses it")
    try:
        why = refused(config)
    except UnfitHost as error:
        return Check("name", "bad", str(error), "put the id of the root back (8 hex digits), or take the file away")
    if why:
        return Check("name", "bad", why, "choose another name in agent.toml")
    return Check("name", "ok", f"{config.name} is free for {config.root}, or its own")


def kernel() -> Check:
    release = platform.release()
    remedy = "5.3 or newer is needed (pidfd_open)"
    return judged("kernel", numbers(release) >= NEEDED_KERNEL, release, release, remedy, "bad")


def numbers(release: str) -> tuple[int, ...]:
    """The first two numbers of a kernel's release."""
    return tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())


def cgroups() -> Iterator[Check]:
    """The layout of cgroups, and which tree has the controllers that limits need."""
    unified = read(CGROUP / "cgroup.controllers").split()
    hybrid = read(CGROUP / "unified" / "cgroup.controllers").split()
    v1 = sorted(line.split()[0] for line in read("/proc/cgroups").splitlines()[1:] if line.split()[1] != "0")
    if unified:
        missing = [name for name in CONTROLLERS if name.replace("blkio", "io") not in unified]
        yield Check("cgroups", "warn" if missing else "ok", "v2" + lacking(missing), enable(missing))
        return
    if not v1:
        yield Check("cgroups", "bad", f"nothing is mounted at {CGROUP}", "mount -t cgroup2 cgroup2 /sys/fs/cgroup")
        return
    missing = [name for name in CONTROLLERS if name not in v1]
    layout = "hybrid: v1 and v2" if (CGROUP / "unified").is_dir() else "v1"
    yield Check("cgroups", "warn" if missing else "ok", layout + lacking(missing), enable(missing))
    if hybrid:
        owned = ",".join(hybrid)
        yield Check(
            "cgroups: crun",
            "warn",
            f"v2 owns {owned}: crun refuses such a host, runc is used",
            f"to use crun: mkdir -p {CGROUP}/{hybrid[0]} && mount -t cgroup -o {owned} cgroup {CGROUP}/{hybrid[0]}",
        )


def service_manager(name: str) -> Iterator[Check]:
    """With systemd: whether containers have their own cgroup, and whether a shutdown stops them."""
    if not delegation.BOOTED.is_dir():
        return
    host = Host(name, Path(), Path(), cgroup_root=delegation.place_of(name))
    if host.cgroup_root and delegation.used(host) and not delegation.keeps(host):
        remedy = "stop all containers, or reboot: it is delegated again when none is left"
        yield Check("systemd: cgroup", "warn", f"nobody keeps {host.cgroup_root}", remedy)
    unit = "holdfast-shutdown.service"
    words = ["systemctl", "is-active", unit]
    asked = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if asked.stdout.strip() == "active":
        yield Check("systemd: shutdown", "ok", f"{unit} stops the containers when the host goes down")
    else:
        remedy = f"install packaging/{unit}, systemctl enable --now {unit}"
        yield Check("systemd: shutdown", "warn", "nothing stops the containers when the host goes down", remedy)


def lacking(missing: list[str]) -> str:
    return f", without {', '.join(missing)}" if missing else ""


def enable(missing: list[str]) -> str:
    return "enable these controllers on the kernel's command line: their limits can't be held" if missing else ""


def runtime(setting: str) -> Check:
    try:
        found = binaries.find_runtime(setting)
    except UnfitHost as error:
        return Check("runtime", "bad", str(error), "apt-get install crun runc")
    passed = [name for name in binaries.CANDIDATES if name != found.name]
    others = "; ".join(f"{name} {binaries.obstacle_for(name)}" for name in passed if binaries.obstacle_for(name))
    why = f'runtime = "{setting}"' + (f"; {others}" if others and setting == "auto" else "")
    return Check("runtime", "ok", f"{found.name} {found.version} at {found.path} ({why})")


def programs() -> Iterator[Check]:
    yield program("conmon", "bad", "conmon")
    yield program("git", "warn", "git", "needed when `state` is a git repository")
    yield program("skopeo", "warn", "skopeo", "needed to pull images")
    yield program("buildah", "warn", "buildah", "needed for [images.*], which are built here")
    init = binaries.find_init()
    yield judged("init", init, str(init), "neither catatonit nor tini (for init = true)", "apt-get install catatonit")


def builds() -> Iterator[Check]:
    """Whether images can be built in a sandbox here, and what is refused with this version of buildah."""
    from holdfast.images.builds.hazards import KNOWN, SAFE, buildah_version, is_safe

    path = binaries.find_program("buildah")
    if path is None:
        return
    if numbers(platform.release()) < FENCE_KERNEL:
        yield Check("builds", "warn", platform.release(), "Linux 5.12 or newer is needed for [images.*]")
    elif read("/proc/sys/user/max_user_namespaces") == "0":
        yield Check("builds", "warn", "no user namespaces", "sysctl user.max_user_namespaces=1000, for [images.*]")
    elif is_safe(version := buildah_version(path)):
        yield Check("builds", "ok", "each in a root, a user namespace and a cgroup of its own")
    else:
        told = ".".join(map(str, version)) if version else "of unknown version"
        yield Check(
            "builds",
            "warn",
            f"buildah {told}: {KNOWN}; the host is out of reach, but RUN --mount with `from` and `source` is refused",
            f"buildah {'.'.join(map(str, SAFE))} or newer, if Dockerfiles need that",
        )


def program(name: str, without: Literal["warn", "bad"], package: str, told: str = "") -> Check:
    path = binaries.find_program(name)
    if path is None:
        return Check(name, without, "not installed" + (f": {told}" if told else ""), f"apt-get install {package}")
    return Check(name, "ok", f"{binaries.version_of(path)} at {path}")


def seccomp() -> Check:
    package = "apt-get install golang-github-containers-common"
    return judged("seccomp profile", SECCOMP.is_file(), str(SECCOMP), f"no {SECCOMP}", package, "bad")


def confinement() -> Iterator[Check]:
    """Whether AppArmor profiles can be loaded, where the kernel has AppArmor."""
    if apparmor.enabled():
        parser = binaries.find_program("apparmor_parser")
        good = f"on; {parser} loads the profile of the containers"
        without = "on, but without apparmor_parser containers get no profile"
        yield judged("AppArmor", parser, good, without, "apt-get install apparmor")


def overlay(known: Path = FILE_SYSTEMS, modules: Path = MODULES) -> Check:
    """Whether overlayfs can be mounted; where it is a module, the first mount of its kind loads it."""
    if "overlay" in read(known).split():
        return Check("overlayfs", "ok", "known to the kernel")
    if "/overlay.ko" in read(modules / platform.release() / "modules.dep"):
        return Check("overlayfs", "ok", "a module of the kernel, loaded when first needed")
    return Check("overlayfs", "bad", "not known to the kernel", "modprobe overlay")


def firewall() -> Check:
    found = [str(each) for each in (ctypes.util.find_library("nftables"), binaries.find_program("nft")) if each]
    without = "neither libnftables nor nft"
    return judged("nftables", found, " and ".join(found), without, "apt-get install nftables", "bad")


def forwarding() -> Check:
    on = read("/proc/sys/net/ipv4/ip_forward") == "1"
    return Check("ip_forward", "ok", "on" if on else "off: turned on when the first bridge needs it")


def findings(config: Config) -> Iterator[Check]:
    """What drivers find that others did to this host, as in `status` and `plan`."""
    from holdfast.plugins import load_plugins

    if os.geteuid() == 0:
        host = Host(config.name, config.root, config.run_root, config.network.pool)
        for found in load_plugins(host, settings=config.plugins).findings():
            yield Check(found.subject, "warn", found.text, found.remedy)


def other_firewalls() -> Iterator[Check]:
    """Who else decides about forwarded packets: an accept in our table does not undo a drop in theirs."""
    if "ENABLED=yes" in read("/etc/ufw/ufw.conf"):
        yield Check("ufw", "warn", "active: a reload flushes rules", "ufw route allow in on the agent's bridges")
    if Path("/run/firewalld").is_dir() or Path("/var/run/firewalld.pid").exists():
        yield Check("firewalld", "warn", "active", "add the agent's bridges to a zone that accepts forwarding")


def resolvers() -> Check:
    lines = [line.split() for line in read("/etc/resolv.conf").splitlines()]
    servers = [words[1] for words in lines if words[:1] == ["nameserver"] and len(words) > 1]
    outside = [server for server in servers if not server.startswith("127.") and server != "::1"]
    if outside:
        return Check("name servers", "ok", ", ".join(outside))
    upstream = Path("/run/systemd/resolve/resolv.conf")
    if upstream.exists():
        return Check("name servers", "ok", f"loopback only; containers get those of {upstream}")
    told = "loopback only: not reachable from containers" if servers else "none in /etc/resolv.conf"
    return Check("name servers", "warn", told, "name one in /etc/resolv.conf that is not on loopback")


def space(place: Path) -> Check:
    """Free space where images, volumes and writable layers are kept."""
    there = next((parent for parent in (place, *place.parents) if parent.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    told = f"{free / (1 << 30):.1f}GiB free at {place}"
    if free < LITTLE_SPACE:
        return Check("disk space", "warn", told, "free some, or set `root` in agent.toml to a larger file system")
    return Check("disk space", "ok", told)


def watches() -> Check:
    limit = int(read("/proc/sys/fs/inotify/max_user_watches") or 0)
    told, remedy = f"{limit} allowed", "sysctl fs.inotify.max_user_watches=65536"
    return judged("inotify watches", limit >= FEW_WATCHES, told, told, remedy)


def answers() -> Iterator[Check]:
    """What the agent knows, or the node itself if no agent runs."""
    try:
        with reach() as node:
            status = node.status()
            found = [*plugins(node.plugins()), *not_ours(status["foreign"]), state(status["source"])]
    except HoldfastError as error:
        found = [Check("plugins", "warn", str(error))]
    yield from found


def plugins(found: Sequence[Mapping[str, str]]) -> Iterator[Check]:
    """What is wrong with plugins, and which ones this node needs but lacks."""
    wrong = [each for each in found if each["state"] != "ok"]
    for each in wrong:
        yield Check(f"plugin {each['name']}", "warn", f"{each['state']}: {each['error']}")
    if not wrong:
        yield Check("plugins", "ok", ", ".join(each["name"] for each in found))


def not_ours(foreign: Mapping[str, str]) -> Iterator[Check]:
    """What has the agent's name but belongs to another root, or was made by somebody else, all in one line."""
    if foreign:
        shown = "; ".join(f"{subject}: {why}" for subject, why in list(foreign.items())[:SHOWN])
        more = f"; {len(foreign) - SHOWN} more in `holdfast status`" if len(foreign) > SHOWN else ""
        yield Check("not ours", "warn", shown + more, "remove it by hand if nobody needs it")


def state(found: Mapping[str, str]) -> Check:
    """Whether the state can be read."""
    return (
        Check("state", "warn", found["error"])
        if found["error"]
        else Check("state", "ok", f"read from {found['url']}")
    )
