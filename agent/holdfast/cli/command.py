"""What every command has in common: `--config` before or after its name, the way to the agent, and targets.

A command gets at all of it through `reach()`, `client()` and `settings()`, which load what they need when they are
called: a command that only asks the agent must not wait for a schema library.
"""

from __future__ import annotations

import io
import os
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from holdfast.cli import render
from holdfast.cli.client import Client
from holdfast.errors import HoldfastError, NoAgent, NotFound, WrongCall
from holdfast.questions import Questions

if TYPE_CHECKING:
    from holdfast.config import Config

DEFAULT_CONFIG = "/etc/holdfast/agent.toml"
META = "holdfast.config"
F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
    """A command that takes --config."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(config_option())

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, whole: the list of commands folds it."""
        return super().get_short_help_str(1000)


ALIASES = {"ls": "list", "rm": "remove"}  # in no help: docker has them


class Group(click.Group):
    """A group whose commands all take --config, as it does itself."""

    command_class = Command
    group_class = type

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(config_option())

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, whole: the list of commands folds it."""
        return super().get_short_help_str(1000)


def config_option() -> click.Option:
    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        metavar="FILE",
        expose_value=False,
        callback=remember_config,
        help=f"The agent's settings.  [env: HOLDFAST_CONFIG; default: {DEFAULT_CONFIG}]",
    )


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

    Reads the keys that say so, and leaves the rest of agent.toml to the agent.
    """
    path = config_path() or Path(os.environ.get("HOLDFAST_CONFIG") or DEFAULT_CONFIG)
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, ValueError):
        table = {"name": None}  # the defaults, or what is wrong in the words of whoever validates the file
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
    """The agent that agent.toml leads to, whether it runs or not."""
    return Client(*places())


def client() -> Client:
    """The agent that agent.toml leads to; raises NoAgent if it does not run."""
    found = agent_client()
    if not found.listens():
        raise NoAgent(f"ask the agent on '{found.path}': nobody answers (start it with 'holdfast agent')")
    return found


@contextmanager
def reach(*, makes: bool = False) -> Iterator[Questions]:
    """The running agent, or without one the node itself, which answers most of the same questions.

    makes: whether it is asked to put something into a root that no agent has used yet; else nothing is made there.
    """
    found = agent_client()
    if found.listens():
        yield found
        return
    from holdfast.daemon.offline import open_node

    log_to_stderr(only_warnings=True)
    with open_node(settings(), makes=makes) as node:
        yield node


def containers_of(status: Mapping[str, Any]) -> list[str]:
    """Every container of a status, as `app/name`."""
    return [f"{app}/{name}" for app, value in status["apps"].items() for name in value["containers"]]


def resolve(status: Mapping[str, Any], target: str) -> str:
    """The `app/name` that a target means; raises WrongCall where it means several, NotFound where it means none."""
    known = containers_of(status)
    if target in known:
        return target
    meant = [each for each in known if each.partition("/")[2] == target]
    match meant:
        case [one]:
            return one
        case []:
            raise NotFound(f"container '{target}': no such container{nearest(target, known)}")
        case _:
            raise WrongCall(f"container '{target}': there are several ({', '.join(meant)})")


def resolve_all(status: Mapping[str, Any], targets: Sequence[str]) -> list[str]:
    """The containers that targets mean, each once: `app/name`, a name that is unique, or an app (`app` or `app/`)."""
    found: dict[str, None] = {}
    known = containers_of(status)
    for target in targets:
        app = target.removesuffix("/")
        named = [each for each in known if each.partition("/")[2] == target]
        if app in status["apps"] and not named:
            of_app = [each for each in known if each.partition("/")[0] == app]
            if not of_app:
                raise NotFound(f"app '{app}': it has no containers")
            found |= dict.fromkeys(of_app)
        else:
            found[resolve(status, target)] = None
    return list(found)


def nearest(target: str, known: list[str]) -> str:
    """A hint at what may have been meant, in parentheses."""
    import difflib

    by_name = {each if "/" in target else each.partition("/")[2]: each for each in known}
    if close := difflib.get_close_matches(target, by_name, n=1):
        return f" (did you mean '{by_name[close[0]]}'?)"
    return f" (there is {', '.join(known)})" if 0 < len(known) <= 8 else ""


def complete_target(ctx: click.Context, _: click.Parameter, typed: str) -> list[str]:
    """For the shell: every container, and its short name where that is unique."""
    try:
        with ctx.scope():
            known = containers_of(agent_client().status())
    except HoldfastError:
        return []
    short = [each.partition("/")[2] for each in known]
    unique = [name for name in short if short.count(name) == 1]
    return [each for each in [*unique, *known] if each.startswith(typed)]


def log_to_stderr(*, only_warnings: bool = False) -> None:
    """Have the log of what is done on standard error: standard output is for what was asked.

    only_warnings: leave out what is no fault, for commands that are not asked to do what the log tells.
    Tracebacks are plain: prettier ones would print local variables, and those may hold what is secret.
    """
    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(30 if only_warnings else 0),  # levels of `logging`
        logger_factory=lambda *_: Printer(),
        processors=[
            plain_values,
            structlog.processors.add_log_level,
            *([] if _in_journal() else [structlog.processors.TimeStamper("%Y-%m-%d %H:%M:%S", utc=False)]),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain_traceback),
        ],
    )


class Printer:
    """Prints the lines of the log; where they can't be written (a full disk, a closed pipe), the work goes on."""

    def msg(self, line: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: it was closed
            sys.stderr.buffer.write(f"{line}\n".encode(errors="backslashreplace"))
            sys.stderr.flush()

    debug = info = warning = error = critical = exception = msg


def plain_values(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Escape what would control a terminal in a line of the log (a structlog processor)."""
    return {key: render.plain(value) if isinstance(value, str) else value for key, value in event.items()}


def plain_traceback(out: TextIO, failure: Any) -> None:
    """Write a traceback without colours and what would control a terminal."""
    import structlog

    text = io.StringIO()
    structlog.dev.plain_traceback(text, failure)
    out.write(render.terminal(text.getvalue()))


def _in_journal() -> bool:
    """Whether standard error is systemd's journal, which has the time of every line itself (systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    if not device:
        return False
    found = os.fstat(sys.stderr.fileno())
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def json_option() -> Callable[[F], F]:
    return click.option("--json", "json_", is_flag=True, help="Print JSON.")


def agreed(question: str) -> bool:
    """Whether the person who is asked says yes; says what comes of a no."""
    if click.confirm(render.plain(question)):
        return True
    render.echo("nothing is removed")
    return False


def target_argument() -> Callable[[F], F]:
    return click.argument("target", metavar="APP/NAME", shell_complete=complete_target)


def command(name: str, **kwargs: Any) -> Callable[[Callable[..., Any]], Command]:
    """A command of the top level."""
    return click.command(name, cls=Command, **kwargs)
