"""volume list, inspect, remove, prune: the data that outlives containers."""

from __future__ import annotations

import click

from holdfast.cli import options, render
from holdfast.cli.command import Group, reach
from holdfast.questions import Json


@click.group("volume", cls=Group)
def volume() -> None:
    """Manage named volumes, APP/NAME.

    They are kept when their app is removed, until somebody removes them.
    """


@volume.command("list")
@options.as_json
def list_(json_: bool) -> None:
    """List the volumes of this node. An orphan is a volume that no app declares any more."""
    with reach() as node:
        render.listing(node.volumes(), COLUMNS, json=json_, empty="no volumes")


COLUMNS = {
    "VOLUME": lambda each: each["id"],
    "DRIVER": lambda each: each["driver"],
    "": lambda each: render.paint("orphan", render.BUSY) if each["orphan"] else "",
    "USED BY": lambda each: " ".join(each["used_by"]),
    "PATH": lambda each: str(each["path"] or ""),
}


@volume.command("inspect")
@click.argument("id", metavar="APP/NAME")
@options.as_json
def inspect(id: str, json_: bool) -> None:
    """Print all that is known of a volume."""
    with reach() as node:
        render.details(node.volume(id), json=json_)


@volume.command("remove")
@click.argument("ids", metavar="APP/NAME...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Also volumes that an app declares or a stopped container has mounted.")
def remove(ids: tuple[str, ...], force: bool) -> None:
    """Delete volumes and their data."""
    with reach() as node:
        for id in ids:
            node.remove_volume(id, force)
            render.echo(f"removed {id}")


@volume.command("prune")
@options.force
def prune(force: bool) -> None:
    """Delete every volume that no app declares, with its data."""
    with reach() as node:
        orphans = {each["id"] for each in node.volumes() if unused(each)}
    if not orphans:
        render.echo("no orphans")
    elif force or options.agreed(f"delete {', '.join(sorted(orphans))} and their data?"):
        with reach() as node:  # again: an agent may have been started, or another volume may be an orphan now
            for each in node.volumes():
                if each["id"] in orphans and unused(each):
                    node.remove_volume(each["id"])
                    render.echo(f"removed {each['id']}")


def unused(volume: Json) -> bool:
    return bool(volume["orphan"] and not volume["used_by"])
