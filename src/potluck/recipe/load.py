"""From a TOML file, what it extends and ``--set`` to a checked recipe, with errors for people."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from potluck.errors import RecipeError
from potluck.files import name_of, page
from potluck.recipe.schema import Recipe
from potluck.untrusted import load_toml, loads_toml

# A table of alternatives is replaced as a whole: half a model folder and half a preset mean nothing.
_WHOLE_TABLES = {"source", "model", "split"}
_ELSEWHERE = "# Files and folders of the machine that this ran on are here by name only.\n\n"
_FEW = 4  # places of a key, all of which are named
_NEAR = 0.7  # of difflib: "batch_sise" is near "batch_size", "wheels" is not near "seed"
_PATH_KEYS = {"path", "jsonl", "file", "predicts_with", "edits", "edit_secret", "secret", "decisions"}
_MAYBE_PATHS = {"dataset", "folder", "shards"}


def load_recipe(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path: TOML file. Its ``extends`` names the file it builds on; paths in a file are relative to that file.
        settings: ``section.key=value`` from the command line, checked by the same schema.

    Raises:
        RecipeError: The file cannot be read, or what it says is wrong; the message names every fault.
    """
    raw = _read(Path(path), ())
    for item in settings:
        raw = _merge(raw, absolute_paths(_parse_setting(item, raw), Path.cwd()))
    return parse_recipe(raw, str(path), [key for item in settings for key in _keys_set(item)])


def parse_recipe(raw: dict[str, Any], where: str = "recipe", keys_set: Sequence[str] = ()) -> Recipe:
    """Check the content of a recipe.

    Args:
        keys_set: Keys that come from the command line, such as ``rounds.count``.

    Raises:
        RecipeError: naming every fault, with the key that was probably meant.
    """
    try:
        return Recipe.model_validate(_with_kinds(raw, Recipe))
    except ValidationError as error:
        faults = [explain(fault) for fault in error.errors(include_url=False)]
        told = [f"--set {fault}" if fault.partition(":")[0] in keys_set else fault for fault in faults]
        if len(told) > 1:
            shown = f"{where}: " + "".join(f"\n  - {fault}" for fault in told)
        else:
            shown = f"{where}: {told[0]}" if told == faults else told[0]
        raise RecipeError(shown, f"{page('reference/recipe.md')} lists every key") from None


def _with_kinds(raw: Any, table: type[BaseModel]) -> Any:
    """What is written without a ``kind`` is of the default's, where there is one."""
    if not isinstance(raw, dict):
        return raw
    whole = dict(raw)
    for name, field in table.model_fields.items():
        value, options = raw.get(name), tables_in(field.annotation)
        if not isinstance(value, dict) or not options:
            continue
        usual = getattr(field.default, "kind", None)
        if usual is not None and "kind" not in value:
            value = {"kind": usual, **value}
        kind = value.get("kind", "")
        chosen = options if len(options) == 1 else [o for o in options if isinstance(kind, str) and _has_tag(o, kind)]
        whole[name] = _with_kinds(value, chosen[0]) if len(chosen) == 1 else value
    return whole


def without_sources(recipe: Recipe) -> Recipe:
    """A recipe without what participants name where they join."""
    bare = tuple(p.model_copy(update={"source": None, "profile": None, "edits": None}) for p in recipe.participants)
    return recipe.model_copy(update={"participants": bare})


def recipe_toml(recipe: Recipe) -> str:
    """The resolved recipe as a TOML file that gives the same run."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def shareable(text: str) -> str:
    """A recipe file as other people get it: files and folders of this machine by their names alone."""
    raw = loads_toml(text)
    told = renamed_paths(raw, name_of)
    return text if told == raw else _ELSEWHERE + tomli_w.dumps(told)


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of all that decides a run's numbers: not of where things lie or on what it computes.

    Where text, tokenizer and model lie is left out: a checkpoint names their content.
    """
    return hashlib.sha256(json.dumps(_deciding(recipe), sort_keys=True).encode()).hexdigest()


