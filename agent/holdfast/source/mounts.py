"""Whether a state directory, and each folder of it, still lies on the file system that it was read from.

Where a file system is no longer mounted, there is an empty folder, or none. Read as it is, it would ask for no app,
and every app would be removed. So each revision records which mounts its state files were read from
(`Revision.lies_on`). If such a folder lies on another mount and has no state file, it is not taken for empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from holdfast.mounts import MountPoint
from holdfast.runtime.mountpoints import AUTOMOUNT, Mounted, mount_id
from holdfast.source.revision import LiesOn

REMEDY = "mount it, or put an empty vars.toml there if it is to be empty"


def lies_on(root: str, state_files: Iterable[str]) -> LiesOn:
    """The mounts that the state files of a directory lie on. root and state_files: absolute, without links.

    Raises OSError when one of them has just gone.
    """
    files, known = list(state_files), Mounted.now()
    inner = [point for point in known.at if point.startswith(f"{root}/")]
    found = {}
    for path in (root, *sorted(inner)):
        here = known.by_id.get(mount_id(path)) if any(file.startswith(f"{path}/") for file in files) else None
        if here is not None and here.kind != AUTOMOUNT:
            found[path[len(root) + 1 :]] = (here.point, here.what)
    return found


def lost(root: str, before: LiesOn, now: LiesOn) -> dict[str, str]:
    """The mounts that a directory was read from and no longer lies on: folder → what has become of it.

    root: as in agent.toml. before, now: of the last revision, and of what is there.
    """
    gone = before.keys() - now.keys()
    if not gone:
        return {}
    known = Mounted.now()
    found = {}
    for folder in sorted(gone):
        (point, what), here = before[folder], None
        unchanged = not point or _at(known, point) == what
        with suppress(OSError):  # the folder is not there, or not for us
            here = known.by_id.get(mount_id(f"{root}/{folder}"))
            unchanged = here is not None and (here.point, here.what) == (point, what)
        if not unchanged:
            found[folder] = _change(point, what, here, known)
    return found


def _at(known: Mounted, point: str) -> str:
    """What is mounted at a point; "" for nothing, and for what waits for a file system."""
    here = known.at.get(point)
    return here.what if here is not None and here.kind != AUTOMOUNT else ""


def _change(point: str, what: str, here: MountPoint | None, known: Mounted) -> str:
    if not point:
        return "it is not known on which file system it lay, since an earlier version read it"
    if not _at(known, point):
        return f"{point} is not mounted any more (it was {what})"
    now = f"{here.what} at {here.point}" if here else "nothing that mounts tell of"
    return f"it lies on {now} and not on {what} at {point} any more"
