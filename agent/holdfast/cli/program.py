"""schema, version, completion: the program itself."""

from __future__ import annotations

import click

from holdfast import __version__
from holdfast.cli import options, render
from holdfast.cli.command import command


@command("schema")
@click.option("--markdown", is_flag=True, help="Print a reference of every key, including agent.toml.")
def schema(markdown: bool) -> None:
    """Print the JSON Schema of state files, for editors."""
    if markdown:
        from holdfast.cli.reference import reference

        render.echo(reference().removesuffix("\n"))
        return
    from holdfast.spec import json_schema

    render.as_json(json_schema())


@command("version")
@options.as_json
def version(json_: bool) -> None:
    """Print the version."""
    if json_:
        render.as_json({"version": __version__})
    else:
        render.echo(f"holdfast {__version__}")


@command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    For bash: eval "$(holdfast completion bash)".
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    root = click.get_current_context().find_root().command
    render.echo(kind(root, {}, "holdfast", "_HOLDFAST_COMPLETE").source())
