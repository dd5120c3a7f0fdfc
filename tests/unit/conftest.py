"""What several files of unit tests ask for. Tests that draw their cases draw the same ones in every run: a failure is
of the change that is tested (HOLDFAST_TEST_FUZZ=1 draws others).
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from holdfast.cli import main
from holdfast.drivers import Host
from holdfast.hookspecs import hookimpl
from holdfast.images.kept.store import ImageStore
from holdfast.plugins import Plugins, load_plugins
from holdfast.source.git import GitSource
from holdfast.testing import temporary_host
from layouts import Layout
from paper import PaperAgent, Run, served
from paper_plugins import Loose, Register, offering
from repositories import Repository
from tars import ROOTFS

settings.register_profile("same", derandomize=True, database=None, deadline=None)
if not os.environ.get("HOLDFAST_TEST_FUZZ"):
    settings.load_profile("same")


# -- commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    name = temporary_host(tmp_path).name  # of its own: another test may use the default's
    path.write_text(f'name = "{name}"\nroot = "{tmp_path}"\nrun_root = "{tmp_path}"\n')
    return path


@pytest.fixture
def agent(tmp_path: Path, config: Path) -> Iterator[PaperAgent]:
    log = tmp_path / "web.log"
    log.write_text("2026-11-21T07:00:00.1+00:00 stdout F hello\n2026-11-21T07:00:01.1+00:00 stderr F oops\n")
    paper = PaperAgent(log)
    with served(paper, tmp_path / "agent.sock"):
        yield paper


@pytest.fixture
def run(config: Path) -> Run:
    return lambda *words: main(["--config", str(config), *words])


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    return lambda: capsys.readouterr().out


# -- plugins ------------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return temporary_host(tmp_path)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, host: Host) -> Callable[..., Plugins]:
    """Load plugins given as keyword arguments: their functions, or (name, value), None for what can't be imported."""

    def load(**plugins: Any) -> Plugins:
        entry_points = []
        for name, functions in plugins.items():
            if functions is not None:
                module = types.ModuleType(f"plugin_{name}")
                named = [each if isinstance(each, tuple) else (each.__name__, each) for each in functions]
                module.__dict__.update(named)
                monkeypatch.setitem(sys.modules, module.__name__, module)
            entry_points.append(EntryPoint(name, f"plugin_{name}", "holdfast"))
        return load_plugins(host, entry_points=entry_points)

    return load


@pytest.fixture
def offer(load: Callable[..., Plugins], host: Host) -> Callable[..., Plugins]:
    """Load a plugin `mine` with one volume driver, which has these verbs instead of its own."""

    def offer(**verbs: Any) -> Plugins:
        @hookimpl
        def register_volume_drivers(register: Register) -> None:
            register(Loose(host, **verbs))

        return load(mine=[register_volume_drivers], good=[offering("good")])

    return offer


# -- git ----------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    repository = Repository(tmp_path / "repository")
    repository.commit("Open the shop\n\nAt last.", shop="1", nodes__edge__web="1")
    return repository


@pytest.fixture
def git_source(repository: Repository, tmp_path: Path) -> Callable[..., GitSource]:
    def git_source(url: str = str(repository.path), **settings: object) -> GitSource:
        return GitSource(url, tmp_path / "root", **settings)  # type: ignore[arg-type]

    return git_source


# -- images -------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    path = tmp_path / "rootfs.tar"
    path.write_bytes(ROOTFS)
    return path


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "shop")
