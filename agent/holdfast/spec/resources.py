"""The table `resources` of a container."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from holdfast.keys import Checked, Short, Strings, Table, size_text, within
from holdfast.spec import forms
from holdfast.spec.values import STRING, Absolute, Memory

DEFAULT_PIDS = 2048  # processes and threads of a container that names no limit

Iops = Annotated[int, within(1, 2**32 - 1)]


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)


class Resources(Table):
    """What the container may use. All of it can be changed while the container runs."""

    memory: Memory | None = Field(None, description="the most memory it may use; absent: no limit")
    memory_swap: (
        Annotated[int, Short(forms.swap, ({**STRING, "description": "a size, or unlimited"},), show=size_text)] | None
    ) = Field(None, description="memory and swap together; `-1` or `unlimited`: no limit to swap")
    memory_reservation: Memory | None = Field(None, description="the memory it keeps when the host runs short")
    cpus: Annotated[float, within(above=0, high=forms.MOST_CPUS)] | None = Field(
        None, description="how many cores it may use at a time, for example `0.5`"
    )
    cpu_weight: Annotated[int, within(2, 262144)] | None = Field(
        None, description="its share of the processors when they are busy; 1024 is normal"
    )
    cpuset: Annotated[str, Checked(forms.cpuset, {"examples": ["0-3,6"]})] | None = Field(
        None, description="the cores it may run on"
    )
    # None stands for -1, too, in what an earlier version has stored.
    pids: Annotated[int, Short(forms.pids, ({"enum": ["max"]},), show=_limit), within(-1, forms.MOST_PIDS)] | None = (
        Field(DEFAULT_PIDS, description="the most processes and threads; `max` or `-1`: no limit")
    )
    io_weight: Annotated[int, within(10, 1000)] | None = Field(
        None, description="its share of the disks when they are busy; 500 is normal"
    )
    device_read_bps: dict[Absolute, Memory] = Field({}, description="the most bytes read per second, by device")
    device_write_bps: dict[Absolute, Memory] = Field({}, description="the most bytes written per second, by device")
    device_read_iops: dict[Absolute, Iops] = Field({}, description="the most reads per second, by device")
    device_write_iops: dict[Absolute, Iops] = Field({}, description="the most writes per second, by device")
    oom_score_adj: Annotated[int, within(-1000, 1000)] | None = Field(
        None, description="how readily the kernel kills it when memory runs out; -1000: never"
    )
    service_class: Literal["guaranteed", "burstable", "besteffort"] | None = Field(
        None, alias="class", description="the service class that the cgroup policy `qos` gives it"
    )
    policy: Strings = Field((), description="the cgroup policies that apply; later ones win")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.memory is not None and self.memory < 1:
            yield "memory", "0 is no memory at all (expected a size; absent: no limit)"
        if self.pids == 0:
            yield "pids", "0 leaves no process (expected at least 1, or max for no limit)"
        memory, swap, reservation = self.memory, self.memory_swap, self.memory_reservation
        if swap is not None and memory is None:
            yield "memory_swap", "needs a memory limit (expected memory as well)"
        if memory is not None and swap is not None and swap != -1 and swap < memory:
            wrong = f"{size_text(swap)} is less than memory, which it includes"
            yield "memory_swap", f"{wrong} (expected at least {size_text(memory)})"
        if memory is not None and reservation is not None and reservation > memory:
            wrong = f"{size_text(reservation)} is more than memory"
            yield "memory_reservation", f"{wrong} (expected at most {size_text(memory)})"

    @cached_property
    def text(self) -> str:
        """All of it as JSON: equal tables have equal texts."""
        return self.model_dump_json()
