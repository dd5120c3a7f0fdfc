"""A pass reads what is asked for: from one source at a time, by one set of settings at a time."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from holdfast.config import Config
from holdfast.errors import TryAgain
from holdfast.reconcile import Reconciler
from holdfast.source import Revision

FILES = {"shop.toml": b'[containers.web]\nimage = "registry.example/web:${vars.tag:-1}"\n'}


class _Files(dict[str, bytes]):
    """Files whose reading waits until it is let go, as it takes long in a large repository."""

    def __init__(self) -> None:
        super().__init__(FILES)
        self.asked, self.answers = threading.Event(), threading.Event()

    def __getitem__(self, path: str) -> bytes:
        self.asked.set()
        assert self.answers.wait(10)
        return super().__getitem__(path)


class _Source:
    """A source that always has the same revision."""

    def __init__(self) -> None:
        self.files = _Files()
        self.files.answers.set()
        self.revision = Revision(id="1" * 40, files=self.files)

    def current(self, *, light: bool = False) -> Revision:
        return self.revision


@pytest.fixture
def source() -> _Source:
    return _Source()


def _reconciler(source: _Source) -> Reconciler:
    return Reconciler(cast(Any, None), cast(Any, source), Config())


def _image(reconciler: Reconciler) -> str | None:
    spec = reconciler.wanted()
    assert spec is not None
    return spec.apps["shop"].containers["web"].image


def test_a_source_that_can_not_be_read_leaves_the_last_answer_in_force(source: _Source) -> None:
    reconciler = _reconciler(source)
    before = reconciler.wanted()

    def unreadable(*, light: bool = False) -> Revision:
        raise TryAgain("no answer")

    source.current = unreadable  # type: ignore[method-assign]
    assert reconciler.wanted() is before


def test_settings_that_change_while_a_revision_is_read_apply_to_it(source: _Source) -> None:
    reconciler = _reconciler(source)
    source.files.answers.clear()
    reading = threading.Thread(target=reconciler.wanted)
    reading.start()
    assert source.files.asked.wait(10)
    reloading = threading.Thread(target=reconciler.reload, args=(source, Config(vars={"tag": "2"})))
    reloading.start()
    reloading.join(0.05)
    source.files.answers.set()
    reading.join(10)
    reloading.join(10)
    assert _image(reconciler) == "registry.example/web:2"


def test_a_revision_is_read_once_however_often_it_is_asked_for(source: _Source) -> None:
    reconciler = _reconciler(source)
    assert reconciler.wanted() is reconciler.wanted()


class _Asked(Exception):
    """Ends a pass once it has asked its source."""


@pytest.mark.parametrize(("deep", "light"), [(False, True), (True, False)])
def test_a_deep_pass_does_not_rely_on_what_a_watch_has_told(source: _Source, deep: bool, light: bool) -> None:
    def asked(*, light: bool = False) -> Revision:
        raise _Asked(light)

    source.current = asked  # type: ignore[method-assign]
    with pytest.raises(_Asked) as found:
        _reconciler(source).run(deep=deep, light=True)
    assert found.value.args == (light,)
