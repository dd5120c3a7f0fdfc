from __future__ import annotations

import resource
from pathlib import Path

import pytest

from holdfast.runtime.names import hosts_text, resolv_conf, write_in_place


def test_hosts_file_lists_localhost_then_the_own_address_then_the_peers() -> None:
    text = hosts_text("web", [("10.0.0.2", ["web.shop"])], [("10.0.0.3", ("api", "api.shop"))])
    assert text.splitlines() == [
        "127.0.0.1 localhost",
        "::1 localhost ip6-localhost ip6-loopback",
        "10.0.0.2 web web.shop",
        "10.0.0.3 api api.shop",
    ]


def test_hostname_resolves_without_a_network() -> None:
    assert "127.0.1.1 web\n" in hosts_text("web", [("", ())], [])


def test_name_that_is_also_the_hostname_is_written_once() -> None:
    assert "10.0.0.2 web web.shop\n" in hosts_text("web", [("10.0.0.2", ("web", "web.shop"))], [])


def test_loopback_resolvers_are_dropped_and_the_rest_is_kept() -> None:
    host = (
        "# written by hand\nsearch lan\nnameserver 127.0.0.53\nnameserver 192.0.2.53\nnameserver ::1\noptions edns0\n"
    )
    assert resolv_conf(host) == "search lan\nnameserver 192.0.2.53\noptions edns0\n"


def test_host_with_a_local_resolver_only_gives_what_that_one_asks() -> None:
    host, upstream = "nameserver 127.0.0.53\n", "nameserver 192.0.2.53\nsearch lan\n"
    assert resolv_conf(host, upstream) == upstream


def test_without_any_reachable_resolver_none_is_invented() -> None:
    assert resolv_conf("search lan\nnameserver 127.0.0.1\n") == "search lan\n"


def test_link_local_resolver_with_a_zone_is_kept() -> None:
    assert resolv_conf("nameserver fe80::1%eth0\n") == "nameserver fe80::1%eth0\n"


def test_shorter_text_replaces_a_longer_one_in_the_same_inode(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    write_in_place(file, "a long text\n")
    inode = file.stat().st_ino
    write_in_place(file, "short\n")
    assert (file.read_text(), file.stat().st_ino) == ("short\n", inode)


def test_equal_text_is_not_written_again(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    write_in_place(file, "same\n")
    before = file.stat().st_mtime_ns
    file.chmod(0o600)
    write_in_place(file, "same\n")
    assert file.stat().st_mtime_ns == before


def test_hosts_file_that_has_no_room_is_an_error_and_not_a_part_of_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # write(2) then takes what fits, as on a full disk
    try:
        with pytest.raises(OSError, match="too large"):
            write_in_place(tmp_path / "hosts", 5000 * "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
