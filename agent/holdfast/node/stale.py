"""Which bind mounts of running containers are not what is at their sources any more.

A container keeps what was mounted when it started. Where a file system is unmounted, mounted anew or mounted over the
source later, the container goes on with the old one, until it is restarted. Only mountinfo(5) is read: a file system
that is gone may not answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from holdfast.mounts import MountPoint, read_points
from holdfast.node.context import Context
from holdfast.observed import Instance, Receipt
from holdfast.runtime.mountpoints import AUTOMOUNT, Mounted, mount_point


def where(source: str) -> dict[str, str]:
    """What the receipt of a bind mount keeps: its source without links, and the mount point that lies on.

    Nothing, where somebody has just moved the source: what is mounted was opened before, and is right.
    """
    try:
        real = str(Path(source).resolve(strict=True))
        return {"real": real, "mount_point": mount_point(real)}
    except OSError:
        return {}


def look(context: Context, instances: Iterable[Instance]) -> None:
    """Find what running containers have mounted that is outdated; tell of what is new."""
    mounted = Mounted.now()
    known, context.stale_judged = context.stale_judged, {}
    found = {}
    for each in (each for each in instances if each.phase == "running"):
        judged = known.get(each.id)
        if (
            judged is None or judged[0] is not mounted.points or judged[1] != each.pid
        ):  # else nothing was mounted since
            judged = mounted.points, each.pid, tuple(_outdated(context, each, mounted))
        context.stale_judged[each.id] = judged
        found[each.id] = judged[2]
    before, context.stale = context.stale, {id: words for id, words in found.items() if words}
    for instance in instances if context.records_exits else ():
        for words in set(context.stale.get(instance.id, ())).difference(before.get(instance.id, ())):
            context.store.event("unmounted", instance.key, words, instance=instance.id)


def _outdated(context: Context, instance: Instance, mounted: Mounted) -> Iterator[str]:
    sources = {mount.target: mount.source for mount in instance.mounts if mount.kind == "bind"}
    for receipt in context.store.owned(instance.id) if sources else ():
        source = sources.get(receipt.id.partition(":")[2], "") if receipt.kind == "volume" else ""
        if source and (change := _change(receipt, instance.pid, mounted)):
            yield f"{change}, which '{source}' lies on: it still has what was there when it started (restart it)"


def _change(receipt: Receipt, pid: int | None, mounted: Mounted) -> str:
    """What has become of the mount that a bind's source was on; "" if nothing has."""
    point = receipt.data.get("mount_point", "/")
    if point != "/" and point not in mounted.at:
        return f"{point} is not mounted any more"
    here = mounted.covering(receipt.data["real"]) if "real" in receipt.data else mounted.at.get(point)
    if here is None or here.kind == AUTOMOUNT:  # it waits for whoever asks for it next
        return ""
    if here.point != point:
        return f"{here.what} was mounted at {here.point}"
    if point != "/" and pid is not None and not _has(pid, here):
        return f"{point} was mounted anew"
    return ""


def _has(pid: int, mount: MountPoint) -> bool:
    """Whether a process has a mount, or a part of it, in its own mount namespace."""
    try:
        own = read_points(Path(f"/proc/{pid}/mountinfo"))
    except OSError:  # it has just ended
        return True
    inside = f"{mount.root.rstrip('/')}/"
    return any(each.device == mount.device and f"{each.root}/".startswith(inside) for each in own)
