"""bundle create, inspect, load: a whole state with its images in one file, for nodes without a network."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from holdfast.cli import converge, options, render
from holdfast.cli.bars import followed
from holdfast.cli.client import Client
from holdfast.cli.command import Group, agent_client, client, reach, settings
from holdfast.cli.status import headline
from holdfast.convergence import Wait
from holdfast.errors import NotPermitted, UnfitHost, WrongCall, WrongState

if TYPE_CHECKING:
    from holdfast.config import Config
    from holdfast.images.builds.build import Builder
    from holdfast.images.builds.gather import Wanted
    from holdfast.images.formats.bundle import Bundle, StateTree
    from holdfast.images.kept.store import ImageStore
    from holdfast.source import Revision
    from holdfast.spec import Spec


@click.group("bundle", cls=Group)
def bundle() -> None:
    """Pack state and images into one file, for nodes without a network."""


# -- create --------------------------------------------------------------------------------------------------


@bundle.command("create")
@click.argument("state_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-o", "--output", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The bundle to write."
)
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="The platform of the nodes.  [default: this host's]")
@click.option("--node-name", metavar="NAME", help="Only apps for a node of this name (and with the labels).")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label of that node; can be repeated.")
@click.option("--authfile", type=options.FILE, help="Passwords for registries, as skopeo has them.")
def create(
    state_dir: Path,
    output: Path,
    platform: str | None,
    node_name: str | None,
    labels: tuple[str, ...],
    authfile: Path | None,
) -> None:
    """Write the files of a state directory and every image that they name to one file.

    Needs skopeo, but neither an agent nor root. Variables have the values that agent.toml of this host gives them
    (see --config). The file is an OCI image layout: `skopeo inspect oci-archive:FILE:IMAGE` shows an image in it.
    """
    from holdfast.images.builds.gather import Gatherer
    from holdfast.images.formats.bundle import write_bundle
    from holdfast.source.directory import DirectorySource

    config = settings()
    revision = DirectorySource(state_dir).current()
    wanted, spec = images_of(state_dir, revision, node_name, labels)
    tree = tree_of(state_dir, revision)
    goal = platform_of(platform)
    fetching = config.images.model_copy(update={"authfile": authfile.absolute()}) if authfile else config.images
    if not output.parent.is_dir():
        raise WrongCall(f"write '{output}': '{output.parent}' is not a directory")
    with scratch(output) as folder, ExitStack() as stack:
        store = store_here(config.root)
        place = config.root if store else folder / "root"
        used = config.model_copy(update={"root": place, "images": fetching})
        builder = partial(builder_in, stack, used) if os.geteuid() == 0 else None
        places = {each.reference: f"[{number}/{len(wanted)}]" for number, each in enumerate(wanted, 1)}

        def coming(reference: str, source: str) -> None:
            render.echo(f"{places[reference]} {reference}  {source}", err=True)

        gatherer = Gatherer(folder, goal, fetching, store, coming, builder)
        stack.callback(gatherer.close)
        images = gatherer.gather(wanted, spec)
        digest = write_bundle(output, tree, images, gatherer.blobs, goal)
    size = render.size(output.stat().st_size)
    files, count = render.counted(len(tree.files), "state file"), render.counted(len(images), "image")
    render.echo(f"wrote {output}: {files}, {count} for {goal}, {size}")
    render.echo(f"sha256:{digest}")


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """A folder beside the file that is to be written, on its disk; removed at the end, also after SIGTERM."""
    import signal
    import tempfile

    beside = output.parent.resolve()
    try:
        # skopeo takes a colon for the end of a path
        folder = tempfile.TemporaryDirectory(prefix=".bundle.", dir=None if ":" in str(beside) else beside)
    except PermissionError as error:
        raise NotPermitted(f"write '{output}': may not write to '{beside}'") from error
    except OSError as error:
        raise UnfitHost(f"write '{output}': {(error.strerror or str(error)).lower()}") from error
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with folder as path:
            yield Path(path)
    finally:
        signal.signal(signal.SIGTERM, before)


def images_of(
    state_dir: Path, revision: Revision, node_name: str | None, labels: Sequence[str]
) -> tuple[list[Wanted], Spec]:
    """Every image that the files name; raises all that is wrong with them at once."""
    from holdfast.images.builds.gather import Unread, wanted_images

    facts = settings().facts()
    if node_name is not None:
        facts = replace(facts, name=node_name)
    if labels:
        facts = replace(facts, labels={**facts.labels, **dict(pair(label) for label in labels)})
    everywhere = node_name is None and not labels
    try:
        found, spec = wanted_images(
            revision.files, facts, executable=revision.executable, left_out=revision.left_out, everywhere=everywhere
        )
    except Unread as error:
        told = [WrongState(str(replace(each, path=str(state_dir / each.path)))) for each in error.problems]
        raise ExceptionGroup("state files", told) from None
    for path, why in revision.left_out.items():
        render.echo(f"left out {state_dir / path}: {why}", err=True)
    return [replace(each, places=tuple(str(state_dir / place) for place in each.places)) for each in found], spec


def store_here(root: Path) -> ImageStore | None:
    """This host's image store; None where there is none, or not for this user."""
    from holdfast.images.kept.store import ImageStore

    place = root / "images"
    return ImageStore(place) if os.access(place / "index.json", os.R_OK | os.W_OK) else None


