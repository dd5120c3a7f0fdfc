#!/usr/bin/env python3
"""Make a tar of a small root file system from Debian's busybox-static: an image without a registry.

    examples/busybox_image.py busybox.tar && holdfast image import busybox.tar busybox:1

Also used by the demo, the tests and the bench. Needs no privilege: owners and modes are written into the tar.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

FOLDERS = {
    "bin": 0o755,
    "dev": 0o755,
    "etc": 0o755,
    "proc": 0o555,
    "sys": 0o555,
    "root": 0o700,
    "tmp": 0o1777,
    "var": 0o755,
}
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
}


def write_busybox_tar(target: Path) -> None:
    """Write the tar. The same busybox gives the same bytes. Raises SystemExit if busybox-static is missing."""
    busybox = shutil.which("busybox", path="/usr/bin:/bin")
    if busybox is None:
        raise SystemExit("busybox_image: no busybox (apt-get install busybox-static)")
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    with tarfile.open(target, "w") as tar:
        for name, mode in FOLDERS.items():
            _add(tar, name, mode, kind=tarfile.DIRTYPE)
        for name, text in FILES.items():
            _add(tar, name, 0o644, content=text.encode())
        _add(tar, "bin/busybox", 0o755, content=Path(busybox).read_bytes())
        for applet in sorted({*applets} - {"busybox"}):
            _add(tar, f"bin/{applet}", 0o777, kind=tarfile.SYMTYPE, link="busybox")


def unpack_tar(tar: Path, folder: Path) -> None:
    """Unpack a trusted tar with its owners and modes. Works with every Python 3.11, also without filters."""
    with tarfile.open(tar) as archive:
        archive.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
        archive.extractall(folder)


def _add(
    tar: tarfile.TarFile, name: str, mode: int, *, kind: bytes = tarfile.REGTYPE, content: bytes = b"", link: str = ""
) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.size, entry.linkname = kind, mode, len(content), link
    tar.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: busybox_image.py FILE.tar")
    write_busybox_tar(Path(sys.argv[1]))
