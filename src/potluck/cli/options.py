"""What the verbs share: arguments, options, and how results are printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from potluck.terminal import warn, write_json

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
        write_json(result)
    else:
        from potluck.show import show_result

        show_result({key: value for key, value in result.items() if key != "warnings"})


def print_facts(result: Mapping[str, Any], as_json: bool) -> None:
    """A result that is all figures."""
    if as_json:
        write_json(result)
    else:
        from potluck.show import show_facts

        show_facts(result)
