"""A Debian to build on: debootstrap's, made once and kept, for it takes a minute and Debian's archive."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from ground import patient

SUITE = "bookworm"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
CACHE = Path(__file__).parents[2] / ".pytest_cache/debian"


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
    shutil.rmtree(folder, ignore_errors=True)
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
        # What it downloaded is of no more use.
        shutil.rmtree(folder / "var/cache/apt/archives", ignore_errors=True)
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
        shutil.rmtree(folder, ignore_errors=True)
