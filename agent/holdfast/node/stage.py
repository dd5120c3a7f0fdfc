"""StageGeneration: try everything that can fail before anything that runs is touched.

Images are resolved to digests, mounted files are stored, and every driver and policy, the user names, the entry
points and the ports are checked. All that is wrong is said at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from holdfast import kinds
from holdfast.drivers import EndpointWant
from holdfast.errors import NotFound, Stopping, TryAgain, UnfitHost
from holdfast.files import open_source
from holdfast.grammar.images import archive_path, built
from holdfast.images.formats.references import parse
from holdfast.images.kept.lookup import Content, View
from holdfast.node.context import BARE, ROOTFS, Base, Context, network_of, volume_of
from holdfast.node.inside import check_devices, check_working_dir, content_of_mount, look, mount_all
from holdfast.node.volumes import declared_volumes
from holdfast.node.wants import (
    cgroup_settings,
    endpoint_wants,
    mount_want,
    network_want,
    oci_request,
    rootfs_driver,
    rootfs_want,
    user_of,
    volume_want,
)
from holdfast.observed import Generation, Instance, InstanceId, Json, Receipt
from holdfast.plan.actions import StageGeneration
from holdfast.plan.diff import folder_files
from holdfast.runtime.binaries import foreign_formats
from holdfast.runtime.executables import check_size, find_executable
from holdfast.runtime.oci import (
    command_line,
    environment,
    oci_config,
    ordered_mounts,
    signal_number,
    stop_signal,
    working_dir,
)
from holdfast.runtime.ports import check_free
from holdfast.runtime.sysctls import try_sysctls
from holdfast.spec.model import App, Container, Mount, digest_of_file
from holdfast.store import Store

MOST = 16  # images of one app that are asked for at once
EAGERNESS = ("never", "missing", "newer", "always")  # of Container.pull


def stage_generation(context: Context, action: StageGeneration) -> Json:
    """Make a generation of an app. Raises an ExceptionGroup of everything that is wrong; then nothing is kept."""
    app, blobs = action.spec, action.files
    _store_files(context, app, blobs)
    checks = _Checks()
    with _told_at_once(context, app):
        made = build_images(context, app, blobs, checks)  # which may take an hour: prune works meanwhile
        return _stage(context, action, made, checks)


@contextmanager
def _told_at_once(context: Context, app: App) -> Iterator[None]:
    """Let the builder report images of the app that fail to build, until the app's own failure reports them."""
    try:
        yield
    finally:
        context.builder.forget(app.images)


def _stage(
    context: Context,
    action: StageGeneration,
    made: dict[str, str],
    checks: _Checks,
) -> Json:
    """Fetch what the app needs besides the images that were built, check it, and write the generation down."""
    app = action.spec
    with context.images.keep():  # what is fetched here counts as used by nobody until the generation is written down
        images = {name: _still_here(context, name, digest) for name, digest in made.items()}
        images |= fetch_images(context, app, action.images, checks)
        volumes = declared_volumes(context, app, images)
        known = context.store.history().generations.get(app.name, ())
        earlier = known[-1] if known and _around(known[-1].app) == _around(app) else None
        for name in images:
            if earlier and _is_as_in(earlier, app, name, images[name], volumes.get(name, ())):
                continue
            with checks.of(f"{app.name}/{name}"):
                _check_container(context, app, name, images[name], volumes.get(name, ()), checks)
        _check_unused_volumes(context, app, checks)
        for network in sorted({net for want in app.containers.values() for net in want.networks} - BARE):
            with checks.of(f"network {network}"):
                _check_network(context, app, network)
        checks.report(f"stage '{app.name}'")
        number = known[-1].number + 1 if known else 1
        context.store.put_generation(
            Generation(
                app=app,
                number=number,
                state="staged",
                revision=action.revision,
                images=images,
                newer=action.images,
                image_volumes=volumes,
                staged_at=time.time(),
            )
        )
    _store_files(context, app, action.files)  # once more: whoever pruned meanwhile did not know of this generation
    return {"generation": number, "images": images}


