"""Images on their way, as a person sees them come."""

from __future__ import annotations

import os
import pty
import sys
from contextlib import suppress

import pytest

from holdfast.cli.bars import bars
from holdfast.images.incoming.transfers import Transfers

MIB = 1 << 20


def test_a_log_gets_a_line_for_each_quarter(capsys: pytest.CaptureFixture[str]) -> None:
    transfers = Transfers()
    with bars() as show, transfers.transfer("app:1") as coming:
        show({"transfers": transfers.look()})
        coming.state = "pulling"
        coming.expect("sha256:a", 4 * MIB)
        coming.expect("sha256:b", 9 * MIB, here=True)
        coming.begin("sha256:a")
        for done in range(0, 4 * MIB + 1, MIB // 2):
            coming.advance("sha256:a", done)
            show({"transfers": transfers.look()})
        coming.finish("sha256:a")
        show({"transfers": transfers.look()})
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"pulling app:1  {done} of 4MiB, 0 of 1 layers" for done in ("0B", "1MiB", "2MiB", "3MiB", "4MiB")
    ]


def test_a_terminal_gets_a_bar_for_each_layer_that_comes_and_one_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", os.fdopen(slave, "w"))
    transfers = Transfers()
    with bars() as show, transfers.transfer("registry.example/[red]app:1") as coming:
        coming.state = "pulling"
        coming.expect(f"sha256:{'a' * 64}", 4 * MIB)
        coming.expect(f"sha256:{'b' * 64}", 4 * MIB)
        coming.begin(f"sha256:{'a' * 64}")
        coming.advance(f"sha256:{'a' * 64}", 2 * MIB)
        show({"transfers": transfers.look()})
    sys.stderr.close()
    seen = read_all(master)
    assert "registry.example/[red]app:1" in seen  # a name is no markup
    assert "aaaaaaaaaaaa" in seen and "bbbbbbbbbbbb" not in seen
    assert "2.0/8.0 MiB" in seen and "2.0/4.0 MiB" in seen


def a_build(step: str = "", error: str = "") -> dict[str, object]:
    return {"image": "images.shop/web", "began": 1.0, "step": step, "error": error}


def test_a_log_gets_a_line_for_each_step_of_a_build_and_what_is_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.cli.bars.PATIENCE", 0.0)
    why = "shop/web: waits until shop/db has started"
    with bars() as show:
        for step in ("", "STEP 1/2: FROM scratch", "STEP 1/2: FROM scratch", "STEP 2/2: COPY . /"):
            show({"builds": [a_build(step)], "blockers": [why]})
        show({"builds": [a_build(error="build 'images.shop/web': exit 1")], "blockers": [why]})
        show({"blockers": [why]})
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "ended after" not in line] == [
        "building images.shop/web",
        f"waiting: {why}",
        "building images.shop/web  STEP 1/2: FROM scratch",
        "building images.shop/web  STEP 2/2: COPY . /",
        "building images.shop/web  build 'images.shop/web': exit 1",
    ]
    assert lines[-1].startswith("building images.shop/web  ended after ")


def test_a_terminal_gets_a_bar_for_each_build_and_for_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.cli.bars.PATIENCE", 0.0)
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", os.fdopen(slave, "w"))
    with bars() as show:
        waits = [{"ref": "app:1", "asking": 1}, {"ref": "old:1", "asking": 0}]
        show({"builds": [a_build("STEP 2/2: [red]RUN")], "unanswered": waits, "blockers": ["shop: a lock"]})
    sys.stderr.close()
    seen = read_all(master)
    assert "images.shop/web  STEP 2/2: [red]RUN" in seen
    assert "waiting: app:1: the registry does not answer" in seen and "waiting: shop: a lock" in seen
    assert "old:1" not in seen, "nobody asks that any more: another commit did"
    assert "bytes" not in seen


def read_all(master: int) -> str:
    """What was written to a terminal that is closed by now."""
    seen = b""
    with os.fdopen(master, "rb", 0) as screen, suppress(OSError):  # EIO: nobody has the other end any more
        while data := screen.read(1 << 16):
            seen += data
    return seen.decode()
