"""How text becomes tokens: bytes, a BPE trained here, or a tokenizer that exists.

Text is data: a special string such as ``<|endoftext|>`` inside a document is encoded as the characters it is
made of, so only the shards' own end-of-text tokens separate documents.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from potluck.corpus.holdings import digest_of, kept_documents, text_keys
from potluck.errors import ModelError
from potluck.files import storing, write_text
from potluck.recipe import Recipe
from potluck.recipe.schema import Bpe, Bytes

END_OF_TEXT = "<|endoftext|>"
PIECE_CHARACTERS = 1 << 18
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and what the rest of the system needs to know of it.

    Attributes:
        tokenizer: Encodes and decodes; adds nothing when called with ``add_special_tokens=False``.
        size: Smallest number that is larger than every token id.
        end_of_text: Token that begins every document and so ends the one before.
        content_hash: SHA-256 of the tokenizer's JSON and ``end_of_text``.
    """

    tokenizer: Tokenizer
    size: int
    end_of_text: int
    content_hash: str


def silent(message: str) -> None:
    """Progress for nobody."""


def build_vocabulary(recipe: Recipe, keys: Mapping[str, str] | None = None, progress: Progress = silent) -> Vocabulary:
    """The vocabulary that the recipe asks for.

    A BPE (Sennrich et al., arXiv 1508.07909, on bytes) is trained on the training documents of all participants, in
    this process: the raw text is pooled for this one purpose, and held-out documents stay out of it. The
    result is kept next to the shards.

    Args:
        recipe: The recipe.
        keys: ``text_keys(recipe)`` if already known.
        progress: Told before slow work.

    Raises:
        CorpusError: Text for the BPE is missing.
        ModelError: The tokenizer folder is missing or broken.
        StorageError: The trained BPE cannot be saved.
    """
    match recipe.tokenizer:
        case Bytes():
            return _byte_vocabulary()
        case Bpe(vocab_size=size):
            parts = list((keys or text_keys(recipe)).values())
            folder = Path(recipe.data.shards) / f"bpe-{digest_of([parts, size])}"
            try:
                return load_vocabulary(folder)
            except ModelError:  # not trained yet, or damaged
                progress(f"training a BPE of {size} tokens on the training text of all participants")
            training = (kept.document.text for kept in kept_documents(recipe) if kept.side == "train")
            vocabulary = _train_bpe((piece for text in training for piece in pieces(text)), size)
            save_vocabulary(vocabulary, folder)
            return vocabulary
        case existing:
            return folder_vocabulary(Path(existing.path))


def save_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``vocabulary.json``.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    about = {"end_of_text": vocabulary.end_of_text, "content_hash": vocabulary.content_hash}
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "tokenizer.json", vocabulary.tokenizer.to_str())
        write_text(folder / "vocabulary.json", json.dumps(about))


def load_vocabulary(folder: Path) -> Vocabulary:
    """What ``save_vocabulary`` wrote.

    Raises:
        ModelError: It is missing or damaged.
    """
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        about = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        end_of_text, content_hash = int(about["end_of_text"]), about["content_hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: no usable vocabulary ({error})") from None
    if _content_hash(text, end_of_text) != content_hash:
        raise ModelError(f"{folder}: the vocabulary is damaged, its content does not fit its hash")
    return _vocabulary(Tokenizer.from_str(text), end_of_text)


def vocabulary_of(tokenizer_json: str, end_of_text: int) -> Vocabulary:
    """A vocabulary that came as text.

    Raises:
        ModelError: It is not a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"not a tokenizer: {str(error).partition(chr(10))[0]}") from None
    return _vocabulary(tokenizer, end_of_text)


def pieces(text: str) -> Iterator[str]:
    """A long text in parts of bounded length, because a tokenizer needs about a hundred times a text's memory."""
    for start in range(0, len(text), PIECE_CHARACTERS):
        yield text[start : start + PIECE_CHARACTERS]


def _vocabulary(tokenizer: Tokenizer, end_of_text: int) -> Vocabulary:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    content_hash = _content_hash(tokenizer.to_str(), end_of_text)
    tokenizer.encode_special_tokens = True  # special strings in a text are text; not part of the JSON
    return Vocabulary(tokenizer, max(tokenizer.get_vocab().values()) + 1, end_of_text, content_hash)


def _content_hash(tokenizer_json: str, end_of_text: int) -> str:
    return hashlib.sha256(f"{tokenizer_json}\n{end_of_text}".encode()).hexdigest()


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_vocabulary() -> Vocabulary:
    """Token b is byte b, and 256 is the end of text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these bytes stand for themselves
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = _byte_level(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _vocabulary(tokenizer, 256)


def word_counts(recipe: Recipe) -> Counter[str]:
    """How often each word stands in the training text that this recipe knows, cut as the BPE cuts it.

    A BPE trained on the sum of participants' counts is the one trained on their pooled text: it depends on nothing
    else. The counts tell much of a text; they are not to be given away lightly.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str
    training = (kept.document.text for kept in kept_documents(recipe) if kept.side == "train")
    counts: Counter[str] = Counter()
    for text in training:
        for piece in pieces(text):
            for _, (start, end) in split(piece):
                counts[piece[start:end]] += 1
    return counts


def vocabulary_from_words(counts: Mapping[str, int], size: int) -> Vocabulary:
    """The BPE of so many tokens that is trained on text with these words."""
    return _train_bpe((word for word, count in counts.items() for _ in range(count)), size)


def _train_bpe(texts: Iterator[str], size: int) -> Vocabulary:
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _vocabulary(tokenizer, tokenizer.get_vocab()[END_OF_TEXT])


def folder_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a Hugging Face tokenizer folder, or of an exported model.

    Raises:
        ModelError: It is missing or broken, or has no end-of-text token.
    """
    if not folder.is_dir():
        raise ModelError(f"tokenizer {folder}: there is no such folder")
    try:
        tokenizer, end_of_text = _read_folder(folder)
    except Exception as error:  # the libraries raise plain Exception for a broken file
        first_line = str(error).partition("\n")[0]
        hint = "it must hold the tokenizer.json of a Hugging Face tokenizer"
        raise ModelError(f"tokenizer {folder}: cannot be used ({first_line})", hint) from error
    token = None if end_of_text is None else tokenizer.token_to_id(end_of_text)
    if token is None:
        hint = "name one as `eos_token` in tokenizer_config.json"
        raise ModelError(f"tokenizer {folder}: has no end-of-text token", hint)
    return _vocabulary(tokenizer, token)


def _read_folder(folder: Path) -> tuple[Tokenizer, str | None]:
    """The tokenizer and the string of its end-of-text token."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        configs = (_json_table(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
        named = [config["eos_token"] for config in configs if config.get("eos_token")]
        if named:
            return tokenizer, named[0]["content"] if isinstance(named[0], dict) else str(named[0])
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    return Tokenizer.from_str(loaded.backend_tokenizer.to_str()), loaded.eos_token


def _json_table(path: Path) -> dict[str, Any]:
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return table if isinstance(table, dict) else {}
