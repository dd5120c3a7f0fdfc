"""Containers on the real kernel: conmon, the runtime below it, cgroups and logs."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ground import Rootfs, patient, wait_for
from holdfast.drivers import CgroupWant, Host
from holdfast.errors import UnfitHost, WrongState
from holdfast.mounts import mount_points
from holdfast.node.logkeeper import LogKeeper
from holdfast.runtime import binaries, cgroup, conmon, logs, oci, seccomp
from holdfast.runtime.devices import device_nodes
from holdfast.runtime.execs import ExecWant, exec_process
from holdfast.runtime.users import User
from holdfast.spec.model import Container, Resources, Ulimit
from holdfast_plugins.cgroup import LimitsPolicy

pytestmark = pytest.mark.live

MIB = 1024 * 1024


@dataclass
class Box:
    """Starts containers of one site."""

    runtime: conmon.Runtime
    rootfs: Path
    ids: list[str] = field(default_factory=list)
    limits: oci.HostLimits = field(default_factory=binaries.host_limits)

    def bundle(self, want: Container, resources: dict[str, Any] | None = None, user: User | None = None) -> str:
        """Write a bundle; its id."""
        id = f"c{len(self.ids)}"
        self.ids.append(id)
        capabilities = oci.granted_capabilities(want, self.limits).names
        request = oci.OciRequest(
            want=want,
            image={},
            rootfs=self.rootfs,
            hostname="box",
            cgroup=self.runtime.cgroup(id),
            resources=resources or {},
            user=user or User(),
            seccomp=seccomp.profile(want.seccomp, capabilities, privileged=want.privileged),
            init=binaries.find_init(),
            devices=device_nodes(want),
            limits=self.limits,
        )
        folder = self.runtime.host.instance(id)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(oci.oci_config(request).config))
        return id

    def create(self, id: str) -> conmon.Run:
        return self.runtime.create(id, self.folder(id), self.log(id), name=f"shop/{id}")

    def start(
        self,
        *command: str,
        resources: dict[str, Any] | None = None,
        user: User | None = None,
        **fields: Any,
    ) -> tuple[str, conmon.Run]:
        id = self.bundle(Container(rootfs="/x", command=command, **fields), resources, user)
        run = self.create(id)
        self.runtime.start(id)
        return id, run

    def output(self, *command: str, **fields: Any) -> str:
        """What a container prints until it ends."""
        id, run = self.start(*command, **fields)
        assert self.runtime.wait_exit(id, run, 20) is not None
        return "".join(f"{line.text}\n" for line in logs.read(self.log(id)))

    def folder(self, id: str) -> Path:
        return self.runtime.host.instance(id)

    def log(self, id: str) -> Path:
        return self.folder(id) / "output.log"

    def value(self, id: str, controller: str, v1: str, v2: str) -> str:
        """A cgroup file of a container."""
        name = v1 if cgroup.version() == 1 else v2
        return (cgroup.folder(controller, self.runtime.cgroup(id)) / name).read_text().strip()


@pytest.fixture
def box(site: Host, busybox_rootfs: Rootfs) -> Any:
    rootfs = site.root / "rootfs"
    subprocess.run(["cp", "-a", busybox_rootfs.path, rootfs], check=True)
    box = Box(runtime_of(site), rootfs)
    box.runtime.prepare()
    yield box
    for id in box.ids:
        box.runtime.delete(id, force=True)
        shutil.rmtree(box.folder(id), ignore_errors=True)
    box.runtime.leave()


def runtime_of(site: Host) -> conmon.Runtime:
    return conmon.Runtime(site, binaries.find_runtime("runc"), binaries.find_conmon().path)


def test_exit_code_is_told(box: Box) -> None:
    id, run = box.start("sh", "-c", "exit 7")
    ended = box.runtime.wait_exit(id, run, 10)
    assert ended is not None
    assert (ended.code, ended.signal, ended.oom) == (7, None, False)
    assert not box.runtime.alive(run)


def test_signal_is_told_and_a_stopped_container_is_gone_after_delete(box: Box) -> None:
    id, run = box.start("sleep", "1000")
    assert box.runtime.alive(run)
    assert box.runtime.supervised(run)
    assert box.runtime.run_of(id) == run
    assert box.runtime.wait_exit(id, run, 0.01) is None
    box.runtime.kill(id, "KILL")
    ended = box.runtime.wait_exit(id, run, 10)
    assert ended is not None
    assert (ended.code, ended.signal, ended.oom) == (137, None, False)
    assert str(ended) == "exited with 137 (SIGKILL if a signal)"
    box.runtime.delete(id)
    assert box.runtime.state() == frozenset()
    assert cgroup.folders(box.runtime.cgroup(id)) == []
    assert box.runtime.exit_of(id) is None


def test_want_of_memory_is_told_from_a_kill(box: Box) -> None:
    hungry = "x=a; while true; do x=$x$x; done"
    id, run = box.start("sh", "-c", hungry, resources={"memory": {"limit": 16 * MIB, "swap": 16 * MIB}})
    ended = box.runtime.wait_exit(id, run, 30)
    assert ended is not None
    assert (ended.signal, ended.oom) == (9, True)


def test_container_runs_on_without_conmon_and_its_end_is_noticed(box: Box) -> None:
    id, run = box.start("sleep", "1000")
    os.kill(run.conmon_pid, signal.SIGKILL)
    wait_for(lambda: not box.runtime.supervised(run), "conmon has ended")
    assert box.runtime.alive(run)
    box.runtime.kill(id, "SIGKILL", all=True)
    ended = box.runtime.wait_exit(id, run, 10)
    assert ended is not None
    assert ended.code is None
    box.runtime.delete(id)
    assert box.runtime.state() == frozenset()


def test_running_container_is_not_deleted_without_force(box: Box) -> None:
    id, run = box.start("sleep", "1000")
    with pytest.raises(UnfitHost, match="processes are left"):
        box.runtime.delete(id)
    assert box.runtime.alive(run)


def test_running_container_is_deleted_by_force_and_what_is_gone_too(box: Box) -> None:
    id, run = box.start("sh", "-c", "trap '' TERM; sleep 1000 & wait")
    box.runtime.delete(id, force=True)
    assert not box.runtime.alive(run)
    assert not box.runtime.supervised(run)
    box.runtime.delete(id, force=True)
    box.runtime.delete("never-was")


CREATE = """
import sys
from pathlib import Path
from holdfast.drivers import Host
from holdfast.runtime import binaries, conmon
name, root, run_root, id = sys.argv[1:]
host = Host(name, Path(root), Path(run_root))
runtime = conmon.Runtime(host, binaries.find_runtime("runc"), binaries.find_conmon().path)
runtime.create(id, host.instance(id), host.instance(id) / "output.log")
"""


def group_lives(number: int) -> bool:
    """Whether a process group has members."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("moment", ["runs/{}", "runs/{}/conmon.pid", "runtime/{}", "runs/{}/pid", "runs/{}/run.json"])
