"""What is printed: nothing that comes from elsewhere controls the terminal."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from holdfast.cli import render
from holdfast.runtime.logs import LogLine

CLI = Path(render.__file__).parent
NASTY = "\x1b]0;title\x07\x1b[2J\x9b31m\rx\x08\x7f\u202egnp\udcff"
SHOWN = r"\x1b]0;title\x07\x1b[2J\x9b31m\rx\x08\x7f\u202egnp\udcff"


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_control_sequences_are_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    render.echo(f"failed: {NASTY}")
    assert capsys.readouterr().out == f"failed: {SHOWN}\n"


def test_a_message_of_several_lines_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    render.echo("a.toml:1: x\n\tb.toml:2: y é 😀")
    assert capsys.readouterr().out == "a.toml:1: x\n\tb.toml:2: y é 😀\n"


@pytest.mark.usefixtures("on_terminal")
def test_our_colours_are_kept_and_those_of_others_are_not() -> None:
    painted = render.paint(f"\x1b[32m{NASTY}", render.BAD)
    assert render.terminal(painted) == f"\x1b[31m\\x1b[32m{SHOWN}\x1b[0m"


@pytest.mark.usefixtures("on_terminal")
def test_cells_and_notes_stay_in_their_lines_and_columns(capsys: pytest.CaptureFixture[str]) -> None:
    render.table(["NAME", "STATE"], [["a\nb\x1b[2J", render.state("running")], ["c", NASTY]], [["note\nline"]])
    lines = (
        capsys.readouterr().out.replace("\x1b[90m", "").replace("\x1b[32m", "").replace("\x1b[0m", "").splitlines()
    )
    assert lines == ["NAME         STATE", r"a\nb\x1b[2J  running", r"    note\nline", f"c            {SHOWN}"]


def test_details_stay_in_their_lines() -> None:
    assert list(render.pairs({"a": "x\ny", "b": ["\x1b[2J"], "c": {"\n": "z"}})) == [
        *(r"a: x\ny", r"b: \x1b[2J", "c:", r"  \n: z")
    ]


def test_json_holds_the_same_text_and_nothing_to_escape() -> None:
    text = render.json_text({"a": NASTY})
    assert json.loads(text) == {"a": NASTY}
    assert render.terminal(text) == text


def test_output_of_containers_is_passed_on_but_for_their_names(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    from holdfast.cli.lines import show

    data = b"\x1b[31mred\xff"
    show([LogLine("2026-11-21T07:00:00+00:00", "stdout", data, target="a/\x1b[2J")], timestamps=False, follow=False)
    assert capfdbinary.readouterr().out == rb"a/\x1b[2J  " + data + b"\n"


def test_nobody_else_prints() -> None:
    """Whoever has to write bytes as they are writes to a buffer; everything else goes through `render.echo`."""
    found = []
    for path in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"):
                    found.append(f"{path.name}:{node.lineno}")
    assert {each.partition(":")[0] for each in found} == {"render.py"}


def test_what_the_node_itself_answers_is_printed_as_what_comes_from_the_agent() -> None:
    made: dict[str, object] = {"a": (), "b": ("x", "y"), "c": ({"d": 1, "e": ()}, {"f": ()})}
    assert list(render.pairs(made)) == ["b: x, y", "c:", "  - d: 1", "  - "]
    assert list(render.pairs(json.loads(json.dumps(made)))) == list(render.pairs(made))
