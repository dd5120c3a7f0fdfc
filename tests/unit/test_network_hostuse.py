from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

from holdfast_plugins.network.hostuse import of_peers, of_resolver

CONNECTIONS = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:0016 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 0A00000A:0016 0705A8C0:C350 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
   3: 0A00000A:0016 0905A8C0:C350 06 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
"""


def test_name_servers_of_the_host_are_read_from_every_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(
        "search lan\nnameserver 10.0.0.53\nnameserver fd00::1\n#nameserver 10.0.0.54\nnameserver\n"
    )
    (tmp_path / "b").write_text("nameserver 192.168.1.1\n")
    found = [subnet for _, subnet in of_resolver(tmp_path / name for name in ("a", "b", "c"))]
    assert found == [IPv4Network("10.0.0.53/32"), IPv4Network("192.168.1.1/32")]


def test_peers_are_those_that_the_host_has_a_connection_with(tmp_path: Path) -> None:
    (tmp_path / "tcp").write_text(CONNECTIONS)
    assert [subnet for _, subnet in of_peers(tmp_path / "tcp")] == [IPv4Network("192.168.5.7/32")]
    assert list(of_peers(tmp_path / "none")) == []
