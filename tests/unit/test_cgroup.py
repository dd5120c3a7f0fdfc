"""Cgroup policies, and how they compose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdfast.drivers import CgroupWant
from holdfast.errors import WrongState
from holdfast.observed import Limits
from holdfast.runtime import cgroup
from holdfast.spec.model import Resources
from holdfast.testing import PolicyConformance
from holdfast_plugins.cgroup import LimitsPolicy, QosPolicy, service_class

MIB = 1024 * 1024
GIB = 1024 * MIB


def want(version: int = 2, **fields: Any) -> CgroupWant:
    return CgroupWant(resources=Resources(**fields), version=version, memory_total=8 * GIB, cpus=4)


def numbers(path: str) -> tuple[int, int]:
    return 254, 0


LIMITS, QOS = LimitsPolicy(numbers), QosPolicy()


def test_every_field_becomes_the_setting_of_its_name() -> None:
    settings = LIMITS.settings(
        want(
            memory=64 * MIB,
            memory_swap=96 * MIB,
            memory_reservation=32 * MIB,
            cpus=0.5,
            cpu_weight=512,
            cpuset="0-1",
            pids=20,
            io_weight=300,
            device_read_bps={"/dev/vda": MIB},
            device_write_bps={"/dev/vda": 2 * MIB},
            device_read_iops={"/dev/vda": 10},
            device_write_iops={"/dev/vda": 20},
            oom_score_adj=100,
        )
    )
    assert settings == {
        "resources": {
            "memory": {"limit": 64 * MIB, "swap": 96 * MIB, "reservation": 32 * MIB},
            "cpu": {"quota": 50_000, "period": 100_000, "shares": 512, "cpus": "0-1"},
            "pids": {"limit": 20},
            "blockIO": {
                "weight": 300,
                "throttleReadBpsDevice": [{"major": 254, "minor": 0, "rate": MIB}],
                "throttleWriteBpsDevice": [{"major": 254, "minor": 0, "rate": 2 * MIB}],
                "throttleReadIOPSDevice": [{"major": 254, "minor": 0, "rate": 10}],
                "throttleWriteIOPSDevice": [{"major": 254, "minor": 0, "rate": 20}],
            },
        },
        "oom_score_adj": 100,
    }


def test_empty_table_limits_the_number_of_processes_alone() -> None:
    assert LIMITS.settings(want()) == {"resources": {"pids": {"limit": 2048}}}


@pytest.mark.parametrize("pids", [-1, None])
def test_number_of_processes_can_be_unlimited(pids: int | None) -> None:
    assert LIMITS.settings(want(pids=pids)) == {"resources": {}}


def test_memory_limit_alone_allows_as_much_swap_again() -> None:
    assert LIMITS.settings(want(memory=64 * MIB))["resources"]["memory"]["swap"] == 128 * MIB


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"memory": 64, "memory_swap": 32}, "memory_swap '32'"),
        ({"memory_swap": 32}, "no memory limit"),
        ({"memory": 64, "memory_reservation": 128}, "memory_reservation '128'"),
        ({"cpus": 5.0}, "up to 4"),
        ({"cpu_weight": 1}, "cpu_weight '1'"),
        ({"io_weight": 5}, "io_weight '5'"),
        ({"cpuset": "0-9"}, "there is no CPU 9"),
        ({"cpuset": "a"}, "not a list"),
    ],
)
def test_limits_that_can_not_be_are_refused(fields: dict[str, Any], cause: str) -> None:
    with pytest.raises(WrongState, match=cause):
        LIMITS.check(want(**fields))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        ({}, Limits(pids=2048)),
        ({"memory": 64 * MIB, "cpus": 1.5, "pids": 10}, Limits(64 * MIB, 128 * MIB, 1.5, 10)),
        ({"memory": 64 * MIB, "memory_swap": -1, "pids": -1}, Limits(64 * MIB)),
        ({"memory": 64 * MIB, "memory_swap": 64 * MIB, "cpus": 0.25}, Limits(64 * MIB, 64 * MIB, 0.25, 2048)),
    ],
)
def test_what_is_written_to_a_cgroup_reads_as_the_limits_that_it_sets(
    version: int, fields: dict[str, Any], limits: Limits
) -> None:
    resources = LIMITS.settings(want(**fields))["resources"]
    assert cgroup.limits_of(cgroup.values(resources, version)) == limits


def test_the_largest_number_of_pages_is_no_limit() -> None:
    assert cgroup.limits_of({"memory.limit_in_bytes": "9223372036854771712", "cpu.cfs_quota_us": "-1"}) == Limits()


def test_unknown_device_is_refused() -> None:
    for path in ("/dev/no-such-disk", "/dev/null"):
        with pytest.raises(WrongState, match=path):
            LimitsPolicy().check(want(device_read_bps={path: 1}))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "besteffort"),
        ({"memory": MIB}, "burstable"),
        ({"memory": MIB, "cpus": 1.0}, "guaranteed"),
        ({"memory": 2 * MIB, "memory_reservation": MIB, "cpus": 1.0}, "burstable"),
        ({"memory": MIB, "service_class": "besteffort"}, "besteffort"),
    ],
)
def test_service_class_follows_from_the_table(fields: dict[str, Any], expected: str) -> None:
    assert service_class(Resources(**fields)) == expected


def test_guaranteed_memory_is_protected_on_v2_and_a_soft_limit_on_v1() -> None:
    table = {"memory": GIB, "cpus": 2.0}
    assert QOS.settings(want(2, **table)) == {
        "resources": {"cpu": {"shares": 2048}, "unified": {"memory.min": str(GIB)}},
        "oom_score_adj": -997,
    }
    assert QOS.settings(want(1, **table))["resources"]["memory"] == {"reservation": GIB}


def test_burstable_scores_fall_with_the_memory_asked_for() -> None:
    def score(memory: int) -> int:
        return int(QOS.settings(want(memory=memory))["oom_score_adj"])

    assert (score(4 * GIB), score(MIB), score(8 * GIB)) == (500, 999, 3)
    assert QOS.settings(want())["oom_score_adj"] == 1000


def test_guaranteed_without_a_memory_limit_is_refused() -> None:
    with pytest.raises(WrongState, match="guaranteed"):
        QOS.check(want(service_class="guaranteed"))


def test_policies_compose_key_by_key_and_the_later_wins() -> None:
    settings = cgroup.compose((LIMITS, QOS), want(memory=GIB, cpus=2.0))
    assert settings.resources["memory"]["limit"] == GIB
    assert settings.resources["cpu"] == {"quota": 200_000, "period": 100_000, "shares": 2048}
    assert settings.oom_score_adj == -997


def test_policies_of_a_table_are_those_it_names() -> None:
    assert cgroup.policy_names(Resources()) == ("limits",)
    assert cgroup.policy_names(Resources(service_class="burstable")) == ("limits", "qos")
    assert cgroup.policy_names(Resources(policy=("qos",))) == ("qos",)


def test_what_the_kernel_lacks_is_left_out_with_a_warning() -> None:
    lacking = cgroup.Features(swap=False, io_weight=False)
    settings = cgroup.compose((LIMITS,), want(memory=MIB, io_weight=100, pids=-1), lacking)
    assert settings.resources == {"memory": {"limit": MIB}, "blockIO": {}}
    assert len(settings.warnings) == 2


def test_weights_of_v2_need_somebody_who_weighs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    (tmp_path / "cgroup.controllers").write_text("cpu io memory\n")
    assert cgroup.features().io_weight == Path("/sys/module/bfq").exists()
    (tmp_path / "io.cost.qos").touch()
    assert cgroup.features().io_weight
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    assert not cgroup.features().io_weight


RESOURCES = {
    "memory": {"limit": 64, "swap": 96, "reservation": 32},
    "cpu": {"quota": 50_000, "period": 100_000, "shares": 1024, "cpus": "0"},
    "pids": {"limit": 9},
    "blockIO": {"weight": 1000},
}


def test_resources_are_files_of_v1() -> None:
    assert cgroup.values(RESOURCES, 1) == {
        "pids.max": "9",
        "cpuset.cpus": "0",
        "memory.limit_in_bytes": "64",
        "memory.memsw.limit_in_bytes": "96",
        "memory.soft_limit_in_bytes": "32",
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "50000",
        "cpu.shares": "1024",
        "blkio.weight": "1000",
        "blkio.bfq.weight": "1000",
    }


def test_resources_are_files_of_v2_where_swap_is_counted_alone() -> None:
    assert cgroup.values(RESOURCES | {"unified": {"memory.min": "16"}}, 2) == {
        "pids.max": "9",
        "cpuset.cpus": "0",
        "memory.max": "64",
        "memory.swap.max": "32",
        "memory.low": "32",
        "memory.min": "16",
        "cpu.max": "50000 100000",
        "cpu.weight": "39",
        "io.weight": "default 10000",
        "io.bfq.weight": "default 1000",
    }


def test_limit_that_is_left_out_is_lifted() -> None:
    assert cgroup.values({}, 1)["memory.limit_in_bytes"] == "-1"
    lifted = cgroup.values({}, 2)
    assert (lifted["memory.max"], lifted["memory.low"], lifted["cpu.max"]) == ("max", "0", "max 100000")
    assert (lifted["cpu.weight"], lifted["pids.max"], lifted["cpuset.cpus"]) == ("100", "max", "")


def test_cpuset_that_is_lifted_becomes_the_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    box = tmp_path / "holdfast" / "box"
    box.mkdir(parents=True)
    (tmp_path / "cgroup.controllers").write_text("cpuset\n")
    (tmp_path / "holdfast" / "cpuset.cpus.effective").write_text("0-3\n")
    for held, lifted in (("1\n", "0-3"), ("\n", "\n")):
        (box / "cpuset.cpus").write_text(held)
        cgroup.apply("/holdfast/box", {})
        assert (box / "cpuset.cpus").read_text() == lifted


class TestLimitsPolicy(PolicyConformance):
    def make_policy(self) -> LimitsPolicy:
        return LimitsPolicy(numbers)

    def wants(self) -> list[CgroupWant]:
        return [want(version, memory=64 * MIB, cpus=0.5, pids=100) for version in (1, 2)]


class TestQosPolicy(PolicyConformance):
    def make_policy(self) -> QosPolicy:
        return QosPolicy()

    def wants(self) -> list[CgroupWant]:
        return [want(version, service_class="burstable", memory=64 * MIB) for version in (1, 2)]
