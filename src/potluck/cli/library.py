"""The verbs of an adapter library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from potluck.cli.options import JsonOption, flag
from potluck.terminal import results, table, telling, warn, write_json

library = typer.Typer(help="Keep adapters with what they are good for, find them, and route between them.")

LibraryArgument = Annotated[str, typer.Argument(metavar="LIBRARY", help="A folder, or a URL such as `s3://bucket/x`.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="An entry.")]
BaseOption = Annotated[Path, typer.Option(help="The model folder that the adapters were trained on.")]
TextOption = Annotated[Path, typer.Option(help="A folder of text files, or one file; it stays here.")]
RegistryOption = Annotated[
    str,
    typer.Option(
        envvar="POTLUCK_REGISTRY", show_envvar=False, help="`postgresql://...` or `sqlite:///FILE`; beside the entries."
    ),
]

_FITS = {
    "related": "none is of this kind, the nearest is related: {:.2f} of the distance that lies between entries",
    "unlike": "no entry fits: the nearest is as far ({:.2f}) as entries are from each other",
    None: "too few entries to tell whether one fits",
}


class By(StrEnum):
    """How tokens are routed."""

    evidence = "evidence"
    arrow = "arrow"


@library.command()
def add(
    place: LibraryArgument,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder that PEFT wrote, or potluck.")],
    base: BaseOption,
    data: Annotated[Path, typer.Option(help="The text it was trained on: a folder, or one file; it stays here.")],
    name: Annotated[str, typer.Option(help="Of the entry; the folder's if left out.")] = "",
    who: Annotated[str, typer.Option(help="Whose it is.")] = "",
    licence: Annotated[str, typer.Option(help="What others may do with it.")] = "",
    spec_points: Annotated[int, typer.Option(min=1, max=100, help="Points of the specification, at most.")] = 100,
    noise: Annotated[
        float, typer.Option(min=0.0, max=0.2, help="Added to each coordinate of these points; 0.02 costs nothing.")
    ] = 0.0,
    public: Annotated[
        Path | None,
        typer.Option(help="Public text, the same for all: give away how often tokens stand in yours."),
    ] = None,
    registry: RegistryOption = "",
    replace: Annotated[bool, flag("--replace", help="Take the place of another entry of this name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put an adapter into a library, with a specification of its text; the first entry begins the library."""
    from potluck.compose.library.commands import Offer, Place
    from potluck.compose.library.commands import add as put

    offer = Offer(
        adapter=adapter, base=base, data=data, name=name, who=who, licence=licence, points=spec_points, noise=noise,
        public=public, replace=replace,
    )  # fmt: skip
    with telling() as say:
        done = put(Place(place, registry), offer, say)
    _print(done, as_json)


@library.command()
def search(
    place: LibraryArgument,
    base: BaseOption,
    data: TextOption,
    mixture: Annotated[bool, flag("--mixture", help="Which entries the text is mixed of, and how.")] = False,
    top: Annotated[int, typer.Option(min=1, help="So many entries, at most.")] = 5,
    registry: RegistryOption = "",
    as_json: JsonOption = False,
) -> None:
    """Find the adapters whose text is like this text."""
    from potluck.compose.library.commands import Place
    from potluck.compose.library.commands import search as look

    with telling() as say:
        found = look(Place(place, registry), base, data, top, mixture, say)
    if as_json:
        write_json(found)
        return
    columns = ("name", "share", "distance", "rank", "who", "licence") if mixture else (
        "name", "distance", "rank", "who", "licence"
    )  # fmt: skip
    _table(found["matches"], columns)
    if found["fit"] != "alike":
        warn([_FITS[found["fit"]].format(found["closeness"] or 0)])
    _warn_of_damaged(found)


