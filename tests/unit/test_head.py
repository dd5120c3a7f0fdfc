"""When a registry is to be asked again, and where an image is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.images.formats.references import parse
from holdfast.images.registry.head import Place, RateLimits, places, waiting

NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        (200, {}, 0),
        (429, {}, 60),
        (429, {"retry-after": "120"}, 120),
        (503, {"retry-after": "5"}, 5),
        (200, {"retry-after": "5"}, 0),
        (429, {"retry-after": "Tue, 14 Nov 2023 22:14:20 GMT"}, 60),
        (429, {"retry-after": "soon"}, 60),
        (429, {"retry-after": "99999999"}, 6 * 3600),
        (200, {"ratelimit-remaining": "76;w=21600"}, 0),
        (200, {"ratelimit-remaining": "0;w=21600"}, 21600),
        (200, {"ratelimit-remaining": "0", "ratelimit-reset": "30"}, 30),
        (200, {"ratelimit": '"default";r=0;t=45'}, 45),
        (200, {"ratelimit": '"default";r=50;t=45'}, 0),
        (200, {"ratelimit-remaining": "0"}, 60),
    ],
)
def test_an_answer_says_how_long_a_registry_is_left_alone(status: int, headers: dict[str, str], wait: float) -> None:
    assert waiting(status, headers, NOW) == wait


def test_a_registry_is_left_alone_until_its_time_has_come() -> None:
    limits = RateLimits()
    limits.heed("r", 429, {"retry-after": "120"}, NOW)
    assert (limits.left("r", NOW + 20), limits.left("r", NOW + 120), limits.left("other", NOW)) == (100, 0, 0)


MIRRORED = {
    "registry": [
        {"prefix": "r.example", "location": "r.example"},
        {
            "prefix": "r.example/team",
            "location": "elsewhere.example/t",
            "mirror": [
                {"location": "mirror.example/m", "insecure": True},
                {"location": "digests.example", "pull-from-mirror": "digest-only"},
            ],
        },
        {"location": "no.example", "blocked": True},
        {"prefix": "*.wild.example"},
    ]
}


@pytest.mark.parametrize(
    ("reference", "wanted"),
    [
        ("app:1", [Place("registry-1.docker.io", "library/app", insecure=False)]),
        ("r.example/app:1", [Place("r.example", "app", insecure=False)]),
        (
            "r.example/team/app:1",
            [
                Place("mirror.example", "m/app", insecure=True),
                Place("elsewhere.example", "t/app", insecure=False),
            ],
        ),
        ("r.example/teams/app:1", [Place("r.example", "teams/app", insecure=False)]),
        ("no.example/app", []),
        ("a.wild.example/app", []),
        ("other.example:5000/app", [Place("other.example:5000", "app", insecure=False)]),
    ],
)
def test_registries_conf_says_where_an_image_is_asked_for(reference: str, wanted: list[Place]) -> None:
    document: dict[str, Any] = MIRRORED
    assert places(parse(reference), [document], loopback=False) == wanted


def test_a_registry_of_this_host_may_be_without_tls() -> None:
    assert places(parse("127.0.0.1:5000/app"), [], loopback=True) == [Place("127.0.0.1:5000", "app", insecure=True)]
