"""Plugins and drivers that a test makes up; the drivers are the manual's example with something changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from holdfast.drivers import Driver, Host, VolumeWant
from holdfast.hookspecs import hookimpl
from holdfast.plugins import Plugins, PluginState
from manual import EXAMPLE

Register = Callable[[Any], None]


class Loose(EXAMPLE.PlainVolume):  # type: ignore[misc, name-defined]
    """A driver whose verbs do what a test puts in their place."""

    def __init__(self, host: Host, **verbs: Any) -> None:
        super().__init__(host)
        self.__dict__.update(verbs)


def offering(name: str) -> Callable[..., None]:
    """A hook that offers a volume driver of this name."""

    class Volume(EXAMPLE.PlainVolume):  # type: ignore[misc, name-defined]
        pass

    Volume.name = name

    @hookimpl
    def register_volume_drivers(register: Callable[[Driver[VolumeWant]], None], host: Host) -> None:
        register(Volume(host))

    return register_volume_drivers


def state(plugins: Plugins, name: str) -> PluginState:
    return next(state for state in plugins.states if state.name == name)