def builder_in(stack: ExitStack, config: Config) -> Builder:
    """What builds images that state files define, in the agent's place or in a scratch one; it ends with stack."""
    from holdfast.drivers import Host
    from holdfast.images.builds.build import Builder
    from holdfast.images.builds.outside import Outside
    from holdfast.images.incoming.pull import Puller
    from holdfast.images.kept.store import ImageStore

    def told(_: str, subject: str, message: str, **__: object) -> None:
        render.echo(f"{subject}: {message}", err=True)

    def begun(image: str, step: str) -> None:
        told("", f"image {image}", step)

    host = Host(config.name, config.root, config.run_root, config.network.pool)
    store = ImageStore(config.root / "images", config.images)
    puller = Puller(store, config.images)
    stack.callback(puller.close)
    outside = Outside(store, puller, host_network="host-network" not in config.policy.forbid)
    builder = Builder(store, host, told, outside, config.builds, begun)
    stack.callback(builder.close)
    return builder


def pair(label: str) -> tuple[str, str]:
    """KEY and VALUE of a label."""
    key, equals, value = label.partition("=")
    if not equals or not key:
        raise WrongCall(f"label '{label}': not KEY=VALUE")
    return key, value


def platform_of(text: str | None) -> str:
    """`OS/ARCH[/VARIANT]` as images name platforms; for None, this host's."""
    from holdfast.images.formats.manifests import architecture

    if text is None:
        return f"linux/{architecture()}"
    system, *rest = text.split("/")
    if system != "linux" or len(rest) not in (1, 2) or not all(part.isalnum() for part in rest):
        raise WrongCall(f"platform '{text}': not one that containers run on here (expected as linux/arm64)")
    return text


def tree_of(state_dir: Path, revision: Revision) -> StateTree:
    """The files, with the commit and author that git knows them by, if they are just as they were committed."""
    from holdfast.images.formats.bundle import StateTree

    created = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    commit, _, author = git(state_dir, "log", "-1", "--format=%H%n%an <%ae>").partition("\n")
    if not commit or git(state_dir, "status", "--porcelain", "--ignored", "--", "."):
        commit, author = revision.id, ""
    return StateTree(revision.files, revision.executable, commit, author, created)


def git(folder: Path, *words: str) -> str:
    """What git says of a folder; "" where there is no git, or no repository."""
    import subprocess

    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *words],
            capture_output=True, check=False, text=True, errors="replace", timeout=30, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# -- inspect -------------------------------------------------------------------------------------------------


