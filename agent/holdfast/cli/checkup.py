"""Check this host, for `holdfast doctor`. Only reads; starts programs only to ask for their versions."""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast.cli.command import reach
from holdfast.config import Config
from holdfast.daemon.compose import refused
from holdfast.drivers import Host
from holdfast.errors import HoldfastError, UnfitHost
from holdfast.questions import Questions
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
Verdict = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. warn: containers run, with limitations."""

    subject: str
    verdict: Verdict
    detail: str
    remedy: str = ""


def judged(
    subject: str, good: object, detail: str, otherwise: str = "", remedy: str = "", verdict: Verdict = "warn"
) -> Check:
    """A check that is ok if `good`, and else `verdict`, told by `otherwise` or by the same words."""
    return Check(subject, "ok", detail) if good else Check(subject, verdict, otherwise or detail, remedy)


def checkup(config: Config) -> Iterator[Check]:
    """Check everything that the agent needs on this host."""
    yield root()
    yield name(config)
    release = platform.release()
    needed = "5.3 or newer is needed (pidfd_open)"
    yield judged("kernel", numbers(release) >= NEEDED_KERNEL, release, remedy=needed, verdict="bad")
    yield from cgroups()
    yield from service_manager(config.name)
    yield runtime(config.runtime)
    yield from programs()
    yield from builds()
    package = "apt-get install golang-github-containers-common"
    yield judged("seccomp profile", SECCOMP.is_file(), str(SECCOMP), f"no {SECCOMP}", package, "bad")
    yield from confinement()
    yield overlay()
    yield from network()
    yield from findings(config)
    yield resolvers()
    yield space(config.root)
    watches = int(read("/proc/sys/fs/inotify/max_user_watches") or 0)
    more = "sysctl fs.inotify.max_user_watches=65536"
    yield judged("inotify watches", watches >= FEW_WATCHES, f"{watches} allowed", remedy=more)
    yield from answers()


def read(path: Path | str) -> str:
    """Read a small file; "" if it does not exist or is not readable."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def numbers(release: str) -> tuple[int, ...]:
    """The first two numbers of a kernel's release."""
    return tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())


def root() -> Check:
    if os.geteuid() != 0:
        return Check("root", "bad", f"uid {os.geteuid()}", "run the agent and this command as root")
    without = "without CAP_SYS_RESOURCE: limits are clamped to this process's, oom_score_adj can't be lowered"
    remedy = "give the agent CAP_SYS_RESOURCE if state files ask for more"
    return judged("root", binaries.host_limits().may_exceed, "with CAP_SYS_RESOURCE", without, remedy)


def name(config: Config) -> Check:
    """Whether the agent's name is free on this host."""
    if os.geteuid() != 0:
        return Check("name", "ok", f"{config.name}; only root may see who uses it")
    try:
        why = refused(config)
    except UnfitHost as error:
        return Check("name", "bad", str(error), "put the id of the root back (8 hex digits), or take the file away")
    free = f"{config.name} is free for {config.root}, or its own"
    return judged("name", not why, free, why, "choose another name in agent.toml", "bad")


