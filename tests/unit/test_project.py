"""What the project promises in words is held to here: its documents, its examples and its layout tell the truth."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from holdfast import errors
from holdfast.cli.entry import holdfast as command
from holdfast.config import FIXED, AgentTable, load_config
from holdfast.keys import Table
from holdfast.spec import NodeFacts, load
from holdfast.spec.policy import RULES

TOP = Path(__file__).parents[2]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
SOURCES = sorted([*(TOP / "agent").rglob("*.py"), *(TOP / "plugins").rglob("*.py")])
#: Since 3.11.4 (tarfile, shutil), 3.11.9 (xml) and 3.11.10 (email): type checkers take them for all of 3.11.
NEW_ARGUMENTS = {
    **{name: {"filter"} for name in ("extract", "extractall", "unpack_archive")},
    **{name: {"strict"} for name in ("getaddresses", "parseaddr")},
}
NEW_NAMES = {
    *("data_filter", "tar_filter", "fully_trusted_filter", "FilterError"),
    *("AbsolutePathError", "OutsideDestinationError", "SpecialFileError", "AbsoluteLinkError"),
    *("LinkOutsideDestinationError", "SetReparseDeferralEnabled", "GetReparseDeferralEnabled"),
}
VAGUE = {"manager", "helper", "helpers", "util", "utils", "base", "common", "service", "handler"}


def fenced(document: str, language: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a document in one language, as (title, text)."""
    for info, text in re.findall(r"^```(.*?)\n(.*?)^```", (TOP / document).read_text(), re.DOTALL | re.MULTILINE):
        if info.split(" ")[0] == language:
            title = re.search(r'title="(.*?)"', info)
            yield title[1] if title else "", text


def in_force(sample: str) -> str:
    """A sample of agent.toml with every commented key in force; of `state`, which has two forms, the table."""
    return re.sub(r"^#(?=\S)", "", re.sub(r"^state = .*$", "", sample, flags=re.MULTILINE), flags=re.MULTILINE)


def keys_of_agent_toml() -> Iterator[str]:
    for name, about in AgentTable.model_fields.items():
        table = about.annotation
        if isinstance(table, type) and issubclass(table, Table):
            yield from (f"{name}.{key}" for key in table.model_fields)
        else:
            yield name


def keys_written(table: Mapping[str, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict) and prefix + key not in known:
            yield from keys_written(value, known, f"{prefix}{key}.")
        else:
            yield prefix + key


def ids(path: Path) -> str:
    return str(path.relative_to(TOP))


def test_architecture_draws_the_import_laws_that_are_checked() -> None:
    drawn = [text.splitlines() for _, text in fenced("ARCHITECTURE.md", "layers")]
    laws = [c["layers"] for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    assert drawn == laws


def test_no_two_classes_of_images_have_one_name() -> None:
    sources = [path.read_text() for path in (TOP / "agent/holdfast/images").rglob("*.py")]
    names = re.findall(r"^class _?(\w+)", "\n".join(sources), re.MULTILINE)
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "plugins/README.md"])
def test_files_that_a_document_names_exist(document: str) -> None:
    folder = (TOP / document).parent
    text = (TOP / document).read_text()
    linked = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    named = re.findall(r"`((?:agent|docs|examples|packaging|plugins|tests|bench)/[\w./-]+)`", text)
    rooms = re.findall(r"`((?:spec|plan|runtime|source|node|store|cli|images|status|api)/\w+\.py)`", text)
    missing = [link for link in linked if not (folder / link).exists()]
    missing += [path for path in named if not (TOP / path).exists()]
    missing += [path for path in rooms if not (TOP / "agent/holdfast" / path).exists()]
    assert missing == []


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_a_module_says_what_it_is_for_and_stays_readable(path: Path) -> None:
    text = path.read_text()
    assert text == "" or text.startswith('"""'), "no docstring"
    assert path.stem not in VAGUE, "the name does not say what is inside"
    assert len(text.splitlines()) <= 600, "too long: split it by noun or by verb"


def newer_than_debian(text: str) -> Iterator[str]:
    """What a module uses that Python 3.11.2 of Debian 12 lacks and later releases of 3.11 have, as NAME:LINE."""
    if not any(name in text for name in (*NEW_ARGUMENTS, *NEW_NAMES)):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            new = NEW_ARGUMENTS.get(called, set())
            yield from (f"{called}({word.arg}=):{node.lineno}" for word in node.keywords if word.arg in new)
        elif isinstance(node, ast.Attribute) and node.attr in NEW_NAMES:
            yield f"{node.attr}:{node.lineno}"
        elif isinstance(node, ast.alias) and node.name in NEW_NAMES:
            yield f"{node.name}:{node.lineno}"


