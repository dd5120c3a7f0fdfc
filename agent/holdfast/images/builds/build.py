"""Build the images of `[images.*]` with buildah, and put them into the store.

First, what an image starts from is fetched into our store, by the rules of all images. Then the context is written
to disk and built in a storage of buildah's own, whose layers are the cache for the app's later builds. The result
goes into the store under a name that holds the build's key; an image whose key is there is not built again. `node`
calls this while it stages; `buildah` runs the programs.

ROOT/builds/logs/APP/NAME.log holds all that the last build of an image said, NAME.log.1 the one before. Events of
kind `build` and subject `image APP/NAME` say that a build begins and ends; one of kind `failed` has the last lines of
the log in `output`.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from holdfast.config import BuildSettings
from holdfast.drivers import Host
from holdfast.errors import HoldfastError, NotFound, Stopping, TryAgain, UnfitHost, WrongState
from holdfast.files import remove_tree
from holdfast.images.builds.buildah import Buildah, Failed, find, give, read_plain
from holdfast.images.builds.buildlog import RETRY, Log, failed, hint_of
from holdfast.images.builds.hazards import buildah_version, check_mounts
from holdfast.images.builds.outside import Outside
from holdfast.images.disk import check_room
from holdfast.images.formats import layout as oci
from holdfast.images.formats.manifests import architecture
from holdfast.images.formats.references import parse
from holdfast.images.kept.image import Image, whole_history
from holdfast.images.kept.store import ImageStore
from holdfast.images.outgoing.write import push, push_index, write_layout
from holdfast.images.registry.faults import failure
from holdfast.images.unpacking.unpack import Expected
from holdfast.observed import Json
from holdfast.spec.dockerfile import Use, images_in, keyed
from holdfast.spec.model import Build

MTIME = 315532800  # 1980-01-01: of all that is copied from a context; older ones trouble zip and make
NATIVE = {"amd64": ("386",), "arm64": ("arm",)}  # what a kernel runs besides its own
BINFMT = Path("/proc/sys/fs/binfmt_misc")
QEMU = {"386": "i386", "amd64": "x86_64", "arm64": "aarch64", "loong64": "loongarch64"}

DEFAULTS = BuildSettings()
MOST = 8  # builds at a time, where agent.toml does not say
OLD_PLACES = ("storage", "work")  # of all apps together, in older versions
Images = Mapping[str, Build]
Blobs = Mapping[str, bytes]


class BuildJob:
    """An image that is to be built. images, blobs: App.images of its app, and Spec.blobs."""

    def __init__(self, name: str, images: Images, blobs: Blobs) -> None:
        self.name, self.images, self.blobs, self.build = name, images, blobs, images[name]
        self.app = name.partition("/")[0]
        self.built = built_name(name, self.build)
        self.what, self.subject = f"build 'images.{name}'", f"image {name}"

    @property
    def dockerfile(self) -> str:
        """Read the instructions."""
        return self.blobs.get(self.build.instructions, b"").decode(errors="replace")

    @property
    def uses(self) -> list[Use]:
        """List the images that it starts from and that are not built here."""
        return [use for use in images_in(self.dockerfile, self.build.args) if use.name not in self.build.bases]

    def of(self, name: str) -> BuildJob:
        """Find the job of another image of the same app."""
        return BuildJob(name, self.images, self.blobs)


class Builder:
    """Builds the images of one agent: one at a time for each app, and so many in all. Safe for several threads."""

    def __init__(
        self,
        store: ImageStore,
        host: Host,
        told: Callable[..., None],
        outside: Outside,
        builds: BuildSettings = DEFAULTS,
        begun: Callable[[str, str], None] = lambda name, step: None,
    ) -> None:
        """told: called as told(kind, subject, message). outside: what builds may have of the rest of the agent.
        begun: called with the image and each step of its build."""
        self.store, self.told, self.host, self.builds = store, told, host, builds
        self.outside, self._begun = outside, begun
        self.logs = host.root / "builds/logs"
        self.caches = host.root / "builds/apps"
        self._lock = threading.RLock()
        self._ended = threading.Condition(self._lock)
        self._buildahs: dict[str, Buildah] = {}
        self._pushing: dict[str, threading.Lock] = {}
        self._now: dict[str, Json] = {}
        self._broken: dict[str, Json] = {}
        self._closed = False

    def look(self) -> list[Json]:
        """List what is being built, and what could not be: {"image" (`images.APP/NAME`), "step", "began" (epoch
        seconds), "error" ("" while it is being built)} of each. A failure is listed until `forget`."""
        with self._lock:
            now = {**self._broken, **self._now}
        return [now[name] for name in sorted(now)]

    def forget(self, names: Iterable[str]) -> None:
        """Stop listing failures that are now failures of the app that the images are for."""
        with self._lock:
            for name in names:
                self._broken.pop(name, None)

    def buildah(self, app: str) -> Buildah:
        """Find or make the buildah of an app."""
        with self._lock:
            if app not in self._buildahs:
                self._buildahs[app] = Buildah(self.host, app, self.outside)
                if self._closed:
                    self._buildahs[app].close()
            return self._buildahs[app]

    def build(self, name: str, images: Images, blobs: Blobs) -> Image:
        """Find or build the image of a qualified name of App.images, and push it if it is to be pushed.

        What it is built from is built first. What came in a bundle is neither built nor pushed here. blobs:
        Spec.blobs. Blocks while another of its app is built. Raises WrongState (the build failed: the last line that
        says why), UnfitHost (no buildah, no emulator), TryAgain.
        """
        began = time.time()
        try:
            return self._build_or_find(BuildJob(name, images, blobs))
        except HoldfastError as error:
            with self._lock:
                self._broken[name] = {"image": f"images.{name}", "step": "", "began": began, "error": str(error)}
            raise

    def _build_or_find(self, job: BuildJob) -> Image:
        image = self.find(job.name, job.build)
        known = self.store.names().get(job.built)
        if image is not None and known is not None and known.source == "bundle":
            return self._named(image, job.build)
        check_platforms(job.name, job.build)
        image = self._named(image or self._made(job), job.build)
        if job.build.push:
            with self._lock:
                turn = self._pushing.setdefault(job.name, threading.Lock())
            with turn:  # of several apps that use it, the first pushes it
                self._push(job, image)
        return image

    def find(self, name: str, build: Build) -> Image | None:
        """Find the image that was built by this key."""
        with suppress(NotFound):
            return self.store.resolve(built_name(name, build))
        return None

    def missing(self, name: str, images: Images, blobs: Blobs) -> Iterator[tuple[Literal["build", "base"], str]]:
        """List what has to be built for an image, in order, each after the references that it starts from."""
        job = BuildJob(name, images, blobs)
        if self.find(name, job.build) is not None:
            return
        for base in job.build.bases.values():
            yield from self.missing(base, images, blobs)
        yield from (("base", use.name) for use in job.uses)
        yield "build", name

    def sweep(self) -> None:
        """Delete what builds of a killed agent left, and the caches of apps that have no built image any more.

        When the agent starts.
        """
        self.outside.sweep()
        for name in OLD_PLACES:
            with suppress(FileNotFoundError):
                remove_tree(self.host.root / "builds" / name)
        for name in ("lock", "open"):
            (self.host.root / "builds" / name).unlink(missing_ok=True)
        for app in self.apps():
            buildah = self.buildah(app)
            buildah.sweep()
            if not any(name.startswith(f"{PREFIX}{_component(app)}/") for name in self.store.names()):
                self.wipe(app)

    def apps(self) -> list[str]:
        """List the apps that have a cache."""
        with suppress(FileNotFoundError):
            return sorted(each.name for each in self.caches.iterdir() if each.is_dir())
        return []

    def wipe(self, app: str) -> bool:
        """Delete the cache of an app; False if one of its images is being built."""
        return self.buildah(app).remove()

    def close(self) -> None:
        """Kill what is being built; whoever waits for it gets Stopping."""
        with self._ended:
            self._closed = True
            for buildah in self._buildahs.values():
                buildah.close()
            self._ended.notify_all()

    def _made(self, job: BuildJob) -> Image:
        """Build an image after what it is built from, each with its app's buildah; never hold two locks."""
        ours = {
            written: self.find(base, job.images[base]) or self._made(job.of(base))
            for written, base in job.build.bases.items()
        }
        with self._failing(job):
            program = find("buildah")  # without it, nothing is built
            version = buildah_version(program) if program else None
            if program:
                check_mounts(job.dockerfile, version)
            bases = self._bases(job, ours)
            for written, base in bases.items() if program else ():
                check_mounts("\n".join(base.triggers), version, f"ONBUILD of '{written}'")
            with self.buildah(job.app).alone():
                if made := self.find(job.name, job.build):
                    return made
                if any(base.image and not self.store.has(base.image) for base in bases.values()):
                    bases = self._bases(job, ours)  # some were pruned while this waited
                return self._build(job, bases)

    def _bases(self, job: BuildJob, ours: Mapping[str, Image]) -> Bases:
        """Have what an image starts from in our store: as written → its name for buildah, and the image. ours: what
        was built here for it."""
        found = {written: Base(stored_name(image), image) for written, image in ours.items()}
        for use in job.uses:
            if use.name not in found:
                found[use.name] = found[use.written] = self._base(job, use)
        return found

    def _base(self, job: BuildJob, use: Use) -> Base:
        image = self.outside.image(use.name, job.build.pull)
        return Base(stored_name(image), image)

    def _build(self, job: BuildJob, bases: Bases) -> Image:
        """Build an image. Only when `alone`."""
        buildah = self.buildah(job.app)
        check_room(buildah.folder, 0, self.store.settings.min_free, job.what)
        for base in bases.values():
            self._take_in(buildah, base)
        with self._building(job) as log:
            began = time.monotonic()
            self.told("build", job.subject, f"building from {job.build.context or '.'} ({job.build.dockerfile})")
            folder = buildah.scratch()
            id = self._make(job, folder, bases, log)
            with self.store.keep():
                image = self._take(buildah, folder, id, job.built)
            seconds = time.monotonic() - began
            self.told("build", job.subject, f"built in {seconds:.1f} s: {image.digest}", digest=image.digest)
        buildah.prune(self._is_known, self.builds.cache // max(len(self.apps()), 1))
        return image

    @contextmanager
    def _building(self, job: BuildJob) -> Iterator[Log]:
        """Wait until fewer than the most allowed builds run, then open the log of one for the block; show its steps
        meanwhile, and tell of a failure at once. This is the last lock that a build takes."""

        def show(step: str) -> None:
            with self._lock:
                self._now[job.name] = {"image": f"images.{job.name}", "step": step, "began": began, "error": ""}
            if step:
                self._begun(job.name, step)

        with self._ended:
            self._ended.wait_for(lambda: self._closed or len(self._now) < self._most)
            if self._closed:
                raise Stopping("run 'buildah': the agent is stopping")
            began = time.time()
            show("")
        try:
            with Log(self.logs / f"{job.name}.log", show) as log, self._failing(job):
                yield log
        except HoldfastError as error:
            if not self._closed:
                self.told("failed", job.subject, str(error), output=list(log.last))
            raise
        finally:
            with self._ended:
                del self._now[job.name]
                self._ended.notify_all()

    @property
    def _most(self) -> int:
        return self.builds.concurrency or min(os.cpu_count() or 1, MOST)

    def _make(self, job: BuildJob, folder: Path, bases: Bases, log: Log, platform: str = "") -> str:
        """Have buildah build an image; returns its id in buildah's storage. platform: "" is this node's."""
        build = job.build
        goal = platform or next(iter(ours(build.platforms)), "")
        try:
            lay_out(build, job.blobs, folder)
        except KeyError as error:
            raise TryAgain(f"{job.what}: its context is of an older commit (commit once more)") from error
        (folder / "Dockerfile").write_text(keyed(job.dockerfile, build.args))
        give(folder)
        words = ["--file", str(folder / "Dockerfile"), "--pull=false", "--ignorefile", os.devnull]
        words += ["--iidfile", str(folder / "id"), "--tag", _tag_for(job.built, platform)]
        words += ["--platform", goal] if goal else []
        words += ["--layers=false"] if platform else []  # buildah takes another platform's layers for its own
        triggers = any(base.triggers for base in bases.values())
        words += ["--no-cache"] if build.no_cache or (triggers and build.args) else []
        words += ["--target", build.target] if build.target else []
        words += [word for key, value in build.labels.items() for word in ("--label", f"{key}={value}")]
        words += [f"--build-context={written}=container-image://{base.name}" for written, base in bases.items()]
        names = {base.name: written for written, base in reversed(list(bases.items()))}
        pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")

        def plain(line: str) -> str:
            return pattern.sub(lambda name: names[name[0]], line)

        try:
            words.append(str(folder / "context"))
            self.buildah(job.app).build(words, build.args, build.network, lambda line: log.hear(plain(line)))
        except Failed as error:
            error.output, error.errors = [[plain(line) for line in said] for said in (error.output, error.errors)]
            raise
        return read_plain(folder, "id").decode().strip().removeprefix("sha256:")

    def _take_in(self, buildah: Buildah, base: Base) -> None:
        """Copy an image of our store into buildah's. Only when `alone`."""
        if base.image is not None and base.name not in buildah.names():
            layout = buildah.scratch() / "layout"
            with self.store.keep():
                write_layout(self.store, base.image, layout)
            complete_history(layout)
            buildah.take_in(layout, base.name)

    def _take(self, buildah: Buildah, folder: Path, id: str, name: str) -> Image:
        """Copy an image from buildah's storage into ours; of its layers, those that are not here yet."""
        path = folder / "layout"
        for diff_id in buildah.config(id)["rootfs"]["diff_ids"]:
            if self.store.layers.has(diff_id):  # a file of holes stands for it: skopeo takes it for the layer
                place = path / oci.member_of(diff_id)
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as holes:
                    holes.truncate(self.store.layers.facts(diff_id).size)
        buildah.take_out(id, path)
        layout = oci.Folder(path)
        manifest, config, layers = layout.image(layout.index()["manifests"][0]["digest"])
        for layer, diff_id in zip(layers, json.loads(config)["rootfs"]["diff_ids"], strict=True):
            if not self.store.layers.has(diff_id):
                with layout.open(oci.member_of(layer["digest"])) as file:
                    self.store.layers.add(file, Expected(diff_id, layer["digest"], layer["size"]))
        return self.store.add_image(manifest, config, [name], source="build")

    def _named(self, image: Image, build: Build) -> Image:
        """Give an image the names of its tags."""
        known = self.store.names()
        for tag in build.tags:
            there = known.get(parse(tag).name)
            if there is None or there.digest != image.digest:
                image = self.store.tag(image.digest, tag)
        return image

    def _push(self, job: BuildJob, image: Image) -> None:
        """Push the image to its tags, unless that was done. What fails is tried again, alone."""
        build, note = job.build, self.logs / f"{job.name}.pushed"
        mark = f"{image.digest} {','.join(build.platforms)}"
        done: dict[str, str] = {}
        with suppress(FileNotFoundError, ValueError):
            done = json.loads(note.read_bytes())
        left = [tag for tag in build.tags if done.get(tag) != mark]
        others = foreign(build.platforms)
        if left and others:
            with self._failing(job), self.buildah(job.app).alone():
                self._push_index(job, others, left)
        for tag in left:
            if not others:
                push(self.store, self.outside.puller.skopeo, image, tag, self.outside.puller.told)
            done[tag] = mark
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps({each: done[each] for each in build.tags if each in done}))

    def _push_index(self, job: BuildJob, others: list[str], tags: list[str]) -> None:
        """Build for the other platforms, and push all as one index. Only when `alone`."""
        buildah = self.buildah(job.app)
        self._take_in(buildah, Base(job.built, self.store.resolve(job.built)))
        with self._building(job) as log:
            ids = [buildah.names()[job.built]]
            for platform in others:
                built = buildah.names().get(_tag_for(job.built, platform))
                if built is None:
                    check_room(buildah.folder, 0, self.store.settings.min_free, job.what)
                    self.told("build", job.subject, f"building for {platform}")
                    bases = self._bases_for(job, platform)
                    built = self._make(job, buildah.scratch(), bases, log, platform)
                ids.append(built)
            layout = buildah.scratch() / "index"
            buildah.take_index(f"{job.built}-index", ids, layout)
            for tag in tags:
                push_index(self.outside.puller.skopeo, layout, tag)
                self.told("pushed", tag, f"{job.built} is there for {', '.join(job.build.platforms)}")

    def _bases_for(self, job: BuildJob, platform: str) -> Bases:
        """What the image starts from for another platform, in buildah's storage; stages of --platform=$BUILDPLATFORM
        start from this node's own."""
        found: dict[str, Base] = {}
        buildah = self.buildah(job.app)
        for use in job.uses:
            if use.name in found:
                continue
            if use.platform == "$BUILDPLATFORM":
                base = self._base(job, use)
                self._take_in(buildah, base)
            else:
                base = Base(f"{STORED}{sha256(f'{use.name} {platform}'.encode()).hexdigest()}")
                layout = buildah.scratch() / "layout"
                self.outside.puller.fetch_for(use.name, platform, layout)
                buildah.take_in(layout, base.name, "image")
            found[use.name] = found[use.written] = base
        return found

    @contextmanager
    def _failing(self, job: BuildJob) -> Iterator[None]:
        """Make each error of the block one line that names the image, with the time until the next try."""
        try:
            yield
        except Failed as error:
            raise failed(job.name, error, self.logs / f"{job.name}.log") from error
        except OSError as error:
            cause = (error.strerror or str(error)).lower()
            raise failure(UnfitHost, f"{job.what}: {cause}{hint_of(cause)}", RETRY) from error
        except HoldfastError as error:
            if not str(error).startswith("build 'images."):
                error.args = (f"{job.what}: {error}",)
            error.wait = max(error.wait, RETRY)
            raise

    def _is_known(self, name: str) -> bool:
        """Check whether a name of buildah's storage is of use: its image must still be in the store."""
        if name.startswith(STORED):
            return f"sha256:{name.removeprefix(STORED)}" in self.store.digests()
        end = name.rfind(":") + 17  # behind it stands for which platform it was built
        return not name.startswith(PREFIX) or name[:end] in self.store.names()


