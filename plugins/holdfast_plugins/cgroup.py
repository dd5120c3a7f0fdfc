"""The built-in cgroup policies: `limits` sets what a resources table says, `qos` what its service class means.

Both only compute, except that numbers of block devices are read from their nodes. Entry point: `cgroup`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from holdfast.drivers import CgroupPolicy, CgroupWant, Host
from holdfast.errors import WrongState, explained
from holdfast.hookspecs import hookimpl
from holdfast.observed import Json
from holdfast.spec.model import Resources

ServiceClass = Literal["guaranteed", "burstable", "besteffort"]
DeviceNumbers = Callable[[str], tuple[int, int]]

PERIOD = 100_000  # microseconds
LEAST_MEMORY = 6 << 20  # bytes; as Docker has it
SHARES_PER_CPU = 1024
MINIMAL_SHARES = 2

GUARANTEED_SCORE = -997
BESTEFFORT_SCORE = 1000


@hookimpl
def register_cgroup_policies(register: Callable[[CgroupPolicy], None], host: Host) -> None:
    """Offer both policies."""
    register(LimitsPolicy())
    register(QosPolicy())


def device_numbers(path: str) -> tuple[int, int]:
    """The major and minor number of a block device; WrongState for anything else."""
    with explained(f"device '{path}'", WrongState, "the path of a block device"):
        status = Path(path).stat()
    if not stat.S_ISBLK(status.st_mode):
        raise WrongState(f"device '{path}': not a block device (as /dev/vda)")
    return os.major(status.st_rdev), os.minor(status.st_rdev)


class LimitsPolicy:
    """Sets the kernel's value for every field of the table, as `docker run` does."""

    name = "limits"

    def __init__(self, numbers: DeviceNumbers = device_numbers) -> None:
        self._numbers = numbers

    def check(self, want: CgroupWant) -> None:
        """Raise WrongState for limits that contradict each other or exceed the host, and for unknown devices."""
        resources = want.resources
        _check_memory(resources)
        if resources.cpus is not None and not 0 < resources.cpus <= want.cpus:
            raise WrongState(f"cpus '{resources.cpus:g}': out of range (above 0, up to {want.cpus} on this node)")
        if resources.cpu_weight is not None and not 2 <= resources.cpu_weight <= 262_144:
            raise WrongState(f"cpu_weight '{resources.cpu_weight}': out of range (2 to 262144)")
        if resources.io_weight is not None and not 10 <= resources.io_weight <= 1000:
            raise WrongState(f"io_weight '{resources.io_weight}': out of range (10 to 1000)")
        if resources.cpuset is not None:
            _check_cpuset(resources.cpuset, want.cpus)
        _block_io(resources, self._numbers)

    def settings(self, want: CgroupWant) -> Json:
        """Turn the table into `linux.resources`, without what it does not name."""
        resources = want.resources
        tables: dict[str, Any] = {
            "memory": _memory(resources),
            "cpu": _cpu(resources),
            "pids": {} if resources.pids in (None, -1) else {"limit": resources.pids},
            "blockIO": _block_io(resources, self._numbers),
        }
        settings: dict[str, Any] = {"resources": {name: table for name, table in tables.items() if table}}
        if resources.oom_score_adj is not None:
            settings["oom_score_adj"] = resources.oom_score_adj
        return settings


def _check_memory(resources: Resources) -> None:
    memory, swap, reservation = resources.memory, resources.memory_swap, resources.memory_reservation
    if swap is not None and swap >= 0 and (memory is None or swap < memory):
        limit = "no memory limit" if memory is None else f"less than memory {memory}"
        raise WrongState(f"memory_swap '{swap}': {limit} (memory and swap together, at least as much as memory)")
    if reservation is not None and memory is not None and reservation > memory:
        raise WrongState(f"memory_reservation '{reservation}': more than memory {memory}")
    if memory is not None and memory < LEAST_MEMORY:
        raise WrongState(f"memory '{memory}': too little for the runtime to start anything (at least 6MiB)")


def _check_cpuset(text: str, cpus: int) -> None:
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise WrongState(f"cpuset '{text}': not a list of CPUs (as 0-2,4)")
        if int(last or first) >= cpus:
            raise WrongState(f"cpuset '{text}': there is no CPU {last or first} (0 to {cpus - 1} on this node)")