@dataclass
class _Checks:
    """Collect failures, so that all of them are reported together.

    views: what containers without mounts of their own find, by image and what the runtime mounts: it is read only.
    """

    failures: list[Exception] = field(default_factory=list)
    views: dict[tuple[str, tuple[str, ...]], View] = field(default_factory=dict)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a driver's bug, too: it is reported with the rest
            error.add_note(what)
            self.failures.append(error)

    def report(self, what: str) -> None:
        if self.failures:
            raise ExceptionGroup(what, self.failures)


def _store_files(context: Context, app: App, blobs: Mapping[str, bytes]) -> None:
    for path, digest in app.files.items():
        if digest in blobs:
            content = blobs[digest]
            context.content.store_file(content, executable=digest != digest_of_file(content))
        else:  # staged from an older generation: it must be there already
            try:
                context.content.path(digest)
            except NotFound as error:
                raise TryAgain(f"store '{path}': {error}") from error
    for want in app.containers.values():
        for mount in want.mounts:
            if mount.kind == "file" and mount.source not in app.files:
                context.content.store_tree(folder_files(app, mount))


def build_images(context: Context, app: App, blobs: Mapping[str, bytes], checks: _Checks) -> dict[str, str]:
    """Build images; return container → digest of its image. What the app only pushes is built, too.

    What can't be built, or pushed, is a failure, and its containers are left out.
    """
    users: dict[str, list[str]] = {
        image: [] for image, build in app.images.items() if build.push and image.startswith(f"{app.name}/")
    }
    for name, want in app.containers.items():
        if (image := built(want.image or "")) is not None:
            users.setdefault(image, []).append(name)
    images: dict[str, str] = {}
    for image, names in sorted(users.items()):
        with checks.of(""):  # what is raised names the image
            images.update(dict.fromkeys(names, context.builder.build(image, app.images, blobs).digest))
    return images


def _still_here(context: Context, container: str, digest: str) -> str:
    """Return the digest. Raises TryAgain if the image was removed since it was built."""
    try:
        return context.images.get(digest).digest
    except NotFound as error:
        raise TryAgain(f"the image of '{container}' was built, and removed meanwhile") from error


def fetch_images(context: Context, app: App, newer: Mapping[str, str], checks: _Checks) -> dict[str, str]:
    """Fetch images, several at a time; return container → digest of its image.

    newer: container → what its registry is known to have by now.
    """
    wanted: dict[str, list[str]] = {}
    for name, want in app.containers.items():
        if built(want.image or "") is None:
            wanted.setdefault(newer.get(name) or want.image or f"{ROOTFS}{want.rootfs}", []).append(name)
    images: dict[str, str] = {}

    def fetch(names: list[str]) -> None:
        """One reference is one digest in the whole app: it is asked for as the most eager of its containers says."""
        with checks.of(f"{app.name}/{', '.join(names)}"):
            eager = max((app.containers[name] for name in names), key=lambda want: EAGERNESS.index(want.pull))
            digest = resolve_image(context, eager, newer.get(names[0], ""))
            images.update(dict.fromkeys(names, digest))

    with ThreadPoolExecutor(min(max(len(wanted), 1), MOST), "image") as threads:
        list(threads.map(fetch, wanted.values()))
    return {name: images[name] for name in app.containers if name in images}


def resolve_image(context: Context, want: Container, newer: str = "") -> str:
    """Return the digest of what a container is to run, and fetch it where its `pull` says so.

    newer: the reference to run instead of the committed one. Raises TryAgain, NotFound, WrongState as `Puller.pull`.
    """
    if want.rootfs is not None:
        if not Path(want.rootfs).is_dir():
            raise TryAgain(f"rootfs '{want.rootfs}': is not a directory of this host")
        return f"{ROOTFS}{want.rootfs}"
    reference = newer or want.image or ""
    if archive_path(reference):
        return _from_archive(context, reference)
    here = _here(context, reference)
    known = context.images.names().get(parse(reference).name)
    # A bundle is there for want of a registry, and what a digest pins can't be newer anywhere.
    settled = here is not None and bool(parse(reference).digest or (known and known.source == "bundle"))
    match "never" if context.images.settings.offline or settled else "missing" if newer else want.pull:
        case "never" if here is None:
            why = "pull is never" if want.pull == "never" else "this node is offline"
            raise TryAgain(f"image '{reference}': is not here, and {why} (expected it to be loaded or imported)")
        case "never" | "missing" if here is not None:
            return here
        case "newer" if here is not None:
            return _newer(context, reference, here)
        case _ if newer:
            return _pull_newer(context, newer)
        case _:
            return context.puller.pull(reference).digest


