"""What the verbs share: arguments, options, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def flag(*names: str, help: str) -> Any:
    """An option that is there or not: it takes no value."""
    return typer.Option(*names, metavar="", help=help)


RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a TOML file.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key of the recipe.")
]
JsonOption = Annotated[bool, flag("--json", help="Print the result as JSON.")]
RoundOption = Annotated[int | None, typer.Option("--round", help="Use the checkpoint of this round, not the newest.")]
BestOption = Annotated[bool, flag("--best", help="Use the checkpoint with the lowest held-out loss.")]


def progress() -> Console:
    """Where progress goes: standard error."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Say on standard error how far slow work is: one line that changes on a terminal, else a line each time."""
    console = progress()
    with console.status("...") as status:  # shows itself on terminals only
        yield status.update if console.is_terminal else partial(console.print, soft_wrap=True, highlight=False)


def parsed(parse: Callable[[str], T], text: str, option: str) -> T:
    """An option read by a function that raises ValueError."""
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def print_result(result: Mapping[str, Any], as_json: bool) -> None:
    """A result, as a table or as JSON; its ``warnings`` on standard error, too."""
    warn(result.get("warnings", ()))
    if as_json:
        print_json(result)
    else:
        from potluck.show import show_result

        show_result({key: value for key, value in result.items() if key != "warnings"})


def warn(warnings: Iterable[str]) -> None:
    """Say on standard error what is doubtful of a result."""
    if warnings:
        from rich.markup import escape

        for text in warnings:
            progress().print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True, highlight=False)


def print_facts(result: Mapping[str, Any], as_json: bool) -> None:
    """A result that is all figures."""
    if as_json:
        print_json(result)
    else:
        from potluck.show import show_facts

        show_facts(result)


def print_json(result: Mapping[str, Any]) -> None:
    """A result as JSON, on standard output."""
    typer.echo(json.dumps(result, indent=2, default=str))
