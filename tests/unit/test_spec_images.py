"""[images.*] → what must be built, and by which key; .dockerignore and Dockerfile as far as that takes."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from holdfast.spec import Cache, NodeFacts, Spec, load
from holdfast.spec.dockerfile import Use, images_in
from holdfast.spec.dockerignore import Ignore
from holdfast.spec.model import App

NODE = NodeFacts("edge-1", vars={"version": "7"})
SHOP = """
[images.web]
context = "./web"
args = { VERSION = "${vars.version}", DEBUG = true }
target = "final"
tags = ["r.example/web:1"]
labels = ["team=shop"]
[containers.web]
image = "images.web"
"""
FILES = {
    "shop.toml": SHOP,
    "web/Dockerfile": "FROM scratch AS final\nCOPY . /\n",
    "web/start.sh": "#!/bin/sh\n",
    "web/src/main.c": "main",
    "other.txt": "x",
}


def read(files: Mapping[str, str], executable: frozenset[str] = frozenset(), cache: Cache | None = None) -> Spec:
    spec = load({path: text.encode() for path, text in files.items()}, NODE, executable=executable, cache=cache)
    assert not spec.problems, [str(problem) for problem in spec.problems]
    return spec


def shop(**changes: str | None) -> App:
    """The app of FILES with some changed: `web__x` is web/x, `_` a dot."""
    named = {path.replace("__", "/"): text for path, text in changes.items()}
    files = {path: text for path, text in {**FILES, **named}.items() if text is not None}
    return read(files).apps["shop"]


def key(app: App, name: str = "shop/web") -> str:
    return app.images[name].key


def test_an_image_is_resolved_with_its_context_and_its_arguments() -> None:
    spec = read(FILES, frozenset({"web/start.sh", "other.txt"}))
    app = spec.apps["shop"]
    assert app.containers["web"].image == "images.shop/web"
    build = app.images["shop/web"]
    assert (build.args, build.labels) == ({"VERSION": "7", "DEBUG": "true"}, {"team": "shop"})
    assert (build.context, build.dockerfile, build.target) == ("web", "web/Dockerfile", "final")
    listing = json.loads(spec.blobs[build.tree])
    assert {path: executable for path, (_, executable) in listing.items()} == {
        "Dockerfile": False, "src/main.c": False, "start.sh": True,
    }  # fmt: skip
    assert spec.blobs[listing["src/main.c"][0]] == b"main"
    assert spec.blobs[build.instructions] == FILES["web/Dockerfile"].encode()


def test_nothing_but_what_it_is_built_from_changes_its_key() -> None:
    same = shop(
        **{
            "other.txt": "y",
            "web2/x": "",
            "shop.toml": SHOP.replace("r.example/web:1", "r.example/web:2") + 'command = "x"\n',
        }
    )
    assert key(same) == key(shop())


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("web/src/main.c", "other"),
        ("web/src/main.c", None),
        ("web/new", ""),
        ("web/Dockerfile", "FROM scratch AS final\n"),
        ("shop.toml", SHOP.replace("true", "false")),
        ("shop.toml", SHOP.replace("final", "first")),
        ("shop.toml", SHOP.replace("team=shop", "team=web")),
        ("shop.toml", SHOP.replace("[containers", 'network = "none"\n[containers')),
        ("shop.toml", SHOP.replace("[containers", 'platforms = ["linux/amd64"]\n[containers')),
    ],
)
def test_whatever_it_is_built_from_changes_its_key_and_its_app(path: str, text: str | None) -> None:
    changed, before = shop(**{path: text}), shop()
    assert key(changed) != key(before)
    assert changed.digest != before.digest


def test_a_file_that_becomes_a_program_changes_the_key() -> None:
    before, after = read(FILES).apps["shop"], read(FILES, frozenset({"web/start.sh"})).apps["shop"]
    assert key(before) != key(after)
    assert key(before) == key(read(FILES, frozenset({"other.txt"})).apps["shop"])


def test_what_the_context_leaves_out_neither_counts_nor_is_copied() -> None:
    ignore = {"web/.dockerignore": ".dockerignore\nDockerfile\nsrc\n"}
    spec = read({**FILES, **ignore})
    assert list(json.loads(spec.blobs[spec.apps["shop"].images["shop/web"].tree])) == ["start.sh"]
    assert key(shop(**ignore)) == key(shop(**ignore, **{"web/src/main.c": "other", "web/src/new.c": ""}))
    assert key(shop(**ignore)) != key(shop(**ignore, **{"web/Dockerfile": "FROM scratch"}))


def test_a_dockerfile_may_bring_its_own_ignorefile() -> None:
    both = {"web/.dockerignore": "start.sh\n", "web/Dockerfile.dockerignore": "*\n!start.sh\n"}
    spec = read({**FILES, **both})
    assert list(json.loads(spec.blobs[spec.apps["shop"].images["shop/web"].tree])) == ["start.sh"]


def test_only_what_is_run_or_pushed_is_built_and_what_these_start_from() -> None:
    files = {
        "shop.toml": SHOP + '[images.idle]\ncontext = "./idle"\n',
        "web/Dockerfile": "FROM images.tools/base\nFROM scratch AS final\n",
        "idle/Dockerfile": "FROM scratch",
        "tools.toml": """
