"""The images that pulling is measured with, made once from what Debian has installed on this host, and kept.

A layer is what some packages of this host consist of, as `apt-get install` in a Dockerfile would have made it: real
binaries, libraries, documentation and links, 20 KB a file on average. Everything lies in OCI layouts; `images` pushes
them to a registry.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contestant import quiet

RECIPE = "2"  # another one makes everything anew
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
PLAN = (150, 130, 90, 60, 45, 25, 12)  # MB of files in each layer: a base, what was installed on it, the app
LAST = 12  # MB: the layer that the second image has instead
BIGGEST = 36  # MB: packages above are few huge programs (kubectl, llvm), unlike a usual image
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "riscv64": "riscv64", "i686": "386"}


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer in a layout. size, plain: bytes, compressed and as a tar."""

    digest: str
    size: int
    diff_id: str
    plain: int
    files: int


class Layout:
    """An OCI image layout in a folder (image-layout.md), filled by and by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = folder / "blobs/sha256"
        self.blobs.mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.manifests: list[dict[str, Any]] = []

    def add_image(self, tag: str, layers: Sequence[Layer], command: Sequence[str] = ()) -> None:
        config = {
            "architecture": ARCHITECTURES[os.uname().machine],
            "os": "linux",
            "config": {"Cmd": [*command]} if command else {},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self._add(CONFIG, config),
            "layers": [{"mediaType": LAYER, "digest": layer.digest, "size": layer.size} for layer in layers],
        }
        entry = {**self._add(MANIFEST, manifest), "annotations": {"org.opencontainers.image.ref.name": tag}}
        self.manifests.append(entry)
        index = {"schemaVersion": 2, "manifests": self.manifests}
        (self.folder / "index.json").write_text(json.dumps(index))

    def _add(self, kind: str, document: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(document).encode()
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}


def real_images(cache: Path) -> tuple[Path, list[Layer], Layer]:
    """The layout with the images `first` and `second`, the layers of the first, and the one that second has instead
    of the last of these; made now (a minute), unless the cache has it."""
    folder, noted = cache / "layout", cache / "layers.json"
    if not noted.exists() or (known := json.loads(noted.read_text()))["recipe"] != RECIPE:
        shutil.rmtree(cache, ignore_errors=True)
        layout = Layout(folder)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            *layers, other = pool.map(pack_files, (layout.blobs for _ in range(99)), plan_layers((*PLAN, LAST)))
        layout.add_image("first", layers)
        layout.add_image("second", [*layers[:-1], other])
        known = {"recipe": RECIPE, "layers": [asdict(layer) for layer in (*layers, other)]}
        noted.write_text(json.dumps(known))
    *layers, other = (Layer(**fields) for fields in known["layers"])
    return folder, layers, other


def stacks(folder: Path, root: Path, heights: Sequence[int]) -> None:
    """A layout with an image for each height, its number for a tag: a root file system (tar) below small layers."""
    layout = Layout(folder)
    for number, height in enumerate(heights):
        layers = [pack_small(layout.blobs, f"{number}-{level}") for level in range(1, height)]
        layout.add_image(str(number), [pack_small(layout.blobs, f"{number}-0", root), *layers])


def plan_layers(sizes: Iterable[int]) -> list[list[str]]:
    """The paths of each layer: packages of Debian's own, the required ones first, until it has its size (MB)."""
    form = "${Priority}\t${Package}\t${Installed-Size}\t${db:Status-Status}\t${Maintainer}\n"
    packages = []
    for line in quiet("dpkg-query", "--show", f"--showformat={form}").splitlines():
        priority, name, kilobytes, status, maintainer = line.split("\t")
        if status == "installed" and int(kilobytes or 0) < BIGGEST * 1000 and "debian" in maintainer:
            packages.append((priority not in ("required", "important"), name))
    todo = iter(sorted(set(packages)))
    layers, taken = [], set[str]()
    for size in sizes:
        paths: list[str] = []
        left = size * 1_000_000
        while left > 0 and (package := next(todo, None)):
            for path in quiet("dpkg-query", "--listfiles", package[1]).splitlines():
                if not path.startswith("/") or path == "/." or not os.path.lexists(path):
                    continue
                real = str(Path(path).parent.resolve() / Path(path).name)  # /bin leads to /usr/bin
                folder = stat.S_ISDIR((entry := os.lstat(real)).st_mode)
                if folder or real not in taken:
                    paths.append(real)
                    left -= 0 if folder else entry.st_size
        taken.update(paths)
        layers.append(sorted(set(paths)))
    return layers


def pack_files(blobs: Path, paths: Sequence[str]) -> Layer:
    """Compress the files at these paths of the host into a layer, the way that Docker writes one (gzip, level 6)."""
    with _Packing(blobs) as packing:
        for path in paths:
            member = packing.tar.gettarinfo(path, arcname=path.lstrip("/"))
            if member is None:
                continue  # a socket
            member.mtime = int(member.mtime)
            if member.isreg():
                with Path(path).open("rb") as content:
                    packing.tar.addfile(member, content)
            else:
                packing.tar.addfile(member)
    return packing.layer(len(paths))


def pack_small(blobs: Path, text: str, root: Path | None = None) -> Layer:
    """A layer of a few files that no other one holds, after the entries of a tar if there is one."""
    with _Packing(blobs) as packing:
        if root is not None:
            with tarfile.open(root) as tar:
                for entry in tar:
                    packing.tar.addfile(entry, tar.extractfile(entry) if entry.isreg() else None)
        for number in range(20):
            entry = tarfile.TarInfo(f"data/{text}/{number}")
            entry.size = len(text)
            packing.tar.addfile(entry, io.BytesIO(text.encode()))
    return packing.layer(20)


class _Packing:
    """A tar that is hashed, compressed and hashed again while it is written."""

    def __init__(self, blobs: Path) -> None:
        self.blobs = blobs
        self.target = blobs / f".{os.getpid()}"
        self.plain, self.packed = hashlib.sha256(), hashlib.sha256()
        self.size = self.compressed = 0

    def __enter__(self) -> _Packing:
        self.file = self.target.open("wb")
        self.deflate = zlib.compressobj(6, wbits=31)
        self.tar = tarfile.open(mode="w|", fileobj=self, format=tarfile.PAX_FORMAT, bufsize=1 << 20)  # type: ignore[call-overload] # which only writes
        return self

    def __exit__(self, *_: object) -> None:
        self.tar.close()
        self._put(self.deflate.flush())
        self.file.close()

    def write(self, data: bytes) -> int:
        self.plain.update(data)
        self.size += len(data)
        self._put(self.deflate.compress(data))
        return len(data)

    def layer(self, files: int) -> Layer:
        self.target.rename(self.blobs / self.packed.hexdigest())
        digests = (f"sha256:{each.hexdigest()}" for each in (self.packed, self.plain))
        return Layer(next(digests), self.compressed, next(digests), self.size, files)

    def _put(self, data: bytes) -> None:
        self.packed.update(data)
        self.compressed += len(data)
        self.file.write(data)


def push(layout: Path, tag: str, reference: str) -> None:
    """Copy an image of a layout to a registry without TLS."""
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:{tag}", f"docker://{reference}"],
        stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip
