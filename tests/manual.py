"""Reads the manual for driver authors: its blocks of code, and the driver that it shows."""

from __future__ import annotations

import re
import types
from pathlib import Path

MANUAL = Path(__file__).parents[1] / "plugins/README.md"
BLOCKS = re.findall(r"^```python([^\n]*)\n(.*?)^```", MANUAL.read_text(), re.DOTALL | re.MULTILINE)
EXAMPLE = types.ModuleType("manual_example")
exec(next(code for label, code in BLOCKS if not label), EXAMPLE.__dict__)


def block(label: str) -> str:
    """The only block of code in the manual with a label."""
    (code,) = [code for each, code in BLOCKS if each.strip() == label]
    return str(code)
