"""Text from outside, one document at a time.

Documents come in a fixed order, and memory holds one of them. A document without anything but white space is dropped.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from potluck.corpus.reading import MAX_DOCUMENT_BYTES, LeftOut, NotText, numbered_lines, read_text, too_long
from potluck.corpus.world import documents_of
from potluck.errors import CorpusError, MissingExtra
from potluck.files import nearby
from potluck.recipe.sources import Folder, HubDataset, JsonLines, Package, SeparatedFile, Source, World, key_of

_NOT_A_PACKAGES_TEXT = frozenset({"test", "tests", "__pycache__"})
_NOT_STDLIB = _NOT_A_PACKAGES_TEXT | {"site-packages", "dist-packages", "idlelib", "lib2to3"}


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        name: Where it stands in its source: relative path, ``file:line`` or row number.
        group: What it belongs to: the first component of a path (a file directly below the root is a
            group of its own), or the value of ``group_field``, or "".
    """

    name: str
    text: str
    group: str


def documents(source: Source, left_out: LeftOut | None = None) -> Iterator[Document]:
    """Every document of a source, in a fixed order.

    Args:
        source: Where to read.
        left_out: Takes the files that are no text.

    Raises:
        CorpusError: The source is missing, unreadable, malformed or holds no text.
        MissingExtra: The source needs `datasets`, which is not installed.
    """
    empty, left_out = True, left_out or LeftOut()
    with _reading(source):
        for document in _read(source, left_out):
            if not document.text or document.text.isspace():
                continue
            if not _is_unicode(document.text):
                raise CorpusError(f"{place(source)}: document {document.name} is not valid Unicode")
            empty = False
            yield document
    if empty:
        files = "; ".join(left_out.sentences())
        hint = f"of its files: {files}" if files else "check its path, glob, field or separator"
        raise CorpusError(f"{place(source)}: holds no text", hint)


def fingerprint(source: Source) -> str:
    """SHA-256 of all that decides the documents: names and contents of the files, or the dataset's own fingerprint.

    Where the files lie does not matter.

    Raises:
        CorpusError: The source is missing or unreadable.
        MissingExtra: The source needs `datasets`, which is not installed.
    """
    options = source.model_dump(exclude={"path", "jsonl", "file"})
    digest = hashlib.sha256(json.dumps([type(source).__name__, options]).encode())
    with _reading(source):
        if isinstance(source, HubDataset):
            digest.update(str(_dataset(source)._fingerprint).encode())
            return digest.hexdigest()
        if isinstance(source, World):
            for document in _read_world(source):
                digest.update(document.text.encode())
            return digest.hexdigest()
        for name, path in _files(source):
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            except PermissionError:
                content = "unreadable"
            digest.update(json.dumps([name, content]).encode())
    return digest.hexdigest()


def place(source: Source) -> str:
    """The source as the recipe names it: the first key of each kind says where it is."""
    key, value = next(iter(source))
    return f"{key} {value}"


def check_there(source: Source) -> None:
    """See whether a source is there, without reading it.

    Raises:
        CorpusError: Its file or folder is not there, or its package is not installed.
    """
    match source:
        case Package():
            _package_roots(source.package)
        case Folder(path=path) | JsonLines(jsonl=path) | SeparatedFile(file=path) if not Path(path).exists():
            hint = nearby(Path(path)) or "a path in a recipe or a part is relative to that file's folder"
            raise CorpusError(f"{place(source)}: there is no such file or folder", hint)


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        check_there(source)
        raise CorpusError(f"{place(source)}: {error.filename} is gone") from None
    except OSError as error:
        raise CorpusError(f"{place(source)}: cannot be read ({error})") from None


def _read(source: Source, left_out: LeftOut) -> Iterator[Document]:
    match source:
        case Folder() | Package():
            return _read_files(source, left_out)
        case JsonLines():
            return _read_json_lines(source)
        case SeparatedFile():
            return _read_separated(source)
        case HubDataset():
            return _read_dataset(source)
        case World():
            return _read_world(source)


