"""Commands for images: what they list, write, remove and say."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import WrongState
from paper import PaperAgent, Run


def test_image_import_hands_on_an_absolute_path(
    agent: PaperAgent, run: Run, tmp_path: Path, said: Callable[[], str]
) -> None:
    (tmp_path / "root.tar").touch()
    assert run("image", "import", str(tmp_path / "root.tar"), "app:1") == 0
    assert said() == "app:1  sha256:abc\n"


IMAGES = [
    {"ref": "app:1", "digest": "sha256:" + "a" * 64, "size": 1 << 20, "used_by": ["shop/web"], "source": "registry"},
    {"ref": "localhost/images/shop/web:0123456789abcdef", "digest": "sha256:" + "a" * 64, "size": 1 << 20},
    {"ref": "", "digest": "sha256:" + "b" * 64, "size": 1 << 10, "used_by": ["shop/old"]},
]


def test_images_without_a_name_are_listed_as_such(
    agent: PaperAgent, run: Run, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "images", lambda: IMAGES)
    assert run("image", "list") == 0
    lines = said().splitlines()
    assert [line.split()[0] for line in lines] == ["IMAGE", "app:1", "<none>"]
    assert "shop/old" in lines[2]
    for words, expected in {
        ("-q",): ["a" * 12, "b" * 12],
        ("-q", "--no-trunc", "--filter", "dangling=true"): ["sha256:" + "b" * 64],
        ("-q", "--filter", "reference=app*"): ["a" * 12],
        ("-q", "ap"): [],
        ("-a", "-q", "localhost/*:0*"): ["a" * 12],
    }.items():
        assert run("image", "list", *words) == 0
        assert said().split() == expected, words
    assert run("image", "list", "--filter", "since=x") == 64


def test_an_archive_is_written_whole_or_not_at_all(
    agent: PaperAgent, run: Run, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "x.tar").write_bytes(b"before")
    assert run("image", "save", "-o", str(tmp_path / "x.tar"), "gone:1") == 64
    assert [(path.name, path.read_bytes()) for path in tmp_path.glob("*x.tar*")] == [("x.tar", b"before")]
    assert run("image", "save", "-o", str(tmp_path / "x.tar"), "app:1") == 0
    assert (tmp_path / "x.tar").read_bytes() == b"tar" * 1_000_000 + b"oci-archive"
    capfdbinary.readouterr()
    assert run("export", "shop/web") == 0
    assert capfdbinary.readouterr().out == b"shop/web"


def test_what_images_are_asked_for_is_said_in_a_line(agent: PaperAgent, run: Run, said: Callable[[], str]) -> None:
    for words, expected in {
        ("image", "pull", "app:1"): "app:1  sha256:abc",
        ("image", "push", "app:1", "r.test/a:1"): "r.test/a:1  sha256:abc",
        ("image", "history", "app:1"): "CMD",
        ("image", "inspect", "app:1"): '"RepoTags"',
        ("image", "prune", "--all", "--force"): "removed sha256:abc",
        ("commit", "shop/web", "app:2", "-m", "why"): "app:2",
        ("system", "prune", "--force", "--volumes"): "removed shop/old",
    }.items():
        assert run(*words) == 0, words
        assert expected in said(), words
    assert run("image", "pull", "gone:1") == 64


def test_an_empty_name_is_a_wrong_call(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("image", "pull", "") == 64
    assert "it is empty (expected [HOST/]NAME[:TAG])" in capsys.readouterr().err


def test_who_stops_watching_a_pull_hears_that_it_goes_on(
    agent: PaperAgent, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = threading.Event()

    def pull_image(ref: str) -> Iterator[dict[str, Any]]:
        yield {"transfers": []}
        os.kill(os.getpid(), signal.SIGINT)  # while the command waits for more
        assert heard.wait(30)
        yield {"image": {"ref": ref, "digest": "sha256:abc"}}

    monkeypatch.setattr(agent, "pull_image", pull_image)
    code = run("image", "pull", "app:1")
    heard.set()
    assert code == 130
    assert capsys.readouterr().err == (
        "holdfast: pull 'app:1': the agent goes on pulling it (see 'holdfast status')\n"
    )


def test_a_prune_names_what_goes_and_asks_before(
    agent: PaperAgent, run: Run, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [{"ref": ref, "digest": "sha256:abc"} for ref in ("app:1", "app:2")]
    gone = {"images": ["sha256:abc"], "layers": ["sha256:1", "sha256:2"], "freed": 1024}
    monkeypatch.setattr(agent, "images", lambda: names)
    monkeypatch.setattr(agent, "prune_images", lambda all=False: gone)
    assert run("image", "prune", "--force") == 0
    assert said().splitlines() == [
        "removed sha256:abc  app:1  app:2",
        "removed 2 layers that no image needs",
        "freed 1KiB",
    ]
    left = {"images": [], "volumes": [], "freed": 1, "kinds": {"images": 1}}
    monkeypatch.setattr(agent, "prune", lambda all=False, volumes=False: left)
    assert run("system", "prune", "--force") == 0
    assert said().splitlines() == ["removed layers that no image needs", "freed 1B"]
    for kind in ("image", "system"):
        monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
        assert run(kind, "prune") == 0
        assert said().endswith("nothing is removed\n")


def test_what_comes_by_a_pipe_is_called_standard_input(
    agent: PaperAgent, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(path: str) -> None:
        raise WrongState(f"load {path!r}: neither an archive nor a layout")

    monkeypatch.setattr(agent, "load_image", load)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    assert run("image", "load") == 65
    assert capsys.readouterr().err == "holdfast: load 'standard input': neither an archive nor a layout\n"
