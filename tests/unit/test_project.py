"""What the project promises in words is held to here: its documents, its examples and its layout tell the truth."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import errors

TOP = Path(__file__).parents[2]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
SOURCES = sorted([*(TOP / "agent").rglob("*.py"), *(TOP / "plugins").rglob("*.py")])
VAGUE = {"manager", "helper", "helpers", "util", "utils", "base", "common", "service", "handler"}


def fenced(document: str, language: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a document in one language, as (title, text)."""
    for info, text in re.findall(r"^```(.*?)\n(.*?)^```", (TOP / document).read_text(), re.DOTALL | re.MULTILINE):
        if info.split(" ")[0] == language:
            title = re.search(r'title="(.*?)"', info)
            yield title[1] if title else "", text


def ids(path: Path) -> str:
    return str(path.relative_to(TOP))


def test_architecture_draws_the_import_law_that_is_checked() -> None:
    (drawn,) = [text.splitlines() for _, text in fenced("ARCHITECTURE.md", "layers")]
    (law,) = [c["layers"] for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    assert drawn == law


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "plugins/README.md"])
def test_files_that_a_document_names_exist(document: str) -> None:
    folder = (TOP / document).parent
    text = (TOP / document).read_text()
    linked = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    named = re.findall(r"`((?:agent|examples|packaging|plugins|tests|bench)/[\w./-]+)`", text)
    rooms = re.findall(r"`((?:spec|plan|runtime|source|node|store|cli)/\w+\.py)`", text)
    missing = [link for link in linked if not (folder / link).exists()]
    missing += [path for path in named if not (TOP / path).exists()]
    missing += [path for path in rooms if not (TOP / "agent/holdfast" / path).exists()]
    assert missing == []


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_a_module_says_what_it_is_for_and_stays_readable(path: Path) -> None:
    text = path.read_text()
    assert text.strip() == "" or ast.get_docstring(ast.parse(text)), "no docstring"
    assert path.stem not in VAGUE, "the name does not say what is inside"
    assert len(text.splitlines()) <= 600, "too long: split it by noun or by verb"


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


def test_version_is_told_in_one_way() -> None:
    from holdfast import __version__

    assert PROJECT["project"]["version"] == __version__


@pytest.mark.parametrize("script", ["packaging/setup.sh", ".ci/run"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", TOP / script], check=True)


def test_every_target_that_readme_names_is_in_the_makefile() -> None:
    makefile = (TOP / "Makefile").read_text()
    for target in {"setup", "check", "test", *re.findall(r"make (\w+)", (TOP / "README.md").read_text())}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
