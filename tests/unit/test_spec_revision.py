"""A revision as a whole: what is read again, what it lacks, who keeps what two apps want, and what may be missed."""

from __future__ import annotations

import pytest

from holdfast.spec import Cache, NodeFacts, load

NODE = NodeFacts("edge-1")
FILES = {
    "shop.toml": b'[containers.web]\nimage = "a"\nenvironment = { NODE = "${node.name}" }\n',
    "databases.toml": b"[networks.back]\n",
}


def many(count: int) -> dict[str, bytes]:
    app = '[containers.c{0}]\nimage = "a:1"\nports = ["{1}:80"]\nnetworks = ["front"]\n'
    head = "[networks.front]\n[volumes.data]\n"
    return {
        f"app{n}.toml": (head + "".join(app.format(i, 10_000 + n * 10 + i) for i in range(10))).encode()
        for n in range(count // 10)
    }


def test_a_thousand_unchanged_containers_are_not_read_again() -> None:
    files, cache = many(1000), Cache()
    first = load(files, NODE, cache=cache)
    assert not first.problems
    again = {path: bytes(bytearray(text)) for path, text in files.items()}  # equal, not the same
    assert load(again, NODE, cache=cache) is first


def test_only_a_changed_file_is_read_again() -> None:
    files, cache = dict(FILES), Cache()
    first = load(files, NODE, cache=cache)
    files["databases.toml"] += b"[networks.other]\n"
    second = load(files, NODE, cache=cache)
    assert second.apps["shop"] is first.apps["shop"]
    assert set(second.apps["databases"].networks) == {"back", "other"}


def test_other_facts_are_other_values() -> None:
    cache = Cache()
    load(FILES, NODE, cache=cache)
    other = NodeFacts("edge-2")
    assert load(FILES, other, cache=cache).apps["shop"].containers["web"].environment["NODE"] == "edge-2"


def test_changed_shared_vars_reach_every_file() -> None:
    text = b'[containers.web]\nimage = "${vars.x}"\n'
    cache = Cache()
    for tag in (b"a", b"b"):
        spec = load({"s.toml": text, "vars.toml": b'x = "' + tag + b'"\n'}, NODE, cache=cache)
        assert spec.apps["s"].containers["web"].image == tag.decode()


LEFT_OUT = {
    "conf/sub": "a git submodule",
    "conf/big": "a git LFS pointer",
    "away": "a symbolic link that leads out",
    "elsewhere/x": "a pipe",
    "src/skipped/link": "a symbolic link that leads nowhere",
    "bad/link": "a symbolic link that leads nowhere",
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'volumes = ["./conf:/c"]',
            "it lacks: 'conf/big', a git LFS pointer, 'conf/sub', a git submodule",
        ),
        (
            'volumes = ["./conf/sub/file:/c"]',
            "is not in this revision: 'conf/sub' is a git submodule",
        ),
        ('volumes = ["./away:/c"]', "'away' is not in this revision: 'away' is a symbolic link that leads out"),
        ('configs = ["k"]\n[configs.k]\nfile = "./conf/big"', "'conf/big' is a git LFS pointer"),
        (
            '[images.i]\ncontext = "./bad"',
            "it lacks: 'bad/link', a symbolic link that leads nowhere",
        ),
        ('[images.i]\ncontext = "./conf/sub"', "'conf/sub' is a git submodule"),
    ],
)
def test_what_lacks_something_of_the_revision_is_refused_with_the_reason(text: str, said: str) -> None:
    files = {
        "shop.toml": f'[containers.web]\nimage = "nginx"\n{text}\n'.encode(),
        "conf/own": b"x",
        "bad/Dockerfile": b"FROM scratch\n",
    }
    (problem,) = load(files, NodeFacts("node"), left_out=LEFT_OUT).problems
    assert said in problem.message


def test_what_a_context_does_not_need_may_be_left_out() -> None:
    files = {
        "shop.toml": b'[images.i]\ncontext = "./src"\n[containers.web]\nimage = "images.i"\nvolumes = ["./ok:/c"]\n',
        "src/Dockerfile": b"FROM scratch\n",
        "src/.dockerignore": b"skipped\n",
        "ok": b"x",
    }
    assert load(files, NodeFacts("node"), left_out=LEFT_OUT).problems == ()


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ({"apps/shop.toml": "a git LFS pointer"}, "is not in this revision: 'apps/shop.toml' is a git LFS pointer"),
        ({"apps": "a symbolic link that leads out"}, "is not in this revision: 'apps' is a symbolic link that leads"),
    ],
)
def test_an_app_whose_state_file_is_left_out_stays_as_it_is(left_out: dict[str, str], said: str) -> None:
    here = load(
        {"apps/shop.toml": b'[app]\nname = "store"\n[containers.web]\nimage = "nginx"\n'}, NodeFacts("node")
    ).apps
    spec = load({}, NodeFacts("node"), left_out=left_out, in_force=here)
    assert spec.broken == {"apps/shop.toml": "store"}
    (problem,) = spec.problems
    assert said in problem.message