def _read_world(source: World) -> Iterator[Document]:
    texts = documents_of(source.world, source.first, source.world_seed, source.tellings)
    try:
        for number, text in enumerate(texts):
            yield Document(str(number), text, "")
    except ValueError as error:
        raise CorpusError(f"{place(source)}: {error}") from None


# --- files -------------------------------------------------------------------------------------


def _read_files(source: Folder | Package, left_out: LeftOut) -> Iterator[Document]:
    """Each text file is a document."""
    for name, path in _files(source):
        try:
            yield Document(name, read_text(path), name.split("/")[0])
        except NotText as reason:
            left_out.add(name, str(reason))


def _files(source: Folder | Package | JsonLines | SeparatedFile) -> Iterator[tuple[str, Path]]:
    """Name and path of every file of a source; hidden files are not part of it."""
    match source:
        case JsonLines():
            yield _one_file(source, Path(source.jsonl))
        case SeparatedFile():
            yield _one_file(source, Path(source.file))
        case Folder() | Package():
            files = _files_below(source)
            if source.order == "shuffled":
                files = iter(sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file[0])).digest()))
            yield from files


def _one_file(source: Source, path: Path) -> tuple[str, Path]:
    """A file by name; a pipe or a device may have no end."""
    if path.exists() and not path.is_file():
        raise CorpusError(f"{place(source)}: not a file", "a folder of text files is named by `path`")
    return path.name, path


def _files_below(source: Folder | Package) -> Iterator[tuple[str, Path]]:
    if isinstance(source, Folder):
        root = Path(source.path)
        if key_of(root) == "jsonl":
            raise CorpusError(f"{place(source)}: not a text, but JSON lines", "name the file by `jsonl`")
        if root.is_file() and source.glob != Folder.model_fields["glob"].default:
            raise CorpusError(f"{place(source)}: one file, so that `glob` has no effect", "leave it out")
        roots, pruned = [root], frozenset[str]()
    else:
        roots, pruned = _package_roots(source.package)
    pattern = tuple(part for part in source.glob.split("/") if part != ".")
    for root in roots:
        if root.is_file():  # a single document, or a package that is a single module
            yield root.name, root
            continue
        for name in _walk(root, "", pruned):
            if _matches(tuple(name.split("/")), pattern):
                yield name, root / name


def _package_roots(package: str) -> tuple[list[Path], frozenset[str]]:
    """Folders (or the one file) of a package and the folder names to leave out; nothing is imported."""
    if package == "stdlib":
        return [Path(sysconfig.get_path("stdlib"))], _NOT_STDLIB
    if not package.isidentifier():
        raise CorpusError(f"package {package}: not the plain name of a top-level package")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:
        spec = None
    if spec is None:
        raise CorpusError(f"package {package}: not installed", f"pip install {package}, or name another source")
    if spec.submodule_search_locations is not None:
        return sorted(Path(location) for location in spec.submodule_search_locations), _NOT_A_PACKAGES_TEXT
    if spec.origin is None or not spec.has_location:
        raise CorpusError(f"package {package}: built into Python, it has no source text")
    return [Path(spec.origin)], _NOT_A_PACKAGES_TEXT


