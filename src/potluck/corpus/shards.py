"""Token shards: a participant's text as tokens in memory-mapped files, built once and reused by content.

A shard folder lies in ``data.shards`` under the hash of all that decides its content::

    <key>/  train.bin         tokens, little-endian uint16 (uint32 from 65,537 tokens in the vocabulary)
            train.index       where each document starts, int64
            train.jsonl       each document's name, SHA-256 and bytes, one line each
            validation.*      the same for the held-out side
            manifest.json     counts, hashes, and notes for its owner

Every document is [end_of_text] + tokens: a shard begins with end_of_text, and each token after the first is a
prediction. A folder appears under its name complete or not at all; one whose files do not have the sizes of its
manifest is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potluck.corpus.holdings import SIDES, Kept, Side, digest_of, kept_documents, text_keys
from potluck.corpus.tokenizer import Progress, Vocabulary, build_vocabulary, pieces, silent
from potluck.corpus.tokenizer_json import refusing
from potluck.errors import CorpusError
from potluck.files import storing, write_text
from potluck.recipe import Recipe
from potluck.untrusted import load_json

FORMAT = 2
_CHUNK_CHARACTERS = 1 << 20  # text encoded at a time
Encoder = Callable[[Sequence[str]], list[np.ndarray]]


@dataclass(frozen=True)
class Shard:
    """One side of one participant's text.

    Attributes:
        tokens: uint16 or uint32, memory-mapped, read-only.
        documents: How many documents it holds.
        text_bytes: Their UTF-8 bytes.
        index: File with each document's ``name``, ``sha256`` and ``bytes``, one JSON object a line.
    """

    tokens: np.ndarray
    documents: int
    text_bytes: int
    index: Path

    @property
    def starts(self) -> np.ndarray:
        """Where each document starts in ``tokens``, int64, read anew."""
        return np.fromfile(self.index.with_suffix(".index"), "<i8")


@dataclass(frozen=True)
class Holding:
    """What one participant holds.

    Attributes:
        content_hash: Names its exact tokens.
        notes: What its owner should know of its text, in sentences: files that were left out, and the like.
    """

    name: str
    train: Shard
    validation: Shard
    content_hash: str
    notes: tuple[str, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """How much it is, and its hash."""
        facts: dict[str, Any] = {"name": self.name, "content_hash": self.content_hash}
        for side, shard in (("train", self.train), ("validation", self.validation)):
            facts |= {
                f"{side}_tokens": len(shard.tokens),
                f"{side}_bytes": shard.text_bytes,
                f"{side}_documents": shard.documents,
            }
        return facts


@dataclass(frozen=True)
class Corpus:
    """The vocabulary and every participant's holding, in the order of ``recipe.participant_names``."""

    vocabulary: Vocabulary
    holdings: Mapping[str, Holding]

    @property
    def notes(self) -> list[str]:
        """What there is to know of everybody's text; what was left out of a divided source once."""
        return list(dict.fromkeys(note for holding in self.holdings.values() for note in holding.notes))


def build_corpus(recipe: Recipe, progress: Progress = silent, vocabulary: Vocabulary | None = None) -> Corpus:
    """Tokenise what has not been tokenised yet, in one streaming pass, and open it.

    Args:
        recipe: The recipe; participants without a source are left out.
        progress: Told before slow work.
        vocabulary: If it is known already; else the one that the recipe asks for.

    Raises:
        CorpusError: A source is missing or empty, or a participant has too little text to train on.
        ModelError: The tokenizer folder is missing or broken.
        StorageError: The disk is full or cannot be written.
    """
    progress("reading the sources")
    keys = text_keys(recipe)
    vocabulary = vocabulary or build_vocabulary(recipe, keys, progress)
    root = Path(recipe.data.shards)
    folders = {name: root / digest_of([FORMAT, keys[name], vocabulary.content_hash]) for name in keys}
    missing = {name: folder for name, folder in folders.items() if _manifest(folder) is None}
    if missing:
        progress(f"tokenising the text of {len(missing)} participants")
        _build(recipe, vocabulary, missing)
    manifests = {name: _manifest(folder) or {} for name, folder in folders.items()}
    _check_enough(recipe, manifests)
    _allow_open_files(2 * len(folders))
    return Corpus(vocabulary, {name: _open(name, folders[name], manifest) for name, manifest in manifests.items()})