def _pull_newer(context: Context, newer: str) -> str:
    """Fetch what was found to be newer: by its tag while that still leads there, else by its digest."""
    name, _, digest = newer.partition("@")
    remote = context.puller.resolve(name)
    if remote.digest != digest:  # the tag has moved on meanwhile: the next question finds that
        return context.puller.pull(newer).digest
    return context.puller.pull(name, remote).digest


def _here(context: Context, reference: str) -> str | None:
    try:
        return context.images.resolve(reference).digest
    except NotFound:
        return None


def _newer(context: Context, reference: str, here: str) -> str:
    """Fetch what the registry has. While it can't be reached, use what is here."""
    try:
        return context.puller.pull(reference, needed=False).digest
    except Stopping:
        raise
    except (TryAgain, UnfitHost, NotFound) as error:  # what is damaged or not to be trusted is another matter
        message = f'{error}; what is here will do (pull = "newer")'
        context.store.event("pull", reference, message, digest=here, app="", container="")
        return here


def _from_archive(context: Context, reference: str) -> str:
    """Load the image of an archive of this host. It is read each time, because it may have changed."""
    path = archive_path(reference) or ""
    try:
        handle = open_source(path, context.bind_roots)
    except FileNotFoundError as error:
        raise TryAgain(f"load '{path}': no such file or directory") from error
    try:
        return context.puller.load(reference, handle).digest
    except NotFound as error:
        raise TryAgain(str(error)) from error
    finally:
        os.close(handle)


def _around(app: App) -> tuple[object, ...]:
    """What of an app concerns the checks of all its containers."""
    return app.depends_on, app.volumes, app.networks


def _is_as_in(earlier: Generation, app: App, name: str, image: str, volumes: tuple[Mount, ...]) -> bool:
    """Whether a container is the same as in an earlier generation, whose staging has checked it."""
    then, want = earlier.app, app.containers[name]
    if (then.containers.get(name), earlier.images.get(name)) != (want, image):
        return False
    return (earlier.image_volumes or {}).get(name, ()) == volumes and all(
        then.files.get(mount.source) == app.files.get(mount.source)
        and folder_files(then, mount) == folder_files(app, mount)
        for mount in want.mounts
        if mount.kind == "file"
    )


def _check_container(
    context: Context, app: App, name: str, image: str, volumes: tuple[Mount, ...], checks: _Checks
) -> None:
    want, base, what = app.containers[name], context.base(image), f"{app.name}/{name}"
    standing = [each for each in list(context.store.instances.values()) if each.key == what]
    stand_in = Instance(
        id=InstanceId("check"),
        app=app.name,
        container=name,
        generation=0,
        want=want,
        image=image,
        slot=standing[-1].slot if standing else 1,
    )
    rootfs_driver(context, stand_in.id).check(rootfs_want(stand_in, base.layers))
    contents: dict[str, Content] = {}
    for mount in (*want.mounts, *volumes):
        with checks.of(what):
            stored = _check_mount(context, app, stand_in, mount)
            contents[mount.target] = content_of_mount(context, base, mount, stored)
    with checks.of(what):
        check_free(want.ports)
    with checks.of(what):
        _check_endpoints(context, app, stand_in)
    _check_inside(context, app, stand_in, base, contents, checks)


def _check_endpoints(context: Context, app: App, stand_in: Instance) -> None:
    """Let drivers check the attachments to networks that exist and stay as they are."""
    for network, want in endpoint_wants(context, stand_in, context.host.netns(stand_in.id)):
        if want is None:
            continue
        if network in BARE or want.network.data.get("want") == network_of(context, network, app).digest:
            asked = replace(want, predecessor=predecessor(context.store, app, want))
            context.plugins.driver(kinds.ENDPOINT, want.network.driver).check(asked)