@bundle.command("inspect")
@click.argument("file", type=options.FILE)
@options.as_json
def inspect(file: Path, json_: bool) -> None:
    """Show what is in a bundle. Its layers are not read: load verifies them."""
    from holdfast.images.formats.bundle import open_bundle

    with open_bundle(file) as found:
        told = found.json()
    if json_:
        render.as_json(told)
        return
    made = f"made {render.ago(told['created'])}" if told["created"] else ""
    about = [f"for {told['platform']}", told["revision"][:19], told["author"], made]
    render.echo(f"{file}: {render.size(told['size'])}, " + ", ".join(filter(None, about)))
    for kind, columns in CONTENT.items():
        if told[kind]:
            render.echo()
            render.listing(told[kind], columns)


CONTENT = {
    "images": {
        "IMAGE": lambda each: each["ref"],
        "DIGEST": lambda each: render.digest(each["top"]),
        "SIZE": lambda each: render.size(each["size"]),
        "LAYERS": lambda each: str(len(each["layers"])),
    },
    "files": {
        "STATE FILE": lambda each: each["path"],
        "SIZE": lambda each: render.size(each["size"]),
    },
}


# -- load ----------------------------------------------------------------------------------------------------


@bundle.command("load")
@click.argument("file", type=options.FILE)
@click.option(
    "--state", metavar="DIR", type=click.Path(path_type=Path), help="Where the files go.  [default: as in agent.toml]"
)
@click.option("--images-only", is_flag=True, help="Load the images and leave the state as it is.")
@click.option("--wait", is_flag=True, help="Wait until the node is converged; exit 0 only if it is.")
@options.timeout
def load(file: Path, state: Path | None, images_only: bool, wait: bool, timeout: float) -> None:
    """Load the images of a bundle, then make its files the state of this node.

    The directory that agent.toml names is replaced as a whole, and what was in it is kept beside it. A running agent
    converges by itself.
    """
    from holdfast.images.formats.bundle import open_bundle
    from holdfast.source.replace import check_replaceable, holds, replace_tree

    if images_only and state:
        raise WrongCall("load bundle: --state and --images-only exclude each other")
    agent = client() if wait else None
    folder = None if images_only else (state or state_directory())
    with open_bundle(file) as found:
        check_platform(found)
        if folder is not None:
            check_replaceable(folder)
        with reach(makes=True) as node:
            steps = node.load_bundle(str(file.absolute()))
            images = followed(steps, quiet=not sys.stderr.isatty())["images"]
        for each in images:
            render.echo(f"{each['ref']}  {each['digest']}" + ("" if each["new"] else "  (here already)"))
        if folder is None:
            pass
        elif holds(folder, found.tree.files, found.tree.executable):
            render.echo(f"{folder}: has this state already")
        else:
            previous = replace_tree(folder, found.tree.files, found.tree.executable)
            kept = f" (what was there: {previous})" if previous else ""
            render.echo(f"{folder}: {render.counted(len(found.tree.files), 'state file')}{kept}")
    follow(agent, timeout)


def follow(agent: Client | None, timeout: float) -> None:
    """Wait for the agent, if that is asked for; say so if no agent will converge."""
    if agent is None:
        if not agent_client().listens():
            render.echo("no agent runs: 'holdfast apply' converges once, 'holdfast agent' from now on")
        return
    wait = Wait(timeout)
    agent.sync()
    status = converge.converged(agent, wait)
    render.echo(headline(status))
    converge.check("load bundle", status, wait)


def state_directory() -> Path:
    """The directory of the state that agent.toml names. Raises WrongCall if the state comes from git."""
    source = settings().state
    if source.git:
        raise WrongCall(
            f"load bundle: the state of this node comes from '{source.git}', which no bundle can replace (use "
            "--images-only, or --state DIR and name DIR in agent.toml)"
        )
    return source.directory


def check_platform(found: Bundle) -> None:
    """Raise WrongState for a bundle that is for other machines than this."""
    from holdfast.images.formats.manifests import architecture

    here = f"linux/{architecture()}"
    if "/".join(found.platform.split("/")[:2]) != here:
        raise WrongState(f"load bundle '{found.path}': is for {found.platform} (this host is {here})")