def cgroups() -> Iterator[Check]:
    """The layout of cgroups, and which tree has the controllers that limits need."""
    unified = read(CGROUP / "cgroup.controllers").split()
    hybrid = read(CGROUP / "unified" / "cgroup.controllers").split()
    v1 = [line.split()[0] for line in read("/proc/cgroups").splitlines()[1:] if line.split()[1] != "0"]
    if not (unified or v1):
        yield Check("cgroups", "bad", f"nothing is mounted at {CGROUP}", "mount -t cgroup2 cgroup2 /sys/fs/cgroup")
        return
    layout = "v2" if unified else "hybrid: v1 and v2" if (CGROUP / "unified").is_dir() else "v1"
    wanted = [name.replace("blkio", "io") if unified else name for name in CONTROLLERS]
    missing = [name for name in wanted if name not in (unified or v1)]
    without = f"{layout}, without {', '.join(missing)}"
    remedy = "enable these controllers on the kernel's command line: their limits can't be held"
    yield judged("cgroups", not missing, layout, without, remedy)
    if hybrid and not unified:
        owned = ",".join(hybrid)
        mount = f"mkdir -p {CGROUP}/{hybrid[0]} && mount -t cgroup -o {owned} cgroup {CGROUP}/{hybrid[0]}"
        refused = f"v2 owns {owned}: crun refuses such a host, runc is used"
        yield Check("cgroups: crun", "warn", refused, f"to use crun: {mount}")


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
    good, otherwise = (f"{who} the containers when the host goes down" for who in (f"{unit} stops", "nothing stops"))
    remedy = f"install packaging/{unit}, systemctl enable --now {unit}"
    yield judged("systemd: shutdown", asked.stdout.strip() == "active", good, otherwise, remedy)


def runtime(setting: str) -> Check:
    try:
        found = binaries.find_runtime(setting)
    except UnfitHost as error:
        return Check("runtime", "bad", str(error), "apt-get install crun runc")
    passed = [name for name in binaries.CANDIDATES if name != found.name]
    others = "; ".join(f"{name} {binaries.obstacle_for(name)}" for name in passed if binaries.obstacle_for(name))
    why = f'runtime = "{setting}"' + (f"; {others}" if others and setting == "auto" else "")
    return Check("runtime", "ok", f"{found.name} {found.version} at {found.path} ({why})")


PROGRAMS: Sequence[tuple[str, Verdict, str]] = (
    ("conmon", "bad", ""),
    ("git", "warn", ": needed when `state` is a git repository"),
    ("skopeo", "warn", ": needed to pull images"),
    ("buildah", "warn", ": needed for [images.*], which are built here"),
)


def programs() -> Iterator[Check]:
    for name, without, purpose in PROGRAMS:
        path = binaries.find_program(name)
        found = f"{binaries.version_of(path)} at {path}" if path else ""
        yield judged(name, path, found, f"not installed{purpose}", f"apt-get install {name}", without)
    init = binaries.find_init()
    yield judged("init", init, str(init), "neither catatonit nor tini (for init = true)", "apt-get install catatonit")


def builds() -> Iterator[Check]:
    """Whether images can be built in a sandbox here, and what is refused with this version of buildah."""
    from holdfast.images.builds.hazards import KNOWN, SAFE, buildah_version, is_safe

    path, release = binaries.find_program("buildah"), platform.release()
    if path is None:
        return
    version = buildah_version(path)
    told = ".".join(map(str, version)) if version else "of unknown version"
    if numbers(release) < FENCE_KERNEL:
        yield Check("builds", "warn", release, "Linux 5.12 or newer is needed for [images.*]")
    elif read("/proc/sys/user/max_user_namespaces") == "0":
        yield Check("builds", "warn", "no user namespaces", "sysctl user.max_user_namespaces=1000, for [images.*]")
    else:
        yield judged(
            "builds",
            is_safe(version),
            "each in a root, a user namespace and a cgroup of its own",
            f"buildah {told}: {KNOWN}; the host is out of reach, but RUN --mount with `from` and `source` is refused",
            f"buildah {'.'.join(map(str, SAFE))} or newer, if Dockerfiles need that",
        )


def confinement() -> Iterator[Check]:
    """Whether AppArmor profiles can be loaded, where the kernel has AppArmor."""
    if apparmor.enabled():
        parser = binaries.find_program("apparmor_parser")
        good = f"on; {parser} loads the profile of the containers"
        without = "on, but without apparmor_parser containers get no profile"
        yield judged("AppArmor", parser, good, without, "apt-get install apparmor")


