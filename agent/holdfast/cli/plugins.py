"""plugin list, forget: where drivers come from."""

from __future__ import annotations

import click

from holdfast.cli import options, render
from holdfast.cli.command import Group, reach
from holdfast.questions import Json


@click.group("plugin", cls=Group)
def plugin() -> None:
    """Show plugins, which drivers come from."""


@plugin.command("list")
@options.as_json
def list_(json_: bool) -> None:
    """List the plugins, what each offers, and why some failed."""
    with reach() as node:
        render.listing(node.plugins(), COLUMNS, json=json_, notes=notes)


COLUMNS = {
    "PLUGIN": lambda each: each["name"],
    "VERSION": lambda each: each.get("version") or "",
    "STATE": lambda each: render.state(each["state"]),
    "DRIVERS": lambda each: ", ".join(each.get("drivers") or ()),
}


def notes(plugin: Json) -> list[str]:
    """What a plugin does besides offering drivers, and what is wrong with it."""
    hooks = [hook for hook in plugin.get("hooks") or () if not hook.startswith("register_")]
    return [*([f"hooks: {', '.join(hooks)}"] if hooks else []), *([plugin["error"]] if plugin.get("error") else [])]


@plugin.command("forget")
@click.argument("name")
def forget(name: str) -> None:
    """Start containers without a plugin that adjusted them and is not installed any more.

    A plugin that adjusts the configuration of containers is required from then on. While it is missing, what runs
    keeps running and nothing is started.
    """
    with reach() as node:
        node.forget_plugin(name)
