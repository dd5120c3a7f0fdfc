"""Install the examples of third-party plugins as their users do, and run their own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def install(example: str, folder: Path) -> dict[str, str]:
    """Build and install an example into a folder; return the environment of a Python that has it."""
    source = shutil.copytree(
        EXAMPLES / example, folder / "source", ignore=shutil.ignore_patterns("__pycache__", ".*")
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    target = folder / "site"
    subprocess.run([*pip, "--disable-pip-version-check", "--target", target, source], check=True)
    return {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}


def run_tests(example: str, environment: Mapping[str, str], folder: Path) -> None:
    """Run the tests of an example, which keep what they make in a folder."""
    here = EXAMPLES / example
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", here, "--basetemp", folder, here / "tests"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
