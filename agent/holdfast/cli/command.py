"""What every command has in common: `--config` before or after its name, and the way to the agent.

Commands call `reach()`, `client()` and `settings()`, which import what they need when they are called: a command that
only asks the agent must not wait for a schema library.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli.client import Client
from holdfast.errors import NoAgent
from holdfast.questions import Json, Questions

if TYPE_CHECKING:
    from holdfast.config import Config

DEFAULT_CONFIG = "/etc/holdfast/agent.toml"
META = "holdfast.config"
BEAT = 0.1  # seconds between looks at what is being waited for
ALIASES = {"ls": "list", "rm": "remove"}  # in no help: docker has them


class Configured(click.Command):
    """A command or group that takes --config, before or after its name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--config"],
                type=click.Path(path_type=Path),
                metavar="FILE",
                expose_value=False,
                callback=remember_config,
                help=f"The agent's settings.  [env: HOLDFAST_CONFIG; default: {DEFAULT_CONFIG}]",
            )
        )

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, whole: the list of commands folds it."""
        return super().get_short_help_str(1000)


class Group(Configured, click.Group):
    """A group of commands. imported: those that are imported from a module when they are needed, name → module."""

    command_class = Configured
    imported: Mapping[str, str] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*self.commands, *self.imported])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = cmd_name if cmd_name in (*self.commands, *self.imported) else ALIASES.get(cmd_name, cmd_name)
        if name not in self.imported:
            return super().get_command(ctx, name)
        from importlib import import_module

        found: click.Command = getattr(import_module(f"holdfast.cli.{self.imported[name]}"), name)
        return found


def command(name: str, **kwargs: Any) -> Callable[[Callable[..., Any]], Configured]:
    """Make a command of the top level."""
    return click.command(name, cls=Configured, **kwargs)


def remember_config(ctx: click.Context, _: click.Parameter, value: Path | None) -> None:
    if value is not None:
        ctx.meta[META] = value


def config_path() -> Path | None:
    """The agent.toml that --config names; None: HOLDFAST_CONFIG, or the default, which alone may be missing."""
    chosen = click.get_current_context().meta.get(META)
    return chosen if isinstance(chosen, Path) else None


def settings() -> Config:
    """The whole agent.toml, read and validated."""
    from holdfast.config import load_config

    return load_config(config_path())


def places() -> tuple[Path, Path | None]:
    """Where the agent listens, and its root; None where agent.toml names the socket alone.

    Reads only these keys, so that no schema library must be imported.
    """
    path = config_path() or Path(os.environ.get("HOLDFAST_CONFIG") or DEFAULT_CONFIG)
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, ValueError):
        table = {"name": None}  # the defaults, or the error of whoever validates the file
    name = table.get("name", "holdfast")
    match table.get("socket"), table.get("run_root", f"/run/{name}"), table.get("root", f"/var/lib/{name}"):
        case _ if not isinstance(name, str):
            pass
        case str(socket), _, str(root):
            return Path(socket), Path(root) if "root" in table else None
        case None, str(run_root), str(root):
            return Path(run_root) / "agent.sock", Path(root)
    config = settings()
    return config.socket, config.root


def agent_client() -> Client:
    """The agent that agent.toml names, running or not."""
    return Client(*places())


def client() -> Client:
    """The agent that agent.toml names; raises NoAgent if it does not run."""
    found = agent_client()
    found.connect().close()
    return found


@contextmanager
def reach(*, makes: bool = False) -> Iterator[Questions]:
    """Give the running agent, or without one the node itself, which answers most of the same questions.

    makes: whether something may be stored in a root that no agent has used yet.
    """
    found = agent_client()
    if found.listens():
        yield found
        return
    from holdfast.cli.log import log_to_stderr
    from holdfast.daemon.offline import open_node

    log_to_stderr(only_warnings=True)
    with open_node(settings(), makes=makes) as node:
        yield node


def watch(agent: Client, beat: float = BEAT) -> Iterator[Json]:
    """Yield the status each `beat` seconds, and whenever something happens. Raises NoAgent when the agent ends."""
    for _ in agent.events(limit=1, follow=True, beat=beat):
        yield agent.status()
    raise NoAgent(f"ask the agent on '{agent.path}': it has ended meanwhile (see its log)")