def changed_keys(was: Recipe, now: Recipe) -> list[str]:
    """Keys that decide a run's numbers and differ between two recipes, such as ``rounds.count``."""
    before, after = dict(_flat(_deciding(was), "")), dict(_flat(_deciding(now), ""))
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _deciding(recipe: Recipe) -> Any:
    content = recipe.model_dump(mode="json", exclude={"records": True, "compute": True, "data": {"shards"}})
    if recipe.editing is None:
        del content["editing"]
    content["engine"] = {"kind": recipe.engine.kind}  # how messages travel does not change what they say
    return renamed_paths(content, lambda _: "")


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    if not items:
        yield key, value
    for name, inner in items:
        yield from _flat(inner, f"{key}.{name}" if key else str(name))


def _read(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    here = path.resolve()
    if here in children:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(map(str, children))}")
    try:
        raw = load_toml(path)
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    except ValueError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    extended = raw.pop("extends", None)
    raw = dict(absolute_paths(raw, path.parent))
    if extended is None:
        return raw
    if not isinstance(extended, str):
        raise RecipeError(f"{path}: extends must be the path of one recipe")
    return _merge(_read(path.parent / extended, (*children, here)), raw)


def absolute_paths(value: Any, folder: Path, key: str = "") -> Any:
    """Make the paths of sources, models and tokenizers absolute."""
    if isinstance(value, dict):
        return {k: absolute_paths(v, folder, k) for k, v in value.items()}
    if isinstance(value, list):
        return [absolute_paths(v, folder) for v in value]
    if isinstance(value, str) and key in _PATH_KEYS:
        return str((folder / Path(value).expanduser()).absolute())
    if isinstance(value, str) and key == "dataset" and (folder / value).exists():
        return str((folder / value).absolute())
    return value


def renamed_paths(value: Any, called: Callable[[str], str]) -> Any:
    """A recipe's tables with another name for every path in them."""
    if isinstance(value, dict):
        return {k: called(v) if _is_path(k, v) else renamed_paths(v, called) for k, v in value.items()}
    return [renamed_paths(v, called) for v in value] if isinstance(value, list | tuple) else value


