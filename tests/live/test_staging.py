"""Nothing that runs is stopped for a successor that can't start: what can be known is found while staging."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from ground import Rootfs
from live.agent import LiveAgent, Status

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

SLEEPER = """
image = "links:1"
init = true
networks = ["none"]
stop_grace_period = "0s"
command = ["sleep", "1000"]
"""
OLD = f"[containers.c]{SLEEPER}"


def pack(rootfs: Path, tar: Path) -> Path:
    subprocess.run(["tar", "-C", rootfs, "--numeric-owner", "-cf", tar, "."], check=True)
    return tar


@pytest.fixture
def image(agent: LiveAgent, busybox_rootfs: Rootfs, tmp_path: Path) -> LiveAgent:
    """The agent, with an image that has links, and files that only look like programs, as `links:1`."""
    root = tmp_path / "image"
    shutil.copytree(busybox_rootfs.path, root, symlinks=True)
    (root / "srv/app").mkdir(parents=True)
    (root / "srv/app/there").write_text("x")
    (root / "app").symlink_to("/srv/app")
    (root / "var").mkdir(exist_ok=True)
    (root / "run").mkdir(exist_ok=True)
    (root / "var/run").symlink_to("../run")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("/srv/new")
    for name, text in {
        "crlf": b"#!/bin/sh\r\nsleep 1000\n",
        "lost": b"#!/usr/bin/python3\n",
        "text": b"sleep 1000\n",
        "empty": b"",
        "far": b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 22) + bytes(44),
        "loader": b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1)
        + bytes(6) + struct.pack("<IIQQQQQQ", 3, 4, 120, 120, 120, 16, 16, 1) + b"/lib/ld-musl.so\0",
    }.items():  # fmt: skip
        (root / "bin" / name).write_bytes(text)
        (root / "bin" / name).chmod(0o755)
    tar = pack(root, tmp_path / "links.tar")
    agent.image("links:1", tar)
    agent.cli("image", "import", "-c", "STOPSIGNAL banana", str(tar), "banana:1")
    return agent


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """A folder of the host with something of each kind."""
    place = tmp_path / "host"
    (place / "folder/inner").mkdir(parents=True)
    (place / "file").write_text("x")
    (place / "plain").write_text("#!/bin/sh\n")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place / "socket"))
    yield place
    listener.close()


# name → (what the next commit adds to [containers.c], further tables, what is said of it)
FAULTS: dict[str, tuple[str, str, str]] = {
    "directory-on-file": ('volumes = ["HOST/folder:/etc/passwd"]', "", "can't be mounted on a file"),
    "directory-on-file-by-link": ('volumes = ["HOST/folder:/app/there"]', "", "'/srv/app/there' of the image"),
    "file-on-directory": ('volumes = ["HOST/file:/etc"]', "", "can't be mounted on a directory"),
    "socket-on-directory": ('volumes = ["HOST/socket:/app"]', "", "can't be mounted on a directory"),
    "file-on-mounted-directory": ('volumes = ["HOST/folder:/x", "HOST/file:/x/inner"]', "", "on a directory"),
    "volume-on-file": ('volumes = ["v:/etc/passwd"]', "[volumes.v]", "can't be mounted on a file"),
    "tmpfs-on-file": ('tmpfs = "/etc/passwd"', "", "can't be mounted on a file"),
    "config-on-directory": (
        'configs = [{ source = "k", target = "/etc" }]', '[configs.k]\ncontent = "x"', "on a directory",
    ),
    "repository-folder-on-file": ('volumes = ["./files:/etc/passwd"]', "", "can't be mounted on a file"),
    "mount-below-file": ('volumes = ["HOST/folder:/etc/passwd/x"]', "", "'/etc/passwd' of the image is not a dir"),
    "mount-in-a-loop": ('volumes = ["HOST/folder:/loop/x"]', "", "is not a directory"),
    "mount-in-read-only": ('volumes = ["HOST/folder:/x:ro", "v:/x/new"]', "[volumes.v]", "is read-only"),
    "mount-in-repository": ('volumes = ["./files:/x:ro", "v:/x/new"]', "[volumes.v]", "is read-only"),
    "mount-in-proc": ('volumes = ["HOST/file:/proc/nothing"]', "", "is read-only and has no such entry"),
    "mount-in-sys": ('volumes = ["HOST/folder:/sys/nothing"]', "", "is read-only and has no such entry"),
    "name-too-long": (f'volumes = ["HOST/folder:/{"x" * 256}"]', "", "too long"),
    "source-missing": ('volumes = ["HOST/none:/x"]', "", "no such file or directory"),
    "source-name-too-long": (f'volumes = ["HOST/{"x" * 256}:/x"]', "", "too long"),
    "source-below-file": (
        'volumes = [{ source = "HOST/file/x", target = "/x", create_host_path = true }]', "", "not a directory",
    ),
    "working-dir-is-file": ('working_dir = "/etc/passwd"', "", "is not a directory"),
    "working-dir-below-file": ('working_dir = "/etc/passwd/x"', "", "is not a directory"),
    "working-dir-in-read-only": ('working_dir = "/x/new"\nvolumes = ["HOST/folder:/x:ro"]', "", "is read-only"),
    "program-missing": ('command = ["nothing"]', "", "not found in PATH"),
    "program-missing-by-link": ('command = ["/app/none"]', "", "no such file in the image"),
    "program-missing-on-host": ('command = ["/x/none"]\nvolumes = ["HOST/folder:/x"]', "", "no such file in 'HOST"),
    "program-missing-in-repository": ('command = ["/x/none"]\nvolumes = ["./files:/x"]', "", "no such file in 'f"),
    "program-not-executable": ('command = ["/x"]\nvolumes = ["HOST/plain:/x"]', "", "is not executable"),
    "program-hidden": ('command = ["/app/there"]\ntmpfs = "/srv"', "", "no such file in the tmpfs"),
    "program-without-interpreter": ('command = ["lost"]', "", "'/usr/bin/python3', which is not there"),
    "program-of-windows": ('command = ["crlf"]', "", "is not there"),
    "program-without-loader": ('command = ["loader"]', "", "'/lib/ld-musl.so', which is not there"),
    "program-of-another-machine": ('init = false\ncommand = ["far"]', "", "another machine"),
    "program-is-text": ('init = false\ncommand = ["text"]', "", "neither a program nor a script"),
    "program-is-empty": ('init = false\ncommand = ["empty"]', "", "is empty"),
    "argument-too-long": (f'command = ["sleep", "{"x" * 131_072}"]', "", "131072 bytes"),
    "user-unknown": ('user = "nobody-here"', "", "not in the container's /etc/passwd"),
    "user-hidden": ('user = "nobody"\nvolumes = ["HOST/file:/etc/passwd"]', "", "not in the container's /etc/passwd"),
    "signal-of-the-image": ('image = "banana:1"', "", "signal 'banana' is not a signal"),
    "device-missing": ('devices = ["HOST/file:/dev/x"]', "", "no such device"),
    "device-on-file": ('devices = ["/dev/null:/etc/passwd"]', "", "is there already"),
    "device-below-file": ('devices = ["/dev/null:/etc/passwd/x"]', "", "is not a directory"),
    "sysctl-unknown": ('networks = ["bridge"]\nsysctls = { "net.ipv4.nothing" = "1" }', "", "has no such setting"),
    "sysctl-refused": ('networks = ["bridge"]\nsysctls = { "net.ipv4.ip_forward" = "x" }', "", "the kernel refuses"),
    "seccomp-missing": ('seccomp = "HOST/none"', "", "no such file"),
    "rlimit-beyond-the-kernel": ("ulimits = { nofile = 4294967296 }", "", "4294967296 is more than"),
    "cpu-missing": ("[containers.c.resources]\ncpuset = '4000'", "", "there is no CPU 4000"),
    "memory-too-small": ("read_only = true\n[containers.c.resources]\nmemory = '4KiB'", "", "too little"),
}  # fmt: skip


def commit(text: str, more: str) -> str:
    """SLEEPER with what is added in place of the keys that it has already."""
    keys = {line.partition("=")[0].strip() for line in more.splitlines() if not line.startswith("[")}
    kept = [line for line in text.splitlines() if line.partition("=")[0].strip() not in keys]
    return "\n".join([*kept, more])


def test_whatever_is_wrong_with_its_successor_a_container_runs_on(image: LiveAgent, host: Path) -> None:
    agent, names = image, [f"app{number}" for number in range(8)]
    agent.write("files/note", "x")
    for name in names:
        agent.write(f"{name}.toml", OLD)
    agent.converge()
    before = {name: agent.pid(f"{name}/c") for name in names}
    tried, wrong = dict.fromkeys(names, 0.0), {}

    def told(app: Status, tried: float) -> bool:
        return (app["failed_at"] or 0) > tried or app["state"] == "invalid" or app["generation"] != 1

    for faults in batched(FAULTS, len(names)):
        trying = dict(zip(names, faults, strict=False))
        for name, fault in trying.items():
            more, tables, _ = FAULTS[fault]
            agent.write(f"{name}.toml", f"{commit(OLD, more.replace('HOST', str(host)))}\n{tables}\n")
        status = agent.wait_until(
            lambda status, trying=trying: all(told(status["apps"][name], tried[name]) for name in trying)  # type: ignore[misc]
        )
        for name, fault in trying.items():
            app = status["apps"][name]
            tried[name] = app["failed_at"] or tried[name]
            if FAULTS[fault][2].replace("HOST", str(host)) not in str(app["reason"]):
                wrong[fault] = app["reason"]
    assert wrong == {}
    assert {name: agent.pid(f"{name}/c") for name in names} == before


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


LINKED = {
    "program-by-link": ('command = ["/app/prog"]', "HOST:/srv/app"),
    "target-by-link": ('command = ["/srv/app/prog"]', "HOST:/app"),
    "path-by-link": ('command = ["prog"]\nenvironment = { PATH = "/app:/bin" }', "HOST:/srv/app"),
    "relative-link": ('command = ["/var/run/x/prog"]', "HOST:/run/x"),
    "dangling-link": ('command = ["/srv/new/prog"]', "HOST:/dangling"),
    "working-dir": ('command = ["./prog"]\nworking_dir = "/app"', "HOST:/srv/app"),
    "program-of-the-repository": ('command = ["/prog"]', "./tools/prog:/prog"),
    "folder-of-the-repository": ('command = ["/app/prog"]', "./tools:/srv/app:ro"),
    "made-by-the-one-before": ('command = ["/app/made"]\ndepends_on = { first = "completed" }', "HOST:/srv/app"),
}


def test_programs_and_mounts_are_found_through_the_links_of_the_image(image: LiveAgent, host: Path) -> None:
    agent, text = image, "#!/bin/sh\nsleep 1000\n"
    for place in (host / "prog", agent.state / "tools/prog"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
        place.chmod(0o755)
    for name, (more, volume) in LINKED.items():
        container = f"{OLD.replace('init = true', '')}volumes = ['{volume.replace('HOST', str(host))}']"
        agent.write(f"{name}.toml", commit(container, more) + MAKER.replace("HOST", str(host)) * ("made" in name))
    agent.converge(120)
    for name in LINKED:
        agent.pid(f"{name}/c")


MAKER = """
[containers.first]
image = "links:1"
networks = ["none"]
command = ["cp", "/h/prog", "/h/made"]
volumes = ["HOST:/h"]
"""


def test_users_are_those_of_the_passwd_that_is_mounted(image: LiveAgent, host: Path) -> None:
    agent = image
    (host / "passwd").write_text("tom:x:4321:4322::/home/tom:/bin/sh\n")
    agent.write("app.toml", OLD + f"user = 'tom'\nvolumes = ['{host}/passwd:/etc/passwd:ro']\n")
    agent.converge()
    assert agent.exec("app/c", "id", "-u").strip() == "4321"


def test_a_container_that_stays_as_it_is_holds_up_no_commit_for_another(agent: LiveAgent, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    stays = f"[containers.stays]{SLEEPER}volumes = ['{folder}:/x']\n".replace("links:1", "busybox:1")
    changes = f"[containers.changes]{SLEEPER}".replace("links:1", "busybox:1")
    agent.write("app.toml", stays + changes)
    agent.converge()
    pid = agent.pid("app/stays")
    folder.rmdir()
    agent.write("app.toml", stays + changes + "environment = { NEW = '1' }\n")
    agent.converge()
    assert agent.pid("app/stays") == pid
    agent.write("app.toml", stays + "environment = { NEW = '1' }\n" + changes)
    agent.wait_until(lambda status: "no such" in str(status["apps"]["app"]["reason"]))
    assert agent.pid("app/stays") == pid