def predecessor(store: Store, app: App, want: EndpointWant) -> Receipt | None:
    """Find the endpoint that will be gone when this one is made.

    That is the one that has the wanted address and is given up by another container of the app, or else the
    container's own.
    """
    own = None
    for each in list(store.instances.values()):
        made = store.receipt("endpoint", f"{each.id}/{want.network.id}") if each.app == app.name else None
        if made is None:
            continue
        if each.container == want.container:
            own = made
        elif want.ipv4_address and made.data.get("address") == want.ipv4_address:
            then = app.containers.get(each.container)
            later = then.networks.get(want.network.id) if then else None
            if later is None or later.ipv4_address != want.ipv4_address:
                return made
    return own


def _check_mount(context: Context, app: App, stand_in: Instance, mount: Mount) -> Path | None:
    """Have the driver check a mount; return where the content of a file of the revision is stored."""
    if mount.kind == "volume":
        spec = volume_of(context, app, mount.source)
        context.plugins.check_volume(spec.driver, volume_want(mount.source, spec))
        return None
    want = mount_want(context, stand_in, app, mount)
    context.plugins.driver(kinds.MOUNT, mount.kind).check(want)
    return want.content


def _check_inside(
    context: Context, app: App, stand_in: Instance, base: Base, contents: Mapping[str, Content], checks: _Checks
) -> None:
    """Check what the runtime will do inside the container. contents: target → what is mounted there."""
    want, what = stand_in.want, stand_in.key
    own, theirs = Path("/"), tuple({"destination": target} for target in contents)
    request = replace(
        oci_request(context, stand_in, base, cgroup_settings(context, stand_in)),
        hosts=own, resolv_conf=own, hostname_file=own, mounts=theirs,
    )  # fmt: skip
    mounts = ordered_mounts(request)
    alike = stand_in.image, tuple(str(mount["destination"]) for mount in mounts)
    view = checks.views.get(alike) if not contents else None
    if view is None:
        view, before = View(base.layers), len(checks.failures)
        for error in mount_all(view, mounts, contents, context.runtime.binary.name):
            with checks.of(what):
                raise error
        if not contents and len(checks.failures) == before:
            checks.views[alike] = view
    with checks.of(what):
        made = oci_config(replace(request, user=user_of(want, base, view)))
        context.plugins.adjust_oci_config(app.name, stand_in.container, made.config, want.labels)
    with checks.of(what):
        signal_number(stop_signal(want, base.config))
    with checks.of(what):
        check_devices(view, request.devices)
    with checks.of(what):
        try_sysctls(want.sysctls)
    with checks.of(what):
        _check_program(app, want, base, view)


def _check_program(app: App, want: Container, base: Base, view: View) -> None:
    """Find what is to be executed, and where, unless something that runs before may put it there."""
    cwd, words = working_dir(want, base.config), command_line(want, base.config)
    check_working_dir(view, cwd)
    variables = environment(want, base.config, "")
    check_size(words, variables)
    waits = bool(want.depends_on or app.depends_on)
    at = partial(look, view, waits)
    find_executable(words[0], variables.get("PATH", ""), cwd, at, any_format=want.init or foreign_formats())


def _check_unused_volumes(context: Context, app: App, checks: _Checks) -> None:
    """Let drivers check the app's volumes that none of its containers mounts."""
    mounted = {mount.source for want in app.containers.values() for mount in want.mounts}
    for name, spec in app.volumes.items():
        if (volume := f"{app.name}/{name}") not in mounted:
            with checks.of(f"volume {volume}"):
                context.plugins.check_volume(spec.driver, volume_want(volume, spec))


def _check_network(context: Context, app: App, network: str) -> None:
    """Let the driver check a network that is new or has changed."""
    spec, standing = network_of(context, network, app), context.store.receipt("network", network)
    joining = sum(network in want.networks for want in app.containers.values())
    if standing is None or standing.data.get("want") != spec.digest:
        context.plugins.driver(kinds.NETWORK, spec.driver).check(network_want(network, spec, joining))
