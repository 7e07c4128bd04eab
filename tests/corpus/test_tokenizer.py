"""Vocabularies encode every text, give it back, and never read a special token out of it."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.corpus.holdings import kept_documents
from potluck.corpus.tokenizer import (
    Vocabulary,
    build_vocabulary,
    folder_vocabulary,
    load_vocabulary,
    save_vocabulary,
    vocabulary_of,
)
from potluck.errors import CorpusError, ModelError
from potluck.recipe import Recipe, parse_recipe

BYTES = build_vocabulary(parse_recipe({"participants": [{"name": "a", "source": {"path": "/"}}]}))


def recipe(folder: Path, tokenizer: dict[str, object], text: Path | None = None) -> Recipe:
    source = {"path": str(text or folder / "text")}
    shards = {"shards": str(folder / "shards"), "validation_fraction": 0.3}
    return parse_recipe({"data": shards, "tokenizer": tokenizer, "participants": [{"name": "a", "source": source}]})


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    ids: list[int] = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@given(st.text())
def test_bytes_are_their_own_tokens(text: str) -> None:
    assert encode(BYTES, text) == list(text.encode())
    assert BYTES.tokenizer.decode(encode(BYTES, text), skip_special_tokens=False) == text


def test_the_text_cannot_end_its_document() -> None:
    assert (BYTES.size, BYTES.end_of_text) == (257, 256)
    assert encode(BYTES, "<|endoftext|>") == list(b"<|endoftext|>")


@pytest.fixture
def trained(tmp_path: Path) -> Recipe:
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i}.txt").write_text(f"the quick brown fox {i} jumps over the lazy dog\n" * (i % 5 + 1))
    return recipe(tmp_path, {"kind": "bpe", "vocab_size": 300})


def test_bpe_is_deterministic_lossless_and_trained_once(trained: Recipe, tmp_path: Path) -> None:
    told: list[str] = []
    first = build_vocabulary(trained, progress=told.append)
    again = build_vocabulary(trained, progress=told.append)
    elsewhere = build_vocabulary(recipe(tmp_path, {"kind": "bpe", "vocab_size": 300}, tmp_path / "text"))
    other_shards = trained.model_copy(update={"data": trained.data.model_copy(update={"shards": str(tmp_path / "s")})})
    assert len({v.content_hash for v in (first, again, elsewhere, build_vocabulary(other_shards))}) == 1
    assert len(told) == 1 and first.size == 300
    text = "the quick <|endoftext|> 漢字\x00"
    assert first.end_of_text not in encode(first, text)
    assert first.end_of_text not in encode(again, text)
    assert again.tokenizer.decode(encode(again, text)) == text


def test_bpe_learns_from_training_documents_only(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    words = [f"zy{a}{b}q" for a in "abcdefghij" for b in "klmnoprstu"]
    for word in words:
        (tmp_path / "text" / word).write_text(f" {word}" * 50)
    settings = recipe(tmp_path, {"kind": "bpe", "vocab_size": 5000})
    vocabulary = build_vocabulary(settings)
    learnt = {word for word in words if len(encode(vocabulary, f" {word}")) == 1}
    training = {k.document.name for k in kept_documents(settings) if k.side == "train"}
    assert learnt == training and 50 < len(training) < 90


def test_an_error_of_the_source_ends_the_training(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    with pytest.raises(CorpusError, match="holds no text"):
        build_vocabulary(recipe(tmp_path, {"kind": "bpe"}))


def test_save_and_load(trained: Recipe, tmp_path: Path) -> None:
    vocabulary = build_vocabulary(trained)
    save_vocabulary(vocabulary, tmp_path / "v")
    loaded = load_vocabulary(tmp_path / "v")
    assert (loaded.size, loaded.end_of_text) == (300, vocabulary.end_of_text)
    assert loaded.content_hash == vocabulary.content_hash
    text = (tmp_path / "v" / "tokenizer.json").read_text()
    (tmp_path / "v" / "tokenizer.json").write_text(text[:-100])
    with pytest.raises(ModelError, match="damaged"):
        load_vocabulary(tmp_path / "v")
    with pytest.raises(ModelError, match="no usable vocabulary"):
        load_vocabulary(tmp_path / "nowhere")


def test_an_existing_folder(trained: Recipe, tmp_path: Path) -> None:
    vocabulary = build_vocabulary(trained)
    folder = tmp_path / "hf"
    existing = recipe(tmp_path, {"kind": "folder", "path": str(folder)})
    with pytest.raises(ModelError, match="no such folder"):
        build_vocabulary(existing)
    folder.mkdir()
    vocabulary.tokenizer.enable_truncation(4)
    (folder / "tokenizer.json").write_text(vocabulary.tokenizer.to_str())
    vocabulary.tokenizer.no_truncation()
    with pytest.raises(ModelError, match="end-of-text"):
        build_vocabulary(existing)
    for eos in ("<|endoftext|>", {"content": "<|endoftext|>"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert build_vocabulary(existing).content_hash == vocabulary.content_hash
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be used"):
        build_vocabulary(existing)


def folder_of(folder: Path, tokens: list[str], config: dict[str, object], template: list[str] | None = None) -> Path:
    """A tokenizer folder of bytes with special tokens from 256 on."""
    folder.mkdir(exist_ok=True)
    table = json.loads(BYTES.tokenizer.to_str())
    table["added_tokens"] = [{**table["added_tokens"][0], "id": 256 + i, "content": t} for i, t in enumerate(tokens)]
    table["post_processor"] = None
    if template is not None:
        ids = {name: {"id": name, "ids": [256 + tokens.index(name)], "tokens": [name]} for name in template}
        said = [*({"SpecialToken": {"id": n, "type_id": 0}} for n in template), {"Sequence": {"id": "A", "type_id": 0}}]
        table["post_processor"] = {"type": "TemplateProcessing", "single": said, "pair": said, "special_tokens": ids}
        table["post_processor"]["pair"] = [*said, {"Sequence": {"id": "B", "type_id": 1}}]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_a_turn_s_end_does_not_separate_documents(tmp_path: Path) -> None:
    loaded = folder_vocabulary(folder_of(tmp_path / "chat", CHAT, {"eos_token": "<|im_end|>"}))
    assert (loaded.end_of_text, loaded.stops) == (256, frozenset({256, 258}))
    own = ["<stop>", "</s>"]
    assert folder_vocabulary(folder_of(tmp_path / "own", own, {"eos_token": "<stop>"})).end_of_text == 256
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ messages[0].content }}<stop>")
    loaded = folder_vocabulary(tmp_path / "own")
    assert (loaded.end_of_text, loaded.stops) == (257, frozenset({256, 257}))


def test_generation_stops_at_every_end_that_the_folder_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "chat", CHAT, {"eos_token": "<|endoftext|>"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))  # Llama's default; here the byte 2
    assert folder_vocabulary(folder).stops == {256, 257, 258}


def test_a_prompt_begins_as_the_tokenizer_begins_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ends: dict[str, object] = {"eos_token": "</s>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    added = ["<s>", "</s>"]
    yes, no = {**ends, "add_bos_token": True}, {**ends, "add_bos_token": False}
    for config, template in [(ends, ["<s>"]), (ends, None), (yes, None), (no, ["<s>"])]:
        folder = folder_of(tmp_path / "t", added, config, template)
        expected = AutoTokenizer.from_pretrained(folder)("hello").input_ids
        assert folder_vocabulary(folder).prompt("hello") == expected
    assert folder_vocabulary(folder_of(tmp_path / "t", added, ends)).prompt("") == [257]
    bare = folder_vocabulary(folder_of(tmp_path / "bare", added, {"eos_token": "</s>"}))
    assert bare.beginning == (257,) == vocabulary_of(bare.tokenizer.to_str(), 257, (), bare.beginning).beginning


def test_what_a_tokenizer_puts_around_a_text_does_not_make_it_another(trained: Recipe, tmp_path: Path) -> None:
    vocabulary = build_vocabulary(trained)
    assert vocabulary.beginning == (vocabulary.end_of_text,)
    shard = next((tmp_path / "shards").glob("bpe-*"))
    table = json.loads((shard / "tokenizer.json").read_text())
    table["post_processor"] = None  # as version 0.1 saved and exported it
    (shard / "tokenizer.json").write_text(json.dumps(table))
    again = load_vocabulary(shard)
    assert (again.content_hash, again.beginning) == (vocabulary.content_hash, vocabulary.beginning)
    travelled = vocabulary_of(vocabulary.tokenizer.to_str(), vocabulary.end_of_text, [7])
    assert (travelled.beginning, travelled.stops) == (vocabulary.beginning, frozenset({7, vocabulary.end_of_text}))


def rules(kind: str, key: str, part: dict[str, object], times: int) -> dict[str, object]:
    return {kind: {"type": "Sequence", key: [part] * times}}


def hostile_tokenizers() -> Iterator[tuple[dict[str, object], str]]:
    """Changes to a tokenizer's JSON that would take gigabytes, hours or the process."""
    bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    yield {"model": {**bpe, "vocab": {"a": 0, "z": 1 << 31}}}, "token id 2147483648 among 2 tokens"
    yield {"model": {**bpe, "vocab": {"a": 0, "z": -1}}}, "token id -1"
    yield {"model": {**bpe, "vocab": {"a": 0, "z": "1"}}}, "not an integer"
    yield {"model": {**bpe, "vocab": {"a": 0, "z" * 100_000: 1}}}, "a token of 100000 characters"
    yield {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["b" * 1_000_000, 0.0]]}}, "a token of 1000000 char"
    yield {"model": {**bpe, "continuing_subword_prefix": "é", "merges": [["a", "b"]]}}, "ends at 0"  # a panic
    piece = {"type": "WordPiece", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    yield {"model": {**piece, "max_input_chars_per_word": 10**9}}, "words of 1000000000 characters"
    yield rules("normalizer", "normalizers", double, 40), "times as long"
    yield rules("normalizer", "normalizers", {"type": "ByteLevel"}, 20), "times as long"
    yield rules("normalizer", "normalizers", {"type": "Prepend", "prepend": "x"}, 1000), "rules, at most 64"
    yield {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////fwAAAAA="}}, "cut off"
    yield {"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "non-zero"  # a panic
    yield {"post_processor": {**template, "single": [text] * 5000}}, "repeats the text"
    yield rules("post_processor", "processors", {**template, "single": [text] * 2}, 40), "repeats the text"
    yield {"normalizer": json.loads('{"a":' * 60 + "1" + "}" * 60)}, "nested deeper"


@pytest.mark.parametrize(("changes", "reason"), [*hostile_tokenizers()])
def test_a_tokenizer_from_outside_is_held_to_bounds(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    table = {**json.loads(BYTES.tokenizer.to_str()), **changes}
    text = json.dumps({**table, "added_tokens": []} if "model" in changes else table)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=reason):
        vocabulary_of(text, 0)
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a", "model_max_length": 1' + "0" * 30 + "}")
    with pytest.raises(ModelError, match=reason):
        folder_vocabulary(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_slow_tokenizer_s_ids_are_held_to_bounds(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "</s>": 1, "z": 2147483000}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}'
    )
    with pytest.raises(ModelError, match="2147483000"):
        folder_vocabulary(tmp_path)


def test_ids_that_no_token_has_are_refused() -> None:
    text = BYTES.tokenizer.to_str()
    for changes in ({"end_of_text": 257}, {"stops": [1 << 40]}, {"beginning": [-1]}):
        with pytest.raises(ModelError, match="is none of the tokenizer's 257"):
            vocabulary_of(text, **{"end_of_text": 256, **changes})  # type: ignore[arg-type]


def test_a_tokenizer_that_gives_up_on_a_text_is_an_error_of_ours() -> None:
    table = json.loads(BYTES.tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    vocabulary = vocabulary_of(json.dumps({**table, "pre_tokenizer": split}), 256)
    with pytest.raises(ModelError, match=r"cannot encode the text: .*retry-limit"):
        vocabulary.prompt("a" * 3000 + "b")
