"""network list, inspect: what containers talk over."""

from __future__ import annotations

import click

from holdfast.cli import options, render
from holdfast.cli.command import Group, reach


@click.group("network", cls=Group)
def network() -> None:
    """Show networks: `bridge`, and those of apps, APP/NAME."""


@network.command("list")
@options.as_json
def list_(json_: bool) -> None:
    """List the networks of this node."""
    with reach() as node:
        render.listing(node.networks(), COLUMNS, json=json_, empty="no networks")


COLUMNS = {
    "NETWORK": lambda each: each["id"],
    "DRIVER": lambda each: each["driver"],
    "SUBNET": lambda each: str(each.get("subnet") or ""),
    "GATEWAY": lambda each: str(each.get("gateway") or ""),
    "INTERFACE": lambda each: str(each.get("interface") or ""),
    "": lambda each: "internal" if each.get("internal") else "",
    "ENDPOINTS": lambda each: str(len(each.get("endpoints") or ())),
}


@network.command("inspect")
@click.argument("id", metavar="NETWORK")
@options.as_json
def inspect(id: str, json_: bool) -> None:
    """Print all that is known of a network."""
    with reach() as node:
        render.details(node.network(id), json=json_)
