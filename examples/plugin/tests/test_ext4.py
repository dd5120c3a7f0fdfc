"""The ext4 driver under the laws of every driver, and its own: run as root, with holdfast and pytest installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from holdfast_ext4 import Ext4Volume

from holdfast.drivers import Host, VolumeWant
from holdfast.errors import UnfitHost, WrongState
from holdfast.observed import Receipt
from holdfast.testing import VolumeConformance, temporary_host

MIB = 1 << 20


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return temporary_host(tmp_path)


@pytest.fixture
def driver(host: Host) -> Ext4Volume:
    return Ext4Volume(host)


def volume(size: str = "4MiB", id: str = "shop/data") -> VolumeWant:
    return VolumeWant(id=id, driver_opts={"size": size})


class TestExt4Volume(VolumeConformance):
    many = 10

    def make_driver(self, host: Host) -> Ext4Volume:
        return Ext4Volume(host)

    def make_want(self, host: Host, number: int) -> VolumeWant:
        return volume(id=f"shop/data-{number}")


def test_a_volume_takes_no_more_than_its_size(driver: Ext4Volume) -> None:
    receipt = driver.ensure(volume())
    path = Path(receipt.data["path"])
    try:
        assert list(path.iterdir()) == []
        with pytest.raises(OSError, match="No space left"):
            (path / "big").write_bytes(bytes(5 * MIB))
    finally:
        driver.remove(receipt)


def test_a_volume_grows_and_keeps_its_data(driver: Ext4Volume) -> None:
    receipt = driver.ensure(volume())
    path = Path(receipt.data["path"])
    try:
        (path / "kept").write_text("yes")
        assert driver.ensure(volume("32MiB")).data == {**receipt.data, "size": 32 * MIB}
        (path / "big").write_bytes(bytes(20 * MIB))
        assert (path / "kept").read_text() == "yes"
        with pytest.raises(WrongState, match="can't shrink"):
            driver.check(volume("4MiB"))
    finally:
        driver.remove(receipt)


def test_a_volume_that_is_in_use_grows_in_place_or_says_why_not(driver: Ext4Volume) -> None:
    receipt = driver.ensure(volume())
    try:
        with (Path(receipt.data["path"]) / "open").open("w") as file:
            try:
                driver.ensure(volume("32MiB"))
            except UnfitHost as error:
                assert "busy" in str(error)  # without CAP_SYS_RESOURCE
            file.write("still there")
        assert driver.ensure(volume("32MiB")).data == {**receipt.data, "size": 32 * MIB}
        assert (Path(receipt.data["path"]) / "open").read_text() == "still there"
    finally:
        driver.remove(receipt)


def test_growing_a_volume_that_a_container_uses_is_refused_beforehand_where_it_would_fail(
    driver: Ext4Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = driver.ensure(volume())
    command = ["unshare", "--mount", "sh", "-c", "echo up; exec sleep 1000"]
    monkeypatch.setattr("holdfast_ext4._may_grow_online", lambda: False)
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as container:
            try:
                assert container.stdout is not None and container.stdout.readline() == b"up\n"
                with pytest.raises(UnfitHost, match="can't grow to 33554432 bytes while containers use it"):
                    driver.check(volume("32MiB"))
                driver.check(volume())
            finally:
                container.kill()
        driver.check(volume("32MiB"))
    finally:
        driver.remove(receipt)


def test_a_volume_is_mounted_again_after_a_reboot(driver: Ext4Volume) -> None:
    receipt = driver.ensure(volume())
    path = Path(receipt.data["path"])
    try:
        (path / "kept").write_text("yes")
        subprocess.run(["umount", path], check=True)
        assert list(driver.observe()) == [Receipt("volume", "ext4", "shop/data")]
        assert driver.ensure(volume()) == receipt
        assert (path / "kept").read_text() == "yes"
    finally:
        driver.remove(receipt)


def test_a_new_volume_is_empty(driver: Ext4Volume) -> None:
    receipt = driver.ensure(volume())
    try:
        assert list(Path(receipt.data["path"]).iterdir()) == []
    finally:
        driver.remove(receipt)


@pytest.mark.parametrize("options", [{}, {"size": "much"}, {"size": "1KiB"}, {"size": "4MiB", "colour": "red"}])
def test_wrong_options_are_refused(driver: Ext4Volume, options: dict[str, str]) -> None:
    with pytest.raises(WrongState, match=r"driver_opts\."):
        driver.check(VolumeWant(id="shop/data", driver_opts=options))
