"""Whether this root may use its name on this host: asked once, when an agent starts, before anything is changed.

A name belongs to one root as long as that root has anything on the host, whether its agent runs or not: an agent of
another root would take for gone what it does not know. What is found is judged by the id that it carries. A root that
was renamed or bound elsewhere is known by its inode; a copy, or one that was moved to another file system, is refused
while containers run that write to the old place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from holdfast.drivers import Host
from holdfast.errors import Conflict
from holdfast.identity import FILE, Record, drop, look_up, names_of
from holdfast.node.context import Context
from holdfast.node.observe import everything
from holdfast.observed import Receipt
from holdfast.runtime import cgroup
from holdfast.runtime.delegation import place_of

SHOWN = 3  # things that a message names


def check_claim(context: Context, known: Record | None) -> None:
    """Raise Conflict where the name, or the root, belongs to another. known: whose the name was so far."""
    host = context.host
    refuse_new_name(host)
    if known is not None and known.is_of(host.root) and known.run_root != str(host.run_root):
        moved = f"its containers run from '{known.run_root}', and agent.toml says run_root = '{host.run_root}'"
        _refuse(host, moved, traces(host), f'run_root = "{known.run_root}" until they are stopped')
    elif known is not None and known.id == host.id and not known.is_of(host.root):
        copy = f"it is a copy of '{known.root}' (both have the id {host.id}), from which containers still run"
        _refuse(host, copy, traces(host), f'root = "{known.root}"; to move a root, stop its containers first')
    found = list(everything(context, context.plugins.observe().seen, deep=True))
    if elsewhere := [each for each in found if each.of_root not in ("", host.id) and not _ours(context, each, known)]:
        id = elsewhere[0].of_root
        where = f" ('{known.root}')" if known is not None and known.id == id else ""
        belongs = f"the name belongs to the root with the id {id}{where}, which still has on this host"
        gone = f"if that root is gone for good: echo {id} > '{host.root / FILE}', and all of it is removed"
        _refuse(host, belongs, _listed(elsewhere), f"another name in agent.toml; {gone}")
    if not context.store.used:
        unmarked = [each for each in found if not each.of_root and each.kind != "volume"]
        _refuse(host, "another root uses the name", _listed(unmarked), "another name in agent.toml")


def traces(host: Host) -> list[str]:
    """What is on the host under a name, by its kernel objects alone: no driver is asked."""
    groups = {name for top in host.cgroups for place in cgroup.folders(top) for name in cgroup.children(place)}
    return [
        *(f"netns {path.name}" for path in Path("/run/netns").glob(f"{host.name}-*")),
        *(f"link {path.name}" for path in Path("/sys/class/net").glob(f"{host.name}-*")),
        *(f"cgroup {name}" for name in sorted(groups)),
    ]


def _ours(context: Context, thing: Receipt, known: Record | None) -> bool:
    """Whether a thing that carries another id is ours by its receipt: the root's id was changed since."""
    other = known is not None and not known.is_of(context.host.root) and known.id == thing.of_root
    return context.store.receipt(thing.kind, thing.id) is not None and not other


def refuse_new_name(host: Host) -> None:
    """Raise Conflict where the root has things on the host under another name; forget names without."""
    for name in names_of(host.root):
        if name != host.name:
            still = f"that root still has things on this host under the name '{name}'"
            left = traces(replace(host, name=name, cgroup_root=place_of(name)))
            _refuse(host, still, left, f'name = "{name}" in agent.toml; stop all containers, then rename')
            drop(name)


def _refuse(host: Host, why: str, left: Sequence[str], remedy: str) -> None:
    """Raise Conflict if something is left."""
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        shown = ", ".join(left[:SHOWN]) + more
        raise Conflict(f"run the agent '{host.name}' on '{host.root}': {why}: {shown} ({remedy})")


def _listed(found: Iterable[Receipt]) -> list[str]:
    return [f"{each.kind} {each.id}" for each in found]


def record_of(host: Host) -> str:
    """Why an agent would be refused at once, as far as the record of the name says; "" if it would not be."""
    record, held = look_up(host.name)
    if record is None or record.is_of(host.root):
        return ""
    if held:
        return f"the name '{host.name}' is used by process {record.pid} for '{record.root}', not for '{host.root}'"
    if record.id != host.id and traces(host):
        return f"the name '{host.name}' belongs to '{record.root}' (id {record.id}), not to '{host.root}'"
    return ""