def _memory(resources: Resources) -> dict[str, int]:
    """As with Docker, a memory limit alone allows the same amount of swap."""
    swap = resources.memory_swap
    if swap is None and resources.memory is not None:
        swap = 2 * resources.memory
    return _given(limit=resources.memory, swap=swap, reservation=resources.memory_reservation)


def _cpu(resources: Resources) -> dict[str, Any]:
    quota = {"quota": max(1000, round(resources.cpus * PERIOD)), "period": PERIOD} if resources.cpus else {}
    return quota | _given(shares=resources.cpu_weight, cpus=resources.cpuset)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _block_io(resources: Resources, numbers: DeviceNumbers) -> dict[str, Any]:
    throttles: Mapping[str, Mapping[str, int]] = {
        "throttleReadBpsDevice": resources.device_read_bps,
        "throttleWriteBpsDevice": resources.device_write_bps,
        "throttleReadIOPSDevice": resources.device_read_iops,
        "throttleWriteIOPSDevice": resources.device_write_iops,
    }
    block: dict[str, Any] = _given(weight=resources.io_weight)
    for name, rates in throttles.items():
        if rates:
            devices = ((*numbers(path), rate) for path, rate in sorted(rates.items()))
            block[name] = [{"major": major, "minor": minor, "rate": rate} for major, minor, rate in devices]
    return block


class QosPolicy:
    """Kubernetes' service classes: who gets CPU first, whose memory is protected, who is killed first.

    memory and cpus are a container's limits, memory_reservation and cpu_weight its requests. It comes after `limits`
    and adds weights and protection; an explicit cpu_weight or oom_score_adj is kept.
    """

    name = "qos"

    def check(self, want: CgroupWant) -> None:
        """Raise WrongState for a class that contradicts the rest of the table."""
        if want.resources.service_class == "guaranteed" and want.resources.memory is None:
            raise WrongState("service_class 'guaranteed': no memory limit (memory = …, which is what it guarantees)")

    def settings(self, want: CgroupWant) -> Json:
        """Set the CPU weight, the memory protection and the oom_score_adj of the class."""
        resources, quality = want.resources, service_class(want.resources)
        table: dict[str, Any] = {"cpu": {"shares": _shares(resources, quality)}}
        request = _memory_request(resources)
        if request and quality != "besteffort":
            table |= _protection(request, want.version, hard=quality == "guaranteed")
        score = resources.oom_score_adj
        return {"resources": table, "oom_score_adj": _score(want, quality) if score is None else score}


def service_class(resources: Resources) -> ServiceClass:
    """The class that a table names, or that follows from it as in Kubernetes.

    guaranteed: memory and CPU are limited, and all of the memory is requested. besteffort: nothing is requested.
    """
    if resources.service_class is not None:
        return resources.service_class
    requests = (resources.memory, resources.cpus, resources.memory_reservation, resources.cpu_weight)
    if all(request is None for request in requests):
        return "besteffort"
    limited = resources.memory is not None and resources.cpus is not None
    return "guaranteed" if limited and resources.memory_reservation in (None, resources.memory) else "burstable"


def _memory_request(resources: Resources) -> int | None:
    return resources.memory_reservation if resources.memory_reservation is not None else resources.memory


def _shares(resources: Resources, quality: ServiceClass) -> int:
    if resources.cpu_weight is not None:
        return resources.cpu_weight
    cpus = 0 if quality == "besteffort" else resources.cpus or 0
    return max(MINIMAL_SHARES, int(cpus * SHARES_PER_CPU))


def _protection(request: int, version: int, *, hard: bool) -> dict[str, Any]:
    """Protect memory. cgroup v1 can't: its soft limit at least spares containers that stay below their request."""
    if version == 2:
        return {"unified": {"memory.min" if hard else "memory.low": str(request)}}
    return {"memory": {"reservation": request}}


def _score(want: CgroupWant, quality: ServiceClass) -> int:
    """Kubernetes' formula: the more of the node's memory a burstable container requests, the later it is killed."""
    if quality != "burstable":
        return GUARANTEED_SCORE if quality == "guaranteed" else BESTEFFORT_SCORE
    request = _memory_request(want.resources) or 0
    score = 1000 - 1000 * request // max(1, want.memory_total)
    return min(max(score, 1000 + GUARANTEED_SCORE), BESTEFFORT_SCORE - 1)
