"""Write reference/recipe.md and reference/cli.md from the schema and the verbs: ``python docs/_generate.py``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.main import get_command

from potluck.cli import app
from potluck.models.shapes import PRESETS, parameter_count
from potluck.recipe.load import tables_in
from potluck.recipe.part import Part
from potluck.recipe.schema import Recipe, Shape

REFERENCE = Path(__file__).parent / "reference"
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
TYPES = {int: "integer", float: "number", str: "text", bool: "true or false"}
VOCABULARIES = (2_048, 32_000, 50_257)


def recipe_page() -> str:
    """Every table of a recipe with its keys, the presets, and a participant's own part."""
    done: set[type[BaseModel]] = set()
    tables = [*sections("", Recipe, done)]
    shapes = [
        (f"`{name}`", *map(toml, dict(shape).values()), *(f"{parameter_count(shape, v):,}" for v in VOCABULARIES))
        for name, shape in PRESETS.items()
    ]
    head = ("preset", *Shape.model_fields, *(f"parameters with {v:,} tokens" for v in VOCABULARIES))
    own = sections("", Part, done, "A participant's own part")
    return page("_recipe_head.md", [*tables, "## Presets\n\n" + grid(head, shapes), *own])


def sections(path: str, table: type[BaseModel], done: set[type[BaseModel]], top: str = "Top level") -> Iterator[str]:
    """A table, then the tables that it holds; each class once."""
    done.add(table)
    kind, first = table.model_fields.get("kind"), next(iter(table.model_fields))
    title = f"`[{path}]`" if path else top
    title = "`[[participants]]`" if path == "participants" else title
    if kind or path in ("model", "data.source"):
        title += f' with `kind = "{kind.default}"`' if kind else f" with `{first}`"
    rows = [(f"`{name}`", *about(field)) for name, field in table.model_fields.items()]
    yield f"## {title}\n\n{table.__doc__}\n\n" + grid(("key", "type", "unit", "default", "meaning"), rows)
    for name, field in table.model_fields.items():
        for inner in tables_in(field.annotation):
            if inner not in done:
                yield from sections(f"{path}.{name}".removeprefix("."), inner, done)


def about(field: FieldInfo) -> tuple[str, ...]:
    """Type with bounds, unit, default and sentence of one key."""
    inner, default, shown = tables_in(field.annotation), field.default, ""
    words = ["list of tables" if default == () else "table" if inner else spelled(field.annotation)]
    words += [f"{sign} {getattr(m, key):,}" for m in field.metadata for key, sign in SIGNS.items() if hasattr(m, key)]
    if isinstance(default, BaseModel):
        first = next(iter(type(default).model_fields))
        shown = f'`{first} = "{getattr(default, first)}"`' if len(inner) > 1 else "see below"
    elif default is PydanticUndefined or default in (None, ()):
        shown = "required" if default is PydanticUndefined else "left out"
    extra = field.json_schema_extra
    return ", ".join(words), extra["unit"], shown or f"`{toml(default)}`", field.description  # type: ignore


def spelled(annotation: Any) -> str:
    """A plain type, or the values it may have."""
    if get_origin(annotation) is tuple:
        return f"list of {spelled(get_args(annotation)[0])}"
    choices = [a for a in get_args(annotation) if a is not type(None)] or [annotation]
    return " or ".join(TYPES.get(c) or (spelled(c) if get_args(c) else f"`{toml(c)}`") for c in choices)


def toml(value: Any) -> str:
    """A scalar, or a list of them, as TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else "all" if value is None else str(value).lower()


def cli_page() -> str:
    """Every verb with its arguments and options."""
    parts = []
    for name, verb in leaves(get_command(app)):
        arguments, rows = [argument(p) for p in verb.params if p.name in p.opts], []
        for p in verb.params:
            names = [p.metavar] if p.name in p.opts else [*p.opts, *p.secondary_opts]
            kind = "repeatable" if p.multiple else p.type_descriptor.annotation.__name__.replace("bool", "flag").lower()
            kind += "".join(f", {sign} {b:g}" for sign, b in (("≥", p.min), ("≤", p.max)) if b is not None)
            default = "required" if p.required else "left out" if p.default is None else f"`{toml(p.default)}`"
            rows.append((" / ".join(f"`{n}`" for n in names), kind, default, p.help))
        table = grid(("argument or option", "type", "default", "meaning"), rows)
        parts.append(f"## potluck {' '.join([name, *arguments])}\n\n{verb.help}\n\n{table}")
    return page("_cli_head.md", parts)


def argument(parameter: Any) -> str:
    """An argument's name; in brackets, if it may be left out."""
    return parameter.metavar if parameter.required else f"[{parameter.metavar}]"  # type: ignore


def leaves(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every verb that does something, `library add` after `library`'s place, with its whole name."""
    for name, verb in group.commands.items():
        if hasattr(verb, "commands"):
            yield from leaves(verb, f"{before}{name} ")
        else:
            yield before + name, verb


def grid(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), *rows]
    lines.insert(1, ["---"] * len(lines[0]))  # type: ignore
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def page(head: str, parts: Iterable[str]) -> str:
    """A page that begins with what a person wrote."""
    return "\n\n".join([(REFERENCE / head).read_text(encoding="utf-8").rstrip(), *parts]) + "\n"


if __name__ == "__main__":
    (REFERENCE / "recipe.md").write_text(recipe_page(), encoding="utf-8")
    (REFERENCE / "cli.md").write_text(cli_page(), encoding="utf-8")
