"""system df, prune: what takes up the disk, and what of it nobody needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from holdfast.cli import render
from holdfast.cli.command import Group, agreed, json_option, reach
from holdfast.cli.images import removed

Json = Mapping[str, Any]


@click.group("system", cls=Group)
def system() -> None:
    """The disk: what takes it up, and what of it could go."""


@system.command("df")
@json_option()
@click.option("-v", "--verbose", is_flag=True, help="Each image, container and volume.")
def df(json_: bool, verbose: bool) -> None:
    """Show what takes up the disk: images, layers, containers, volumes, logs.

    Layers that images share count once. RECLAIMABLE is what nobody uses.
    """
    with reach() as node:
        found: Json = node.usage()
    if json_:
        render.as_json(found)
    elif verbose:
        details(found)
    else:
        render.table(["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"], [kind(each) for each in found["kinds"]])


def kind(each: Json) -> list[str]:
    share = f" ({100 * each['reclaimable'] // each['size']}%)" if each["size"] else ""
    free = render.size(each["reclaimable"]) + share
    return [each["kind"], str(each["count"]), str(each["active"]), render.size(each["size"]), free]


def details(found: Json) -> None:
    """Three tables, one for each kind of thing."""
    images = [
        [
            " ".join(each["refs"]) or "<none>",
            str(each["digest"]).removeprefix("sha256:")[:12],
            render.ago(each["created"] or None),
            render.size(each["size"]),
            render.size(each["shared"]),
            render.size(each["unique"]),
            " ".join(each["used_by"]),
        ]
        for each in found["images"]
    ]
    containers = [
        [each["container"], each["instance"], each["state"], render.size(each["size"])]
        for each in found["containers"]
    ]
    volumes = [[each["volume"], render.size(each["size"]), " ".join(each["used_by"])] for each in found["volumes"]]
    for head, rows in (
        (["IMAGE", "DIGEST", "MADE", "SIZE", "SHARED", "UNIQUE", "USED BY"], images),
        (["CONTAINER", "INSTANCE", "STATE", "SIZE"], containers),
        (["VOLUME", "SIZE", "USED BY"], volumes),
        (["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"], [kind(each) for each in found["kinds"]]),
    ):
        if rows:
            render.table(head, rows)
            render.echo()


@system.command("prune")
@click.option("-a", "--all", "all_", is_flag=True, help="Also images with names that nobody uses.")
@click.option("--volumes", is_flag=True, help="Also volumes that no app declares, with their data.")
@click.option("-f", "--force", is_flag=True, help="Don't ask.")
@json_option()
def prune(all_: bool, volumes: bool, force: bool, json_: bool) -> None:
    """Delete what nobody needs: unused images and layers, the cache of builds, logs of apps that are gone."""
    images = "every image that nobody uses" if all_ else "every image without a name that nobody uses"
    more = ", every volume that no app declares with its data" if volumes else ""
    rest = "layers of pulls that broke off, the build cache and the logs of apps that are gone"
    if not force and not agreed(f"delete {images}{more}, {rest}?"):
        return
    with reach() as node:
        every = node.images()
        found: Json = node.prune(all_, volumes)
    if json_:
        render.as_json(found)
        return
    removed(found["images"], every)
    if not found["images"] and found["kinds"].get("images"):
        render.echo("removed layers that no image needs")
    for each in found["volumes"]:
        render.echo(f"removed {each}")
    render.echo(f"freed {render.size(found['freed'])}")


COMMANDS = [system]