def overlay(known: Path = FILE_SYSTEMS, modules: Path = MODULES) -> Check:
    """Whether overlayfs can be mounted; where it is a module, the first mount of its kind loads it."""
    module = "/overlay.ko" in read(modules / platform.release() / "modules.dep")
    if module and "overlay" not in read(known).split():
        return Check("overlayfs", "ok", "a module of the kernel, loaded when first needed")
    there = "overlay" in read(known).split()
    return judged("overlayfs", there, "known to the kernel", "not known to the kernel", "modprobe overlay", "bad")


def network() -> Iterator[Check]:
    """What the firewall and bridges need, and who else decides about forwarded packets.

    An accept in our table does not undo a drop in theirs.
    """
    found = [str(each) for each in (ctypes.util.find_library("nftables"), binaries.find_program("nft")) if each]
    without = "neither libnftables nor nft"
    yield judged("nftables", found, " and ".join(found), without, "apt-get install nftables", "bad")
    on = read("/proc/sys/net/ipv4/ip_forward") == "1"
    yield Check("ip_forward", "ok", "on" if on else "off: turned on when the first bridge needs it")
    if "ENABLED=yes" in read("/etc/ufw/ufw.conf"):
        yield Check("ufw", "warn", "active: a reload flushes rules", "ufw route allow in on the agent's bridges")
    if Path("/run/firewalld").is_dir() or Path("/var/run/firewalld.pid").exists():
        yield Check("firewalld", "warn", "active", "add the agent's bridges to a zone that accepts forwarding")


def findings(config: Config) -> Iterator[Check]:
    """What drivers find that others did to this host, as in `status` and `plan`."""
    from holdfast.plugins import load_plugins

    if os.geteuid() == 0:
        host = Host(config.name, config.root, config.run_root, config.network.pool)
        for found in load_plugins(host, settings=config.plugins).findings():
            yield Check(found.subject, "warn", found.text, found.remedy)


def resolvers() -> Check:
    lines = [line.split() for line in read("/etc/resolv.conf").splitlines()]
    servers = [words[1] for words in lines if words[:1] == ["nameserver"] and len(words) > 1]
    outside = [server for server in servers if not server.startswith("127.") and server != "::1"]
    upstream = Path("/run/systemd/resolve/resolv.conf")
    if not outside and upstream.exists():
        return Check("name servers", "ok", f"loopback only; containers get those of {upstream}")
    otherwise = "loopback only: not reachable from containers" if servers else "none in /etc/resolv.conf"
    remedy = "name one in /etc/resolv.conf that is not on loopback"
    return judged("name servers", outside, ", ".join(outside), otherwise, remedy)


def space(place: Path) -> Check:
    """Free space where images, volumes and writable layers are kept."""
    there = next((parent for parent in (place, *place.parents) if parent.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    remedy = "free some, or set `root` in agent.toml to a larger file system"
    return judged("disk space", free >= LITTLE_SPACE, f"{free / (1 << 30):.1f}GiB free at {place}", remedy=remedy)


def answers() -> Iterator[Check]:
    """What the agent knows, or the node itself if no agent runs."""
    try:
        with reach() as node:
            yield from list(known_to(node))
    except HoldfastError as error:
        yield Check("plugins", "warn", str(error))


def known_to(node: Questions) -> Iterator[Check]:
    found, status = node.plugins(), node.status()
    wrong = [each for each in found if each["state"] != "ok"]
    for each in wrong:
        yield Check(f"plugin {each['name']}", "warn", f"{each['state']}: {each['error']}")
    if not wrong:
        yield Check("plugins", "ok", ", ".join(each["name"] for each in found))
    lines = [f"{subject}: {why}" for subject, why in status["foreign"].items()]
    if lines:  # what belongs to another root, or was made by somebody else
        more = [f"{len(lines) - SHOWN} more in `holdfast status`"] if len(lines) > SHOWN else []
        yield Check("not ours", "warn", "; ".join(lines[:SHOWN] + more), "remove it by hand if nobody needs it")
    source = status["source"]
    yield judged("state", not source["error"], f"read from {source['url']}", source["error"])
