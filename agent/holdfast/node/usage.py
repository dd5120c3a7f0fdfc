"""Measure what uses the disk, and what could be deleted: `holdfast system df`, `holdfast system prune`.

The kinds are Docker's, plus layers, which images share, and logs. Sizes are in bytes: for images and layers those of
their uncompressed archives, for everything else what is allocated on disk.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from holdfast.files import discard_tree
from holdfast.images.kept.image import Image
from holdfast.node.context import Context
from holdfast.node.images import image_users
from holdfast.observed import Json

Row = dict[str, Any]


def usage(context: Context, volumes: Sequence[Json]) -> Json:
    """{"kinds": [{"kind", "count", "active", "size", "reclaimable"}, …], "images", "containers", "volumes": details}

    volumes: as `Answers.volumes` has them. reclaimable is what `prune` could free, of everything.
    """
    store, users = context.images, image_users(context)
    images = store.list(dangling=True)
    sizes = {diff_id: store.layers.facts(diff_id).size for diff_id in store.layers.all()}
    of_all = {diff_id for image in images for diff_id in image.diff_ids}
    of_used = {diff_id for image in images if image.digest in users for diff_id in image.diff_ids}

    def total(diff_ids: Iterable[str]) -> int:
        return sum(sizes.get(each, 0) for each in diff_ids)

    containers = [
        _container(context, each.id, each.key, each.phase) for each in list(context.store.instances.values())
    ]
    kept = [_volume(each) for each in volumes]
    logs = _logs(context)
    used = [image for image in images if image.digest in users]
    running = [each for each in containers if each["state"] == "running"]
    mounted = [each for each in kept if each["used_by"]]
    kinds = [
        _kind("images", len(images), len(used), total(of_all), total(of_all - of_used)),
        _kind("layers", len(sizes), len(of_used & sizes.keys()), total(sizes), total(sizes.keys() - of_used)),
        _kind("containers", len(containers), len(running), _sum(containers), 0),
        _kind("volumes", len(kept), len(mounted), _sum(kept), _sum(_orphans(kept))),
        _kind("logs", len(logs), len(logs) - len(_orphans(logs)), _sum(logs), _sum(_orphans(logs))),
    ]
    if context.builder.caches.is_dir():
        size = allocated(context.builder.caches)
        kinds.append(_kind("build cache", 1, 0, size, size))
    return {
        "kinds": kinds,
        "images": [_image(image, images, sizes, users) for image in images],
        "containers": containers,
        "volumes": kept,
    }


def prune_logs(context: Context) -> int:
    """Delete the output of apps that are gone; return the freed bytes."""
    doomed = _orphans(_logs(context))
    for each in doomed:
        discard_tree(each["path"])
    return _sum(doomed)


def prune_build_cache(context: Context) -> int:
    """Empty the layer caches of all apps, except those that are building; return the freed bytes."""
    freed = 0
    for app in context.builder.apps():
        size = allocated(context.builder.caches / app)
        freed += size if context.builder.wipe(app) else 0
    return freed


def allocated(path: Path) -> int:
    """The bytes that a file, or a directory with its content, uses on disk; hard links count once.

    What can't be read, or goes meanwhile, counts for nothing.
    """
    total, seen = 0, set[tuple[int, int]]()
    for entry in _walk(path):
        if entry.st_nlink > 1 and not stat.S_ISDIR(entry.st_mode):
            if (entry.st_dev, entry.st_ino) in seen:
                continue
            seen.add((entry.st_dev, entry.st_ino))
        total += entry.st_blocks * 512
    return total


def _walk(path: Path) -> Iterator[os.stat_result]:
    left = [str(path)]
    with suppress(OSError):
        yield path.lstat()
    while left:
        with suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    yield entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)


def _container(context: Context, id: str, key: str, phase: str) -> Row:
    made = context.store.receipt("rootfs", id)
    place = made and (made.data.get("upper") or made.data["path"])  # without a writable layer, all of it is its own
    size = allocated(Path(place)) if place else 0
    return {"container": key, "instance": id, "state": phase, "size": size}


def _volume(volume: Json) -> Row:
    path = str(volume.get("path") or "")
    return {
        "volume": volume["id"],
        "used_by": list(volume["used_by"]),
        "orphan": bool(volume["orphan"]) and not volume["used_by"],
        "size": allocated(Path(path)) if path else 0,
    }


def _logs(context: Context) -> list[Row]:
    """The folders of logs, one an app."""
    known = {each.app for each in list(context.store.instances.values())} | context.store.history().generations.keys()
    folders = sorted(each for each in (context.host.root / "logs").glob("*") if each.is_dir())
    return [{"path": str(each), "size": allocated(each), "orphan": each.name not in known} for each in folders]


def _image(image: Image, images: Sequence[Image], sizes: Mapping[str, int], users: Mapping[str, set[str]]) -> Row:
    others = {diff_id for each in images if each.digest != image.digest for diff_id in each.diff_ids}
    own = set(image.diff_ids)
    return {
        "refs": list(image.names),
        "digest": image.digest,
        "created": image.created,
        "size": image.size,
        "shared": sum(sizes.get(each, 0) for each in own & others),
        "unique": sum(sizes.get(each, 0) for each in own - others),
        "used_by": sorted(users.get(image.digest, ())),
    }


def _kind(kind: str, count: int, active: int, size: int, reclaimable: int) -> Row:
    return {"kind": kind, "count": count, "active": active, "size": size, "reclaimable": reclaimable}


def _orphans(rows: Iterable[Row]) -> list[Row]:
    return [each for each in rows if each["orphan"]]


def _sum(rows: Iterable[Row]) -> int:
    return sum(each["size"] for each in rows)
