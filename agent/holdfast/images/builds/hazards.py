"""Refuse what no build needs, and what the installed version of buildah is known not to do safely.

The fence holds in any case (`fence`). Sources: the advisories CVE-2024-1753 (a source of a mount that is a link),
CVE-2024-9407 (bind-propagation), CVE-2024-9675 (the id of a cache), CVE-2024-11218 (mounts that are raced).
"""

from __future__ import annotations

import re
import subprocess
from functools import lru_cache
from pathlib import Path

from holdfast.errors import WrongState
from holdfast.spec.dockerfile import RunMount, mounts_in

Version = tuple[int, int, int]
SAFE: Version = (1, 38, 1)
MENDED = {(1, 33): 12, (1, 35): 6, (1, 37): 6}  # older branches → the release that has the same repairs
KNOWN = "CVE-2024-1753, CVE-2024-9407, CVE-2024-9675, CVE-2024-11218"


def is_safe(version: Version | None) -> bool:
    """Check whether a buildah has the known security fixes; None, an unknown version, counts as without."""
    if version is None:
        return False
    return version >= SAFE or version[2] >= MENDED.get(version[:2], version[2] + 1)


def check_mounts(text: str, version: Version | None, what: str = "") -> None:
    """Raise WrongState for a mount of a Dockerfile that is refused, with its line.

    what: where the instructions come from, if not from lines of a Dockerfile (ONBUILD of a base image).
    """
    for mount in mounts_in(text, heredocs=is_safe(version)):
        if wrong := _wrong(mount, version):
            raise WrongState(f"{what or f'line {mount.line}'}: RUN --mount: {wrong}")


def _wrong(mount: RunMount, version: Version | None) -> str:
    options = mount.options
    source = options.get("source") or options.get("src") or ""
    if "bind-propagation" in options:
        return "bind-propagation reaches out of the build (leave it out)"
    for key, value in (("id", options.get("id", "")), ("source", source)):
        if ".." in value.split("/"):
            return f"{key} '{value}' leads out of its place (expected one without '..')"
    if options.get("from") and source.strip("/.") and not is_safe(version):
        told = ".".join(map(str, version)) if version else "this buildah"
        return (
            f"source '{source}' in '{options['from']}': buildah {told} follows links there to anywhere "
            f"({KNOWN}; expected no source, which mounts all of it, or buildah {'.'.join(map(str, SAFE))} or newer)"
        )
    return ""


def parse_version(text: str) -> Version | None:
    """Read what `buildah --version` says."""
    match = re.search(r"version (\d+)\.(\d+)\.?(\d+)?", text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def buildah_version(program: Path) -> Version | None:
    """Find the version of a buildah; each file is asked once."""
    try:
        return _version(str(program), program.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=4)
def _version(program: str, _: int) -> Version | None:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    return parse_version(done.stdout)
