"""What follows an exit, and what a change costs: every row of the tables in `plan.restart` and `plan.diff`."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.observed import Exit, Instance, InstanceId
from holdfast.plan.actions import Replace
from holdfast.plan.diff import EFFECTS, changes, replaces
from holdfast.plan.restart import verdict, wait_before
from holdfast.spec.model import (
    Attachment,
    Container,
    Device,
    Logging,
    Mount,
    Port,
    Resources,
    RestartPolicy,
    StorageOpt,
    Ulimit,
    UpdateImage,
)

POLICIES = ("no", "on-failure", "always", "unless-stopped")
ROWS = (
    ("it exited with 0", "exited", Exit(code=0, at=50.0), ("done", "done", "again", "again")),
    ("it exited with 1", "exited", Exit(code=1, at=50.0), ("failed", "again", "again", "again")),
    ("it was killed", "exited", Exit(code=137, signal=9, at=50.0), ("failed", "again", "again", "again")),
    ("it ran out of memory", "exited", Exit(137, 9, oom=True, at=50.0), ("failed", "again", "again", "again")),
    ("nobody saw it end", "exited", Exit(code=None, at=50.0), ("again", "again", "again", "again")),
    ("it was lost", "lost", None, ("again", "again", "again", "again")),
    ("we stopped it", "exited", Exit(143, 15, at=50.0, asked=True), ("again", "again", "again", "again")),
    ("we stopped it and it ended well", "exited", Exit(0, at=50.0, asked=True), ("again", "again", "again", "again")),
)
OTHERWISE: dict[str, Any] = {
    "image": "app:2",
    "rootfs": "/srv/root",
    "command": ("serve",),
    "entrypoint": ("/init",),
    "working_dir": "/srv",
    "user": "1000",
    "environment": {"A": "1"},
    "hostname": "web",
    "labels": {"a": "b"},
    "ports": (Port(host_port=80, container_port=80),),
    "networks": {"none": Attachment()},
    "mounts": (Mount(kind="tmpfs", target="/tmp"),),
    "volumes_from": {"db": "ro"},
    "storage_opt": StorageOpt(size=1 << 30),
    "cap_add": ("NET_ADMIN",),
    "cap_drop": ("ALL",),
    "privileged": True,
    "no_new_privileges": False,
    "seccomp": "unconfined",
    "read_only": True,
    "devices": (Device(source="/dev/fuse", target="/dev/fuse"),),
    "sysctls": {"net.core.somaxconn": "1024"},
    "ulimits": {"nofile": Ulimit(soft=1, hard=2)},
    "group_add": ("video",),
    "apparmor": "unconfined",
    "pull": "always",
    "update_image": UpdateImage(policy="apply"),
    "init": True,
    "shm_size": 1024,
    "pid": "host",
    "ipc": "host",
    "stop_signal": "SIGINT",
    "stop_grace_period": 1.0,
    "restart_policy": RestartPolicy(policy="always"),
    "depends_on": {"db": "started"},
    "resources": Resources(memory=1024),
    "logging": Logging(max_files=1),
}


def ended(phase: Any = "exited", exit: Exit | None = None, **fields: Any) -> Instance:
    return Instance(
        id=InstanceId("i"),
        app="shop",
        container="web",
        generation=1,
        want=Container(image="app:1"),
        image="of app:1",
        phase=phase,
        exit=exit,
        **{"started_at": 49.0} | fields,
    )


@pytest.mark.parametrize(
    ("phase", "exit", "policy", "kind"),
    [
        pytest.param(phase, exit, policy, kind, id=f"{how}, {policy}: {kind}")
        for how, phase, exit, kinds in ROWS
        for policy, kind in zip(POLICIES, kinds, strict=True)
    ],
)
def test_an_end_is_followed_by_what_the_table_says(phase: str, exit: Exit | None, policy: Any, kind: str) -> None:
    assert verdict(ended(phase, exit), RestartPolicy(policy=policy)).kind == kind


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (Exit(3), "exited with 3"),
        (Exit(128), "exited with 128"),
        (Exit(129), "exited with 129 (SIGHUP if a signal)"),
        (Exit(143), "exited with 143 (SIGTERM if a signal)"),
        (Exit(166), "exited with 166 (SIGRTMIN+4 if a signal)"),
        (Exit(255), "exited with 255"),
        (Exit(255, signal=127), "exited with 255"),  # as an earlier version wrote it down
        (Exit(143, signal=15, asked=True), "was ended by SIGTERM, exit code 143"),
        (Exit(137, signal=9, oom=True), "was killed for want of memory (OOM), exit code 137"),
        (Exit(None), "ended unseen"),
    ],
)
def test_an_end_is_told_with_its_number_and_a_signal_only_where_it_is_known(ended: Exit, words: str) -> None:
    assert str(ended) == words


def test_the_first_restart_in_a_row_is_at_once() -> None:
    answer = verdict(ended(exit=Exit(1, at=50.0)), RestartPolicy(policy="always", delay=30.0))
    assert (answer.at, answer.streak) == (50.0, 1)


def test_each_further_restart_waits_longer_by_the_factor() -> None:
    policy = RestartPolicy(policy="always", delay=0.5, factor=3.0, jitter=0.0, max_delay=1000.0)
    assert [wait_before(policy, attempt, "i") for attempt in (1, 2, 3, 4)] == [0.0, 0.5, 1.5, 4.5]


def test_a_wait_never_exceeds_its_cap_however_often_it_failed() -> None:
    policy = RestartPolicy(policy="always", delay=1.0, max_delay=60.0)
    assert max(wait_before(policy, attempt, "i") for attempt in (10, 100, 10_000)) <= 60.0


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(2, 30), st.text(max_size=5), st.floats(0.0, 1.0))
def test_jitter_stays_within_its_share_and_is_the_same_each_time(attempt: int, salt: str, jitter: float) -> None:
    policy = RestartPolicy(policy="always", delay=1.0, factor=2.0, max_delay=60.0, jitter=jitter)
    plain = min(2.0 ** (attempt - 2), 60.0)
    wait = wait_before(policy, attempt, salt)
    assert plain * (1 - jitter) - 1e-9 <= wait <= min(plain * (1 + jitter), 60.0) + 1e-9
    assert wait == wait_before(policy, attempt, salt)


def test_jitter_tells_instances_apart() -> None:
    policy = RestartPolicy(policy="always", delay=8.0)
    assert len({wait_before(policy, 2, str(number)) for number in range(10)}) == 10


def test_a_run_of_reset_after_forgets_earlier_failures() -> None:
    policy = RestartPolicy(policy="on-failure", max_attempts=3, reset_after=10.0)
    tired = ended(exit=Exit(1, at=50.0), streak=3, started_at=40.0)
    assert (verdict(tired, policy).kind, verdict(tired, policy).streak) == ("again", 1)
    assert verdict(ended(exit=Exit(1, at=50.0), streak=3, started_at=40.1), policy).kind == "failed"


def test_max_attempts_counts_restarts_in_a_row() -> None:
    policy = RestartPolicy(policy="on-failure", max_attempts=2)
    kinds = [verdict(ended(exit=Exit(1, at=50.0), streak=streak), policy).kind for streak in (0, 1, 2)]
    assert kinds == ["again", "again", "failed"]


def test_every_field_of_a_container_has_another_value_here() -> None:
    assert OTHERWISE.keys() == Container.model_fields.keys()


@pytest.mark.parametrize("name", [name for name in OTHERWISE if name != "image"])
def test_a_field_costs_what_the_table_says_and_else_a_new_container(name: str) -> None:
    instance = ended("running")
    found = changes(instance, instance.want.model_copy(update={name: OTHERWISE[name]}), instance.image, {})
    assert {change.effect for change in found} == {EFFECTS.get(name, Replace())}
    assert all(change.field.partition(".")[0] == name for change in found)
    assert replaces(found) == (name not in EFFECTS)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("resources", Resources(memory=128 << 20), "resources.memory none → 128MiB"),
        ("resources", Resources(memory_swap=-1), "resources.memory_swap none → unlimited"),
        ("resources", Resources(memory=1000), "resources.memory none → 1000 bytes"),
        ("stop_grace_period", 90.0, "stop_grace_period 10s → 90s"),
        ("ports", (Port(host_port=8080, container_port=80, count=3),), "ports none → [8080-8082:80-82/tcp]"),
        ("init", True, "init false → true"),
        ("environment", {"A": "1"}, "environment.A none → 1"),
        ("networks", {}, "networks.bridge attached → none"),
        ("mounts", (Mount(kind="tmpfs", target="/t"),), "mounts none → [kind=tmpfs, target=/t]"),
    ],
)
def test_a_change_reads_as_a_person_would_say_it(name: str, value: Any, words: str) -> None:
    instance = ended("running")
    found = changes(instance, instance.want.model_copy(update={name: value}), instance.image, {})
    assert [str(change) for change in found] == [words]