@dataclass(frozen=True, slots=True)
class Base:
    """An image that another starts from. name: in buildah's storage. image: in our store; None: it is not there."""

    name: str
    image: Image | None = None

    @property
    def triggers(self) -> list[str]:
        """Read what it adds to each Dockerfile that begins with it (ONBUILD)."""
        found = self.image.config.get("OnBuild") if self.image else None
        return [str(each) for each in found] if isinstance(found, list) else []


Bases = Mapping[str, Base]
PREFIX = "localhost/images/"
STORED = "localhost/stored:"  # in buildah's storage: and the digest of what our store has


def stored_name(image: Image) -> str:
    """Name an image of our store in buildah's storage."""
    return f"{STORED}{image.digest.removeprefix('sha256:')}"


def built_name(name: str, build: Build) -> str:
    """Name what was built in the store: localhost/images/APP/NAME:KEY."""
    return f"{PREFIX}{'/'.join(map(_component, name.split('/')))}:{build.key[:16]}"


def _component(text: str) -> str:
    """Make text fit a reference; the key tells apart what becomes the same by that."""
    return re.sub(r"[._-]{2,}", "-", text).strip("._-")


def _tag_for(name: str, platform: str) -> str:
    """Name what is built for another platform, which is in buildah's storage only."""
    return f"{name}-{platform.replace('/', '-')}" if platform else name


