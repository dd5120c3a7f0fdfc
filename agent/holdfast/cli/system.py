"""system df, prune: what uses the disk, and what of it nobody needs."""

from __future__ import annotations

import click

from holdfast.cli import options, render
from holdfast.cli.command import Group, reach
from holdfast.cli.images import NAMELESS, print_removed
from holdfast.questions import Json


@click.group("system", cls=Group)
def system() -> None:
    """Show what uses the disk, and delete what nobody needs."""


@system.command("df")
@options.as_json
@click.option("-v", "--verbose", is_flag=True, help="Show each image, container and volume.")
def df(json_: bool, verbose: bool) -> None:
    """Show what uses the disk: images, layers, containers, volumes, logs.

    Layers that images share count once. RECLAIMABLE is what nobody uses.
    """
    with reach() as node:
        found = node.usage()
    if json_:
        render.as_json(found)
        return
    for kind, columns in DETAILS.items() if verbose else ():
        if found[kind]:
            render.listing(found[kind], columns)
            render.echo()
    render.listing(found["kinds"], KINDS)


def share(each: Json) -> str:
    """What of a kind nobody uses, and how much of the kind that is."""
    percent = f" ({100 * each['reclaimable'] // each['size']}%)" if each["size"] else ""
    return render.size(each["reclaimable"]) + percent


KINDS = {
    "TYPE": lambda each: each["kind"],
    "TOTAL": lambda each: str(each["count"]),
    "ACTIVE": lambda each: str(each["active"]),
    "SIZE": lambda each: render.size(each["size"]),
    "RECLAIMABLE": share,
}
DETAILS = {
    "images": {
        "IMAGE": lambda each: " ".join(each["refs"]) or NAMELESS,
        "DIGEST": lambda each: render.digest(str(each["digest"])),
        "MADE": lambda each: render.ago(each["created"] or None),
        "SIZE": lambda each: render.size(each["size"]),
        "SHARED": lambda each: render.size(each["shared"]),
        "UNIQUE": lambda each: render.size(each["unique"]),
        "USED BY": lambda each: " ".join(each["used_by"]),
    },
    "containers": {
        "CONTAINER": lambda each: each["container"],
        "INSTANCE": lambda each: each["instance"],
        "STATE": lambda each: each["state"],
        "SIZE": lambda each: render.size(each["size"]),
    },
    "volumes": {
        "VOLUME": lambda each: each["volume"],
        "SIZE": lambda each: render.size(each["size"]),
        "USED BY": lambda each: " ".join(each["used_by"]),
    },
}


@system.command("prune")
@click.option("-a", "--all", "all_", is_flag=True, help="Also unused images that have names.")
@click.option("--volumes", is_flag=True, help="Also volumes that no app declares, with their data.")
@options.force
@options.as_json
def prune(all_: bool, volumes: bool, force: bool, json_: bool) -> None:
    """Delete what nobody needs: unused images and layers, the build cache, logs of removed apps."""
    images = "every unused image" if all_ else "every unused image without a name"
    more = ", every volume that no app declares with its data" if volumes else ""
    rest = "layers of interrupted pulls, the build cache and the logs of removed apps"
    if not force and not options.agreed(f"delete {images}{more}, {rest}?"):
        return
    with reach() as node:
        every = node.images()
        found = node.prune(all_, volumes)
    if json_:
        render.as_json(found)
        return
    print_removed(found["images"], every)
    if not found["images"] and found["kinds"].get("images"):
        render.echo("removed layers that no image needs")
    for each in found["volumes"]:
        render.echo(f"removed {each}")
    render.echo(f"freed {render.size(found['freed'])}")
