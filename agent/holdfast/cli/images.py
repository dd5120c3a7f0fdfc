"""image …: what containers are made from, in the words of `docker image` and `podman image`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from holdfast.cli import options, render
from holdfast.cli.archives import on_disk, written
from holdfast.cli.bars import followed
from holdfast.cli.client import Client
from holdfast.cli.command import Group, reach
from holdfast.cli.outdated import outdated
from holdfast.errors import HoldfastError, WrongCall
from holdfast.questions import Json

SOURCE = click.Path(exists=True, path_type=Path, allow_dash=True)
NAMELESS = "<none>"
FILTERS = ("dangling", "reference")
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
BUILT = "localhost/images/"  # how names begin that hold the key of a build
LONGEST = 60  # characters of an instruction that are shown


class Named(click.ParamType[str]):
    """What names an image: anything but nothing."""

    name = "image"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if value.strip() else self.fail("it is empty (expected [HOST/]NAME[:TAG])", param, ctx)


one_image = click.argument("ref", type=Named(), metavar="IMAGE")
some_images = click.argument("refs", type=Named(), metavar="IMAGE...", nargs=-1, required=True)
whole_digests = click.option("--no-trunc", is_flag=True, help="Do not shorten digests and instructions.")
digests_only = click.option("-q", "--quiet", is_flag=True, help="Print digests only, one a line.")


@click.group("image", cls=Group)
def image() -> None:
    """Manage images: pull, load, import, push, save, remove."""


image.add_command(outdated)


def print_image(found: Json) -> None:
    render.echo(f"{found['ref']}  {found['digest']}")


# -- looking --


@image.command("list")
@options.as_json
@click.option("-a", "--all", "all_", is_flag=True, help="Also the names that hold the keys of builds.")
@click.option("--digests", is_flag=True, help="Whole digests, and those that registries gave for the tags.")
@digests_only
@whole_digests
@click.option(
    "-f",
    "--filter",
    "filters",
    multiple=True,
    metavar="KEY=VALUE",
    help="dangling=BOOL or reference=PATTERN; can be repeated.",
)
@click.argument("name", required=False)
def list_(
    json_: bool,
    all_: bool,
    digests: bool,
    quiet: bool,
    no_trunc: bool,
    filters: tuple[str, ...],
    name: str | None,
) -> None:
    """List the images of this node. One without a name is <none>, and dangling."""
    wanted = [*filters, *([f"reference={name}"] if name else ())]
    with reach() as node:
        every = node.images()
    found = [each for each in (every if all_ else without_keys(every)) if matches(each, wanted)]
    if quiet and not json_:
        for digest in dict.fromkeys(each["digest"] for each in found):
            render.echo(render.digest(digest, whole=no_trunc))
        return
    columns = {
        "IMAGE": lambda each: each["ref"] or NAMELESS,
        **({"TOP DIGEST": lambda each: str(each.get("top") or "")} if digests else {}),
        "DIGEST": lambda each: render.digest(each["digest"], whole=no_trunc or digests),
        "SIZE": lambda each: render.size(each["size"]),
        "MADE": lambda each: render.ago(each.get("created") or None),
        "FROM": lambda each: str(each.get("source") or ""),
        "USED BY": lambda each: " ".join(each.get("used_by") or ()),
    }
    empty = "no images" + ("" if wanted else " (holdfast image pull, holdfast image load)")
    render.listing(found, columns, json=json_, empty=empty)


def without_keys(images: Sequence[Json]) -> list[Json]:
    """Images without the names that only say what they were built from, where they have others."""
    named = {each["digest"] for each in images if each["ref"] and not each["ref"].startswith(BUILT)}
    return [each for each in images if each["digest"] not in named or not each["ref"].startswith(BUILT)]


def matches(each: Json, filters: Iterable[str]) -> bool:
    """Whether an image passes all filters. Raises WrongCall for one that is none."""
    from fnmatch import fnmatchcase

    for entry in filters:
        key, _, value = entry.partition("=")
        if key == "dangling" and value in BOOLEANS:
            if (not each["ref"]) != BOOLEANS[value]:
                return False
        elif key == "reference" and value:
            tagless = each["ref"].rpartition(":")[0]
            if not any(fnmatchcase(name, value) for name in (each["ref"], tagless)):
                return False
        else:
            raise WrongCall(f"filter {entry!r}: not known (expected {' or '.join(FILTERS)}, as in dangling=true)")
    return True


@image.command("inspect")
@some_images
def inspect(refs: tuple[str, ...]) -> None:
    """Print all that is known of images, as `docker image inspect` does: a JSON list."""
    with reach() as node:
        render.as_json([node.image(ref) for ref in refs])


@image.command("history")
@options.as_json
@whole_digests
@digests_only
@one_image
def history(ref: str, json_: bool, no_trunc: bool, quiet: bool) -> None:
    """Show how an image was made: its steps, the newest first, and the size of their layers."""

    def layer(each: Json) -> str:
        return render.digest(each["layer"], whole=no_trunc) or NAMELESS

    with reach() as node:
        found = node.image_history(ref)
    if quiet and not json_:
        for each in found:
            render.echo(layer(each))
        return
    columns = {
        "LAYER": layer,
        "MADE": lambda each: render.ago(each["created"] or None),
        "SIZE": lambda each: render.size(each["size"]),
        "COMMENT": lambda each: each["comment"],
        "BY": lambda each: instruction(each["created_by"], no_trunc),
    }
    render.listing(found, columns, json=json_)


def instruction(text: str, whole: bool) -> str:
    """What made a step, on one line."""
    line = " ".join(text.split())
    return line if whole or len(line) <= LONGEST else line[: LONGEST - 1] + "…"


# -- taking in --


@image.command("pull")
@options.quiet
@some_images
def pull(refs: tuple[str, ...], quiet: bool) -> None:
    """Fetch images from registries. What is here already is not fetched again."""
    with reach(makes=True) as node:
        for ref in refs:
            try:
                print_image(followed(node.pull_image(ref), quiet=quiet)["image"])
            except KeyboardInterrupt:
                if isinstance(node, Client):
                    after = "\n" if sys.stderr.isatty() else ""  # the terminal has written ^C
                    more = "the agent goes on pulling it (see 'holdfast status')"
                    render.echo(f"{after}holdfast: pull '{ref}': {more}", err=True)
                raise click.Abort from None


@image.command("push")
@options.quiet
@one_image
@click.argument("to", metavar="[DESTINATION]", default="")
def push(ref: str, to: str, quiet: bool) -> None:
    """Send an image to a registry, under its own name or another."""
    with reach() as node:
        print_image(followed(node.push_image(ref, to), quiet=quiet)["pushed"])


@image.command("import")
@click.argument("tar", type=SOURCE)
@click.argument("ref", type=Named(), metavar="NAME[:TAG]")
@options.changes
def import_(tar: Path, ref: str, changes: tuple[str, ...]) -> None:
    """Make an image of one layer from a tar archive of a root file system. - reads standard input."""
    with reach(makes=True) as node, on_disk(tar) as path:
        print_image(node.import_image(str(path.resolve()), ref, changes))


@image.command("load")
@click.option("-i", "--input", "source", type=SOURCE, metavar="PATH", help="The same as the argument, as in Docker.")
@options.quiet
@click.argument("path", type=SOURCE, required=False)
def load(path: Path | None, source: Path | None, quiet: bool) -> None:
    """Load the images of an OCI layout (directory or archive) or a docker-archive. - reads standard input."""
    if path is not None and source is not None:
        raise WrongCall("load: two archives are named (expected one PATH, or --input PATH)")
    with reach(makes=True) as node, on_disk(path or source or Path("-")) as place:
        for found in node.load_image(str(place.resolve())):
            if not quiet:
                print_image(found)


@image.command("tag")
@one_image
@click.argument("names", type=Named(), metavar="NAME[:TAG]...", nargs=-1, required=True)
def tag(ref: str, names: tuple[str, ...]) -> None:
    """Give an image more names."""
    with reach(makes=True) as node:
        for name in names:
            node.tag_image(ref, name)


# -- handing out --


@image.command("save")
@options.output
@click.option(
    "--format",
    "format_",
    type=click.Choice(["oci-archive", "docker-archive"]),
    default="oci-archive",
    show_default=True,
    help="The format of the archive.",
)
@some_images
def save(refs: tuple[str, ...], output: Path | None, format_: str) -> None:
    """Write images to one archive, which skopeo, podman and Docker read."""
    with reach() as node:
        written(output, lambda out: node.save_images(refs, format_, out))


@image.command("export")
@options.output
@one_image
def export(ref: str, output: Path | None) -> None:
    """Write the root file system of an image as a tar archive."""
    with reach() as node:
        written(output, lambda out: node.export_image(ref, out))


# -- taking away --


@image.command("remove")
@some_images
def remove(refs: tuple[str, ...]) -> None:
    """Remove names of images, and from the disk what only they need. A digest stands for all names of its image."""
    failures: list[HoldfastError] = []
    with reach() as node:
        for ref in refs:
            try:
                node.remove_image(ref)
                render.echo(f"removed {ref}")
            except HoldfastError as error:
                failures.append(error)
    if failures:
        raise ExceptionGroup("remove images", failures)


@image.command("prune")
@click.option("-a", "--all", "all_", is_flag=True, help="Also unused images that have names.")
@options.force
def prune(all_: bool, force: bool) -> None:
    """Delete unused images without a name, and layers of interrupted pulls."""
    which = "every unused image" if all_ else "every unused image without a name"
    if not force and not options.agreed(f"delete {which}, and layers of interrupted pulls?"):
        return
    with reach() as node:
        every = node.images()
        freed = node.prune_images(all_)
    print_removed(freed["images"], every)
    if layers := len(freed["layers"]):
        render.echo(f"removed {render.counted(layers, 'layer')} that no image needs")
    render.echo(f"freed {render.size(freed['freed'])}")


def print_removed(digests: Iterable[str], before: Iterable[Json]) -> None:
    """Print a line for each image that was removed, with the names that it had before."""
    names: dict[str, list[str]] = {}
    for each in before:
        if each["ref"]:
            names.setdefault(each["digest"], []).append(each["ref"])
    for digest in digests:
        render.echo("  ".join([f"removed {digest}", *names.get(digest, ())]))
