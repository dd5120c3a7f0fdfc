"""Numbers and names that no kernel takes are refused in one line of bounded length, wherever they stand."""

from __future__ import annotations

import pytest

from holdfast.spec import Spec, load
from holdfast.spec.model import NodeFacts

LONG = "x" * 100_000
CONTAINER = '[containers.web]\nimage = "app:1"\n'


def spec_of(text: str) -> Spec:
    return load({"shop.toml": text.encode()}, NodeFacts(name="node"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('user = "1099511627776"', "'1099511627776' is out of range (expected a number up to 4294967294)"),
        ('user = "root:4294967295"', "'4294967295' is out of range"),
        ('user = "99999999999999999999"', "is out of range (expected a number up to 4294967294)"),
        (f'user = "{LONG}"', "a name of 100000 characters is too long (expected at most 256)"),
        ('group_add = ["1099511627776"]', "'1099511627776' is out of range"),
        (
            'tmpfs = ["/run:uid=1099511627776"]',
            "'1099511627776' is out of range (expected a number up to 4294967294)",
        ),
        ('volumes = [{ type = "tmpfs", target = "/x", gid = 1099511627776 }]', "is too large"),
        (
            'resources = { cpuset = "0-99999999999" }',
            "'0-99999999999' is out of range (expected CPUs from 0 to 8191)",
        ),
        ("resources = { pids = 1099511627776 }", "1099511627776 is too large (expected at most 4194304)"),
        ("resources = { cpus = 1e300 }", "1e+300 is too large (expected at most 8192)"),
        ('resources = { memory = "999999999999999t" }', "is too large for a size"),
        ('shm_size = "999999999999999t"', "is too large for a size"),
        ('resources = { device_read_iops = { "/dev/sda" = 1099511627776 } }', "is too large"),
        ('stop_grace_period = "999999999999999d"', "(expected at most 3650d)"),
        ("logging = { max_files = 1099511627776 }", "1099511627776 is too large (expected at most 10000)"),
        (f'hostname = "{LONG}"', "is not a host name (expected"),
        (f'{LONG} = "1"', "unknown key"),
        (f'"{LONG} \\u001b[31m" = "1"', "unknown key"),
        (f'image2 = "{LONG}"', "unknown key 'image2'"),
        (f'networks = ["{LONG}"]', "(expected a-z, 0-9"),
        (f'cap_add = ["{LONG}"]', "is not a capability"),
        (f'stop_signal = "{LONG}"', "is not a signal"),
        (f'ports = ["{LONG}:80"]', "is not a number (expected"),
        (f'volumes = ["{LONG}"]', "is not a volume (expected SOURCE:TARGET[:ro])"),
        (f'environment = {{ "{LONG}" = [] }}', "expected a string"),
        (f'environment = {{ A = "${{vars.{LONG}}}" }}', "vars."),
        (f'depends_on = {{ a = "{LONG}" }}', "is not known"),
        (f'sysctls = {{ "{LONG}" = 1 }}', "is not a setting that a container has of its own"),
        (f'driver_opts = {{ "{LONG}" = 1 }}', "unknown key 'driver_opts'"),
        (f'restart = "{LONG}"', "is not known (expected"),
        (f'volumes = [{{ type = "{LONG}", target = "/x" }}]', "is not a name (expected"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_out_of_every_range_is_refused_in_one_short_line(line: str, expected: str) -> None:
    spec = spec_of(CONTAINER.replace("image", f"{line}\nimage"))
    assert spec.problems
    for problem in spec.problems:
        assert len(str(problem)) < 1000
        assert str(problem).isprintable()
    assert expected in str(spec.problems[0])


@pytest.mark.parametrize("text", [f'[containers.{LONG}]\nimage = "x"', f"[{LONG}]", f"{LONG}", f'["{LONG}".{LONG}]'])
def test_names_of_tables_are_shortened_too(text: str) -> None:
    problems = spec_of(text).problems
    assert problems
    assert all(len(str(problem)) < 1000 for problem in problems)


def test_the_largest_that_there_is_is_accepted() -> None:
    text = """user = "4294967294:4294967294"
stop_grace_period = "3650d"
resources = { cpuset = "0-8191", pids = 4194304, memory = "8388607t", cpus = 8192 }
"""
    assert spec_of(CONTAINER + text).problems == ()
