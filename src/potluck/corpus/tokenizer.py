"""How text becomes tokens: bytes, a BPE trained here, or a tokenizer that exists.

Text is data: a special string such as ``<|endoftext|>`` inside a document is encoded as the characters it is
made of, so only the shards' own end-of-text tokens separate documents.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from potluck.corpus.holdings import digest_of, kept_documents, text_keys
from potluck.corpus.tokenizer_json import check_ids, read_tokenizer, refusing, tokenizer_text
from potluck.errors import ModelError
from potluck.files import storing, write_text
from potluck.recipe import Recipe
from potluck.recipe.schema import Bpe, Bytes
from potluck.untrusted import load_json

END_OF_TEXT = "<|endoftext|>"
# What tokenizers of chat models name as `eos_token`, and what ended a document when their base was trained.
_TURN_ENDS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>"}
_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<｜end▁of▁sentence｜>")
_FOLDER_HINT = "it must hold the tokenizer.json of a Hugging Face tokenizer"
_DIGITS = 40  # transformers writes 10^30 for a length without bound
PIECE_CHARACTERS = 1 << 18
MAX_WORDS = 1 << 24  # a minute
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and what the rest of the system needs to know of it.

    Attributes:
        tokenizer: Encodes and decodes; adds nothing when called with ``add_special_tokens=False``.
        size: Smallest number that is larger than every token id.
        end_of_text: Token between documents: it begins every document of a stream and so ends the one before.
        content_hash: SHA-256 of the tokenizer's JSON, but for what it puts around a text, and of ``end_of_text``.
        beginning: What the tokenizer itself puts before a text (its post-processor), and so what a prompt begins with.
        stops: Tokens that end what is generated, ``end_of_text`` among them.
    """

    tokenizer: Tokenizer
    size: int
    end_of_text: int
    content_hash: str
    beginning: tuple[int, ...]
    stops: frozenset[int]

    def prompt(self, text: str) -> list[int]:
        """A text's token ids, begun as the tokenizer begins one; an empty text is the start of a document."""
        with refusing("the tokenizer cannot encode the text"):
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [*self.beginning, *ids] or [self.end_of_text]


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
        text = tokenizer_text(folder / "tokenizer.json")
        about = load_json(folder / "vocabulary.json")
        end_of_text, content_hash = int(about["end_of_text"]), about["content_hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: no usable vocabulary ({error})") from None
    damaged = f"{folder}: the vocabulary is damaged"
    with refusing(damaged):
        vocabulary = _own_vocabulary(read_tokenizer(text, damaged), end_of_text)
    if vocabulary.content_hash != content_hash:
        raise ModelError(f"{folder}: the vocabulary is damaged, its content does not fit its hash")
    return vocabulary


def vocabulary_of(
    tokenizer_json: str, end_of_text: int, stops: Iterable[int] = (), beginning: Iterable[int] | None = None
) -> Vocabulary:
    """A vocabulary that came as text.

    Args:
        tokenizer_json: The tokenizer.
        end_of_text: As in `Vocabulary`.
        stops: Tokens that end what is generated, beside ``end_of_text``.
        beginning: What a text begins with; what the tokenizer puts before it if left out.

    Raises:
        ModelError: It is not a tokenizer.
    """
    with refusing("not a tokenizer"):
        return _vocabulary(read_tokenizer(tokenizer_json), end_of_text, stops, beginning)


def pieces(text: str) -> Iterator[str]:
    """A long text in parts of bounded length, because a tokenizer needs about a hundred times a text's memory."""
    for start in range(0, len(text), PIECE_CHARACTERS):
        yield text[start : start + PIECE_CHARACTERS]


def _vocabulary(
    tokenizer: Tokenizer, end_of_text: int, stops: Iterable[int] = (), beginning: Iterable[int] | None = None
) -> Vocabulary:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    around = tokenizer.post_processor
    tokenizer.post_processor = None
    content_hash = _content_hash(tokenizer.to_str(), end_of_text)
    tokenizer.post_processor = around
    tokenizer.encode_special_tokens = True  # special strings in a text are text; not part of the JSON
    size = max(tokenizer.get_vocab().values()) + 1
    begun = _beginning(tokenizer) if beginning is None else tuple(beginning)
    ends = frozenset({*stops, end_of_text})
    if strange := [number for number in (*begun, *ends) if not 0 <= number < size]:
        raise ModelError(f"token id {strange[0]} is none of the tokenizer's {size}")
    return Vocabulary(tokenizer, size, end_of_text, content_hash, begun, ends)


def _own_vocabulary(tokenizer: Tokenizer, end_of_text: int) -> Vocabulary:
    """One that was made here: its models see end-of-text before every text, and the tokenizer says so."""
    end = tokenizer.id_to_token(end_of_text)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[end, "$A"], pair=[end, "$A", end, "$B:1"], special_tokens=[(end, end_of_text)]
    )
    return _vocabulary(tokenizer, end_of_text)