def _check_enough(recipe: Recipe, manifests: Mapping[str, dict[str, Any]]) -> None:
    """Everyone needs one batch of training tokens."""
    need = recipe.tokens_per_step + 1
    for name, manifest in manifests.items():
        tokens = manifest["train"]["tokens"]
        if tokens < need:
            side, local = manifest["train"], recipe.local
            hint = "give it more text, hold out less (data.validation_fraction), or lower local.batch_size"
            raise CorpusError(
                f"participant {name}: has {tokens:,} training tokens in {side['documents']:,} documents and needs "
                f"{need:,}, one batch ({local.batch_size} x {local.accumulation} sequences of {local.sequence_length} "
                "tokens, and the last target)",
                "; ".join([*manifest["notes"], hint]),
            )


# --- reading -----------------------------------------------------------------------------------


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder, else ``None``."""
    try:
        manifest: dict[str, Any] = load_json(folder / "manifest.json")
        fits = all(
            (folder / f"{side}.{kind}").stat().st_size == size
            for side in SIDES
            for kind, size in manifest[side]["sizes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if fits else None


def _allow_open_files(count: int) -> None:
    """Every map keeps a file open: with many participants, raise this process's limit as far as is permitted."""
    if count > 256:
        import resource  # not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + 1024 if hard == resource.RLIM_INFINITY else min(count + 1024, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _open(name: str, folder: Path, manifest: dict[str, Any]) -> Holding:
    def shard(side: Side) -> Shard:
        about = manifest[side]
        dtype = np.dtype(manifest["dtype"])
        tokens = np.memmap(folder / f"{side}.bin", dtype, "r") if about["tokens"] else np.empty(0, dtype)
        return Shard(np.asarray(tokens), about["documents"], about["text_bytes"], folder / f"{side}.jsonl")

    return Holding(name, shard("train"), shard("validation"), manifest["content_hash"], tuple(manifest["notes"]))


# --- building ----------------------------------------------------------------------------------


def _build(recipe: Recipe, vocabulary: Vocabulary, folders: Mapping[str, Path]) -> None:
    """One pass over the sources of ``folders``' participants; every folder is then put in place whole."""
    root = Path(recipe.data.shards)
    with storing(root):
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        scratch = Path(tempfile.mkdtemp(prefix="building-", dir=root))
    try:
        writers = {(name, side): _Writer(scratch / name, side, vocabulary) for name in folders for side in SIDES}
        encode = _encode_bytes if recipe.tokenizer.kind == "bytes" else _encoder(vocabulary)
        notes: dict[str, list[str]] = {}
        for chunk in _chunks(kept_documents(recipe, folders, notes)):
            for (kept, is_first, _), tokens in zip(chunk, encode([text for _, _, text in chunk]), strict=True):
                writers[kept.participant, kept.side].add(kept if is_first else None, tokens)
            for writer in writers.values():
                writer.flush()
        for name, folder in folders.items():
            sides: dict[str, dict[str, Any]] = {side: writers[name, side].finish() for side in SIDES}
            if recipe.data.validation_fraction and not sides["validation"]["documents"]:
                notes[name].append(f"{name}: has no text to hold out, so it trains and is not evaluated")
            _put_in_place(scratch / name, folder, {**sides, "notes": notes[name]}, vocabulary)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(root: Path) -> None:
    """Scratch folders of processes that were killed: older than a day."""
    for scratch in root.glob("building-*"):
        if scratch.stat().st_mtime < time.time() - 86_400:
            shutil.rmtree(scratch, ignore_errors=True)