def _walk(folder: Path, prefix: str, pruned: frozenset[str]) -> Iterator[str]:
    """Relative paths of the files below, in the order of the paths, a folder's entries at a time."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False), entry.is_file()) for entry in entries]
    for name, is_folder, is_file in sorted(found, key=lambda entry: entry[0] + "/" * entry[1]):
        if name.startswith(".") or name in pruned:
            continue
        if is_folder:
            yield from _walk(folder / name, f"{prefix}{name}/", pruned)
        elif is_file:
            yield prefix + name


def _matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a glob; ``**`` stands for any number of folders."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


# --- lines -------------------------------------------------------------------------------------


def _read_json_lines(source: JsonLines) -> Iterator[Document]:
    path = Path(source.jsonl)
    for number, line in numbered_lines(path):
        if line.isspace():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where} is not JSON ({error})", "one JSON object a line") from None
        if not isinstance(row, dict):
            raise CorpusError(f"{where} is not a JSON object", "one JSON object a line")
        yield _from_row(row, source.field, source.group_field, f"{path.name}:{number}", where)


def _read_separated(source: SeparatedFile) -> Iterator[Document]:
    """A document's name is the rest of its separator line, without a closing ``>>>``."""
    path = Path(source.file)
    name: str | None = None
    lines: list[str] = []
    size = 0
    for number, line in numbered_lines(path):
        if line.startswith(source.separator):
            if name is not None:
                yield Document(name, "".join(lines), name.split("/")[0])
            rest = line.removeprefix(source.separator).strip().removesuffix(">>>")
            name, lines, size = rest or f"{path.name}:{number}", [], 0
        elif name is not None:
            lines.append(line)
            size += len(line)
            if size > MAX_DOCUMENT_BYTES:
                raise too_long(f"{path}: document {name}")
        elif not line.isspace():
            raise CorpusError(
                f"{path}: line {number} is text before any line that starts with {source.separator!r}",
                "set `separator` to what begins a document's first line",
            )
    if name is not None:
        yield Document(name, "".join(lines), name.split("/")[0])


# --- datasets ----------------------------------------------------------------------------------


def _read_dataset(source: HubDataset) -> Iterator[Document]:
    columns = [source.field] + ([source.group_field] if source.group_field else [])
    dataset = _dataset(source)
    if set(columns) <= set(dataset.column_names):  # otherwise the first row says what is missing
        dataset = dataset.select_columns(columns)
    for number, row in enumerate(dataset):
        where = f"{place(source)}: row {number}"
        yield _from_row(row, source.field, source.group_field, str(number), where)


def _dataset(source: HubDataset) -> Any:
    """The dataset, memory-mapped; code that comes with a dataset is never run."""
    try:
        import datasets
    except ImportError:
        hint = "pip install 'potluck[datasets]'"
        raise MissingExtra(f"{place(source)}: needs the library `datasets`", hint) from None
    on_disk = Path(source.dataset).is_dir()
    try:
        if on_disk:
            dataset = datasets.load_from_disk(source.dataset)
        else:
            dataset = datasets.load_dataset(source.dataset, name=source.subset, split=source.split, streaming=False)
    except Exception as error:  # the library raises what its many back ends raise
        hint = "a folder must come from `save_to_disk`" if on_disk else "check the id, subset and split, or the network"
        raise CorpusError(f"{place(source)}: cannot be loaded ({error})", hint) from error
    if isinstance(dataset, datasets.DatasetDict):
        if source.split not in dataset:
            raise CorpusError(f"{place(source)}: no split {source.split!r}, only {', '.join(map(str, dataset))}")
        dataset = dataset[source.split]
    return dataset


def _from_row(row: dict[str, Any], field: str, group_field: str | None, name: str, where: str) -> Document:
    for key in (field, group_field):
        if key is not None and key not in row:
            texts = [other for other, value in row.items() if isinstance(value, str)]
            hint = f"name the one that holds the text: field = {json.dumps(texts[0])}" if texts and key == field else ""
            names = ", ".join(map(repr, list(row)[:20])) or "none"
            raise CorpusError(f"{where} has no field {key!r}, only {names}", hint)
    if not isinstance(row[field], str):
        raise CorpusError(f"{where}: field {field!r} is {_kind(row[field])}, not text")
    return Document(name, row[field], "" if group_field is None else str(row[group_field]))


def _kind(value: object) -> str:
    """A value that is no text, as JSON calls it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return "a number" if isinstance(value, int | float) else "a list" if isinstance(value, list) else "an object"


def _is_unicode(text: str) -> bool:
    """False for text with half a surrogate pair, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
