"""A first recipe, with its comments: what `potluck init` writes. Without torch."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from potluck.errors import CorpusError, RecipeError, StorageError
from potluck.files import nearby, write_text
from potluck.preflight import forecast
from potluck.recipe.load import absolute_paths, parse_recipe
from potluck.recipe.schema import NAME
from potluck.recipe.sources import key_of

SAMPLES = {"ada": {"package": "asyncio"}, "ben": {"package": "email"}}  # Python's own source: it is everywhere

_HEAD = """\
# A run of potluck: one model that {count} train together.
# Every key and its default: reference/recipe.md of potluck's documents.
#
#   potluck check {file}       what it costs, before anything slow
#   potluck local {file}       a process for each participant, on this machine
#   potluck train {file}       all of them in one process
#   potluck host {file}        the same with participants elsewhere, who bring their text: their sources here are unused
version = 1
name = "{name}"
seed = 0
"""

_REST = """
[data]
validation_fraction = 0.2       # of each participant's documents: held out, to measure on
train_bytes = 200_000           # of each participant, at most; leave out these two for all text
validation_bytes = 20_000

[tokenizer]
kind = "bytes"                  # or "bpe" (give vocab_size), or "folder" (give path)

[model]                         # in place of a shape: preset = "tiny", "small", "35m" or "125m",
layers = 2                      # or path = "FOLDER" of any causal language model of transformers, to go on from
width = 64
heads = 2
feedforward = 176

[local]
batch_size = 8
sequence_length = 128
optimizer = { kind = "adamw", learning_rate = 3e-3 }

[rounds]
count = 5                       # too few for a good model: enough to see that it works
local_steps = 20                # between two exchanges

[outer]
kind = "sgd"                    # plain averaging; "nesterov" for many rounds of many steps (DiLoCo)
"""


def begin(name: str, data: Sequence[Path]) -> dict[str, Any]:
    """Write ``NAME.toml``, a recipe that can be run at once.

    Args:
        data: A folder of text files, one text file or one of JSON lines for each participant; without any, a sample.

    Raises:
        StorageError: The file is there already, or cannot be written.
        RecipeError: The name is none.
        CorpusError: There is no such folder, or no text in it.
    """
    path = Path(f"{name}.toml")
    if not NAME.fullmatch(name):
        raise RecipeError(f"{name!r}: use 1 to 64 letters, digits, '.', '_' or '-'")
    if path.exists():
        raise StorageError(f"{path}: there is something here already", "give another name: potluck init NAME")
    sources = _sources(data) if data else SAMPLES
    text = _HEAD.format(file=path, name=name, count=len(sources)) + _participants(sources, not data) + _REST
    warnings = forecast(parse_recipe(absolute_paths(tomllib.loads(text), Path.cwd()), str(path))).warnings
    write_text(path, text)
    return {"recipe": str(path), "participants": list(sources), "warnings": list(warnings)}


def _sources(data: Sequence[Path]) -> dict[str, dict[str, str]]:
    """A participant for each folder, called after it."""
    sources: dict[str, dict[str, str]] = {}
    for place in data:
        if not place.exists():
            hint = nearby(place) or "--data FOLDER, once for each participant"
            raise CorpusError(f"{place}: there is no such file or folder", hint)
        called = place.resolve().name if place.is_dir() else place.stem
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", called).strip("-._")[:60] or "p"
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(data) + 2))) if n not in sources)
        sources[name] = {key_of(place): str(place)}
    return sources


def _participants(sources: Mapping[str, Mapping[str, str]], sample: bool) -> str:
    """A table for each participant."""
    note = '   # a sample; yours: { path = "FOLDER", glob = "**/*.txt" }' if sample else ""
    lines = []
    for name, source in sources.items():
        ((key, value),) = source.items()
        quoted = tomli_w.dumps({key: value}).strip()
        lines.append(f'\n[[participants]]\nname = "{name}"\nsource = {{ {quoted} }}{note}\n')
    return "".join(lines)