[images.base]
context = "./base"
[images.pushed]
context = "./idle"
tags = ["r.example/p"]
push = true
""",
        "base/Containerfile": "FROM scratch",
    }
    apps = read(files).apps
    assert list(apps["shop"].images) == ["shop/web", "tools/base"]
    assert list(apps["tools"].images) == ["tools/pushed"]
    assert apps["shop"].images["shop/web"].bases == {"images.tools/base": "tools/base"}
    changed = read({**files, "idle/new": ""}).apps
    assert changed["shop"].digest == apps["shop"].digest, "nobody runs images.idle"
    assert changed["tools"].digest != apps["tools"].digest


@pytest.mark.parametrize("name", ["images.base", "images.shop/base", "r.example/base:1", "base", "base:latest"])
def test_a_changed_base_changes_what_is_built_from_it(name: str) -> None:
    files = {
        **FILES,
        "shop.toml": SHOP + '[images.base]\ncontext = "./base"\ntags = ["r.example/base:1", "docker.io/base"]\n',
        "base/Dockerfile": "FROM scratch",
        "web/Dockerfile": f"ARG BASE={name}\nFROM $BASE AS final",
    }
    before, after = (read({**files, "base/x": text}).apps["shop"] for text in "ab")
    assert before.images["shop/web"].bases == {name: "shop/base", "$BASE": "shop/base"}
    assert key(before) != key(after)


def test_an_image_of_a_registry_may_begin_like_one_of_ours() -> None:
    spec = read({"shop.toml": '[containers.web]\nimage = "images.example.org/web:1"\n'})
    assert spec.apps["shop"].images == {}
    assert spec.apps["shop"].containers["web"].image == "images.example.org/web:1"


def test_a_program_with_toml_files_of_its_own_can_be_built() -> None:
    files = {
        **FILES,
        "web/pyproject.toml": '[project]\nname = "x"\n',
        "web/app.toml": '[containers.c]\nimage = "c"\n',
    }
    assert set(read(files).apps) == {"shop", "app"}


def test_no_context_hides_what_may_be_a_state_file_that_is_written_wrong() -> None:
    beside = {"shop.toml": SHOP.replace("./web", "."), "Dockerfile": "FROM scratch", "api.toml": "[container.api]\n"}
    raw = {path: text.encode() for path, text in beside.items()}
    assert load(raw, NODE).broken == {"api.toml": "api"}
    inside = {**FILES, "web/api.toml": "[containers.api]\nimge = 1\n", "web/ill.toml": "["}
    raw = {path: text.encode() for path, text in inside.items()}
    assert load(raw, NODE).broken == {"web/api.toml": "api", "web/ill.toml": "ill"}


def test_a_reading_that_is_kept_still_sees_a_changed_context() -> None:
    cache = Cache()
    before = read(FILES, cache=cache).apps["shop"]
    assert read({**FILES, "other.txt": "y"}, cache=cache).apps["shop"] is before
    after = read({**FILES, "web/src/main.c": "other"}, cache=cache).apps["shop"]
    assert key(after) == key(read({**FILES, "web/src/main.c": "other"}).apps["shop"]) != key(before)
    moded = read(FILES, frozenset({"web/start.sh"}), cache)
    assert key(moded.apps["shop"]) == key(read(FILES, frozenset({"web/start.sh"})).apps["shop"])


def test_a_node_that_forbids_the_hosts_network_forbids_it_to_builds() -> None:
    facts = NodeFacts("n", vars=NODE.vars, forbid=frozenset({"host-network"}))
    files = {path: text.encode() for path, text in FILES.items()}
    assert not load(files, facts).problems, "they have a network of their own"
    files["shop.toml"] = SHOP.replace("[containers", 'network = "host"\n[containers').encode()
    (problem,) = load(files, facts).problems
    assert str(problem) == (
        "shop.toml:8: images.web.network: host is forbidden by the rule 'host-network' in [policy] forbid of "
        "agent.toml"
    )
    files["shop.toml"] = SHOP.replace("[containers", 'network = "none"\n[containers').encode()
    assert not load(files, facts).problems


def test_a_node_that_forbids_builds_loads_no_app_that_has_one() -> None:
    facts = NodeFacts("n", vars=NODE.vars, forbid=frozenset({"builds"}))
    files = {path: text.encode() for path, text in FILES.items()}
    spec = load({**files, "plain.toml": b"[volumes.data]\n"}, facts)
    assert list(spec.apps) == ["plain"]
    assert "images.web: building is forbidden by the rule 'builds'" in str(spec.problems[0])


# Each as moby's patternmatcher has it; tests/live/test_build.py holds the same against a real build.
PATHS = ["a", "a.md", "b/a", "b/a.md", "b/c/a", "b/c/d.txt", "README.md", "x[1]", "x1", "tmp/keep/f", "tmp/f", ".env"]


@pytest.mark.parametrize(
    ("text", "path", "out"),
    [
        ("[a-c]x", "bx", True),
        ("[^a-c]x", "bx", False),
        ("[a-]x", "-x", True),
        ("[a&&b]x", "&x", True),
        ("[a||b~~]x", "~x", True),
        ("[--0]x", ".x", True),
        ("[[]x", "[x", True),
    ],
)
def test_a_set_of_an_ignorefile_means_what_it_says(text: str, path: str, out: bool) -> None:
    assert Ignore(text).leaves_out(path) is out


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("", PATHS),
        ("# a\n\n  \n", PATHS),
        ("a", [path for path in PATHS if path != "a"]),
        ("/a\n./b/\n", [path for path in PATHS if path != "a" and not path.startswith("b/")]),
        ("*", []),
        ("**", []),
        ("*.md\n!README.md", [path for path in PATHS if path != "a.md"]),
        ("**/*.md", [path for path in PATHS if not path.endswith(".md")]),
        ("**/a", [path for path in PATHS if path.rpartition("/")[2] != "a"]),
        ("*/a", [path for path in PATHS if path != "b/a"]),
        ("b/**/d.txt", [path for path in PATHS if path != "b/c/d.txt"]),
        ("b/**", [path for path in PATHS if not path.startswith("b/")]),
        ("tmp\n!tmp/keep", [path for path in PATHS if path != "tmp/f"]),
        ("!a\n*\n!b\nb/c", ["b/a", "b/a.md"]),
        ("x[0-9]", [path for path in PATHS if path != "x1"]),
        (r"x\[1\]", [path for path in PATHS if path != "x[1]"]),
        ("x[^1]", PATHS),
        ("?", [path for path in PATHS if path != "a" and not path.startswith("b/")]),
        ("\ufeffa\n", [path for path in PATHS if path != "a"]),
        ("b/../a", [path for path in PATHS if path != "a"]),
        (".*", [path for path in PATHS if path != ".env"]),
    ],
)
def test_an_ignorefile_leaves_out_what_docker_leaves_out(text: str, left: list[str]) -> None:
    ignore = Ignore(text)
    assert [path for path in PATHS if not ignore.leaves_out(path)] == left


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("FROM debian:12\n", ["debian:12"]),
        ("from --platform=linux/amd64 a AS b\nFROM b\nFROM B as c\nCOPY --from=b /x /y\n", ["a"]),
        ("FROM scratch\nCOPY --chown=1:1 --from=images.x /x /y\nCOPY --from=0 / /\n", ["images.x"]),
        ("ARG A=1\nARG B=d:${A}\nFROM $B\nARG A=2\nFROM e:$A\n", ["d:9", "e:9"]),
        ("ARG A\nARG C=c\nFROM ${A}/${B:-none}${C:+some}${C:-no}\n", ["9/nonesomec"]),
        ("# escape=`\nFROM a `\n# in between\n  AS b\nFROM b\n", ["a"]),
        ("FROM a\nRUN <<EOF\nFROM no\nEOF\nRUN --mount=type=bind,from=m,target=/m x\n", ["a", "m"]),
        ('FROM a \\\n\n # c\n AS b\nRUN echo \\\n FROM no\nFROM "b"\n', ["a"]),
        ("ADD x y\nFROM\n", []),
        ("FROM\ta\nCOPY \t--from=b / /\n", ["a", "b"]),
        ("FROM a\nRUN --mount=type=bind,\\\nfrom=im\\\nages.m,target=/m x\n", ["a", "images.m"]),
        ("FROM a\nRUN cat <<<word\nFROM b\nRUN echo $((x<<y)) 1<<z\nCOPY --from=c / /\n", ["a", "b", "c"]),
        ("FROM a\nRUN cat <<ONE 3<<-TWO > /x\nFROM no\nONE\nFROM no\n\tTWO\nFROM b\n", ["a", "b"]),
        ("FROM a\nRUN copy --from=b --mount=type=bind,from=c\nCOPY --link --from=d / /\n", ["a", "d"]),
    ],
)
def test_a_dockerfile_names_the_images_it_starts_from(text: str, names: list[str]) -> None:
    assert [use.name for use in images_in(text, {"A": "9"})] == names


def test_an_image_is_found_by_the_line_of_its_instruction() -> None:
    assert images_in("# c\n\nFROM a\nRUN x \\\n y\nFROM b\n", {}) == (Use(3, "a", "a"), Use(6, "b", "b"))
