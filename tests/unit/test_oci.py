"""config.json: Docker's semantics, field by field."""

from __future__ import annotations

import errno
import os
import posixpath
import subprocess
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import UnfitHost, WrongState
from holdfast.grammar.capabilities import ALL
from holdfast.runtime import apparmor, binaries, conmon, device_access, oci, seccomp, users
from holdfast.runtime.capabilities import DEFAULT
from holdfast.runtime.devices import DeviceNode
from holdfast.runtime.executables import Candidate, check_size, find_executable
from holdfast.spec.model import Container, Resources, Ulimit

IMAGE = {
    "config": {
        "Entrypoint": ["/entry"],
        "Cmd": ["serve"],
        "Env": ["PATH=/app/bin", "LEVEL=info"],
        "WorkingDir": "/srv",
        "StopSignal": "SIGQUIT",
    }
}
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nweb:x:101:102::/var/www:/bin/false\n"
GROUP = b"root:x:0:\nweb:x:102:\nvideo:x:44:web,other\naudio:x:29:\n"


def read_file(path: str) -> bytes | None:
    return {"/etc/passwd": PASSWD, "/etc/group": GROUP}.get(path)


def make(want: Container, **given: Any) -> oci.OciConfig:
    request: dict[str, Any] = {
        "image": IMAGE,
        "rootfs": Path("/r"),
        "hostname": "box",
        "cgroup": "/t/x",
        "netns": Path("/run/netns/t-x"),
    }
    return oci.oci_config(oci.OciRequest(want=want, **(request | given)))


def container(**fields: Any) -> Container:
    return Container(**({"image": "app:1"} | fields))


def mount_at(config: dict[str, Any], target: str) -> dict[str, Any]:
    found = [mount for mount in config["mounts"] if mount["destination"] == target]
    assert len(found) == 1
    return dict(found[0])


@pytest.mark.parametrize(
    ("fields", "args"),
    [
        ({}, ["/entry", "serve"]),
        ({"command": ("other", "-v")}, ["/entry", "other", "-v"]),
        ({"command": ()}, ["/entry"]),
        ({"entrypoint": ("/mine",)}, ["/mine"]),
        ({"entrypoint": ("/mine",), "command": ("x",)}, ["/mine", "x"]),
        ({"entrypoint": (), "command": ("x",)}, ["x"]),
        ({"entrypoint": ("",), "command": ("x",)}, ["x"]),
    ],
)
def test_entrypoint_of_ours_makes_the_images_command_void(fields: dict[str, Any], args: list[str]) -> None:
    assert make(container(**fields)).config["process"]["args"] == args


def test_image_and_state_without_a_program_are_refused() -> None:
    with pytest.raises(WrongState, match="neither the state file nor the image"):
        make(container(), image={})


def test_environment_of_the_state_file_beats_the_images_and_home_comes_from_passwd() -> None:
    user = users.resolve("web", (), read_file)
    process = make(container(environment={"LEVEL": "debug"}), user=user).config["process"]
    assert process["env"] == ["PATH=/app/bin", "HOSTNAME=box", "LEVEL=debug", "HOME=/var/www"]


def test_path_has_a_default_and_a_working_dir_must_be_absolute() -> None:
    want = container(command=("x",))
    assert f"PATH={oci.DEFAULT_PATH}" in make(want, image={}).config["process"]["env"]
    assert make(want).config["process"]["cwd"] == "/srv"
    with pytest.raises(WrongState, match="not an absolute path"):
        make(container(working_dir="srv"))


def test_stop_signal_is_the_state_files_then_the_images_then_sigterm() -> None:
    assert oci.stop_signal(container(stop_signal="SIGHUP"), IMAGE) == "SIGHUP"
    assert oci.stop_signal(container(), IMAGE) == "SIGQUIT"
    assert oci.stop_signal(container(), {}) == "SIGTERM"


def test_capabilities_are_dockers_less_net_raw_unless_asked_otherwise() -> None:
    def names(**fields: Any) -> set[str]:
        return set(make(container(**fields)).config["process"]["capabilities"]["bounding"])

    assert len(names()) == 13
    assert "CAP_NET_RAW" not in names()
    assert "CAP_NET_RAW" in names(cap_add=("CAP_NET_RAW",))
    assert names(cap_drop=("ALL",), cap_add=("CAP_NET_BIND_SERVICE",)) == {"CAP_NET_BIND_SERVICE"}
    assert names(cap_drop=("CAP_CHOWN",)) == DEFAULT - {"CAP_CHOWN"}
    assert names(cap_add=("ALL",), cap_drop=("CAP_SYS_ADMIN",)) == set(ALL) - {"CAP_SYS_ADMIN"}


