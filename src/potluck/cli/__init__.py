"""The verbs: arguments in, one call of a room, the result on standard output."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from potluck import __version__
from potluck.cli import composing, edit, forget, runs
from potluck.cli.options import flag
from potluck.errors import PotluckError
from potluck.terminal import labelled, progress, write, write_json

READER_GONE = 141  # as a shell reports SIGPIPE
app = typer.Typer(
    name="potluck",
    help="Train language models together: every participant keeps its own data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(runs.verbs)
app.add_typer(composing.verbs)
app.add_typer(edit.edit, name="edit")
app.add_typer(forget.verbs)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, flag("--version", help="Print the version.")] = False) -> None:
    if version:
        write(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: errors become one message and an exit code."""
    try:
        try:
            app()
        except PotluckError as error:
            sys.exit(_failed(str(error), error.hint, error.exit_code))
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as end:
        if not any(isinstance(cause, BrokenPipeError) for cause in (end, end.__context__)):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be written
        sys.exit(READER_GONE)


def _failed(message: str, hint: str, code: int) -> int:
    if "--json" in sys.argv:
        write_json({"error": message, "hint": hint, "exit_code": code})
    console = progress()
    labelled(console, *(("stopped", "yellow") if code == 130 else ("error", "bold red")), message)
    if hint:
        console.print(hint, style="dim")
    return code