@library.command("list")
def entries(place: LibraryArgument, registry: RegistryOption = "", as_json: JsonOption = False) -> None:
    """Name the adapters of a library."""
    from potluck.compose.library.commands import Place
    from potluck.compose.library.commands import entries as look

    found = look(Place(place, registry))
    if as_json:
        write_json(found)
        return
    _table(found["entries"], ("name", "rank", "parameters", "gain", "who", "licence", "noise", "added"))
    _warn_of_damaged(found)


@library.command()
def get(
    place: LibraryArgument,
    name: NameArgument,
    out: Annotated[Path, typer.Option(help="The folder to write, a new one.")],
    registry: RegistryOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write an adapter to a folder that PEFT and vLLM load."""
    from potluck.compose.library.commands import Place
    from potluck.compose.library.commands import get as fetch

    _print(fetch(Place(place, registry), name, out), as_json)


@library.command()
def remove(
    place: LibraryArgument, name: NameArgument, registry: RegistryOption = "", as_json: JsonOption = False
) -> None:
    """Take an adapter out of a library."""
    from potluck.compose.library.commands import Place
    from potluck.compose.library.commands import remove as take_out

    _print(take_out(Place(place, registry), name), as_json)


@library.command()
def cluster(
    place: LibraryArgument,
    k: Annotated[int, typer.Option("--k", min=1, help="Number of groups.")],
    merge: Annotated[
        str | None, typer.Option(metavar="METHOD", help="Merge each group to one adapter, as `potluck merge` does.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the merged adapters, at most.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the merged adapters, a new one.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides where clustering begins.")] = 0,
    registry: RegistryOption = "",
    as_json: JsonOption = False,
) -> None:
    """Group a library's adapters by what they do to the base."""
    from potluck.compose.library.commands import Grouping, Place
    from potluck.compose.library.commands import cluster as group

    found = group(Place(place, registry), Grouping(k=k, seed=seed, merge=merge, rank=rank, out=out))
    warn(found["warnings"])
    if as_json:
        write_json(found)
        return
    _table([{"cluster": name, "entries": ", ".join(found["clusters"][name])} for name in found["clusters"]])
    _warn_of_damaged(found)


@library.command()
def route(
    place: LibraryArgument,
    base: BaseOption,
    data: TextOption,
    by: Annotated[By, typer.Option(help="Ask the text so far whose it is, or (Arrow) every token at every map.")] = (
        By.evidence
    ),
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Adapters that a token goes through; all, with Arrow 4.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=1e-6, help="Of Arrow: the larger, the more alike their shares; 1 if left out.")
    ] = None,
    nearest: Annotated[
        int | None, typer.Option(min=1, help="Between so many entries, those nearest to the text.")
    ] = None,
    registry: RegistryOption = "",
    as_json: JsonOption = False,
) -> None:
    """Measure a text with every token routed through the library's adapters."""
    from potluck.compose.library.commands import Place, Routing
    from potluck.compose.library.commands import route as measure

    with telling() as say:
        found = measure(Place(place, registry), base, data, Routing(by.value, top_k, temperature, nearest), say)
    warn(found["warnings"])
    if as_json:
        write_json(found)
        return
    _table([{"adapter": name, "share": share} for name, share in found["shares"].items()])
    _print({key: found[key] for key in ("tokens", "base_nats", "routed_nats")}, False)
    _warn_of_damaged(found)


def _print(result: Mapping[str, Any], as_json: bool) -> None:
    warn(result.get("warnings", ()))
    if as_json:
        write_json(result)
        return
    for key, value in result.items():
        if key != "warnings" and value not in ("", None, {}):
            results().print(f"{key.replace('_', ' ')}: {_said(value)}")


def _table(rows: Iterable[Mapping[str, Any]], columns: Iterable[str] = ()) -> None:
    rows = list(rows)
    names = list(columns) or list(rows[0])
    shown = table(*names)
    for row in rows:
        shown.add_row(*(_said(row[name]) for name in names))
    results().print(shown)


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _warn_of_damaged(found: Mapping[str, Any]) -> None:
    for reason in found["damaged"].values():
        warn([f"left out: {reason}"])