def test_capability_that_the_agent_lacks_is_refused_by_name_and_left_out_otherwise() -> None:
    limits = oci.HostLimits(capabilities=frozenset(ALL) - {"CAP_SYS_RESOURCE"})
    made = make(container(privileged=True), limits=limits)
    assert "CAP_SYS_RESOURCE" not in made.config["process"]["capabilities"]["bounding"]
    assert made.warnings == ("capabilities not available here: CAP_SYS_RESOURCE",)
    with pytest.raises(UnfitHost, match="cap_add 'CAP_SYS_RESOURCE'"):
        make(container(cap_add=("CAP_SYS_RESOURCE",)), limits=limits)


def test_privileged_has_every_device_no_masks_no_filter_and_a_writable_sysfs() -> None:
    node = DeviceNode("/dev/vda", "b", 254, 0)
    config = make(container(privileged=True), devices=(node,), seccomp={"defaultAction": "x"}).config
    assert config["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert not {"seccomp", "maskedPaths", "readonlyPaths"} & config["linux"].keys()
    assert "rw" in mount_at(config, "/sys")["options"]
    assert config["linux"]["devices"][0]["path"] == "/dev/vda"


def test_ordinary_container_has_masks_a_filter_no_new_privileges_and_few_devices() -> None:
    config = make(container(), seccomp={"defaultAction": "x"}).config
    assert "/proc/kcore" in config["linux"]["maskedPaths"]
    assert config["linux"]["seccomp"] == {"defaultAction": "x"}
    assert config["process"]["noNewPrivileges"] is True
    assert config["linux"]["resources"]["devices"][0] == {"allow": False, "access": "rwm"}


def test_apparmor_profile_is_that_of_the_process_unless_it_is_privileged() -> None:
    assert make(container(), apparmor="x-default").config["process"]["apparmorProfile"] == "x-default"
    assert "apparmorProfile" not in make(container()).config["process"]
    assert "apparmorProfile" not in make(container(privileged=True), apparmor="x-default").config["process"]


def test_tun_is_closed_to_whoever_does_not_ask_for_it() -> None:
    tun = DeviceNode("/dev/net/tun", "c", 10, 200, "rwm")
    assert not device_access.asked_for(make(container()).config)
    assert not device_access.asked_for(make(container(), devices=(DeviceNode("/x", "b", 10, 200),)).config)
    assert device_access.asked_for(make(container(), devices=(tun,)).config)
    assert device_access.asked_for(make(container(privileged=True)).config)


def test_device_is_made_and_allowed_with_its_permissions() -> None:
    config = make(container(), devices=(DeviceNode("/dev/fuse", "c", 10, 229, "rw"),)).config
    rule = {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"}
    assert rule in config["linux"]["resources"]["devices"]


def test_mounts_of_the_state_file_come_parents_first_and_replace_ours() -> None:
    theirs = (
        {"destination": "/data/deep", "type": "bind", "source": "/b", "options": []},
        {"destination": "/data", "type": "bind", "source": "/a", "options": []},
        {"destination": "/etc/hosts", "type": "bind", "source": "/c", "options": []},
    )
    config = make(container(), mounts=theirs, hosts=Path("/run/x/hosts")).config
    targets = [mount["destination"] for mount in config["mounts"]]
    assert targets.index("/data") < targets.index("/data/deep")
    assert mount_at(config, "/etc/hosts")["source"] == "/c"


def test_host_namespaces_are_shared_only_when_asked() -> None:
    def kinds(config: dict[str, Any]) -> set[str]:
        return {namespace["type"] for namespace in config["linux"]["namespaces"]}

    assert kinds(make(container()).config) == {"mount", "uts", "cgroup", "pid", "ipc", "network"}
    shared = make(container(pid="host", ipc="host"), netns=None).config
    assert kinds(shared) == {"mount", "uts", "cgroup"}
    assert mount_at(shared, "/dev/shm")["type"] == "bind"


def test_sysctls_of_a_namespace_that_is_the_hosts_are_refused() -> None:
    assert make(container(sysctls={"net.core.somaxconn": "9"})).config["linux"]["sysctl"]["net.core.somaxconn"] == "9"
    assert (
        make(container(sysctls={"kernel.domainname": "shop"})).config["linux"]["sysctl"]["kernel.domainname"]
        == "shop"
    )
    with pytest.raises(WrongState, match="network is shared"):
        make(container(sysctls={"net.core.somaxconn": "9"}), netns=None)
    with pytest.raises(WrongState, match="ipc is shared"):
        make(container(sysctls={"kernel.shmmax": "9"}, ipc="host"))


def test_ulimit_beyond_the_agents_own_is_refused() -> None:
    limits = oci.HostLimits(capabilities=frozenset(), rlimits={"nofile": 1000})
    want = container(ulimits={"nofile": Ulimit(soft=10, hard=20)}, cap_drop=("ALL",))
    rlimits = make(want, limits=limits).config["process"]["rlimits"]
    assert rlimits == [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}]
    for hard in (2000, -1):
        want = container(ulimits={"nofile": Ulimit(soft=10, hard=hard)}, cap_drop=("ALL",))
        with pytest.raises(UnfitHost, match="at most 1000"):
            make(want, limits=limits)


def test_oom_score_of_a_policy_is_clamped_with_a_warning_and_one_asked_for_is_refused() -> None:
    limits = oci.HostLimits(capabilities=frozenset(), oom_score_adj=0)
    made = make(container(cap_drop=("ALL",)), limits=limits, oom_score_adj=-997)
    assert made.config["process"]["oomScoreAdj"] == 0
    assert "instead of -997" in made.warnings[0]
    with pytest.raises(UnfitHost, match="oom_score_adj '-5'"):
        make(container(cap_drop=("ALL",), resources=Resources(oom_score_adj=-5)), limits=limits)


def test_init_runs_the_command_as_its_child_and_needs_a_pid_namespace() -> None:
    config = make(container(init=True), init=Path("/usr/bin/catatonit")).config
    assert config["process"]["args"][:3] == [oci.INIT_PATH, "--", "/entry"]
    assert mount_at(config, oci.INIT_PATH)["source"] == "/usr/bin/catatonit"
    with pytest.raises(UnfitHost, match="neither catatonit nor tini"):
        make(container(init=True))
    with pytest.raises(WrongState, match="process 1"):
        make(container(init=True, pid="host"), init=Path("/usr/bin/catatonit"))


@pytest.mark.parametrize(
    ("text", "added", "expected"),
    [
        ("", (), users.User(0, 0, (), "/root")),
        ("web", (), users.User(101, 102, (44,), "/var/www")),
        ("101", (), users.User(101, 102, (44,), "/var/www")),
        ("web:audio", (), users.User(101, 29, (), "/var/www")),
        ("web", ("audio", "7"), users.User(101, 102, (7, 29, 44), "/var/www")),
        ("4000", (), users.User(4000, 0, (), "/")),
        ("4000:5000", (), users.User(4000, 5000, (), "/")),
    ],
)
def test_users_resolve_by_the_images_own_files(text: str, added: tuple[str, ...], expected: users.User) -> None:
    assert users.resolve(text, added, read_file) == expected


def test_records_with_endless_numbers_are_skipped_and_such_a_user_is_refused() -> None:
    endless = "9" * 5000
    files = {
        "/etc/passwd": f"root:x:0:0::/root:/bin/sh\nbig:x:{endless}:1::/:\nother:x:1:{endless}::/:\n",
        "/etc/group": f"big:x:{endless}:root\n",
    }

    def read(path: str) -> bytes:
        return files[path].encode()

    assert users.resolve("root", (), read) == users.User(0, 0, (), "/root")
    for name in ("big", "other", endless, f"0:{endless}"):
        with pytest.raises(WrongState, match=r"not in the container|out of range"):
            users.resolve(name, (), read)


@pytest.mark.parametrize("text", ["nobody", "web:nogroup", "99999999999"])
def test_unknown_users_and_groups_are_refused(text: str) -> None:
    with pytest.raises(WrongState):
        users.resolve(text, (), read_file)


def test_seccomp_rules_follow_capabilities_architecture_and_kernel() -> None:
    def rule(name: str, **conditions: Any) -> dict[str, Any]:
        return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": None, **conditions}

    source = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]}],
        "syscalls": [
            rule("read"),
            rule("mount", includes={"caps": ["CAP_SYS_ADMIN"]}),
            rule("clone", excludes={"caps": ["CAP_SYS_ADMIN"]}),
            rule("swapcontext", includes={"arches": ["ppc64le"]}),
            rule("ptrace", includes={"minKernel": "4.8"}),
        ],
    }
    resolved = seccomp.resolve(source, {"CAP_CHOWN"}, "amd64", (6, 1))
    assert [entry["names"] for entry in resolved["syscalls"]] == [["read"], ["clone"], ["ptrace"]]
    assert resolved["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    resolved = seccomp.resolve(source, {"CAP_SYS_ADMIN"}, "amd64", (4, 7))
    assert [entry["names"] for entry in resolved["syscalls"]] == [["read"], ["mount"]]


ALLOWED = {"names": ["read", "clone", "clone3", "unshare", "mount", "keyctl", "socket"], "action": "SCMP_ACT_ALLOW"}


def hardened(*capabilities: str, arch: str = "amd64") -> dict[str, list[dict[str, Any]]]:
    """The rules of a profile that allows everything, after hardening, by system call."""
    found: dict[str, list[dict[str, Any]]] = {}
    for rule in seccomp.harden({"syscalls": [ALLOWED]}, capabilities, arch)["syscalls"]:
        for name in rule["names"]:
            found.setdefault(name, []).append(rule)
    return found


def test_seccomp_refuses_namespaces_and_mounts_without_sys_admin() -> None:
    rules = hardened("CAP_CHOWN", "CAP_AUDIT_WRITE")
    assert [rules[name][0].get("errnoRet") for name in ("read", "unshare", "mount", "setns", "clone3")] == [
        *(None, errno.EPERM, errno.EPERM, errno.EPERM, errno.ENOSYS)
    ]
    allowed, *refused = rules["clone"]
    assert allowed["args"] == [{"index": 0, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]
    assert {rule["args"][0]["value"] for rule in refused} >= {0x10000000, 0x40000000}
    assert {rule["errnoRet"] for rule in refused} == {errno.EPERM}
    assert hardened(arch="s390x")["clone"][0]["args"][0]["index"] == 1


def test_seccomp_leaves_to_sys_admin_what_it_may_and_the_keyring_to_nobody() -> None:
    rules = hardened("CAP_SYS_ADMIN", "CAP_AUDIT_WRITE")
    assert {rules[name][0]["action"] for name in ("clone", "clone3", "unshare", "mount", "bpf")} == {"SCMP_ACT_ALLOW"}
    assert hardened("CAP_BPF")["bpf"][0]["action"] == "SCMP_ACT_ALLOW"
    assert rules["keyctl"][0]["errnoRet"] == errno.EPERM


@pytest.mark.skipif(binaries.find_program("apparmor_parser") is None, reason="apparmor_parser is not installed")
def test_apparmor_profile_is_one_that_the_parser_takes() -> None:
    features = "/etc/apparmor.d/abi/3.0"
    command = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--features-file", features]
    done = subprocess.run(command, input=apparmor.text("x-default"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_apparmor_profile_denies_nothing_that_a_later_version_only_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apparmor, "ABI", tmp_path / "3.0")
    assert not apparmor.text("x-default").startswith("abi")  # AppArmor 2 does not know the word
    apparmor.ABI.touch()
    assert apparmor.text("x-default").startswith("abi <abi/3.0>,\n")


def test_apparmor_profile_of_an_earlier_version_is_loaded_anew_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = tmp_path / "apparmor_parser"
    parser.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    parser.chmod(0o755)
    (tmp_path / "enabled").write_text("Y\n")
    (tmp_path / "profiles").write_text("y-default (enforce)\n")
    monkeypatch.setattr(apparmor, "ENABLED", tmp_path / "enabled")
    monkeypatch.setattr(apparmor, "LOADED", tmp_path / "profiles")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [apparmor.ensure("y-default") for _ in range(3)] == [("y-default", "")] * 3
    assert (tmp_path / "calls").read_text() == "--replace --skip-cache\n"


def test_seccomp_profile_that_is_not_there_is_the_states_fault() -> None:
    assert seccomp.profile("unconfined", ()) is None
    with pytest.raises(WrongState, match="no such file"):
        seccomp.profile("/nowhere.json", ())


@pytest.mark.parametrize(("owned", "works"), [(None, True), ("", True), ("hugetlb\n", False)])
def test_crun_does_not_work_where_the_v2_tree_beside_v1_owns_a_controller(
    tmp_path: Path, owned: str | None, works: bool
) -> None:
    if owned is not None:
        (tmp_path / "unified").mkdir()
        (tmp_path / "unified/cgroup.controllers").write_text(owned)
    assert (binaries.obstacle_for("crun", tmp_path) == "") is works
    assert binaries.obstacle_for("runc", tmp_path) == ""


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            'time="2026-01-01T00:00:00Z" level=error msg="runc create failed: unable to start container process: '
            'exec: \\"nginxx\\": executable file not found in $PATH"\n',
            "start of 'shop/web': runc create failed: unable to start container process: "
            'exec: "nginxx": executable file not found in $PATH',
        ),
        (
            "2026-01-01T00:00:00.000000Z: executable file `nginxx` not found in $PATH: No such file or directory\n",
            "start of 'shop/web': 2026-01-01T00:00:00.000000Z: executable file `nginxx` not found in $PATH: "
            "No such file or directory",
        ),
    ],
)
def test_the_last_line_of_a_runtime_becomes_the_error(said: str, line: str) -> None:
    error = conmon.runtime_error("start", "shop/web", said)
    assert isinstance(error, WrongState)
    assert str(error) == line