def pretended(text: str) -> Iterator[str]:
    """Where a test waits for time to pass, or replaces something of ours that acts, as WHAT:LINE.

    A constant in capitals may be another one: that is a limit or a place, and what works with it is the real thing.
    """
    if not re.search("mock|sleep|setattr", text):
        return
    tree, ours = ast.parse(text), {"holdfast", "holdfast_plugins"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None) or ""
            whole = [f"{module}.{name.name}".strip(".") for name in node.names]
            yield from (f"{each}:{node.lineno}" for each in whole if re.search(r"(^|\.|_)mock|^time\.sleep$", each))
            if whole[0].split(".")[0] in ours:
                ours |= {name.asname or name.name for name in node.names}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        if called == "time.sleep":
            yield f"{called}:{call.lineno}"
        elif called.endswith(".setattr"):
            what = ".".join(ast.unparse(word).strip("'") for word in call.args[: max(len(call.args) - 1, 1)])
            first, _, name = what.partition(".")
            if first in ours and not name.rpartition(".")[2].strip("_").isupper():
                yield f"{what}:{call.lineno}"


TESTS = sorted((TOP / "tests").rglob("*.py"))


def test_no_test_sleeps_or_mocks_code_of_ours() -> None:
    waits = TOP / "tests/ground.py"  # `wait_for`, which everybody uses
    exempt = {waits, TOP / "tests/unit/test_images.py"}
    found = [f"{ids(path)}: {what}" for path in TESTS if path not in exempt for what in pretended(path.read_text())]
    assert found == []


def test_what_is_pretended_is_found() -> None:
    text = """
import time
from unittest import mock
from holdfast.runtime import filling, logs
from holdfast.store import Store
def test(patch, agent):
    time.sleep(1)
    patch.setattr(filling, "_open_below", None)
    patch.setattr("holdfast.store.Store.event", None)
    patch.setattr(Store, "event", None)
    patch.setattr(logs, "_BLOCK", 1)
    patch.setattr(agent, "images", None)
"""
    assert [each.partition(":")[0] for each in pretended(text)] == [
        "unittest.mock", "time.sleep", "filling._open_below", "holdfast.store.Store.event", "Store.event",
    ]  # fmt: skip


@pytest.mark.parametrize("folder", ["agent", "plugins", "examples", "tests", "bench"])
def test_nothing_is_used_that_python_3_11_2_of_debian_12_lacks(folder: str) -> None:
    files = sorted((TOP / folder).rglob("*.py"))
    found = [f"{ids(path)}: {name}" for path in files for name in newer_than_debian(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("archive.extractall(folder, filter='data')", "extractall(filter=):1"),
        ("import tarfile\nkeep = tarfile.data_filter", "data_filter:2"),
        ("from tarfile import FilterError", "FilterError:1"),
        ("unpack_archive(file, filter='data')", "unpack_archive(filter=):1"),
        ("getaddresses(fields, strict=True)", "getaddresses(strict=):1"),
        ("archive.extractall(folder)\nfilter(None, extract)\nzip(a, b, strict=True)", None),
    ],
)
def test_what_python_3_11_2_lacks_is_found(text: str, found: str | None) -> None:
    assert [*newer_than_debian(text)] == ([found] if found else [])


def test_readme_lists_every_exit_code_that_errors_have() -> None:
    def tree(error: type[errors.HoldfastError]) -> Iterator[int]:
        yield error.exit_code
        for child in error.__subclasses__():
            yield from tree(child)

    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", (TOP / "README.md").read_text(), re.MULTILINE)}
    assert documented == {0, *tree(errors.HoldfastError)} - {1}


def test_changelog_has_a_section_for_what_is_not_released_yet() -> None:
    text = (TOP / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{PROJECT['project']['version']}]" in text