def _chunks(documents: Iterable[Kept]) -> Iterator[list[tuple[Kept, bool, str]]]:
    """Pieces of documents, gathered to a bounded size: (document, whether it begins here, text)."""
    chunk: list[tuple[Kept, bool, str]] = []
    size = 0
    for kept in documents:
        for number, piece in enumerate(pieces(kept.document.text)):
            chunk.append((kept, number == 0, piece))
            size += len(piece)
            if size >= _CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_bytes(texts: Sequence[str]) -> list[np.ndarray]:
    """What the byte vocabulary's tokenizer gives, without its cost: token b is byte b."""
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]


def _encoder(vocabulary: Vocabulary) -> Encoder:
    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        with refusing("the tokenizer cannot encode the text"):
            encodings = vocabulary.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    return encode


class _Writer:
    """Appends documents to the files of one side; they are open only while it writes, so thousands can coexist."""

    def __init__(self, folder: Path, side: Side, vocabulary: Vocabulary) -> None:
        self._paths = {kind: folder / f"{side}.{kind}" for kind in ("bin", "index", "jsonl")}
        self._dtype = _dtype(vocabulary)
        self._separator = np.array([vocabulary.end_of_text], self._dtype).tobytes()
        self._pending: dict[str, list[bytes]] = {kind: [] for kind in self._paths}
        self._digest = hashlib.sha256()
        self._tokens = self._documents = self._text_bytes = 0
        with storing(folder):
            folder.mkdir(exist_ok=True)
            for path in self._paths.values():
                path.touch()

    def add(self, begins: Kept | None, tokens: np.ndarray) -> None:
        """Take the next tokens; ``begins`` is their document if it begins here."""
        if begins is not None:
            about = {"name": begins.document.name, "sha256": begins.sha256, "bytes": begins.size}
            self._pending["jsonl"].append(json.dumps(about).encode() + b"\n")
            self._pending["index"].append(self._tokens.to_bytes(8, "little"))
            self._pending["bin"].append(self._separator)
            self._tokens += 1
            self._documents += 1
            self._text_bytes += begins.size
        self._pending["bin"].append(tokens.astype(self._dtype).tobytes())
        self._tokens += len(tokens)

    def flush(self) -> None:
        """Append what was taken to the files."""
        if not self._pending["bin"]:
            return
        for kind, path in self._paths.items():
            content = b"".join(self._pending[kind])
            self._pending[kind].clear()
            if kind == "bin":
                self._digest.update(content)
            with storing(path), path.open("ab") as file:
                file.write(content)

    def finish(self) -> dict[str, Any]:
        """Force the files to disk and say what is in them."""
        sizes = {}
        for kind, path in self._paths.items():
            with storing(path), path.open("rb+") as file:
                os.fsync(file.fileno())
                sizes[kind] = path.stat().st_size
        return {
            "tokens": self._tokens,
            "documents": self._documents,
            "text_bytes": self._text_bytes,
            "sha256": self._digest.hexdigest(),
            "sizes": sizes,
        }


def _dtype(vocabulary: Vocabulary) -> np.dtype[Any]:
    """The smallest type that holds every token."""
    return np.dtype("<u2" if vocabulary.size <= 1 << 16 else "<u4")


def _put_in_place(built: Path, folder: Path, about: Mapping[str, Any], vocabulary: Vocabulary) -> None:
    """Complete a folder with its manifest and give it its name, unless another process was faster."""
    hashes = [about[side]["sha256"] for side in SIDES]
    content_hash = digest_of([*hashes, vocabulary.content_hash])
    manifest = {"format": FORMAT, "dtype": _dtype(vocabulary).str, "content_hash": content_hash, **about}
    with storing(folder):
        write_text(built / "manifest.json", json.dumps(manifest, indent=1))
        try:
            os.rename(built, folder)
        except OSError:
            if _manifest(folder) is not None:
                return
            if not folder.is_dir():
                raise
            os.rename(folder, built.with_name(built.name + ".damaged"))  # goes with the scratch folder
            os.rename(built, folder)
