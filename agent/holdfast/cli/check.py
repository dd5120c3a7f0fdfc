"""check: state files, read as the agent would read them, before they are committed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.cli import render
from holdfast.cli.command import command, settings
from holdfast.errors import WrongCall, WrongState

if TYPE_CHECKING:
    from holdfast.config import Config
    from holdfast.source import Revision


@command("check")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--any-driver", is_flag=True, help="Accept drivers and policies that no plugin here offers.")
def check(paths: tuple[Path, ...], any_driver: bool) -> None:
    """Print everything that is wrong with state files.

    PATH is a file or a directory of them; needs no agent and no root. Says so when images are to be built and this
    host has no buildah. Drivers and policies must be offered by a plugin that is installed here, unless --any-driver
    is given, for where files are checked without the node's plugins.
    """
    from holdfast.runtime.binaries import find_program
    from holdfast.spec import load

    files, left_out, top = snapshot(paths)
    config = settings()
    facts = config.facts() if any_driver else replace(config.facts(), drivers=installed(config))
    spec = load(files, facts, left_out=left_out)
    for problem in spec.problems:
        render.echo(str(replace(problem, path=str(top / problem.path))))
    if spec.problems:
        wrong = len({problem.path for problem in spec.problems})
        raise WrongState(f"check: {counted(len(spec.problems), 'problem')} in {counted(wrong, 'file')}")
    for hint in spec.hints:
        render.echo(str(top / hint), err=True)
    containers = sum(len(app.containers) for app in spec.apps.values())
    render.echo(f"{counted(len(spec.apps), 'app')}, {counted(containers, 'container')}: ok")
    built = sorted({name for app in spec.apps.values() for name in app.images})
    if built and find_program("buildah") is None:
        render.echo(
            f"buildah is not installed here: this host can't build images.{built[0]} (install buildah)", err=True
        )


def installed(config: Config) -> Mapping[str, frozenset[str]]:
    """The drivers that the plugins of this installation offer, by kind."""
    from holdfast.drivers import Host
    from holdfast.plugins import load_plugins

    return load_plugins(Host(config.name, config.root, config.run_root, config.pool)).names()


def counted(number: int, noun: str) -> str:
    """`1 change`, `2 changes`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def snapshot(paths: tuple[Path, ...]) -> tuple[dict[str, bytes], dict[str, str], Path]:
    """The files to check, what a revision would lack and why, and the folder that their names are relative to.

    One directory is a revision of its own, vars.toml at its top included; several paths are read as one revision.
    """
    if len(paths) == 1 and paths[0].is_dir():
        revision = folder(paths[0])
        return dict(revision.files), dict(revision.left_out), paths[0]
    files: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    for path in paths:
        if path.is_dir():
            revision = folder(path)
            files |= {str(path / name): content for name, content in revision.files.items()}
            left_out |= {str(path / name): why for name, why in revision.left_out.items()}
        else:
            files |= {str(path.parent / name): content for name, content in state_file(path)}
    return files, left_out, Path()


def folder(path: Path) -> Revision:
    """What a revision of this directory would hold."""
    from holdfast.source.directory import DirectorySource

    return DirectorySource(path).current()


def state_file(path: Path) -> Iterator[tuple[str, bytes]]:
    """A state file, and whatever lies beside it that it names: the folder as a whole may be anything."""
    from holdfast.spec.load import NOT_YAML, is_yaml
    from holdfast.toml import Document, Unreadable

    content = read(path, path)
    if path.suffix != ".toml":
        wrong = NOT_YAML if is_yaml(path.name) else "not a state file (expected NAME.toml, or a directory)"
        raise WrongCall(f"check '{path}': {wrong}")
    yield path.name, content
    try:
        data = Document(content).data
    except Unreadable:
        return  # what is wrong with it is said by whoever loads it
    names = {text.split(":")[0] for text in texts(data)}
    for name in sorted(names):
        beside = path.parent / name
        if name.strip("./") and not name.startswith("/") and there(beside):
            for file in sorted(beside.rglob("*")) if beside.is_dir() else [beside]:
                if file.is_file() and file.suffix != ".toml":
                    yield os.path.relpath(file, path.parent), read(path, file)
    yield from instructions(path, data.get("images"))


def there(path: Path) -> bool:
    """Whether there is such a file: most strings of a state file are no names of files."""
    try:
        return path.exists()
    except OSError:  # longer than a name can be, say
        return False


def read(path: Path, file: Path) -> bytes:
    """The content of a file that a state file needs. A pipe or a device may have no end, and is refused."""
    from holdfast.source.revision import check_size

    what = "" if file == path else f"read '{file}': "
    try:
        # O_NONBLOCK: open(2) must not wait for the writer of a pipe.
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(handle, "rb", buffering=0) as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise WrongCall(f"check '{path}': {what}not a file (expected a regular file, or a directory of them)")
            check_size(str(file), status.st_size, 1)
            return opened.read()
    except OSError as error:
        raise WrongCall(f"check '{path}': {what}{(error.strerror or str(error)).lower()}") from error


def instructions(path: Path, images: Any) -> Iterator[tuple[str, bytes]]:
    """The Dockerfiles of [images], what their contexts leave out, and any file of each context to show that it is."""
    folder = path.parent
    for image in images.values() if isinstance(images, dict) else ():
        context = image.get("context") if isinstance(image, dict) else None
        if not isinstance(context, str) or not there(folder / context) or not (folder / context).is_dir():
            continue
        named = image.get("dockerfile")
        dockerfiles = [named] if isinstance(named, str) else ["Dockerfile", "Containerfile"]
        wanted = [*dockerfiles, *(f"{each}.dockerignore" for each in dockerfiles), ".dockerignore"]
        any_file = next((each for each in (folder / context).rglob("*") if each.is_file()), None)
        for file in filter(None, [*(folder / context / each for each in wanted), any_file]):
            if there(file) and file.is_file():
                yield os.path.relpath(file, folder), read(path, file)


def texts(value: Any) -> Iterator[str]:
    """Every string in a TOML value."""
    match value:
        case str():
            yield value
        case dict():
            for each in value.values():
                yield from texts(each)
        case list():
            for each in value:
                yield from texts(each)


COMMANDS = [check]