def test_changelog_has_each_section_and_each_entry_once() -> None:
    released = re.split(r"^## ", (TOP / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    for release in released:
        sections = re.findall(r"^### (.*)$", release, re.MULTILINE)
        assert sections == [each for each in ("Changed", "Added", "Fixed", "Security") if each in sections]
        entries = re.findall(r"^- .*$", release, re.MULTILINE)
        assert sorted({each for each in entries if entries.count(each) > 1}) == []


def test_version_is_told_in_one_way() -> None:
    from holdfast import __version__

    assert PROJECT["project"]["version"] == __version__


@pytest.mark.parametrize("script", ["packaging/setup.sh", ".ci/run"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", TOP / script], check=True)


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md"])
def test_prose_has_lines_of_at_most_120_columns(document: str) -> None:
    lines = (TOP / document).read_text().splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_readme_says_what_every_dependency_is_for() -> None:
    section = (TOP / "README.md").read_text().partition("## Dependencies")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `([\w-]+)` \| ..", section, re.MULTILINE)
    assert named == [re.match(r"[\w-]+", each)[0] for each in PROJECT["project"]["dependencies"]]  # type: ignore[index]


def test_every_target_that_readme_names_is_in_the_makefile() -> None:
    makefile = (TOP / "Makefile").read_text()
    for target in {"setup", "check", "test", *re.findall(r"make (\w+)", (TOP / "README.md").read_text())}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_sample_agent_toml_loads_as_it_is_and_with_every_key_in_force(tmp_path: Path) -> None:
    sample = (TOP / "packaging/agent.toml").read_text()
    for text in (sample, in_force(sample)):
        (tmp_path / "agent.toml").write_text(text)
        load_config(tmp_path / "agent.toml")


def test_sample_agent_toml_shows_every_key() -> None:
    known = {*keys_of_agent_toml()}
    shown = {*keys_written(tomllib.loads(in_force((TOP / "packaging/agent.toml").read_text())), known)}
    assert shown == known - {"state.directory"}


def test_sample_agent_toml_tells_the_defaults(tmp_path: Path) -> None:
    defaults = [
        line
        for line in (TOP / "packaging/agent.toml").read_text().splitlines()
        if "example" not in line and not line.startswith(("#[state]", "#branch", "#path", "#interval"))
    ]
    (tmp_path / "sample.toml").write_text(in_force("\n".join(defaults)))
    (tmp_path / "empty.toml").write_text("")
    assert load_config(tmp_path / "sample.toml") == load_config(tmp_path / "empty.toml")


def test_sample_agent_toml_marks_what_a_reload_does_not_change() -> None:
    marked = re.findall(r"^#(\w+) = .*# \(restart\)", (TOP / "packaging/agent.toml").read_text(), re.MULTILINE)
    assert {*marked} == {key.rpartition(".")[2] for key in FIXED} - {"plugins"}


def test_sample_agent_toml_names_every_rule_of_the_policy() -> None:
    sample = (TOP / "packaging/agent.toml").read_text()
    assert [rule for rule in RULES if rule not in sample] == []


def test_agent_toml_in_readme_loads(tmp_path: Path) -> None:
    blocks = [text for title, text in fenced("README.md", "toml") if title == "agent.toml"]
    assert blocks
    for text in blocks:
        (tmp_path / "agent.toml").write_text(text)
        load_config(tmp_path / "agent.toml")


def test_state_files_in_readme_load() -> None:
    written = {
        title: text for language in ("toml", "html", "dockerfile") for title, text in fenced("README.md", language)
    }
    files = {title: text.encode() for title, text in written.items() if title != "agent.toml"}
    spec = load({**files, "web.conf": b""}, NodeFacts(name="edge-7", labels={"region": "eu"}))
    assert spec.problems == ()
    assert {*spec.apps} == {"hello", "shop", "databases", "web", "site"}


def test_example_state_loads() -> None:
    folder = TOP / "examples/state"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    spec = load(files, NodeFacts(name="node"))
    assert spec.problems == ()
    assert {*spec.apps} == {"site", "visitor"}


def test_commands_in_readme_exist_with_the_options_they_are_given() -> None:
    blocks = [text for _, text in fenced("README.md", "sh")]
    written = {line.partition(" #")[0].strip() for line in "\n".join(blocks).splitlines()}
    written |= {*re.findall(r"`(holdfast [^`]+)`", (TOP / "README.md").read_text())}
    calls = [line.removeprefix("sudo ").split()[1:] for line in written if re.match(r"(sudo )?holdfast ", line)]
    assert len(calls) > 10
    for words in calls:
        assert_known(command, [word for word in words if not word.isupper() and "…" not in word and "/" not in word])


def assert_known(command: click.Command, words: list[str]) -> None:
    """Follow the words down the commands; raises AssertionError at the first that is neither command nor option."""
    for word in words:
        if word.startswith("-"):
            assert any(word in parameter.opts for parameter in command.params), f"{word} in {words}"
        elif isinstance(command, click.Group):
            found = command.get_command(click.Context(command), word)
            assert found, f"no command {word}: {words}"
            command = found


def test_nothing_deletes_trees_but_by_the_function_that_enters_no_mount() -> None:
    found = [str(path) for path in SOURCES if "rmtree(" in path.read_text()]
    assert not found, f"use files.remove_tree or files.discard_tree: {', '.join(found)}"


def rows(document: str, heading: str) -> Iterator[str]:
    """The rows of the table below a heading."""
    section = (TOP / document).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = [line for line in section.splitlines() if line.startswith("|")]
    assert len(found) > 2, f"{document} has no table below '{heading}'"
    yield from found[2:]


@pytest.mark.parametrize(
    "heading",
    [
        "Follow one key from file to kernel and back",
        "Add an action",
        "Add a key to a container",
        "Add a kind of driver",
    ],
)
def test_what_the_lists_of_architecture_name_is_in_the_files_that_they_name(heading: str) -> None:
    for row in rows("ARCHITECTURE.md", heading):
        words = re.findall(r"`([^`]+)`", row)
        paths = [word for word in words if re.fullmatch(r"[\w/-]+(\.py|\.md|/)", word)]
        places = [[top / path for top in (TOP, TOP / "agent/holdfast") if (top / path).exists()] for path in paths]
        assert all(places), f"{heading}: no such file: {row}"
        texts = [place.read_text() for (place,) in places if place.is_file()]
        named = re.findall(r"`(\w+)`", row.split("|")[2])  # the column that says where
        for name in named if texts else ():
            assert any(re.search(rf"\b{name}\b", text) for text in texts), f"{heading}: no `{name}` there: {row}"
