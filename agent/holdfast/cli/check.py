"""check: state files, read as the agent would read them, before they are committed."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from holdfast.cli import render
from holdfast.cli.command import command, settings
from holdfast.errors import WrongCall, WrongState

if TYPE_CHECKING:
    from pydantic import BaseModel

    from holdfast.config import Config
    from holdfast.source.part import Part
    from holdfast.spec import NodeFacts


@command("check")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--any-driver", is_flag=True, help="Accept drivers and policies that no plugin here offers.")
def check(paths: tuple[Path, ...], any_driver: bool) -> None:
    """Print everything that is wrong with state files.

    PATH is a state file or a directory of them. Needs neither an agent nor root. Drivers and policies, also those
    that agent.toml names, must be offered by a plugin that is installed here, unless --any-driver is given. Reports
    if images must be built and this host has no buildah.
    """
    from holdfast.runtime.binaries import find_program
    from holdfast.spec import load

    config = settings()
    facts = config.facts() if any_driver else replace(config.facts(), drivers=installed(config))
    part, top = snapshot(paths, facts)
    executable, ignored = frozenset(part.executable), frozenset(part.ignored)
    spec = load(part.files, facts, executable=executable, left_out=part.left_out, ignored=ignored)
    for problem in spec.problems:
        render.echo(str(replace(problem, path=str(top / problem.path))))
    if spec.problems:
        wrong = len({problem.path for problem in spec.problems})
        raise WrongState(f"check: {render.counted(len(spec.problems), 'problem')} in {render.counted(wrong, 'file')}")
    for hint in spec.hints:
        render.echo(str(top / hint), err=True)
    containers = sum(len(app.containers) for app in spec.apps.values())
    render.echo(f"{render.counted(len(spec.apps), 'app')}, {render.counted(containers, 'container')}: ok")
    built = sorted({name for app in spec.apps.values() for name in app.images})
    if built and find_program("buildah") is None:
        render.echo(
            f"buildah is not installed here: this host can't build images.{built[0]} (install buildah)", err=True
        )


def installed(config: Config) -> Mapping[str, Mapping[str, type[BaseModel] | None]]:
    """The drivers that the plugins of this installation offer, by kind.

    Raises WrongConfig for what agent.toml says of plugins and drivers that they do not know.
    """
    from holdfast.drivers import Host
    from holdfast.plugins import load_plugins

    host = Host(config.name, config.root, config.run_root, config.network.pool)
    plugins = load_plugins(host, settings=config.plugins)
    plugins.check_config(config)
    return plugins.names()


def snapshot(paths: tuple[Path, ...], facts: NodeFacts) -> tuple[Part, Path]:
    """The files to check, what a revision would lack and why, and the folder that their names are relative to.

    One directory is a revision of its own, vars.toml at its top included; several paths are read as one revision. Of
    what lies beside a single file, only what it names is read: the folder as a whole may be anything.
    """
    from holdfast.source.directory import DirectorySource
    from holdfast.source.part import Part

    part, top = Part(), Path()
    for path in paths:
        if path.is_dir():
            revision = DirectorySource(path).current()
            top = path if len(paths) == 1 else top
            at = Path() if len(paths) == 1 else path
            part.files |= {str(at / name): content for name, content in revision.files.items()}
            part.left_out |= {str(at / name): why for name, why in revision.left_out.items()}
            part.ignored |= {str(at / name) for name in revision.ignored}
            part.executable |= {str(at / name) for name in revision.executable}
        else:
            state_file(part, path, facts)
    return part, top


def state_file(part: Part, path: Path, facts: NodeFacts) -> None:
    """Add a state file, and the files beside it that it names."""
    from holdfast.source.directory import top_of, within
    from holdfast.spec.load import NOT_YAML, is_yaml, needs_of

    content = read(path)
    if path.suffix != ".toml":
        wrong = NOT_YAML if is_yaml(path.name) else "not a state file (expected NAME.toml, or a directory)"
        raise WrongCall(f"check '{path}': {wrong}")
    top = top_of(os.path.realpath(path.parent))
    part.files[str(path)] = content
    for name in sorted(needs_of(str(path), content, facts)):
        neighbours = not name or within(str(path), name)  # in its own folder, TOML files are other apps
        try:
            part.add(top, name, without=".toml" if neighbours else "")
        except OSError as error:
            raise WrongCall(f"check '{path}': read '{error.filename}': {(error.strerror or '').lower()}") from error


def read(path: Path) -> bytes:
    """The content of a state file. A pipe or a device may have no end, and is refused."""
    from holdfast.source.revision import check_size

    try:
        # O_NONBLOCK: open(2) must not wait for the writer of a pipe.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(handle, "rb", buffering=0) as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise WrongCall(f"check '{path}': not a file (expected a regular file, or a directory of them)")
            check_size(str(path), status.st_size, 1)
            return opened.read()
    except OSError as error:
        raise WrongCall(f"check '{path}': {(error.strerror or str(error)).lower()}") from error
