"""A model folder's configuration and the headers of its weights, without loading torch.

`transformers` takes ``model.safetensors`` if there is one, else the files that ``model.safetensors.index.json`` names.
Other weight files beside them, and an index beside a single file, are of no account; so it is here.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.errors import ModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}
GENERATION = "generation_config.json"
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template.*"),
    *("additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*"),
)
_MAX_HEADER_BYTES = 100 << 20
_MALFORMED = (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError)


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
        hint = "was it moved? Name its new place: `model.path` in the recipe, of a run in the recipe.toml of its folder"
        raise ModelError(f"{folder}: there is no such model folder", hint)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a model folder ({error})", "save it with model.save_pretrained") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/config.json: not a JSON object")
    return config


def copy_tokenizer(source: Path, to: Path) -> None:
    """Copy a folder's tokenizer byte for byte, with its chat templates and its licence.

    Raises:
        OSError: Something cannot be read or written.
    """
    for path in sorted({path for pattern in _TOKENIZER for path in source.glob(pattern) if path.is_file()}):
        (to / path.relative_to(source)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, to / path.relative_to(source))


def copy_generation_config(source: Path, to: Path) -> bool:
    """Copy how a folder's model generates, if it says so; whether it does."""
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, to / GENERATION)
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
        if (folder / INDEX).stat().st_size > _MAX_HEADER_BYTES:
            raise ValueError("larger than any index")
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
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
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ModelError(f"{path}: not a safetensors file, or cut off")
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {name: _checked(path, 8 + length, size, entry) for name, entry in header.items()}
    except _MALFORMED as error:
        raise ModelError(f"{path}: not a safetensors file, or cut off ({error})") from None


def _checked(path: Path, data: int, size: int, entry: Mapping[str, Any]) -> Stored:
    begin, end = (int(place) for place in entry["data_offsets"])
    tensor = Stored(str(entry["dtype"]), tuple(int(length) for length in entry["shape"]), path, data + begin)
    if tensor.dtype not in SIZES:
        raise ValueError(f"numbers of type {tensor.dtype}")
    if min(tensor.shape, default=0) < 0 or begin < 0 or end - begin != tensor.nbytes or data + end > size:
        raise ValueError("a tensor does not lie where the header says")
    return tensor
