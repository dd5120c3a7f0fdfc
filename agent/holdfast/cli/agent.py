"""agent, plugin list, schema, version, completion: the program itself."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli import render
from holdfast.cli.command import Group, command, config_path, json_option, log_to_stderr, reach, settings
from holdfast.errors import TryAgain

if TYPE_CHECKING:
    from click.shell_completion import ShellComplete


@command("agent")
def agent() -> int:
    """Run the agent in the foreground.

    SIGTERM and SIGINT end it and leave the containers running; SIGHUP reads agent.toml again.
    """
    from holdfast.daemon.agent import run_agent

    log_to_stderr()
    return run_agent(config_path())


@command("shutdown")
@click.option("--now", is_flag=True, help="Do not ask systemd whether the host goes down.")
def shutdown(now: bool) -> int:
    """Stop all containers because the host goes down.

    Each gets its own stop signal and grace period, dependents first, all of them together shutdown_timeout of
    agent.toml. After the next boot they run again, but for jobs that had ended, restart = "no" and holds. Does
    nothing unless systemd is shutting the host down, or --now is given; the agent must not run.
    """
    from holdfast.daemon.once import shut_down

    if not now and not host_goes_down():
        render.echo("the host does not go down: nothing is stopped")
        return 0
    log_to_stderr()
    failed = shut_down(settings())
    for line in failed:
        render.echo(f"holdfast: {line}", err=True)
    return TryAgain.exit_code if failed else 0


def host_goes_down() -> bool:
    """Whether systemd is on its way to shutdown.target, as at a reboot, a power-off or a kexec (systemctl(1))."""
    try:
        asked = subprocess.run(
            ["systemctl", "is-system-running"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return False
    return asked.stdout.strip() == "stopping"


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
@click.option("--markdown", is_flag=True, help="Print a reference of every key, agent.toml's included.")
def schema(markdown: bool) -> None:
    """Print the JSON Schema of state files, for editors."""
    if markdown:
        from holdfast.cli.reference import reference

        render.echo(reference().removesuffix("\n"))
        return
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


COMMANDS = [agent, shutdown, plugin, schema, version, completion]