@pytest.mark.parametrize(
    ("name", "number"),
    [("SIGTERM", 15), ("quit", 3), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX-3", 61), ("37", 37), (2, 2)],
)
def test_signals_have_names_and_numbers(name: str | int, number: int) -> None:
    assert oci.signal_number(name) == number


@pytest.mark.parametrize("name", ["SIGNOPE", "0", "99", "9" * 5000, "TERM+x", "TERM+1", ""])
def test_unknown_signals_are_refused(name: str) -> None:
    with pytest.raises(WrongState, match="is not a signal"):
        oci.signal_number(name)


SCRIPT, ELF = b"#!/bin/sh -e\nexit\n", b"\x7fELF\x02\x01\x01" + bytes(9) + b"\2\0\x3e\0" + bytes(44)
HEADS = {
    "/bin/sh": ELF,
    "/srv/run": SCRIPT,
    "/bin/crlf": b"#!/bin/sh\r\nexit\n",
    "/bin/empty": b"",
    "/bin/text": b"echo hello\n",
    "/bin/far": ELF[:18] + b"\x16\0" + ELF[20:],
    "/bin/chain": b"#!/bin/data\n",
}
FILES = {"/bin/data": 0o100644, "/srv": 0o040755, "/bin/pipe": 0o010755, **dict.fromkeys(HEADS, 0o100755)}


@pytest.mark.parametrize(
    ("entrypoint", "words"),
    [
        (("sh", "", "-c"), ("sh", "", "-c", "", "x")),
        (("",), ("", "x")),
        ((), ("", "x")),
        (("", ""), ("", "", "", "x")),
    ],
)
def test_empty_words_are_words_and_only_an_empty_entrypoint_clears(
    entrypoint: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert oci.command_line(Container(entrypoint=entrypoint, command=("", "x")), IMAGE) == words


def look(path: str) -> Candidate:
    path = posixpath.normpath(path)
    if path.startswith("/mnt/"):
        return Candidate(path, known=False)
    return Candidate(path, FILES.get(path, 0), noexec=path == "/bin/far", head=lambda: HEADS[path])


def test_program_is_found_as_execvp_would() -> None:
    def found(program: str, path: str, cwd: str) -> str | None:
        candidate = find_executable(program, path, cwd, look)
        return candidate.path if candidate else None

    assert found("sh", "/usr/bin:/bin", "/") == "/bin/sh"
    assert found("./run", "/bin", "/srv") == "/srv/run"
    assert found("/mnt/x", "/bin", "/") is None


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        ("nginxx", "not found in PATH"),
        ("/no", "no such file in the image"),
        ("", "first word is empty"),
        ("data", "chmod"),
        ("/srv", "directory"),
        ("pipe", "is not a file"),
        ("crlf", "'/bin/crlf' needs '/bin/sh\r', which is not there"),
        ("empty", "is empty"),
        ("text", "begins with '#!'"),
        ("far", "noexec"),
        ("chain", "run by '/bin/data': '/bin/data' is not executable"),
    ],
)
def test_program_that_can_not_run_is_told_beforehand(program: str, cause: str) -> None:
    with pytest.raises(WrongState, match=cause):
        find_executable(program, "/usr/bin:/bin", "/", look)


def test_a_program_of_another_machine_is_told_beforehand() -> None:
    elf = HEADS["/bin/far"]
    with pytest.raises(WrongState, match="another machine"):
        find_executable("/x", "", "/", lambda path: Candidate(path, 0o100755, head=lambda: elf))


def test_words_that_the_kernel_refuses_are_told_beforehand() -> None:
    check_size(("x" * 131_071,), {"A": "y"})
    with pytest.raises(WrongState, match="word 2 of the command: 131072 bytes"):
        check_size(("a", "x" * 131_072), {})
    with pytest.raises(WrongState, match=r"environment\.A: 131072 bytes"):
        check_size((), {"A": "x" * 131_070})
    with pytest.raises(WrongState, match="command and environment: "):
        check_size(("x" * 100_000,) * 21, {})
