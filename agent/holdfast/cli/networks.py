"""network list, inspect: what containers talk over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from holdfast.cli import render
from holdfast.cli.command import Group, json_option, reach


@click.group("network", cls=Group)
def network() -> None:
    """Networks: bridge, and those of apps, APP/NAME."""


@network.command("list")
@json_option()
def list_(json_: bool) -> None:
    """List the networks that stand on this node."""
    with reach() as node:
        found: Sequence[Mapping[str, Any]] = node.networks()
    if json_:
        render.as_json(found)
    elif not found:
        render.echo("no networks")
    else:
        render.table(
            ["NETWORK", "DRIVER", "SUBNET", "GATEWAY", "INTERFACE", "", "ENDPOINTS"],
            [row(each) for each in found],
        )


def row(each: Mapping[str, Any]) -> list[str]:
    cells = [str(each.get(key) or "") for key in ("subnet", "gateway", "interface")]
    return [
        each["id"],
        each["driver"],
        *cells,
        "internal" if each.get("internal") else "",
        str(len(each.get("endpoints") or ())),
    ]


@network.command("inspect")
@click.argument("id", metavar="NETWORK")
@json_option()
def inspect(id: str, json_: bool) -> None:
    """Print everything that is known of a network."""
    with reach() as node:
        found = node.network(id)
    if json_:
        render.as_json(found)
        return
    for line in render.pairs(dict(found)):
        render.echo(line)


COMMANDS = [network]
