"""What skopeo is told, what its words mean to us, and which of a registry's documents are for this host."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.config import ImageSettings
from holdfast.errors import HoldfastError, NotFound, Throttled, TryAgain, UnfitHost, Unreachable, WrongState
from holdfast.images.formats.manifests import Unfit, choose, read_diff_ids, read_document, read_manifest
from holdfast.images.formats.references import parse
from holdfast.images.registry.faults import SkopeoError, explain, message_of
from holdfast.images.registry.skopeo import Skopeo, configured, is_loopback, noise

REF = "reg.example:5000/shop/web:1"
AT = "reg.example:5000/shop/web"
ABSENT = "(404: the registry does not have it)"
LOGIN = "(401: `skopeo login`, or authfile in [images] of agent.toml)"
ANYTHING = [{"type": "insecureAcceptAnything"}]

SAID: list[tuple[str, type[HoldfastError], str, float]] = [
    (
        f'time="2026-11-21T11:00:19Z" level=fatal msg="Error parsing image name \\"docker://{REF}\\": pinging '
        'container registry reg.example:5000: Get \\"https://reg.example:5000/v2/\\": x509: certificate signed by '
        'unknown authority"',
        UnfitHost,
        "x509: certificate signed by unknown authority (expected its authority in /etc/containers/certs.d",
        60,
    ),
    (
        'level=fatal msg="pinging container registry reg.example:5000: Get \\"https://reg.example:5000/v2/\\": x509: '
        "certificate has expired or is not yet valid: current time 2026-11-21T11:00:19Z is after "
        '2020-02-01T00:00:00Z"',
        UnfitHost,
        "current time 2026-11-21T11:00:19Z is after 2020-02-01T00:00:00Z (expected its",
        60,
    ),
    (
        "x509: certificate has expired or is not yet valid: current time 2019-01-01T11:00:19Z is before "
        "2020-02-01T00:00:00Z",
        UnfitHost,
        "current time 2019-01-01T11:00:19Z is before 2020-02-01T00:00:00Z",
        60,
    ),
    (
        "x509: certificate is valid for other.example, not reg.example",
        UnfitHost,
        "x509: certificate is valid for other.example, not reg.example",
        60,
    ),
    (
        "tls: failed to verify certificate: x509: cannot validate certificate for 10.0.0.1 because it doesn't "
        "contain any IP SANs",
        UnfitHost,
        "doesn't contain any IP SANs",
        60,
    ),
    (
        'Get "https://reg.example:5000/v2/": http: server gave HTTP response to HTTPS client',
        UnfitHost,
        "server gave HTTP response to HTTPS client (expected TLS, or insecure = true",
        60,
    ),
    (
        'pinging container registry reg.example:5000: Get "https://reg.example:5000/v2/": dial tcp: lookup '
        "reg.example on 10.0.0.2:53: no such host",
        Unreachable,
        "lookup reg.example on 10.0.0.2:53: no such host",
        0,
    ),
    (
        'Get "https://reg.example:5000/v2/": dial tcp: lookup reg.example: Temporary failure in name resolution',
        Unreachable,
        "lookup reg.example: Temporary failure in name resolution",
        0,
    ),
    ("dial tcp 10.0.0.1:5000: connect: connection refused", Unreachable, "connect: connection refused", 0),
    ("dial tcp 10.0.0.1:5000: connect: no route to host", Unreachable, "connect: no route to host", 0),
    ("dial tcp 10.0.0.1:5000: i/o timeout", Unreachable, "i/o timeout", 0),
    ("net/http: TLS handshake timeout", Unreachable, "TLS handshake timeout", 0),
    (
        f"reading manifest 1 in {AT}: manifest unknown: manifest unknown",
        NotFound,
        ABSENT,
        60,
    ),
    (f"reading manifest 1 in {AT}: StatusCode: 404, <html>", NotFound, ABSENT, 60),
    (
        f"reading manifest 1 in {AT}: name unknown: repository name not known to registry",
        NotFound,
        ABSENT,
        60,
    ),
    (
        f"reading manifest 1 in {AT}: unauthorized: authentication required",
        UnfitHost,
        LOGIN,
        60,
    ),
    (
        "unable to retrieve auth token: invalid username/password: unauthorized: no",
        UnfitHost,
        LOGIN,
        60,
    ),
    (
        f"reading manifest 1 in {AT}: errors:\ndenied: requested access to the resource is denied\nunauthorized: "
        "authentication required",
        UnfitHost,
        LOGIN,
        60,
    ),
    (f"reading manifest 1 in {AT}: denied: access denied", UnfitHost, "access denied (403)", 60),
    ("error fetching blob: invalid status code from registry 403 (Forbidden)", UnfitHost, "(403)", 60),
    (f"reading manifest 1 in {AT}: too many requests to registry", Throttled, "429", 60),
    (f"reading manifest 1 in {AT}: toomanyrequests: You have reached your pull rate limit", Throttled, "429", 60),
    (
        f"reading manifest 1 in {AT}: received unexpected HTTP status: 503 Service Unavailable",
        TryAgain,
        "503 Service Unavailable",
        0,
    ),
    ("invalid status code returned when fetching blob 502 (Bad Gateway)", TryAgain, "502 (Bad Gateway)", 0),
    ("StatusCode: 418, teapot", TryAgain, "StatusCode: 418, teapot", 60),
    (
        "Source image rejected: A signature was required, but no signature exists",
        WrongState,
        "A signature was required, but no signature exists (policy.json does not allow it)",
        300,
    ),
    (
        "Error loading trust policy: open /etc/containers/policy.json: no such file or directory",
        UnfitHost,
        "open /etc/containers/policy.json: no such file or directory",
        60,
    ),
    (
        "registry reg.example:5000 is blocked in /etc/containers/registries.conf or "
        "/etc/containers/registries.conf.d",
        UnfitHost,
        "registry reg.example:5000 is blocked in /etc/containers/registries.conf",
        60,
    ),
    (
        'getting username and password: error getting credentials - err: exec: "docker-credential-x": executable '
        "file not found in $PATH, out: ``",
        UnfitHost,
        "executable file not found in $PATH",
        60,
    ),
    (
        'getting username and password: 1 error occurred:\n\t* reading JSON file "/a": unmarshaling JSON at "/a": '
        "unexpected end of JSON input\n\n",
        UnfitHost,
        'unmarshaling JSON at "/a": unexpected end of JSON input',
        60,
    ),
    ("invalid reference format", WrongState, "invalid reference format", 300),
    ("expected 17 bytes in blob, got 20030", WrongState, "expected 17 bytes in blob, got 20030", 300),
    ("corrupted blob, expecting sha256:00", WrongState, "corrupted blob", 300),
    ("unexpected EOF", TryAgain, "unexpected EOF", 0),
    ("read tcp 10.0.0.1:4->10.0.0.2:5: read: connection reset by peer", TryAgain, "connection reset by peer", 0),
    ("writing blob: write /x: no space left on device", UnfitHost, "no space left", 60),
    ("Error: the sky: has fallen: on us", TryAgain, "has fallen: on us", 30),
    ("", TryAgain, "it failed without a word", 30),
    ("skopeo ended with -9", TryAgain, "skopeo ended with -9", 0),
]


@pytest.mark.parametrize(("text", "kind", "words", "wait"), SAID, ids=range(len(SAID)))
def test_what_skopeo_says_becomes_one_line_of_ours(
    text: str, kind: type[HoldfastError], words: str, wait: float
) -> None:
    error = explain(SkopeoError(text), "pull", REF, noise(parse(REF), REF))
    assert str(error).startswith(f"pull '{REF}': ")
    assert words in str(error)
    assert "\n" not in str(error)
    assert (type(error), error.wait, error.retry) == (kind, wait, True)


@pytest.mark.parametrize(
    "ref", ["reg.example/unauthorized/denied:404", "x509.example/429:500", "a.b/connection/refused"]
)
def test_names_are_not_taken_for_causes(ref: str) -> None:
    parsed = parse(ref)
    said = f'level=fatal msg="reading manifest {parsed.tag} in {parsed.repository}: manifest unknown"'
    assert type(explain(SkopeoError(said), "pull", ref, noise(parsed, ref))) is NotFound


def test_what_failed_besides_is_not_the_cause() -> None:
    said = (
        "(Mirrors also failed: [m.example/app: pinging m.example: x509: bad]\n[n.example/app: 500]): a.b/app:1: "
        "reading manifest 1 in a.b/app: manifest unknown"
    )
    error = explain(SkopeoError(said), "pull", "a.b/app:1", noise(parse("a.b/app:1"), "a.b/app:1"))
    assert str(error) == (
        "pull 'a.b/app:1': reading manifest 1 in a.b/app: manifest unknown (404: the registry does not have it) (its "
        "mirrors failed as well)"
    )


@given(st.text(max_size=2000))
def test_whatever_it_says_is_one_short_line(text: str) -> None:
    for said in (text, f"level=fatal msg={json.dumps(text)}"):
        error = explain(SkopeoError(said), "pull", REF, noise(parse(REF), REF))
        assert len(str(error)) < 500 and len(str(error).splitlines()) == 1


def test_the_last_fatal_line_is_the_message() -> None:
    log = 'time="x" level=debug msg="GET https://a/v2/"\ntime="x" level=fatal msg="one \\"two\\" \\x00"\n'
    assert message_of(log) == 'one "two" \\x00'
    assert message_of("level=fatal msg=EOF") == "EOF"
    assert message_of('time="x" level=debug msg="Ping https://a/v2/ status 401"\nKilled\n') == "Killed"
    crash = 'time="x" level=debug msg=x\nSIGSEGV: segmentation violation\nPC=0x1 m=0\n\ngoroutine 1:\nnet.go:404 +0x1'
    assert message_of(crash) == "skopeo crashed, SIGSEGV, segmentation violation"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1", True),
        ("127.8.9.1:5000", True),
        ("[::1]:5000", True),
        ("128.0.0.1:5000", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("127.0.0.1.example:80", False),
        ("docker.io", False),
    ],
)
def test_registries_of_this_host_need_no_certificate(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", False),
        ('[[registry]]\nlocation = "127.0.0.1:5000"', True),
        ('[[registry]]\nprefix = "127.0.0.1:5000/shop"\nlocation = "x.example"', True),
        ('[[registry]]\nprefix = "127.0.0.1:5000/sho"', False),
        ('[[registry]]\nlocation = "127.0.0.1"', True),
        ('[registries.insecure]\nregistries = ["127.0.0.1:5000"]', True),
        ('registries = "nonsense"', False),
    ],
)
def test_an_entry_of_registries_conf_is_found_by_its_prefix(text: str, found: bool) -> None:
    assert configured("127.0.0.1:5000/shop/web", iter([tomllib.loads(text)])) is found


@pytest.mark.parametrize(
    ("policy", "is_open"),
    [
        ({"default": ANYTHING}, True),
        ({"default": ANYTHING, "transports": {"docker-daemon": {"": ANYTHING}}}, True),
        ({"default": [{"type": "reject"}]}, False),
        ({"default": ANYTHING, "transports": {"docker": {"a.b": [{"type": "reject"}]}}}, False),
        ({"default": []}, False),
        ({}, False),
        ([], False),
    ],
)  # fmt: skip
def test_only_a_policy_that_accepts_everything_needs_no_check(policy: Any, is_open: bool, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    skopeo = Skopeo(ImageSettings(policy=path))
    assert skopeo.policy_is_open() is is_open
    assert not Skopeo(ImageSettings(policy=tmp_path / "missing")).policy_is_open()
    skopeo.close()


DIGESTS = [f"sha256:{number:064x}" for number in range(9)]


def entry(number: int, platform: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"digest": DIGESTS[number], "size": 1}
    if platform is not None:
        keys = ("os", "architecture", "variant")
        found["platform"] = dict(zip(keys, platform.split("/"), strict=False))
    return found


@pytest.mark.parametrize(
    ("architecture", "variant", "platforms", "chosen"),
    [
        ("amd64", "", ["linux/arm64", "windows/amd64", "linux/amd64"], 2),
        ("amd64", "", ["linux/amd64/v3", "linux/amd64"], 1),
        ("amd64", "", ["linux/amd64/v1", "linux/amd64"], 1),
        ("arm64", "", ["linux/arm/v7", "linux/arm64/v8"], 1),
        ("arm", "", ["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], 1),
        ("arm", "v6", ["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], 2),
        ("amd64", "", ["linux/amd64", "linux/amd64"], 0),
        ("amd64", "", ["linux/arm64", None], 1),
        ("riscv64", "", ["linux/amd64", "linux/riscv64"], 1),
    ],
)
def test_an_index_gives_what_fits_best(
    architecture: str, variant: str, platforms: list[str | None], chosen: int
) -> None:
    index = {"manifests": [entry(number, platform) for number, platform in enumerate(platforms)]}
    assert choose(index, architecture, variant).digest == DIGESTS[chosen]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"manifests": []}, "its index is empty"),
        ({"manifests": [entry(0, "linux/amd64/v9")]}, r"\(it has linux/amd64/v9\)"),
        ({"manifests": [entry(0, f"linux/m{n:02}") for n in range(14)]}, r"linux/m11 and 2 more\)"),
        ({"manifests": {}}, "damaged"),
        ({"manifests": ["x"]}, "damaged"),
        ({"manifests": [{"platform": {"os": "linux", "architecture": "amd64"}}]}, "no digest or no size"),
    ],
)
def test_an_index_without_this_host_lists_what_it_has(index: dict[str, Any], words: str) -> None:
    with pytest.raises(Unfit, match=words):
        choose(index, "amd64", "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(DIGESTS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "config",
                    "layers",
                    "manifests",
                    "digest",
                    "size",
                    "platform",
                    "mediaType",
                    "rootfs",
                    "diff_ids",
                    "os",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_whatever_a_registry_sends_is_taken_or_refused(value: Any) -> None:
    data = json.dumps(value).encode()
    for read in (
        lambda: choose(read_document(data), "amd64", ""),
        lambda: read_manifest(data),
        lambda: read_diff_ids(data, 1, "amd64"),
    ):
        try:
            read()
        except Unfit as error:
            assert len(str(error).splitlines()) == 1


IMAGE = json.dumps(
    {"schemaVersion": 2, "config": {"digest": DIGESTS[0], "size": 1}, "layers": [{"digest": DIGESTS[1], "size": 2}]}
).encode()
