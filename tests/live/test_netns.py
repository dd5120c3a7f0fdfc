"""Network namespaces on a host of their own: a mount namespace with an empty /run, where nobody else keeps any."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ground import patient

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("mounts_alone"), pytest.mark.timeout(600)]

ALONE = """
import os, subprocess, sys, threading
from pathlib import Path
from holdfast.drivers import Host
from holdfast.runtime import netns

subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
host = Host("alone", Path("/run/root"), Path("/run/alone"))

def mounts():
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return sum(" /run/netns " in line and " tmpfs " in line for line in lines)
"""


def _alone(script: str) -> str:
    """What a script prints that has /run for itself."""
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", ALONE + script]
    done = subprocess.run(command, text=True, capture_output=True, timeout=patient(60), check=False, cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder_is_shared_with_the_first_namespace_and_gone_with_the_last() -> None:
    found = _alone("""
receipts = [netns.ensure(host, name) for name in ("a", "b")]
print(mounts())
for receipt in receipts:
    netns.remove(host, receipt)
print(mounts(), os.path.exists("/run/netns"))
""")
    assert found.split() == ["1", "0", "False"]


def test_a_namespace_is_made_while_the_last_one_goes() -> None:
    found = _alone("""
failures = []

def come_and_go(name):
    try:
        for _ in range(100):
            netns.remove(host, netns.ensure(host, name))
    except Exception as error:
        failures.append(f"{type(error).__name__}: {error}")

threads = [threading.Thread(target=come_and_go, args=(name,)) for name in ("a", "b")]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(failures, os.path.exists("/run/netns"))
""")
    assert found.strip() == "[] False"
