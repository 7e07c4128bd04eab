"""What is shown to people is shown as it is, whoever named it."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import potluck
from potluck.terminal import agreed, harmless, labelled, results, table, warn

SOURCE = Path(potluck.__file__).parent
ELSEWHERE = sorted(set(SOURCE.rglob("*.py")) - {SOURCE / "terminal.py"})
WRITERS = re.compile(r"(print|Console|Table|(Prompt|Confirm)\..*|typer\.(echo|secho|confirm|prompt)|.*\.from_markup)")
METHODS = re.compile(r".*(console|progress\(\)|results\(.*\))\.(input|status)", re.I)
STYLED = re.compile(r"\[(/|/?(bold|dim|italic|underline|reverse|black|red|green|yellow|blue|magenta|cyan|white))\]")

PIECES = st.sampled_from(
    ["[y/N]", "potluck[report]", "[::1]:4222", "runs[/b]", "[/]", "[bold]", ":smile:", "\\[", "[red]x", "\x1b[31m"]
)
TEXTS = st.lists(st.one_of(PIECES, st.text("ab [/]:\\é漢\x07\x9b\u202e", max_size=6)), max_size=6).map("".join)
POTLUCK = [sys.executable, "-c", "from potluck.cli import main; main()"]


@pytest.mark.parametrize("source", ELSEWHERE, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_one_module_writes_to_people(source: Path) -> None:
    """Any other console, table or question would read markup again: take those of potluck.terminal."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called, where = ast.unparse(node.func), f"{source}:{node.lineno}"
            assert not (WRITERS.fullmatch(called) or METHODS.fullmatch(called)), where
            assert not any(word.arg in ("markup", "emoji") for word in node.keywords), where
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not STYLED.search(node.value), f"{source}:{node.lineno}: style stands beside a text, not in it"


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_a_line_is_its_text(text: str) -> None:
    shown = results(file=io.StringIO(), width=20)
    shown.print(text)
    labelled(shown, "error", "bold red", text)
    warn([text], shown)
    plain = harmless(text)
    assert shown.file.getvalue() == f"{plain}\nerror: {plain}\nwarning: {plain}\n"  # type: ignore[attr-defined]
    assert plain.isprintable()


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_a_table_keeps_every_letter(text: str) -> None:
    """However narrow: what does not fit goes on below."""
    shown, made = results(file=io.StringIO(), width=24), table("", title=text)
    made.add_row(text)
    shown.print(made)
    kept = "".join(shown.file.getvalue().split())  # type: ignore[attr-defined]
    assert kept == 2 * "".join(harmless(text).split())


def test_a_terminal_obeys_nobody_else() -> None:
    shown = results(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=60)
    labelled(shown, "error", "bold red", "\x1b]0;owned\x07 \x9b2J \ud800")
    assert shown.file.getvalue() == "\x1b[1;31merror:\x1b[0m ]0;owned 2J \ufffd\n"  # type: ignore[attr-defined]


def test_a_question_shows_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Yes\nmaybe\n"))
    shown = results(file=io.StringIO())
    assert agreed(shown, "join [run]?")
    assert not agreed(shown, "join?")
    assert not agreed(shown, "nobody there?")
    assert shown.file.getvalue() == "join [run]? [y/N] join? [y/N] nobody there? [y/N] "  # type: ignore[attr-defined]


def test_errors_keep_brackets_and_how_to_install(tmp_path: Path) -> None:
    folder = tmp_path / "a[/b] [bold]"
    folder.mkdir(parents=True)
    (folder / "r.toml").write_text(
        'version = 1\nname = "r"\nparticipants = [{ name = "ada", source = { package = "asyncio" } }]\n'
    )
    blocked = "import sys; sys.modules['matplotlib'] = None; from potluck.cli import main; main()"
    link = ["--uplink", "1mbit", "--downlink", "1mbit", "--tokens-per-second", "9", "--plot", "p.svg"]
    for command, expected in (
        ([*POTLUCK, "check", str(folder / "none.toml")], f"error: {folder}/none.toml: there is no such recipe"),
        ([*POTLUCK, "report", str(folder)], f"error: {folder}: "),
        ([sys.executable, "-c", blocked, "plan", str(folder / "r.toml"), *link], "pip install 'potluck[report]'"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        assert done.returncode > 2, done.stderr
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_help_keeps_its_brackets() -> None:
    """Typer reads help as markup: what every verb and option says must come out."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from docs._generate import leaves
    from potluck.cli import app

    runner = CliRunner(env={**os.environ, "COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    for name, command in leaves(get_command(app)):
        page = " ".join(re.sub(r"[│╭╰─╮╯]", " ", runner.invoke(app, [*name.split(), "--help"]).output).split())
        for said in (command.help, *(parameter.help for parameter in command.params if hasattr(parameter, "help"))):
            assert " ".join((said or "").split()) in page, f"{name}: {said}"
