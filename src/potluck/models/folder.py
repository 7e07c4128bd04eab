"""A model folder's configuration and the headers of its weights, without loading torch.

`transformers` takes ``model.safetensors`` if there is one, else the files that ``model.safetensors.index.json`` names.
Other weight files beside them, and an index beside a single file, are of no account; so it is here.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.errors import ModelError
from potluck.tensors import SIZES, read_header
from potluck.untrusted import load_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template.*"),
    *("additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*"),
)
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)
_MOST = {"layer": 1000, "expert": 4096, "head": 1 << 16, "label": 1 << 16}
_MOST_IN_ALL = 8  # times as many, over all models in one folder
_DIGITS = 40  # some write 10^30 for a length without bound


@dataclass(frozen=True)
class Stored:
    """A tensor's form, and where it lies.

    Attributes:
        dtype: As safetensors names it.
        path: Of the file.
        begin: Its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return SIZES[self.dtype] * math.prod(self.shape)


def folder_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        ModelError: It is not there or not JSON.
    """
    if not folder.exists():
        hint = "was it moved? Name its new place: `path` in the recipe, of a run in the recipe.toml of its folder"
        raise ModelError(f"{folder}: there is no such model folder", hint)
    try:
        config = load_json(folder / "config.json", digits=_DIGITS)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a model folder ({error})", "save it with model.save_pretrained") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/config.json: not a JSON object")
    check_counts(folder, config)
    return config


def check_counts(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a model of so many parts that describing it takes the memory, before a single weight does.

    Raises:
        ModelError: Naming the key, and the most.
    """
    counted = dict.fromkeys(_MOST, 0)  # of a model in which there are others
    for key, value in _entries(config):
        for part, most in _MOST.items():
            if re.search(rf"(^|_){part}s?$", key) and isinstance(value, int):
                counted[part] += max(value, 0)
                if value > most or counted[part] > _MOST_IN_ALL * most:
                    raise ModelError(f"{folder}/config.json: {key} = {value}, at most {most} are built")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of a table and of all tables in it."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(inner)


def copy_tokenizer(source: Path, to: Path) -> None:
    """Copy a folder's tokenizer byte for byte, with its chat templates and its licence.

    Raises:
        ModelError: One is a link to a file outside the folder.
        OSError: Something cannot be read or written.
    """
    for path in sorted({path for pattern in _TOKENIZER for path in source.glob(pattern) if path.is_file()}):
        (to / path.relative_to(source)).parent.mkdir(exist_ok=True)
        copy_own(path, source, to / path.relative_to(source))


def copy_own(path: Path, folder: Path, to: Path) -> None:
    """Copy a file of a model folder that may be a stranger's: a link must not fetch a file of this machine's owner.

    Links may lead to a file of the same name, as where folders share their files, and those of the hub's cache from
    ``snapshots/COMMIT`` to the ``blobs`` beside ``snapshots``.

    Raises:
        ModelError: It is a link to another file outside the folder.
        OSError: It cannot be read or written.
    """
    cached, file = folder.absolute().parent, path.resolve()
    roots = (folder, cached.parent / "blobs") if cached.name == "snapshots" else (folder,)
    if file.name != path.name and not any(file.is_relative_to(root.resolve()) for root in roots):
        raise ModelError(f"{path}: a link to another file, outside the model's folder", "copy it there if it is yours")
    shutil.copyfile(path, to)


def copy_generation_config(source: Path, to: Path) -> bool:
    """Copy how a folder's model generates, if it says so; whether it does."""
    if (source / GENERATION).is_file():
        copy_own(source / GENERATION, source, to / GENERATION)
        return True
    return False


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that ``from_pretrained`` takes.

    Raises:
        ModelError: There are none, or the index cannot be read or names other places.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        hint = "potluck loads nothing pickled; save with model.save_pretrained"
        raise ModelError(f"{folder}: no {WEIGHTS}", hint)
    try:
        names = set(load_json(folder / INDEX)["weight_map"].values())
    except (OSError, *_MALFORMED) as error:
        raise ModelError(f"{folder}/{INDEX}: cannot be read ({error})") from None
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ModelError(f"{folder}/{INDEX}: names a file outside the folder")
    return [folder / name for name in sorted(names)]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder by the names they are stored under, one file's after the other.

    Raises:
        ModelError: There are no safetensors, or they are damaged.
    """
    tensors: dict[str, Stored] = {}
    for path in weight_files(folder):
        tensors |= _header(path)
    return tensors


def _header(path: Path) -> dict[str, Stored]:
    """What a file's header says, checked against the file."""
    try:
        return {name: Stored(e.dtype, e.shape, path, e.begin) for name, e in read_header(path).tensors.items()}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ModelError(f"{path}: not a safetensors file, or cut off ({error})") from None
