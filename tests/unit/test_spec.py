"""State files that are right → the nouns of the model, beyond what the data files of test_spec_cases say."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.grammar import signals
from holdfast.grammar.quantities import size_text
from holdfast.keys import duration, size
from holdfast.spec import App, Container, NodeFacts, Spec, load
from holdfast.spec.model import Attachment, Network

EVERYTHING = Path(__file__).parent / "spec/everything-that-can-be-written-loads.toml"
FILES = {path: text.encode() for path, text in tomllib.loads(EVERYTHING.read_text())["files"].items()}
NODE = NodeFacts("edge-1", labels={"region": "eu"}, vars={"domain": "example.org"}, env={"LANG": "C"})


def loaded(files: dict[str, bytes], facts: NodeFacts = NODE) -> Spec:
    spec = load(files, facts)
    assert [str(problem) for problem in spec.problems] == []
    return spec


def container(more: str, facts: NodeFacts = NODE) -> Container:
    text = f'[containers.web]\nimage = "a"\n{more}\n'
    return loaded({"shop.toml": text.encode()}, facts).apps["shop"].containers["web"]


@pytest.fixture(scope="module")
def shop() -> App:
    return loaded(FILES).apps["shop"]


def test_app_has_no_default_network_when_no_container_joins_it() -> None:
    app = load_one("[containers.web]\nimage = 'a'\nnetworks = ['front']\n[networks.front]\n")
    assert app.networks == {"front": Network()}


def test_an_app_or_the_node_may_ask_for_the_shared_bridge() -> None:
    text = "[containers.web]\nimage = 'a'\n"
    shared = load_one(f"[app]\nnetwork = 'bridge'\n{text}")
    assert (shared.containers["web"].networks, shared.networks) == ({"bridge": Attachment()}, {})
    facts = replace(NODE, network="bridge")
    assert load_one(text, facts).containers["web"].networks == {"bridge": Attachment()}
    own = load_one(f"[app]\nnetwork = 'default'\n{text}", facts)
    assert own.containers["web"].networks == {"shop/default": Attachment()}


def load_one(text: str, facts: NodeFacts | None = None) -> App:
    spec = load({"shop.toml": text.encode()}, facts or NODE)
    assert spec.problems == ()
    return spec.apps["shop"]


def test_a_changed_file_changes_the_digest_of_the_app() -> None:
    before = loaded(FILES).apps["shop"].digest
    after = loaded({**FILES, "apps/site/index.html": b"<h1>"}).apps["shop"].digest
    assert before != after


def test_what_is_not_said_is_the_models_default() -> None:
    assert container("") == Container(image="a", networks={"shop/default": Attachment()})


def test_an_app_goes_through_json_and_back(shop: App) -> None:
    again = App.model_validate(json.loads(json.dumps(shop.model_dump(mode="json"))))
    assert again == shop
    assert again.digest == shop.digest


def test_whatever_changes_of_an_app_changes_its_digest(shop: App) -> None:
    web = shop.containers["web"].model_copy(update={"hostname": "other"})
    others: list[dict[str, Any]] = [
        {"containers": {**shop.containers, "web": web}},
        {"containers": {"other": shop.containers["web"]}},
        {"volumes": {}},
        {"files": {}},
        {"depends_on": ()},
    ]
    found = {shop.digest, *(shop.model_copy(update=each).digest for each in others)}
    assert len(found) == 1 + len(others)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("64MiB", 64 << 20),
        ("64m", 64 << 20),
        ("64MB", 64_000_000),
        ("1.5g", 3 << 29),
        ("7", 7),
        ("2 KiB", 2048),
        (5, 5),
    ],
)
def test_sizes_are_read_as_docker_reads_them(text: str | int, number: int) -> None:
    assert size(text) == number


def test_sizes_are_shown_in_their_largest_whole_unit() -> None:
    assert [size_text(number) for number in (64 << 20, 1536, 1000, 0)] == [
        "64MiB",
        "1536 bytes",
        "1000 bytes",
        "0 bytes",
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("100ms", 0.1), ("1m30s", 90), ("2h", 7200), ("1d", 86400), ("0.5s", 0.5), ("0", 0), ("3650d", 315_360_000)],
)
def test_durations_add_their_parts_up(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["3651d", "3650d1ms", "300000d", "99999999999999d"])
def test_a_duration_that_no_clock_counts_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^'{text}' is longer than .* \(expected at most 3650d\)$"):
        duration(text)


@pytest.mark.parametrize(
    ("written", "name", "number"),
    [
        ('"term"', "SIGTERM", 15),
        ("9", "SIGKILL", 9),
        ('"SIGRTMIN+3"', "SIGRTMIN+3", 37),
        ('"RTMAX-1"', "SIGRTMAX-1", 63),
    ],
)
def test_signals_have_one_spelling_and_a_number(written: str, name: str, number: int) -> None:
    assert container(f"stop_signal = {written}").stop_signal == name
    assert signals.number_of(name) == number


@pytest.mark.parametrize(
    "image",
    [
        "busybox",
        "busybox:1.36",
        "localhost/app:dev",
        "localhost:5000/app",
        "ghcr.io/a/b/c:v1",
        "a__b/c--d.e:X_1",
        "[::1]:5000/app",
        "docker/compose:1",
        "library/app@sha256:" + "0" * 64,
    ],
)
def test_image_references_of_all_kinds_are_taken(image: str) -> None:
    text = f'[containers.web]\nimage = "{image}"\n'.encode()
    assert loaded({"a.toml": text}).apps["a"].containers["web"].image == image


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    text = b'\xef\xbb\xbf[containers.web]\nimage = "nginx"\n'
    assert load({"shop.toml": text}, NodeFacts("node")).problems == ()
    (problem,) = load({"shop.toml": "[app]".encode("utf-16")}, NodeFacts("node")).problems
    assert "UTF-16 (expected UTF-8)" in problem.message


class Later(Network):
    """A network of a later version."""

    mode: str = "plain"


def test_the_digest_of_a_network_is_that_of_earlier_versions() -> None:
    earlier = "4308ac5d9cb737297ae4c69a829bb998"
    assert Network().digest.startswith(earlier)
    assert Later().digest == Network().digest != Later(mode="other").digest
    assert len({Network().digest, Network(internal=True).digest, Network(driver_opts={"mtu": "1400"}).digest}) == 3
