"""volume list, inspect, remove, prune: the data that outlives containers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from holdfast.cli import render
from holdfast.cli.command import Group, json_option, reach


@click.group("volume", cls=Group)
def volume() -> None:
    """Named volumes, APP/NAME.

    They stay when their app goes, until somebody removes them.
    """


@volume.command("list")
@json_option()
def list_(json_: bool) -> None:
    """List the volumes of this node; an orphan is one that no app declares any more."""
    with reach() as node:
        found: Sequence[Mapping[str, Any]] = node.volumes()
    if json_:
        render.as_json(found)
    elif not found:
        render.echo("no volumes")
    else:
        render.table(["VOLUME", "DRIVER", "", "USED BY", "PATH"], [row(each) for each in found])


def row(each: Mapping[str, Any]) -> list[str]:
    orphan = render.paint("orphan", render.BUSY) if each.get("orphan") else ""
    users = " ".join(each.get("used_by") or ())
    return [each["id"], each["driver"], orphan, users, str(each.get("path") or "")]


@volume.command("inspect")
@click.argument("id", metavar="APP/NAME")
@json_option()
def inspect(id: str, json_: bool) -> None:
    """Print everything that is known of a volume."""
    with reach() as node:
        found = node.volume(id)
    if json_:
        render.as_json(found)
        return
    for line in render.pairs(dict(found)):
        render.echo(line)


@volume.command("remove")
@click.argument("ids", metavar="APP/NAME...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Also one that an app declares, or a stopped container has mounted.")
def remove(ids: tuple[str, ...], force: bool) -> None:
    """Delete volumes and their data."""
    with reach() as node:
        for id in ids:
            node.remove_volume(id, force)
            render.echo(f"removed {id}")


@volume.command("prune")
@click.option("--force", is_flag=True, help="Don't ask.")
def prune(force: bool) -> None:
    """Delete every volume that no app declares, with its data."""
    with reach() as node:
        orphans = [each["id"] for each in node.volumes() if each["orphan"]]
        if not orphans:
            render.echo("no orphans")
            return
    if not force:
        click.confirm(render.plain(f"delete {', '.join(orphans)} and their data?"), abort=True)
    with reach() as node:  # once more: an agent may have begun while the question stood, and another volume been left
        for each in node.volumes():
            if each["id"] in orphans and each["orphan"] and not each["used_by"]:
                node.remove_volume(each["id"])
                render.echo(f"removed {each['id']}")


COMMANDS = [volume]
