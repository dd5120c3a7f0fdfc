"""A Debian to build on: debootstrap's, without what images of Debian leave out as well.

It is made once for all working copies and kept, because making it takes a minute and Debian's archive.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from ground import patient
from holdfast.files import discard_tree

SUITE = "bookworm"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast-tests/debian"
LEFT_OUT = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "var/cache/apt",
    "var/lib/apt/lists",
)


def debian_tar() -> Path:
    """The tar of a minimal Debian. Raises LookupError where it is not here and can't be made."""
    CACHE.mkdir(parents=True, exist_ok=True)
    tar = CACHE / f"{SUITE}.tar"
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tar.exists():
            _make(tar)
    return tar


def _make(tar: Path) -> None:
    folder, fresh = CACHE / "rootfs", tar.with_suffix(".new")
    discard_tree(folder)
    program = shutil.which("debootstrap")
    if program is None:
        raise LookupError("debootstrap is not installed")
    try:
        done = subprocess.run(
            # In a mount namespace of its own: it mounts /proc, which would stay, and be swept, when it is killed.
            ["unshare", "--mount", program, "--variant=minbase", SUITE, str(folder), MIRROR],
            capture_output=True, text=True, check=False, timeout=patient(240), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode != 0:
            raise LookupError(f"debootstrap failed: {(done.stdout + done.stderr).strip().splitlines()[-1:]}")
        for name in LEFT_OUT:
            discard_tree(folder / name)
        words = [
            "tar",
            "--create",
            "--file",
            str(fresh),
            "--numeric-owner",
            "--xattrs",
            "--directory",
            str(folder),
            ".",
        ]
        subprocess.run(words, check=True, capture_output=True)
        fresh.replace(tar)
    finally:
        discard_tree(folder)