def _beginning(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that the post-processor puts before a text."""
    for text in ("a", *tokenizer.get_vocab()):
        if bare := tokenizer.encode(text, add_special_tokens=False).ids:
            whole = tokenizer.encode(text).ids
            starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
            return tuple(whole[: next(starts, 0)])
    return ()


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
    return _own_vocabulary(tokenizer, 256)


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
    """The BPE of so many tokens that is trained on text with these words; of very many, on a part in proportion."""
    return _train_bpe((word for word, count in at_most(counts).items() for _ in range(count)), size)


def at_most(counts: Mapping[str, int], most: int = MAX_WORDS) -> Mapping[str, int]:
    """Counts in proportion that come to no more than ``most``: the trainer reads words one by one."""
    total = sum(counts.values())
    if total <= most:
        return counts
    parts = {word: count * most // total for word, count in counts.items()}
    return {word: part for word, part in parts.items() if part}


def _train_bpe(texts: Iterator[str], size: int) -> Vocabulary:
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _own_vocabulary(tokenizer, tokenizer.get_vocab()[END_OF_TEXT])


def folder_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a Hugging Face tokenizer folder, or of an exported model.

    Documents are separated by the tokenizer's ``eos_token``, or, where that is a chat turn's end, by the token that
    ended documents when the base was trained (``<|endoftext|>`` and its like). Generation stops at either, and at
    each token that the folder's generation config or model config names: tokens of ordinary text are not among them.
    A text begins with what the tokenizer puts before it; with end-of-text, if its files name no beginning of any kind.

    Raises:
        ModelError: It is missing or broken, or has no end-of-text token.
    """
    with _reading(folder):
        tokenizer, eos = _read_folder(folder)
        named = _named_ends(folder)
        template = chat_templates(folder)
    last = None if eos is None else tokenizer.token_to_id(eos)
    if eos is None or last is None:
        hint = "name one as `eos_token` in tokenizer_config.json"
        raise ModelError(f"tokenizer {folder}: has no end-of-text token", hint)
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items()}
    separator = last
    if eos not in _DOCUMENT_ENDS and (eos in _TURN_ENDS or eos in template):
        separator = next((special[end] for end in _DOCUMENT_ENDS if end in special), last)
    stops = {last, *(number for number in named if number in added)}
    with _reading(folder):
        beginning = _beginning(tokenizer) or (() if _knows_beginnings(folder) else (separator,))
        return _vocabulary(tokenizer, separator, stops, beginning)


def _knows_beginnings(folder: Path) -> bool:
    """Whether a tokenizer that puts nothing before a text could have: its files name a beginning, or it is for chats.

    Where none is named, as in files that were made by hand, texts begin as documents do in a stream.
    """
    configs = [_json_table(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    names = ("bos_token", "add_bos_token", "chat_template")
    return any(name in config for config in configs for name in names) or any(folder.glob("*chat_template*"))


def vocabulary_files(folder: Path) -> list[str]:
    """Names of a folder's files that hold tokens, in one of the forms that there are: the one that counts first."""
    return [name for name in _FILES if (folder / name).is_file()] + sorted(p.name for p in folder.glob("*.tiktoken"))


def folder_tokens(folder: Path) -> dict[str, int]:
    """Every token of a tokenizer folder with its number.

    Raises:
        ModelError: The tokenizer is missing or broken.
    """
    with _reading(folder):
        tokens: dict[str, int] = _read_folder(folder)[0].get_vocab()
        return tokens


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn whatever a tokenizer's files raise into our own error."""
    if not folder.is_dir():
        hint = "was it moved? Name its new place: `path` in the recipe, of a run in the recipe.toml of its folder"
        raise ModelError(f"tokenizer {folder}: there is no such folder", hint)
    with refusing(_unusable(folder), _FOLDER_HINT):
        yield


def _unusable(folder: Path) -> str:
    return f"tokenizer {folder}: cannot be used"


def _named_ends(folder: Path) -> list[int]:
    """``eos_token_id`` of generation config and model config: one number or several."""
    configs = (_json_table(folder / name) for name in ("generation_config.json", "config.json"))
    named = [config.get("eos_token_id") for config in configs]
    return [int(number) for ids in named if ids is not None for number in (ids if isinstance(ids, list) else [ids])]


def chat_templates(folder: Path) -> str:
    """The text of a tokenizer folder's chat templates; empty if it has none."""
    files = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    texts = [path.read_text(encoding="utf-8") for path in files if path.is_file()]
    inside = (
        _json_table(folder / name).get("chat_template") for name in ("tokenizer_config.json", "chat_template.json")
    )
    return "\n".join([*texts, *(json.dumps(template) for template in inside if template)])


def _read_folder(folder: Path) -> tuple[Tokenizer, str | None]:
    """The tokenizer and the string of its ``eos_token``."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(tokenizer_text(folder / "tokenizer.json"), _unusable(folder), _FOLDER_HINT)
        configs = (_json_table(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
        eos = next((token for token in (_content(config.get("eos_token")) for config in configs) if token), None)
        if eos:
            return tokenizer, eos
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    check_ids(loaded.backend_tokenizer.get_vocab())
    return read_tokenizer(loaded.backend_tokenizer.to_str(), _unusable(folder), _FOLDER_HINT), loaded.eos_token


def _content(token: Any) -> str | None:
    """A special token's string: configs hold it as it is, or in a table."""
    text = token.get("content") if isinstance(token, dict) else token
    return str(text) if text else None


def _json_table(path: Path) -> dict[str, Any]:
    table = load_json(path, digits=_DIGITS) if path.is_file() else {}
    return table if isinstance(table, dict) else {}
