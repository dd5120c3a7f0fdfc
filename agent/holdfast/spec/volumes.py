"""The volumes that images declare (VOLUME) → mounts of the containers that run them. Pure.

Each becomes a volume of its container, `app/CONTAINER.TARGET`, so that the next container of that name finds it. A
state file that defines a volume of this name says what driver and options it has, and what becomes of it. Instances
of one container that stand side by side have different slots (`Instance.slot`), and each slot has volumes of its own:
`app/CONTAINER.TARGET--2` is that of the second.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

from holdfast.grammar.names import NAME, absolute
from holdfast.spec.model import App, Mount

PLAIN = re.compile(r"(/[a-z0-9_]+)+")  # a target whose name can be nobody else's


def image_volumes(app: App, declared: Mapping[str, Iterable[str]]) -> dict[str, tuple[Mount, ...]]:
    """Return the mounts that each container has beyond those of its state file.

    declared: container → what its image declares as volumes. What is mounted by the state file at the same place
    comes instead; what a container takes over by `volumes_from` is the other's. Raises ValueError for a path that
    can't be mounted.
    """
    found: dict[str, tuple[Mount, ...]] = {}

    def visit(name: str, above: frozenset[str]) -> tuple[Mount, ...]:
        if name in found or name in above:
            return found.get(name, ())
        want = app.containers[name]
        mounts = {mount.target: mount for mount in want.mounts}
        taken = set(mounts)
        for other, access in want.volumes_from.items():
            for mount in visit(other, above | {name}) if other in app.containers else ():
                mounts.setdefault(mount.target, taken_over(mount, access))
        for target in sorted({absolute(f"/{target}") for target in declared.get(name, ())} - {"/"}):
            source = f"{app.name}/{volume_name(name, target)}"
            mounts.setdefault(target, Mount(kind="volume", source=source, target=target))
        found[name] = tuple(mount for target, mount in mounts.items() if target not in taken)
        return found[name]

    for name in app.containers:
        visit(name, frozenset())
    return found


def taken_over(mount: Mount, access: str) -> Mount:
    """Return another container's mount as `volumes_from` gives it. The other's image fills a new volume."""
    return mount.model_copy(update={"read_only": mount.read_only or access == "ro", "nocopy": True})


def of_slot(app: str, container: str, mounts: Iterable[Mount], slot: int) -> tuple[Mount, ...]:
    """Return the mounts that `image_volumes` found as the instance in a slot has them.

    What it takes over by `volumes_from` is the same for all.
    """
    return tuple(
        mount.model_copy(update={"source": f"{app}/{volume_name(container, mount.target, slot)}"})
        if mount.source == f"{app}/{volume_name(container, mount.target)}"
        else mount
        for mount in mounts
    )


def defined_as(app: str, container: str, mount: Mount, slot: int) -> str:
    """Return the volume whose definition counts for a mount of an instance: that of the first slot, for all."""
    own = mount.source == f"{app}/{volume_name(container, mount.target, slot)}"
    return f"{app}/{volume_name(container, mount.target)}" if own else mount.source


def volume_name(container: str, target: str, slot: int = 1) -> str:
    """Return the name of the volume at a target: `db.var-lib-mysql`, with a digest where names could clash."""
    readable = re.sub(r"[^a-z0-9_.-]", "-", target.strip("/").lower())
    which = f"--{slot}" if slot > 1 else ""
    name = f"{container}.{readable}{which}"
    if PLAIN.fullmatch(target) and NAME.fullmatch(name):
        return name
    tail = hashlib.sha256(f"{container}:{target}{which}".encode()).hexdigest()[:8]
    return f"{name[: 62 - len(tail)]}-{tail}"