def test_a_state_file_that_was_never_here_and_is_left_out_is_told() -> None:
    spec = load({}, NodeFacts("node"), left_out={"shop.toml": "a symbolic link that leads nowhere", "x": "a socket"})
    assert spec.broken == {"shop.toml": "shop"}
    assert [problem.path for problem in spec.problems] == ["shop.toml"]


def test_a_toml_file_that_a_context_leaves_out_is_no_app() -> None:
    files = {
        "shop.toml": b'[images.i]\ncontext = "./src"\n[containers.web]\nimage = "images.i"\n',
        "src/Dockerfile": b"FROM scratch\n",
        "src/.dockerignore": b"tests\n",
    }
    left_out = {"src/tests/pyproject.toml": "a symbolic link that leads nowhere"}
    assert load(files, NodeFacts("node"), left_out=left_out).problems == ()


def test_vars_that_are_left_out_do_not_become_their_defaults() -> None:
    files = {"shop.toml": b'[containers.web]\nimage = "nginx:${vars.tag:-old}"\n'}
    spec = load(files, NodeFacts("node"), left_out={"vars.toml": "a git LFS pointer"})
    assert spec.broken == {"shop.toml": "shop"}
    assert [(problem.path, problem.message) for problem in spec.problems] == [
        ("vars.toml", "is not in this revision: it is a git LFS pointer")
    ]


@pytest.mark.parametrize(
    "text",
    [
        '[app\nname = "store"\n',
        '[app]\nname = "market"\n[containers.web]\nimag = "nginx"\n',
        '[app]\nname = "market"\n[containers.web]\nimage = "nginx"\ndepends_on = ["gone/db"]\n',
    ],
)
def test_an_app_with_a_name_of_its_own_stays_when_its_file_does_not_load_any_more(text: str) -> None:
    here = load({"shop.toml": b'[app]\nname = "store"\n[containers.web]\nimage = "nginx"\n'}, NodeFacts("node")).apps
    spec = load({"shop.toml": text.encode()}, NodeFacts("node"), in_force=here)
    assert spec.broken == {"shop.toml": "store"}
    assert spec.apps == {}


def test_a_file_that_becomes_a_program_is_another_file() -> None:
    files = {"shop.toml": b'[containers.web]\nimage = "nginx"\nvolumes = ["./run:/run.sh"]\n', "run": b"x"}
    cache = Cache()
    before = load(files, NodeFacts("node"), cache=cache).apps["shop"]
    after = load(files, NodeFacts("node"), cache=cache, executable=frozenset({"run"})).apps["shop"]
    assert before.files != after.files
    assert before.digest != after.digest


def test_yaml_files_that_nobody_mounts_are_named() -> None:
    files = {
        "shop.toml": b'[containers.web]\nimage = "nginx"\nvolumes = ["./conf:/c", "./one.yml:/one.yml"]\n',
        **dict.fromkeys(("compose.yaml", "conf/a.yaml", "one.yml", ".github/ci.yml"), b"x: y"),
    }
    (hint,) = load(files, NodeFacts("node")).hints
    assert hint.startswith("compose.yaml: this is YAML")


CLASH = b'[containers.web]\nimage = "shop/web:1"\nports = ["8080:80"]\n'


def test_of_two_that_want_one_port_the_newcomer_is_refused() -> None:
    here = load({"zebra.toml": CLASH}, NodeFacts(name="node")).apps
    both = {"ant.toml": CLASH, "zebra.toml": CLASH}
    assert load(both, NodeFacts(name="node")).broken == {"zebra.toml": "zebra"}
    assert load(both, NodeFacts(name="node"), in_force=here).broken == {"ant.toml": "ant"}


def test_an_app_that_wants_one_more_port_keeps_the_one_it_has() -> None:
    here = load({"zebra.toml": CLASH}, NodeFacts(name="node")).apps
    more = CLASH.replace(b'"8080:80"', b'"8080:80", "9090:90"')
    spec = load({"ant.toml": CLASH, "zebra.toml": more}, NodeFacts(name="node"), in_force=here)
    assert spec.broken == {"ant.toml": "ant"}
