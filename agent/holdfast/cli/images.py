"""image import, load, list, remove: what containers can be made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from holdfast.cli import render
from holdfast.cli.command import Group, json_option, reach

SOURCE = click.Path(exists=True, path_type=Path)


@click.group("image", cls=Group)
def image() -> None:
    """Images, imported or loaded from files."""


@image.command("import")
@click.argument("tar", type=SOURCE)
@click.argument("ref", metavar="NAME[:TAG]")
@click.option(
    "-c", "--change", "changes", multiple=True, metavar="'CMD [\"sh\"]'", help="Set CMD, ENV, USER …; may repeat."
)
def import_(tar: Path, ref: str, changes: tuple[str, ...]) -> None:
    """Make an image of one layer out of a root file system's tar archive."""
    with reach() as node:
        told(node.import_image(str(tar.resolve()), ref, changes))


@image.command("load")
@click.argument("path", type=SOURCE)
def load(path: Path) -> None:
    """Take in the images of an OCI layout (directory or archive) or a docker-archive."""
    with reach() as node:
        for found in node.load_image(str(path.resolve())):
            told(found)


def told(found: dict[str, Any]) -> None:
    click.echo(f"{found['ref']}  {found['digest']}")


@image.command("list")
@json_option()
def list_(json_: bool) -> None:
    """List the images of this node."""
    with reach() as node:
        found: Sequence[dict[str, Any]] = node.images()
    if json_:
        render.as_json(found)
    elif not found:
        click.echo("no images (holdfast image import, holdfast image load)")
    else:
        render.table(["IMAGE", "DIGEST", "SIZE", "MADE", "USED BY"], [row(each) for each in found])


def row(each: dict[str, Any]) -> list[str]:
    digest = str(each["digest"]).removeprefix("sha256:")[:12]
    made = render.ago(each.get("created") or None)
    return [each["ref"], digest, render.size(each.get("size")), made, " ".join(each.get("used_by") or ())]


@image.command("remove")
@click.argument("refs", metavar="NAME[:TAG]...", nargs=-1, required=True)
def remove(refs: tuple[str, ...]) -> None:
    """Forget images, and what only they need on disk."""
    with reach() as node:
        for ref in refs:
            node.remove_image(ref)
            click.echo(f"removed {ref}")


COMMANDS = [image]