def test_create_that_was_cut_off_leaves_nothing_after_a_forced_delete(box: Box, moment: str) -> None:
    id = box.bundle(Container(rootfs="/x", command=("sleep", "1000")))
    host = box.runtime.host
    creator = subprocess.Popen(
        [sys.executable, "-c", CREATE, host.name, host.root, host.run_root, id], start_new_session=True
    )
    wait_for((host.run_root / moment.format(id)).exists, "it came so far")
    creator.kill()
    creator.wait()
    wait_for(
        lambda: not group_lives(creator.pid), "its children have ended"
    )  # a child of its that is not conmon yet will be, and bear the id
    box.runtime.delete(id, force=True)
    assert box.runtime.state() == frozenset()
    assert cgroup.folders(box.runtime.cgroup(id)) == []
    assert not list(box.runtime._processes(id))


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("nginxx", r'exec: "nginxx": executable file not found in \$PATH'),
        ("/no/such", "no such file or directory"),
        ("/etc", "permission denied"),
    ],
)
def test_program_that_can_not_run_is_one_clear_line(box: Box, command: str, cause: str) -> None:
    with pytest.raises(WrongState, match=cause) as caught:
        box.start(command)
    assert str(caught.value).startswith("start of 'shop/c0': ")
    assert "\n" not in str(caught.value)


def test_what_could_not_be_started_leaves_no_zombie_to_a_subreaper(box: Box) -> None:
    conmon.become_subreaper()
    try:
        before = _zombies()
        for _ in range(3):
            with pytest.raises(WrongState):
                box.start("/no/such/program")
            box.runtime.delete(box.ids[-1], force=True)
        id, _ = box.start("sleep", "1000")
        box.runtime.delete(id, force=True)
        wait_for(lambda: _zombies() <= before, "all are waited for")
    finally:
        ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _zombies() -> set[str]:
    """The children of this process that have ended and that nobody has waited for."""
    stats = {path: _stat(path) for path in Path("/proc").glob("[0-9]*/stat")}
    return {path.parent.name for path, fields in stats.items() if fields[:2] == ["Z", str(os.getpid())]}