def ours(platforms: Sequence[str]) -> list[str]:
    """Find those of the platforms that are this node's."""
    return [platform for platform in platforms if platform.split("/")[1] == architecture()]


def foreign(platforms: Sequence[str]) -> list[str]:
    """Find those of the platforms that are not this node's."""
    return [platform for platform in platforms if platform not in ours(platforms)]


def check_platforms(name: str, build: Build) -> None:
    """Raise WrongState for an image that is not for this node, UnfitHost for one that can't be built here."""
    own, others, what = architecture(), foreign(build.platforms), f"build 'images.{name}'"
    if build.platforms and not ours(build.platforms):
        said = ", ".join(build.platforms)
        raise WrongState(f"{what}: its platforms are {said} (expected linux/{own}, this node's, too)")
    if not build.push:
        return  # the others would lead nowhere
    for platform in others:
        machine = platform.split("/")[1]
        emulator = f"qemu-{QEMU.get(machine, machine)}"
        if machine not in NATIVE.get(own, ()) and not (BINFMT / emulator).exists():
            told = f"no {emulator} in {BINFMT} (expected the package qemu-user-static)"
            raise UnfitHost(f"{what}: {platform} can't be run here: {told}")
    if others and build.bases:
        raise WrongState(
            f"{what}: starts from 'images.{next(iter(build.bases.values()))}', which is built for this node alone "
            "(expected an image of a registry for several platforms)"
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


def complete_history(path: Path) -> None:
    """Add a history step for each layer of a layout's image that has none; buildah refuses it otherwise."""
    layout = oci.Folder(path)
    (entry,) = layout.index()["manifests"]
    manifest, config, layers = layout.image(entry["digest"])
    document = json.loads(config)
    whole = whole_history(document.get("history") or [], len(layers))
    if whole != document.get("history"):
        out = oci.LayoutWriter(oci.FolderWriter(path))
        described = out.add(oci.dump({**document, "history": whole}), oci.CONFIG)
        changed = out.add(oci.dump({**json.loads(manifest), "config": described}), oci.MANIFEST)
        out.finish([{**entry, **changed}])
