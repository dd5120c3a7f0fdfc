"""agent, plugin list, schema, version, completion: the program itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli import render
from holdfast.cli.command import Group, command, config_path, json_option, log_to_stderr, reach

if TYPE_CHECKING:
    from click.shell_completion import ShellComplete


@command("agent")
def agent() -> int:
    """Run the agent in the foreground.

    SIGTERM and SIGINT end it and leave the containers running; SIGHUP reads agent.toml again.
    """
    from holdfast.daemon import run_agent

    log_to_stderr()
    return run_agent(config_path())


@click.group("plugin", cls=Group)
def plugin() -> None:
    """Plugins: where drivers come from."""


@plugin.command("list")
@json_option()
def list_(json_: bool) -> None:
    """List the plugins, what each offers, and why those failed that did."""
    with reach() as node:
        found = node.plugins()
    if json_:
        render.as_json(found)
        return
    rows = [
        [each["name"], each.get("version") or "", render.state(each["state"]), ", ".join(each.get("drivers") or ())]
        for each in found
    ]
    render.table(["PLUGIN", "VERSION", "STATE", "DRIVERS"], rows, notes=[notes(each) for each in found])


def notes(plugin: Mapping[str, Any]) -> list[str]:
    """What a plugin does besides offering drivers, and what is wrong with it."""
    hooks = [hook for hook in plugin.get("hooks") or () if not hook.startswith("register_")]
    return [*([f"hooks: {', '.join(hooks)}"] if hooks else []), *([plugin["error"]] if plugin.get("error") else [])]


@plugin.command("forget")
@click.argument("name")
def forget(name: str) -> None:
    """Start containers without a plugin that adjusted them and is not installed any more.

    A plugin that adjusts every container's configuration is required from then on: while it is missing, what runs
    goes on and nothing is started.
    """
    with reach() as node:
        node.forget_plugin(name)


@command("schema")
def schema() -> None:
    """Print the JSON Schema of state files, for editors."""
    from holdfast.spec import json_schema

    render.as_json(json_schema())


@command("version")
@json_option()
def version(json_: bool) -> None:
    """Print the version."""
    from importlib.metadata import version as version_of

    found = version_of("holdfast")
    if json_:
        render.as_json({"version": found})
    else:
        render.echo(f"holdfast {found}")


@command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    For bash: eval "$(holdfast completion bash)".
    """
    from click.shell_completion import get_completion_class

    kind: type[ShellComplete] | None = get_completion_class(shell)
    if kind is None:
        raise AssertionError(f"click knows no completion for {shell}")
    root = click.get_current_context().find_root().command
    render.echo(kind(root, {}, "holdfast", "_HOLDFAST_COMPLETE").source())


COMMANDS = [agent, plugin, schema, version, completion]