def _is_path(key: str, value: Any) -> bool:
    return key in _PATH_KEYS or (key in _MAYBE_PATHS and Path(str(value)).is_absolute())


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` wins; a table whose ``kind`` changes starts afresh."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_kind(key, old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _same_kind(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    if key in _WHOLE_TABLES:
        return False
    return "kind" not in new or new["kind"] == old.get("kind", new["kind"])


def _keys_set(item: str) -> list[str]:
    """The keys that a setting sets, such as ``rounds.count``, and also of ``rounds={count=3}``."""
    parts, value = _key_and_value(item)
    return [".".join(parts), *(key for key, _ in _flat(value, ".".join(parts)))]


def _key_and_value(item: str) -> tuple[list[str], Any]:
    keys, equals, text = item.partition("=")
    parts = keys.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {item}: write section.key=value")
    try:
        return parts, loads_toml(f"value = {text}")["value"]
    except ValueError:
        return parts, text


def _parse_setting(item: str, raw: dict[str, Any]) -> dict[str, Any]:
    """``a.b=value`` as a nested table; the value is TOML, or else a string."""
    parts, value = _key_and_value(item)
    for depth in range(len(parts) - 1, -1, -1):
        owner = _follow(raw, parts[:depth])
        if isinstance(owner, list):  # a list is replaced whole, so carry its other items along
            if not parts[depth].isdigit() or int(parts[depth]) >= len(owner):
                raise RecipeError(f"--set {item}: {'.'.join(parts[:depth])} has items 0 to {len(owner) - 1}")
            key = parts[depth]
            merged = _merge({key: owner[int(key)]}, {key: value})[key]
            value = [merged if i == int(key) else o for i, o in enumerate(owner)]
        else:
            if isinstance(owner, dict) and parts[depth] in _WHOLE_TABLES and depth < len(parts) - 1:
                value = {**owner.get(parts[depth], {}), **value}
            value = {parts[depth]: value}
    return dict(value)


def _follow(raw: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        if isinstance(raw, dict):
            raw = raw.get(part)
        elif isinstance(raw, list) and part.isdigit() and int(part) < len(raw):
            raw = raw[int(part)]
        else:
            return None
    return raw


def explain(fault: ErrorDetails, root: type[BaseModel] = Recipe) -> str:
    """One fault as a sentence that names the key as the user wrote it."""
    tables, where, others = _tables_along(fault["loc"], root)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        key = str(fault["loc"][-1])
        return f"{where}: {_of_another(key, where, tables[-1], others) or f'unknown key{_suggest(key, tables[-1])}'}"
    if fault["type"] == "missing":
        return f"{where}: must be given"
    if fault["type"] == "union_tag_not_found":
        alternatives = tables_in(tables[-1].model_fields[str(fault["loc"][-1])].annotation)
        kinds = (table.model_fields["kind"].default for table in alternatives)
        return f"{where}.kind: must be given, one of {', '.join(map(repr, kinds))}"
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if fault["type"] in ("union_tag_invalid", "literal_error"):
        expected = str((fault.get("ctx") or {}).get("expected_tags") or (fault.get("ctx") or {}).get("expected"))
        given = fault["input"].get("kind") if isinstance(fault["input"], dict) else fault["input"]
        return f"{where}: {given!r} is not one of {expected}{_closest(str(given), expected)}"
    shown = "" if isinstance(fault["input"], dict) else f", not {fault['input']!r}"
    return f"{where}: {message[0].lower()}{message[1:]}{shown}"


def _closest(word: str, among: str) -> str:
    close = _near(word, [part.strip("' ") for part in among.replace(" or ", ",").split(",")])
    return f"; did you mean {close!r}?" if close else ""


def _near(word: str, among: Iterable[str]) -> str | None:
    """A word that may have been meant; never the one that was written."""
    others = [other for other in among if other != word]
    begun = [other for other in others if len(word) > 3 and other.startswith(word)]
    return next(iter([*difflib.get_close_matches(word, others, 1, _NEAR), *begun]), None)


def _of_another(key: str, where: str, table: type[BaseModel], others: Sequence[type[BaseModel]]) -> str:
    """Why a key that goes with another form of a table does not go with this one; empty if it is in none."""
    owners = [other for other in others if key in other.model_fields]
    if not owners:
        return ""
    kind = table.model_fields.get("kind")
    if kind is not None:
        theirs = ", ".join(repr(owner.model_fields["kind"].default) for owner in owners)
        return f"goes with kind = {theirs}, not with {kind.default!r}"
    mark = next(iter(table.model_fields))
    return f"does not go with {where.removesuffix(key)}{mark}: leave one of them out"


def _suggest(key: str, table: type[BaseModel]) -> str:
    if close := _near(key, table.model_fields):
        return f"; did you mean {close!r}?"
    elsewhere = sorted({path for path, name in _all_keys(Recipe, "") if name == key})
    if 1 <= len(elsewhere) <= _FEW:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; this table has {', '.join(table.model_fields)}"


def _all_keys(table: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in table.model_fields.items():
        yield prefix + name, name
        for inner in tables_in(field.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")


def tables_in(annotation: Any) -> list[type[BaseModel]]:
    """The tables an annotation admits, looking through unions, tuples and ``Annotated``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for inner in get_args(annotation) for table in tables_in(inner)]


def _tables_along(
    loc: Sequence[str | int], root: type[BaseModel]
) -> tuple[list[type[BaseModel]], str, list[type[BaseModel]]]:
    """The tables a fault's location passes, the location without pydantic's union tags, and the last's alternatives."""
    tables: list[type[BaseModel]] = [root]
    options: list[type[BaseModel]] = []
    others: list[type[BaseModel]] = []
    shown: list[str] = []
    for part in loc:
        if isinstance(part, int):
            shown.append(str(part))
        elif len(options) > 1:  # this part is the tag that chose among them
            chosen = [o for o in options if _has_tag(o, part)]
            tables.append((chosen or options)[0])
            others, options = [o for o in options if o is not tables[-1]], []
        else:
            shown.append(part)
            field = tables[-1].model_fields.get(part)
            options = tables_in(field.annotation) if field else []
            if options:
                others = []
            if len(options) == 1:
                tables.append(options[0])
    return tables, ".".join(shown), others


def _has_tag(table: type[BaseModel], tag: str) -> bool:
    kind = table.model_fields.get("kind")
    if kind is not None:
        return bool(kind.default == tag)
    return tag in table.model_fields or (tag == "shape" and "layers" in table.model_fields)
