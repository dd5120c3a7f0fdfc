"""`[images.*]` of a state tree → images in the store, by buildah.

The context is laid out, built with a storage of buildah's own (its layers are the cache of later builds), and what
comes of it is taken into the store under a name that holds the build's key: where that is known, nothing is built.
Called by `node` while it stages; the programs are run by `buildah`.

ROOT/builds/logs/APP/NAME.log holds all that the last build of an image said, NAME.log.1 the one before. Events of
kind `build` and subject `image APP/NAME` say the steps, and of their output as much as a person reads.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from holdfast.config import ImageSettings
from holdfast.drivers import Host
from holdfast.errors import HoldfastError, NotFound, TryAgain, UnfitHost, WrongCall, WrongState
from holdfast.images.buildah import STEP, Buildah, Failed, on_loopback
from holdfast.images.faults import explain, failure, message_of
from holdfast.images.image import Image, architecture, whole_history
from holdfast.images.store import ImageStore
from holdfast.images.unpack import Expected
from holdfast.images.write import write_layout
from holdfast.observed import Json
from holdfast.spec.dockerfile import images_in
from holdfast.spec.model import Build

RETRY = 60.0  # seconds; a build that failed is not tried again before, unless something else is committed
MTIME = 315532800  # 1980-01-01: of all that is copied from a context; older ones trouble zip and make
NOISE = re.compile(rf"Error: |error running container: from \S+ (?!creating)|: exit status|time=|--> |{STEP.pattern}")
UNSTARTED = re.compile(r"error running container: from (\S+) creating container for \[.*?\]: (.*)")
DUMPED = re.compile(r"step \{Env:\[.*? Original:(.*?)\}")  # buildah prints the whole of its own value
UNKNOWN = re.compile(r'.*Unknown instruction: "(.*?)" &imagebuilder\.Step\{.*\}')
ABSENT = re.compile(r'checking on sources under "(.*?)": .*?copier: stat: \[?"(.*)"\]?: no such file or directory')
NO_STAGE = re.compile(r"((?:COPY|ADD) --from=\S+): no stage or image found with that name")
UNWRITTEN = re.compile(r"committing container for step \{.*\}: (?:.*: )?(.*)")
FULL = " (see 'holdfast system df')"
NO_SPACE = re.compile("no space left on", re.IGNORECASE)
HEREDOC = re.compile(r"""<<-?(["']?)([A-Za-z_]\w*)\1.*\n((?:.*\n)*?[ \t]*\2[ \t\r]*)$""", re.MULTILINE)
LOUD = 20  # lines of one step that events carry; of those beyond it, one a second
LONGEST_STEP = 80  # characters of an instruction in an error
LONGEST_EVENT = 400  # characters of a line in an event
LOG_LIMIT = 16 << 20  # bytes of one log; what a build says beyond it is not kept
REGISTRY = re.compile(r"docker://|pinging container registry|short-name|registr(y|ies)\b")
NATIVE = {"amd64": ("386",), "arm64": ("arm",)}  # what a kernel runs besides its own
BINFMT = Path("/proc/sys/fs/binfmt_misc")
QEMU = {"386": "i386", "amd64": "x86_64", "arm64": "aarch64", "loong64": "loongarch64"}

Images = Mapping[str, Build]
Blobs = Mapping[str, bytes]


class Builder:
    """Builds the images of one agent, one at a time. Safe for several threads."""

    def __init__(
        self,
        store: ImageStore,
        settings: ImageSettings,
        host: Host,
        runtime: Path,
        told: Callable[..., None],
        push: Callable[[Image, str], object],
    ) -> None:
        """runtime: crun's or runc's path, for RUN steps. told: called as told(kind, subject, message). push: called
        with an image and a name, `Puller.push`."""
        self.store, self.told, self.push = store, told, push
        self.buildah = Buildah(settings, host, runtime)
        self.logs = host.root / "builds/logs"
        self._now: Json | None = None

    def look(self) -> list[Json]:
        """What is being built: {"image" (`images.APP/NAME`), "step", "began" (epoch seconds)}; one at the most."""
        now = self._now
        return [now] if now else []

    @property
    def settings(self) -> ImageSettings:
        """agent.toml's [images]."""
        return self.buildah.settings

    @settings.setter
    def settings(self, settings: ImageSettings) -> None:
        self.buildah.settings = settings

    def build(self, name: str, images: Images, blobs: Blobs) -> Image:
        """The image of a qualified name of App.images: built if it is not here, and pushed where it says so.

        Before it, what it is built from. What came in a bundle was built, and is to be pushed, elsewhere. blobs:
        Spec.blobs. Blocks while another is built. Raises WrongState (the build failed: the last line that says why),
        UnfitHost (no buildah, no emulator), TryAgain.
        """
        build = images[name]
        image = self.find(name, build)
        known = self.store.names().get(built_name(name, build))
        if image is not None and known is not None and known.source == "bundle":
            return self._named(image, build)
        check_platforms(name, build)
        if image is None:
            with self._failing(name), self.store.keep(), self.buildah.alone():
                image = self.find(name, build) or self._build(name, images, blobs)  # somebody else's, by now
                self.buildah.prune(self._is_known)
        image = self._named(image, build)
        if build.push:
            self._push(name, images, blobs, image)
        return image

    def find(self, name: str, build: Build) -> Image | None:
        """The image that was built by this key, if it is here."""
        with suppress(NotFound):
            return self.store.resolve(built_name(name, build))
        return None

    def sweep(self) -> None:
        """Clear away what a killed agent's build left, and the cache once no built image is left. When it starts."""
        self.buildah.sweep()
        if self.buildah.storage.exists() and not any(name.startswith(PREFIX) for name in self.store.names()):
            with suppress(HoldfastError), self.buildah.alone():
                self.buildah.wipe()

    def close(self) -> None:
        """Kill what is being built; who waits for it gets TryAgain."""
        self.buildah.close()

    def _build(self, name: str, images: Images, blobs: Blobs) -> Image:
        """Build an image while we are alone, and first what it is built from."""
        build = images[name]
        self._check_room(name)
        for base in sorted(set(build.bases.values())):
            image = self.find(base, images[base]) or self._build(base, images, blobs)
            self._take_in(image, built_name(base, images[base]))
        subject, began = f"image {name}", time.monotonic()
        with self._shown(name), Log(self.logs / f"{name}.log", partial(self._tell, subject)) as log:
            self.told("build", subject, f"building from {build.context or '.'} ({build.dockerfile})")
            with self._failing(name, _dockerfile(build, blobs)), self._scratch() as folder:
                id = self._make(folder, name, images, blobs, log.hear)
                image = self._take(folder, id, built_name(name, build))
            seconds = time.monotonic() - began
            self.told("build", subject, f"built in {seconds:.1f} s: {image.digest}", digest=image.digest)
        return image

    @contextmanager
    def _shown(self, name: str) -> Iterator[None]:
        self._now = {"image": f"images.{name}", "step": "", "began": time.time()}
        try:
            yield
        finally:
            self._now = None

    def _tell(self, subject: str, line: str) -> None:
        if STEP.match(line) and self._now:
            self._now = {**self._now, "step": line}
        self.told("build", subject, line)

    def _make(
        self,
        folder: Path,
        name: str,
        images: Images,
        blobs: Blobs,
        hear: Callable[[str], None],
        platform: str = "",
    ) -> str:
        """Have buildah build it; the id of the image in its storage. platform: "" is this node's."""
        build = images[name]
        tag = _tag_for(built_name(name, build), platform)
        own = next(iter(ours(build.platforms)), "")
        try:
            lay_out(build, blobs, folder)
        except KeyError as error:
            raise TryAgain(f"build 'images.{name}': its context is of an older commit (commit once more)") from error
        words = ["--network", build.network, "--file", str(folder / "Dockerfile")]
        words += ["--ignorefile", os.devnull, "--iidfile", str(folder / "id"), "--tag", tag]
        words += ["--platform", platform or own] if platform or own else []
        words += ["--layers=false"] if platform else []  # buildah takes another platform's layers for its own
        words += [_PULL["never" if self.settings.offline else build.pull]]
        words += ["--no-cache"] if build.no_cache else []
        words += ["--target", build.target] if build.target else []
        words += ["--tls-verify=false"] if _starts_on_loopback(build, blobs) else []
        for option, values in (("--build-arg", build.args), ("--label", build.labels)):
            words += [word for key, value in values.items() for word in (option, f"{key}={value}")]
        bases = {written: built_name(base, images[base]) for written, base in build.bases.items()}
        bases |= {} if platform else self._stored(build, blobs)
        words += [f"--build-context={written}=container-image://{base}" for written, base in bases.items()]
        names: dict[str, str] = {}  # as buildah is given them → as they are written
        for use in images_in(_dockerfile(build, blobs), build.args):
            if use.name in bases:
                names.setdefault(bases[use.name], use.name)
        pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")

        def plain(line: str) -> str:
            return pattern.sub(lambda name: names[name[0]], line)

        try:
            self.buildah.build([*words, str(folder / "context")], lambda line: hear(plain(line)))
        except Failed as error:
            error.output, error.errors = [[plain(line) for line in said] for said in (error.output, error.errors)]
            raise
        return (folder / "id").read_text().strip().removeprefix("sha256:")

    def _stored(self, build: Build, blobs: Blobs) -> dict[str, str]:
        """What it starts from that our own store has, imported say: as written → name in buildah's storage."""
        found: dict[str, str] = {}
        if build.pull in ("always", "newer") and not self.settings.offline:
            return found
        for use in images_in(blobs[build.instructions].decode(), build.args):
            with suppress(NotFound, WrongCall):
                if use.name not in build.bases:
                    image = self.store.resolve(use.name)
                    found[use.name] = found[use.written] = f"{STORED}{image.digest.removeprefix('sha256:')}"
                    self._take_in(image, found[use.name])
        return found

    def _take_in(self, image: Image, name: str) -> None:
        """Have an image of our store in buildah's by this name, while we are alone."""
        if name not in self.buildah.names():
            with self._scratch() as folder:
                write_layout(self.store, image, folder / "layout")
                complete_history(folder / "layout")
                self.buildah.take_in(folder / "layout", name)

    def _take(self, folder: Path, id: str, name: str) -> Image:
        """Copy an image from buildah's storage into ours; of its layers, those that are not here yet."""
        layout = folder / "layout"
        blobs = layout / "blobs/sha256"
        blobs.mkdir(parents=True)
        for diff_id in self.buildah.config(id)["rootfs"]["diff_ids"]:
            if self.store.has_layer(diff_id):  # a file of holes stands for it: skopeo takes it for the layer
                with (blobs / diff_id.removeprefix("sha256:")).open("wb") as file:
                    file.truncate(self.store.layers.facts(diff_id).size)
        self.buildah.take_out(id, layout)

        def read(digest: str) -> bytes:
            return (blobs / digest.removeprefix("sha256:")).read_bytes()

        manifest = read(json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"])
        document = json.loads(manifest)
        config = read(document["config"]["digest"])
        for layer, diff_id in zip(document["layers"], json.loads(config)["rootfs"]["diff_ids"], strict=True):
            if not self.store.has_layer(diff_id):
                with (blobs / layer["digest"].removeprefix("sha256:")).open("rb") as file:
                    self.store.add_layer(file.fileno(), Expected(diff_id, layer["digest"], layer["size"]))
        return self.store.add_image(manifest, config, [name], source="build")

    def _named(self, image: Image, build: Build) -> Image:
        """The image with all names that its tags give it."""
        from holdfast.images.references import parse

        known = self.store.names()
        for tag in build.tags:
            there = known.get(parse(tag).name)
            if there is None or there.digest != image.digest:
                image = self.store.tag(image.digest, tag)
        return image

    def _push(self, name: str, images: Images, blobs: Blobs, image: Image) -> None:
        """Bring the image to the registries of its tags, unless that was done. What fails is tried again, alone."""
        build, note = images[name], self.logs / f"{name}.pushed"
        mark = f"{image.digest} {','.join(build.platforms)}"
        done: dict[str, str] = {}
        with suppress(FileNotFoundError, ValueError):
            done = json.loads(note.read_bytes())
        left = [tag for tag in build.tags if done.get(tag) != mark]
        others = [platform for platform in build.platforms if platform not in ours(build.platforms)]
        if left and others:
            with self._failing(name), self.store.keep(), self.buildah.alone():
                self._push_index(name, images, blobs, others, left)
        for tag in left:
            if not others:
                self.push(image, tag)
            done[tag] = mark
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps({each: done[each] for each in build.tags if each in done}))

    def _push_index(self, name: str, images: Images, blobs: Blobs, others: list[str], tags: list[str]) -> None:
        """Build for the other platforms, and push all as one index, while we are alone."""
        build, own = images[name], built_name(name, images[name])
        index, subject = f"{own}-index", f"image {name}"
        self._take_in(self.store.resolve(own), own)
        with Log(self.logs / f"{name}.log", lambda line: self.told("build", subject, line)) as log:
            ids = [self.buildah.names()[own]]
            for platform in others:
                built = self.buildah.names().get(_tag_for(own, platform))
                if built is None:
                    self._check_room(name)
                    self.told("build", subject, f"building for {platform}")
                    with self._scratch() as folder:
                        built = self._make(folder, name, images, blobs, log.hear, platform)
                ids.append(built)
            if index in self.buildah.names():
                self.buildah.run("manifest", "rm", index)
            self.buildah.run("manifest", "create", index, *ids)
            for tag in tags:
                self.buildah.send(index, tag, log.hear)
                self.told("pushed", tag, f"{own} is there for {', '.join(build.platforms)}")

    def _check_room(self, name: str) -> None:
        """Raise UnfitHost where less is free than is to stay free."""
        system = os.statvfs(self.buildah.folder)
        free, least = system.f_bavail * system.f_frsize, self.settings.min_free
        if free < least:
            raise failure(
                UnfitHost,
                f"build 'images.{name}': not enough space in {str(self.buildah.folder)!r}: {free >> 20} MiB free, "
                f"and {least >> 20} MiB are to stay free (min_free in [images] of agent.toml; 'holdfast system "
                "prune' makes room)",
                RETRY,
            )

    @contextmanager
    def _failing(self, name: str, dockerfile: str = "") -> Iterator[None]:
        """Say in one line what fails in the block, in which image, and when a next try makes sense."""
        try:
            yield
        except Failed as error:
            raise failed(name, error, self.logs / f"{name}.log", dockerfile) from error
        except OSError as error:
            cause = (error.strerror or str(error)).lower()
            raise failure(UnfitHost, f"build 'images.{name}': {cause}{_hint(cause)}", RETRY) from error
        except HoldfastError as error:
            if not str(error).startswith("build 'images."):
                error.args = (f"build 'images.{name}': {error}",)
            error.wait = max(error.wait, RETRY)
            raise

    def _is_known(self, name: str) -> bool:
        """Whether a name of buildah's storage is worth keeping: not if what was built is in the store no more."""
        if name.startswith(STORED):
            return f"sha256:{name.removeprefix(STORED)}" in self.store.digests()
        end = name.rfind(":") + 17  # behind it stands for which platform it was built
        return not name.startswith(PREFIX) or name[:end] in self.store.names()

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder for one step; all of `work` goes when we are alone no more."""
        folder = self.buildah.work / str(time.monotonic_ns())
        folder.mkdir()
        yield folder


PREFIX = "localhost/images/"
STORED = "localhost/stored:"  # in buildah's storage: and the digest of what our store has
_PULL = {"missing": "--pull=false", "newer": "--pull=ifnewer", "always": "--pull-always", "never": "--pull-never"}


def failed(name: str, error: Failed, log: Path, dockerfile: str = "") -> HoldfastError:
    """What buildah or skopeo said → one line: the step, its end, and what it said last. Pure."""
    reasons = [line.removeprefix("Error: ") for line in error.errors if line.startswith("Error: ")]
    reason = reasons[-1] if reasons else next(reversed([*error.output, *error.errors]), str(error))
    unwritten = UNWRITTEN.fullmatch(reason)
    reason = DUMPED.sub(lambda step: _shortened(step[1]), reason)
    reason = message_of(reason) if "level=fatal" in reason else reason
    begun = max((at for at, line in enumerate(error.output) if STEP.match(line)), default=-1)
    step = STEP.sub("", error.output[begun]) if begun >= 0 else ""
    kind: type[HoldfastError] = WrongState
    wait, what, cause = RETRY, "", reason
    if found := _in_step(reason, step):
        what, cause = found
        if unknown := UNKNOWN.fullmatch(cause):
            what, cause = step or what, f"unknown instruction '{unknown[1]}'"
            bodies = "\n".join(match[3] for match in HEREDOC.finditer(dockerfile)).upper().splitlines()
            inside = any(line.split()[:1] == [unknown[1]] for line in bodies)
            cause += " (this buildah has no heredocs)" if inside else ""
        elif absent := ABSENT.fullmatch(cause):
            cause = _absent(absent[1], absent[2], what)
        elif "exit status" in cause and (last := _last_word(error.output[begun + 1 :], error.errors)):
            cause += f": {last}"
    elif unwritten:
        what, cause = step, f"its layer can't be written: {unwritten[1]}"
    elif nowhere := NO_STAGE.fullmatch(reason):
        what, cause = nowhere[1], "no stage is called so, and no such image could be had"
        tried = [line for line in error.errors if "Error: initializing source docker://" in line]
        reason = tried[-1].partition("Error: ")[2] if tried else ""
    elif reason.startswith("creating build container: "):
        what, cause = step, reason.removeprefix("creating build container: ")
        if short := re.match(r'short-name "(.*?)" did not resolve to an alias and no unqual', cause):
            whole = f"docker.io/{'' if '/' in short[1] else 'library/'}{short[1]}"
            cause = f"no stage and no image here is called so, and it names no registry (expected {whole}, say)"
            reason = ""
        elif cause.endswith(": image not known"):
            cause = "no such image here, and none is to be pulled (expected it to be loaded, or another `pull`)"
    if not found and not unwritten and REGISTRY.search(reason):
        asked = re.search(r"docker://(\S+?):?(?=[\s\"]|$)", reason)
        image = asked[1] if asked else ""
        explained, what = explain(reason, "build", "", (image, image.rpartition(":")[0])), what or image
        kind, wait, cause = type(explained), max(explained.wait, RETRY), str(explained).removeprefix("build '': ")
    what = f"{_shortened(what)}: " if what else ""
    hint = FULL if unwritten else _hint(cause)
    return failure(kind, f"build 'images.{name}': {what}{cause}{hint} (all of it is in {log})", wait)


def _in_step(reason: str, step: str) -> tuple[str, str] | None:
    """The instruction and what became of it, where it failed at one. step: the last that was begun."""
    match = re.fullmatch(rf'building at STEP "({re.escape(step)}|.*?)": (?:while running runtime: )?(.*)', reason)
    return (match[1].strip(), match[2]) if match else None


def _absent(where: str, path: str, step: str) -> str:
    """Why what is to be copied is not there."""
    if path.startswith("/<<"):
        return "this buildah has no heredocs"
    if where.endswith("/context"):
        return f"'{path[1:]}' is not in the context (or .dockerignore leaves it out)"
    source = re.search(r"\bfrom=([^\s,]+)", step)
    return f"'{path}' is not in '{source[1]}'" if source else f"'{path}' is not there"


def _last_word(output: Sequence[str], errors: Sequence[str]) -> str:
    """Of what a step said, the line that says most likely why it failed; "" without one."""
    loud, quiet = ([line for line in said if not NOISE.match(line)] for said in (errors, output))
    full = [line for line in [*quiet, *loud] if NO_SPACE.search(line)]
    said = next(reversed(full or loud or quiet), "")
    if unstarted := UNSTARTED.match(said):
        said = f"{Path(unstarted[1]).name}: {unstarted[2]}"
    return said.strip()[:LONGEST_EVENT]


def _hint(cause: str) -> str:
    return FULL if NO_SPACE.search(cause) else ""


def _dockerfile(build: Build, blobs: Blobs) -> str:
    return blobs.get(build.instructions, b"").decode(errors="replace")


def _shortened(instruction: str) -> str:
    return instruction if len(instruction) <= LONGEST_STEP else f"{instruction[:LONGEST_STEP]}…"


def built_name(name: str, build: Build) -> str:
    """The full name by which the store knows what was built: localhost/images/APP/NAME:KEY."""

    def component(text: str) -> str:
        """Nearest to text that a reference may hold: the key tells apart what this makes alike."""
        return re.sub(r"[._-]{2,}", "-", text).strip("._-")

    return f"{PREFIX}{'/'.join(map(component, name.split('/')))}:{build.key[:16]}"


def _tag_for(name: str, platform: str) -> str:
    """The name of what is built for another platform, in buildah's storage alone."""
    return f"{name}-{platform.replace('/', '-')}" if platform else name


def ours(platforms: Sequence[str]) -> list[str]:
    """Those of the platforms that are this node's."""
    return [platform for platform in platforms if platform.split("/")[1] == architecture()]


def check_platforms(name: str, build: Build) -> None:
    """Raise WrongState for an image that is not for this node, UnfitHost for one that can't be built here."""
    own = architecture()
    if not build.platforms:
        return
    if not ours(build.platforms):
        said = ", ".join(build.platforms)
        raise WrongState(f"build 'images.{name}': its platforms are {said} (expected linux/{own}, this node's, too)")
    others = [platform for platform in build.platforms if platform not in ours(build.platforms)]
    if not build.push:
        return  # the others would lead nowhere
    for platform in others:
        machine = platform.split("/")[1]
        emulator = f"qemu-{QEMU.get(machine, machine)}"
        if machine not in NATIVE.get(own, ()) and not (BINFMT / emulator).exists():
            raise UnfitHost(
                f"build 'images.{name}': {platform} can't be run here: no {emulator} in {BINFMT} (expected "
                "the package qemu-user-static)"
            )
    if others and build.bases:
        base = next(iter(build.bases.values()))
        raise WrongState(
            f"build 'images.{name}': starts from 'images.{base}', which is built for this node alone (expected "
            "an image of a registry for several platforms)"
        )


def lay_out(build: Build, blobs: Blobs, folder: Path) -> None:
    """Write folder/context and folder/Dockerfile, so that the same build always finds the same. Raises KeyError."""
    context = folder / "context"
    context.mkdir()
    listing: dict[str, Sequence[Any]] = json.loads(blobs[build.tree])
    for path, (digest, executable) in listing.items():
        file = context / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(blobs[digest])
        file.chmod(0o755 if executable else 0o644)
    (folder / "Dockerfile").write_bytes(blobs[build.instructions])
    for top, folders, files in os.walk(context, topdown=False):
        for each in files:
            os.utime(Path(top, each), (MTIME, MTIME))
        for each in folders:
            Path(top, each).chmod(0o755)
        os.utime(top, (MTIME, MTIME))


def complete_history(layout: Path) -> None:
    """Have the image of a layout say of each layer where it came from: buildah refuses it otherwise."""
    blobs = layout / "blobs/sha256"

    def read(digest: str) -> Any:
        return json.loads((blobs / digest.removeprefix("sha256:")).read_bytes())

    def write(document: Any, descriptor: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        descriptor |= {"digest": f"sha256:{sha256(data).hexdigest()}", "size": len(data)}
        (blobs / descriptor["digest"].removeprefix("sha256:")).write_bytes(data)

    index = json.loads((layout / "index.json").read_bytes())
    manifest = read(index["manifests"][0]["digest"])
    config = read(manifest["config"]["digest"])
    history = config.get("history") or []
    whole = whole_history(history, len(manifest["layers"]))
    if whole != history:
        config["history"] = whole
        write(config, manifest["config"])
        write(manifest, index["manifests"][0])
        (layout / "index.json").write_text(json.dumps(index))


def _starts_on_loopback(build: Build, blobs: Blobs) -> bool:
    """Whether it starts from nothing but registries on this host, which may be without TLS."""
    uses = images_in(blobs[build.instructions].decode(), build.args)
    names = [use.name for use in uses if use.name not in build.bases]
    return bool(names) and all(map(on_loopback, names))


class Log:
    """Where the output of one build goes: all of it to a file, as much as a person reads to events."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path, self._tell = path, tell
        self._size, self._lines, self._left_out, self._told_at = 0, 0, 0, 0.0

    def __enter__(self) -> Log:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        self._file = self.path.open("w", encoding="utf-8", errors="replace")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def hear(self, line: str) -> None:
        """Take one line."""
        if self._size <= LOG_LIMIT:
            self._size += len(line) + 1
            self._file.write(f"{line}\n" if self._size <= LOG_LIMIT else "what follows is not kept\n")
            self._file.flush()
        if STEP.match(line):
            self._lines = 0
        self._lines += 1
        if self._lines > LOUD and time.monotonic() - self._told_at < 1:
            self._left_out += 1
            return
        left_out = f" ({self._left_out} lines left out before it)" if self._left_out else ""
        self._left_out, self._told_at = 0, time.monotonic()
        self._tell((line if len(line) <= LONGEST_EVENT else f"{line[:LONGEST_EVENT]}…") + left_out)
