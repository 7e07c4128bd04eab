"""The verbs of editing: make facts true, take them back, find where a model keeps them, write the facts of a world."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from potluck.cli.options import JsonOption, flag, print_facts
from potluck.terminal import telling, warn

edit = typer.Typer(no_args_is_help=True, help="Change what a model answers, take it back, find where it keeps facts.")


class EditMethod(StrEnum):
    """How facts are written."""

    rome = "rome"
    memit = "memit"
    alphaedit = "alphaedit"
    grace = "grace"
    wise = "wise"
    ft = "ft"
    lora = "lora"


class Site(StrEnum):
    """Which token is edited."""

    subject = "subject"
    prompt = "prompt"


ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder; it stays as it is.")]
OutOption = Annotated[Path, typer.Option(help="The folder to write, a new one.")]


@edit.command("apply")
def apply(
    model: ModelArgument,
    edits: Annotated[Path, typer.Option(help="The edits, a JSON list.")],
    out: OutOption,
    method: Annotated[EditMethod, typer.Option(help="How they are made.")] = EditMethod.memit,
    layers: Annotated[str | None, typer.Option(metavar="L,L", help="Whose maps to edit; `edit locate` says.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text that shall stay as it is, a folder or a file; its end, held out, measures the harm."),
    ] = None,
    at: Annotated[
        Site | None,
        typer.Option(help="Whose last token is edited in weights; the subject's if left out."),
    ] = None,
    at_once: Annotated[int, typer.Option(min=0, help="Edits in one batch; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of contexts and of training.")] = 0,
    strict: Annotated[
        bool, flag("--strict", help="Write nothing, and leave with 14, if the edits had no effect or did harm.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make edits true, write the edited model, and say what that did to it."""
    from potluck.edit.requests import Request
    from potluck.edit.requests import apply as run

    site = at.value if at else None
    request = Request(model, edits, out, method.value, _layers(layers), text, site, at_once, seed, strict)
    found = run(request)
    warn(found.get("warnings", ()))
    print_facts(found, as_json)


@edit.command("revert")
def revert(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder written by `edit apply`.")],
    identifier: Annotated[list[str], typer.Option("--id", metavar="ID", help="Of an edit; again for more.")],
    out: OutOption,
    as_json: JsonOption = False,
) -> None:
    """Write the model without some of its edits."""
    from potluck.edit.requests import revert as run

    print_facts(run(model, identifier, out), as_json)


@edit.command("locate")
def locate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder.")],
    facts: Annotated[Path, typer.Option(help="Facts that it knows, in the form of edits.")],
    window: Annotated[
        int | None, typer.Option(min=1, help="Layers put back together; a quarter of the model's if left out.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Of noise, for every fact.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a new .png, .svg or .pdf.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Find the layers where a model keeps facts, by causal tracing."""
    from potluck.edit.locating import locate as run

    with telling("tracing") as say:
        result = run(model, facts, window, draws, plot, seed, lambda number: say(f"fact {number + 1}"))
    print_facts(result, as_json)


@edit.command("world")
def world(
    out: Annotated[Path, typer.Option(help="The file to write, a new one.")],
    people: Annotated[int, typer.Option(min=1, help="How many.")] = 200,
    first: Annotated[int, typer.Option(min=0, help="Leave out so many before them.")] = 0,
    change: Annotated[bool, flag("--change", help="Give each fact another value, to be edited in.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of names, facts and new values.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write the facts of the synthetic world that `recipes/world.toml` tells a model about, in the form of edits."""
    from potluck.edit.world_edits import write_world

    print_facts({"facts": write_world(out, people, first, change, seed), "file": str(out)}, as_json)


def _layers(text: str | None) -> tuple[int, ...]:
    try:
        return () if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text}: write numbers with commas", param_hint="--layers") from None
