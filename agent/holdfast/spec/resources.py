"""The table `resources` of a container, as a person writes it in a state file. Part of the tables of `authored`."""

# ruff: noqa: RUF012 (pydantic copies the defaults of fields)

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from holdfast.grammar import names
from holdfast.grammar.quantities import size_text
from holdfast.spec import forms, model
from holdfast.tables import Checked, Short, Size, Table

STRING = {"type": "string"}
Strings = Annotated[list[str], Short(forms.several, (STRING,))]
Memory = Annotated[Size, Field(ge=0)]
Iops = Annotated[int, Field(ge=1, le=2**32 - 1)]
DevicePath = Annotated[str, Checked(names.absolute, {})]


class ResourcesTable(Table):
    """What the container may use; all of it is changeable while it runs."""

    memory: Annotated[Memory | None, Field(description="the most memory it gets")] = None
    memory_swap: Annotated[
        Annotated[int, Short(forms.swap, ({**STRING, "description": "a size, or unlimited"},))] | None,
        Field(description="memory and swap together; -1 or unlimited: no limit to swap"),
    ] = None
    memory_reservation: Annotated[Memory | None, Field(description="what it keeps when memory is short")] = None
    cpus: Annotated[
        float | None, Field(gt=0, le=forms.MOST_CPUS, description="cores it may use at a time, as 0.5")
    ] = None
    cpu_weight: Annotated[int | None, Field(ge=2, le=262144, description="relative, 1024 is normal")] = None
    cpuset: Annotated[
        Annotated[str, Checked(forms.cpuset, {"examples": ["0-3,6"]})] | None,
        Field(description="cores it may run on"),
    ] = None
    pids: Annotated[
        Annotated[int, Short(forms.pids, ({"enum": ["max"]},))],
        Field(ge=-1, le=forms.MOST_PIDS, description="the most processes and threads; max or -1: no limit"),
    ] = model.DEFAULT_PIDS
    io_weight: Annotated[int | None, Field(ge=10, le=1000, description="relative, 500 is normal")] = None
    device_read_bps: Annotated[dict[DevicePath, Memory], Field(description="bytes read a second, by device")] = {}
    device_write_bps: Annotated[dict[DevicePath, Memory], Field(description="bytes written a second, by device")] = {}
    device_read_iops: Annotated[dict[DevicePath, Iops], Field(description="reads a second, by device")] = {}
    device_write_iops: Annotated[dict[DevicePath, Iops], Field(description="writes a second, by device")] = {}
    oom_score_adj: Annotated[
        int | None, Field(ge=-1000, le=1000, description="how readily the kernel kills it when memory is short")
    ] = None
    service_class: Annotated[
        Literal["guaranteed", "burstable", "besteffort"] | None,
        Field(alias="class", description="what the cgroup policy qos gives it"),
    ] = None
    policy: Annotated[Strings, Field(description="cgroup policy drivers; later ones win")] = []

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.memory is not None and self.memory < 1:
            yield "memory", "0 is no memory at all (expected a size; absent: no limit)"
        if self.pids == 0:
            yield "pids", "0 leaves no process (expected at least 1, or max for no limit)"
        memory, swap, reservation = self.memory, self.memory_swap, self.memory_reservation
        if swap is not None and memory is None:
            yield "memory_swap", "needs a memory limit (expected memory beside it)"
        if memory is not None and swap is not None and swap != -1 and swap < memory:
            wrong = f"{size_text(swap)} is less than memory, which it includes"
            yield "memory_swap", f"{wrong} (expected at least {size_text(memory)})"
        if memory is not None and reservation is not None and reservation > memory:
            wrong = f"{size_text(reservation)} is more than memory"
            yield "memory_reservation", f"{wrong} (expected at most {size_text(memory)})"

    def resources(self) -> model.Resources:
        return model.Resources.model_validate(self.model_dump(by_alias=False))