def _stat(path: Path) -> list[str]:
    try:
        return path.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_every_limit_changes_while_it_runs_and_is_lifted_again(box: Box) -> None:
    id, run = box.start("sleep", "1000")
    free = cgroup.snapshot(box.runtime.cgroup(id))
    cpus = box.value(id, "cpuset", "cpuset.effective_cpus", "cpuset.cpus.effective")
    disk = next(node for node in device_nodes(Container(rootfs="/x", privileged=True)) if node.kind == "b")
    table = Resources(
        memory=64 * MIB,
        memory_swap=96 * MIB,
        memory_reservation=32 * MIB,
        cpus=0.5,
        cpu_weight=512,
        cpuset="0",
        pids=20,
        io_weight=300,
        device_read_bps={disk.path: 1048576},
        device_write_iops={disk.path: 100},
    )
    want = CgroupWant(resources=table, version=cgroup.version(), memory_total=2**33, cpus=os.cpu_count() or 1)
    settings = cgroup.compose((LimitsPolicy(),), want, cgroup.features())
    box.runtime.update(id, settings.resources)
    assert box.value(id, "memory", "memory.limit_in_bytes", "memory.max") == str(64 * MIB)
    assert box.value(id, "memory", "memory.soft_limit_in_bytes", "memory.low") == str(32 * MIB)
    assert box.value(id, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    assert box.value(id, "cpu", "cpu.shares", "cpu.weight") in ("512", "20")
    assert box.value(id, "cpuset", "cpuset.cpus", "cpuset.cpus") == "0"
    assert box.value(id, "pids", "pids.max", "pids.max") == "20"
    numbers = f"{disk.major}:{disk.minor}"
    assert f"{numbers} " in box.value(id, "blkio", "blkio.throttle.read_bps_device", "io.max") + " "
    changed = cgroup.snapshot(box.runtime.cgroup(id))
    assert {name for name in free if free[name] != changed[name]} >= {"pids.max", "cpuset.cpus"}
    box.runtime.update(id, {})
    assert {**cgroup.snapshot(box.runtime.cgroup(id)), "cpuset.cpus": free["cpuset.cpus"]} == free
    assert box.value(id, "cpuset", "cpuset.effective_cpus", "cpuset.cpus.effective") == cpus
    assert box.runtime.alive(run)


def test_limits_given_at_the_start_hold_and_usage_is_read(box: Box) -> None:
    want = CgroupWant(
        resources=Resources(memory=64 * MIB, pids=9), version=cgroup.version(), memory_total=2**33, cpus=1
    )
    settings = cgroup.compose((LimitsPolicy(),), want, cgroup.features())
    id, _ = box.start("sleep", "1000", resources=dict(settings.resources))
    assert box.value(id, "memory", "memory.limit_in_bytes", "memory.max") == str(64 * MIB)
    assert box.value(id, "pids", "pids.max", "pids.max") == "9"
    wait_for(
        lambda: cgroup.usage(box.runtime.cgroup(id)).pids == 1, "it is alone"
    )  # the runtime's own are on their way out
    usage = cgroup.usage(box.runtime.cgroup(id))
    assert usage.memory and usage.cpu


def test_oom_score_is_raised_live(box: Box) -> None:
    id, run = box.start("sleep", "1000")
    box.runtime.set_oom_score_adj(id, 500)
    assert Path(f"/proc/{run.pid}/oom_score_adj").read_text().strip() == "500"


def test_process_has_dockers_capabilities_less_net_raw_a_filter_and_no_new_privileges(box: Box) -> None:
    status = dict(line.split(":\t") for line in box.output("cat", "/proc/self/status").splitlines() if ":\t" in line)
    assert status["CapBnd"] == "00000000a80405fb"
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    status = dict(
        line.split(":\t")
        for line in box.output("cat", "/proc/self/status", cap_drop=("ALL",), seccomp="unconfined").splitlines()
        if ":\t" in line
    )
    assert (int(status["CapBnd"], 16), status["Seccomp"]) == (0, "0")


def test_namespaces_are_its_own_and_the_user_is_the_one_asked_for(box: Box) -> None:
    said = box.output("sh", "-c", "echo $$ $(hostname) $(id -u) $(id -g) $(id -G) $HOME", user=User(7, 8, (9,), "/h"))
    assert said.split() == ["1", "box", "7", "8", "8", "9", "/h"]


def test_init_is_process_one_and_passes_signals_on(box: Box) -> None:
    id, run = box.start("sh", "-c", "trap 'exit 3' TERM; echo ready; while true; do sleep 0.05; done", init=True)
    wait_for(lambda: box.log(id).exists() and "ready" in box.log(id).read_text(), "it listens for SIGTERM")
    assert b"init" in Path(f"/proc/{run.pid}/cmdline").read_bytes()
    box.runtime.kill(id, "SIGTERM")
    ended = box.runtime.wait_exit(id, run, 10)
    assert ended is not None and ended.code == 3


def test_read_only_root_can_not_be_written_and_shm_has_its_size(box: Box) -> None:
    said = box.output("sh", "-c", "touch /x 2>&1; df -k /dev/shm | tail -1", read_only=True, shm_size=MIB)
    assert "Read-only file system" in said
    assert said.splitlines()[-1].split()[1] == "1024"


def test_privileged_sees_devices_and_ulimits_and_devices_are_set(box: Box) -> None:
    assert "loop-control" in box.output("ls", "/dev", privileged=True)
    assert box.output("sh", "-c", "ulimit -n", ulimits={"nofile": Ulimit(soft=100, hard=200)}).strip() == "100"


def test_exec_runs_beside_it(box: Box) -> None:
    id, _ = box.start("sleep", "1000")
    want = ExecWant(argv=["sh", "-c", "echo $A; pwd; id -u"], environment={"A": "b"}, workdir="/tmp")
    process = exec_process(box.runtime.process(id), want, User(5), home_is_set=False)
    answer = subprocess.run(
        box.runtime.exec_argv(id, process), capture_output=True, text=True, check=True, timeout=patient(20)
    )
    assert answer.stdout.split() == ["b", "/tmp", "5"]


def test_output_is_kept_whole_while_conmon_begins_new_files(box: Box) -> None:
    """A file is lost when the next one is full before it has its number: so after less than a file, all wait."""
    burst = "i=0; while [ $i -lt 100 ]; do echo line $((b * 100 + i)); i=$((i+1)); done"
    script = f"b=0; while [ $b -lt 30 ]; do {burst}; b=$((b+1)); until [ -e /go-$b ]; do sleep 0.01; done; done"
    id = box.bundle(Container(rootfs="/x", command=("sh", "-c", script)))
    size = logs.begin(box.log(id), 10_000, 200)
    keeper = LogKeeper(lambda path: 200)
    keeper.add(box.folder(id))
    run = box.runtime.create(id, box.folder(id), box.log(id), log_size=size)
    box.runtime.start(id)
    log = box.log(id)
    for number in range(1, 31):
        wait_for(lambda last=f"line {number * 100 - 1}\n": last in log.read_text(), "the burst is written")  # type: ignore[misc]
        wait_for(lambda: log.stat().st_nlink == 2, "the file before it has its number")
        (box.rootfs / f"go-{number}").touch()
    assert box.runtime.wait_exit(id, run, 30) is not None
    keeper.close()
    texts = [line.text for line in logs.read(box.log(id))]
    assert texts == [f"line {number}" for number in range(3000)]
    files = logs.log_files(box.log(id))
    assert len(files) > 10
    assert max(file.stat().st_size for file in files) <= 10_000


def test_refused_update_is_an_error(box: Box) -> None:
    id, _ = box.start("sleep", "1000")
    with pytest.raises(UnfitHost, match="write of '4000' to"):
        box.runtime.update(id, {"cpu": {"cpus": "4000"}})


def test_an_event_of_a_cgroup_is_waited_for(site: Host) -> None:
    tree = next(iter(mount_points("cgroup2")), None)
    if tree is None:
        pytest.skip("no cgroup v2 tree")
    group = Path(tree.point) / f"{site.name}-events"
    group.mkdir()
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            (group / "cgroup.procs").write_text(str(process.pid))
            assert not cgroup.wait_event(group, "populated", 0, time.monotonic() + 0.01)
            (group / "cgroup.freeze").write_text("1")
            assert cgroup.wait_event(group, "frozen", 1, time.monotonic() + 10)
            (group / "cgroup.freeze").write_text("0")
            reaper = threading.Thread(target=process.wait)
            reaper.start()
            process.kill()
            assert cgroup.wait_event(group, "populated", 0, time.monotonic() + 10)
            reaper.join()
        finally:
            process.kill()
            process.wait()
            group.rmdir()
    assert cgroup.wait_event(group, "populated", 0, time.monotonic())  # what is gone has ended
