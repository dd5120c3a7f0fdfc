"""References: what people write about images, as Docker and containers-transports(5) read it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import WrongCall
from holdfast.grammar.images import Reference, familiar
from holdfast.images.formats.references import parse, parse_changes

HEX = "0123456789abcdef" * 4
PINNED = f"sha256:{HEX}"


@pytest.mark.parametrize(
    ("text", "name", "asked"),
    [
        ("app", "docker.io/library/app:latest", "docker.io/library/app:latest"),
        ("docker://app:1", "docker.io/library/app:1", "docker.io/library/app:1"),
        ("docker.io/app", "docker.io/library/app:latest", "docker.io/library/app:latest"),
        ("index.docker.io/a/b:1", "docker.io/a/b:1", "docker.io/a/b:1"),
        ("myregistry/app", "docker.io/myregistry/app:latest", "docker.io/myregistry/app:latest"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest", "localhost:5000/app:latest"),
        ("host:5000/a/b/c:V1", "host:5000/a/b/c:V1", "host:5000/a/b/c:V1"),
        ("REGISTRY.Example/app", "REGISTRY.Example/app:latest", "REGISTRY.Example/app:latest"),
        ("[::1]:5000/app", "[::1]:5000/app:latest", "[::1]:5000/app:latest"),
        (f"app@{PINNED}", "docker.io/library/app:latest", f"docker.io/library/app@{PINNED}"),
        (f"127.0.0.1:5/a:1@{PINNED}", "127.0.0.1:5/a:1", f"127.0.0.1:5/a@{PINNED}"),
        ("a__b.c-d---e", "docker.io/library/a__b.c-d---e:latest", "docker.io/library/a__b.c-d---e:latest"),
    ],
)
def test_names_are_read_as_docker_reads_them(text: str, name: str, asked: str) -> None:
    assert (parse(text).name, parse(text).remote) == (name, asked)


@pytest.mark.parametrize(
    ("text", "path", "tag"),
    [
        ("oci:/srv/web", "/srv/web", ""),
        ("oci:/srv/web:1.2", "/srv/web", "1.2"),
        ("oci-archive:/srv/web.tar:shop/web:1", "/srv/web.tar", "shop/web:1"),
        ("docker-archive:/srv/web.tar", "/srv/web.tar", ""),
    ],
)
def test_archives_of_the_host_are_named_as_skopeo_names_them(text: str, path: str, tag: str) -> None:
    reference = parse(text)
    assert (reference.transport, reference.path, reference.tag) == (text.partition(":")[0], path, tag)
    assert reference.name == text


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "is empty (expected [HOST[:PORT]/]NAME"),
        ("https://example.com/app", "an address, not a name (leave https:// out)"),
        ("http://app", "leave http:// out"),
        ("a b", "has a space in it"),
        ("app\n", "has a space in it"),
        ("Shop/Web", "'Shop/Web' is in upper case (expected 'shop/web')"),
        ("app:", "the tag is empty"),
        ("app:-1", "'-1' is no tag"),
        ("app:" + "x" * 129, "is no tag"),
        ("a:b:c", "'b:c' is no tag"),
        ("app@sha1:da39a3ee", "'sha1:da39a3ee' is no digest (expected sha256: and 64 hexadecimal digits)"),
        (f"app@sha512:{HEX}{HEX}", "is no digest (expected sha256:"),
        (f"app@{PINNED}0", "is no digest"),
        ("app@", "'' is no digest"),
        (f"app@{PINNED.upper()}", "is no digest"),
        ("../x", "'..' is no host"),
        ("a//b", "not a valid name"),
        ("/app", "not a valid name"),
        ("app/", "not a valid name"),
        ("-a", "not a valid name"),
        ("a___b", "not a valid name"),
        ("host_x.y:1/app", "'host_x.y:1' is no host"),
        ("host:port/app", "'host:port' is no host"),
        ("127.0.0.1:65536/app", "'127.0.0.1:65536' is no host"),
        ("host:0/app", "'host:0' is no host"),
        (HEX, "looks like a digest (expected sha256: before it)"),
        ("a/" * 128 + "a", "the path has 257 characters (at most 255)"),
        ("docker-daemon:/app:1", "the transport 'docker-daemon' is not known"),
        ("ftp://x/y", "the transport 'ftp' is not known"),
        ("oci:srv/web", "no absolute path (expected oci:/PATH[:REF])"),
        ("oci:", "no absolute path"),
    ],
)
def test_what_is_no_reference_is_said_with_the_reason(text: str, wrong: str) -> None:
    with pytest.raises(WrongCall, match=re.escape(wrong)) as caught:
        parse(text)
    assert str(caught.value).startswith("image name ") and "\n" not in str(caught.value)


COMPONENT = st.from_regex(r"[a-z0-9]{1,4}((\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}", fullmatch=True)
HOST = st.sampled_from(["docker.io", "localhost", "localhost:1", "127.0.0.1:5000", "Reg.example", "[fe80::1]:443"])
TAG = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,9}", fullmatch=True)


@given(HOST, st.lists(COMPONENT, min_size=1, max_size=4), TAG, st.sampled_from(["", PINNED]))
def test_what_is_written_out_is_read_back(host: str, path: list[str], tag: str, digest: str) -> None:
    full = f"{host}/{'/'.join(path)}:{tag}"
    reference = parse(f"{full}@{digest}" if digest else full)
    where = "library/" + path[0] if host == "docker.io" and len(path) == 1 else "/".join(path)
    assert reference == Reference("docker", host, where, tag, digest)
    assert parse(reference.name).name == reference.name == parse(familiar(reference.name)).name


@given(st.text(st.characters(codec="utf-8"), max_size=40) | st.text("aB:/@.-_ 0[]\n", max_size=30))
def test_any_text_is_a_reference_or_one_line_of_what_is_wrong(text: str) -> None:
    try:
        reference = parse(text)
    except WrongCall as error:
        assert "\n" not in str(error)
    else:
        assert parse(reference.name).name == reference.name


@pytest.mark.parametrize(
    ("reference", "full"),
    [
        ("app", "docker.io/library/app:latest"),
        ("app:1", "docker.io/library/app:1"),
        ("shop/web", "docker.io/shop/web:latest"),
        ("docker.io/app", "docker.io/library/app:latest"),
        ("index.docker.io/library/app", "docker.io/library/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("registry.example:5000/shop/web:1.27", "registry.example:5000/shop/web:1.27"),
        ("ghcr.io/a/b_c--d.e:V1_x", "ghcr.io/a/b_c--d.e:V1_x"),
    ],
)
def test_names_are_completed_as_docker_does(reference: str, full: str) -> None:
    assert parse(reference).name == full
    assert parse(familiar(full)).name == full


@pytest.mark.parametrize("reference", ["", "App", "a b", "app:", "/app", "app/", "../x", "a:b:c", "-a"])
def test_malformed_names_are_refused(reference: str) -> None:
    with pytest.raises(WrongCall, match="image name"):
        parse(reference)


def test_dockerfile_instructions_become_configuration() -> None:
    config = parse_changes(
        [
            "CMD echo hi",
            'entrypoint ["/init"]',
            'ENV A=1 B="x y"',
            "ENV C d e",
            "WORKDIR /w",
            "EXPOSE 80 53/udp",
            "LABEL k=v",
            'VOLUME ["/a b"]',
            "STOPSIGNAL SIGINT",
            "USER 1:2",
        ]
    )
    assert config == {
        "Cmd": ["/bin/sh", "-c", "echo hi"],
        "Entrypoint": ["/init"],
        "Env": ["A=1", "B=x y", "C=d e"],
        "WorkingDir": "/w",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "Labels": {"k": "v"},
        "Volumes": {"/a b": {}},
        "StopSignal": "SIGINT",
        "User": "1:2",
    }


@pytest.mark.parametrize("change", ["COPY a b", "ENV", "ENV A=1 b", 'ENV A="', "VOLUME [1"])
def test_wrong_instructions_are_refused(change: str) -> None:
    with pytest.raises(WrongCall, match="change"):
        parse_changes([change])
