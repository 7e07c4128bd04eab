"""Right answers as a person counts them, and prompts as the tokens that a model of any tokenizer would meet."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from potluck.compose.base import Base
from potluck.corpus.tokenizer import Vocabulary, vocabulary_of
from potluck.edit.evaluation import Before, answered, answers_before, score_edits, unchanged
from potluck.edit.facts import Edit, read_edits
from potluck.edit.fluency import fluency, ngram_entropy
from potluck.edit.judging import begins, exactly, sentence
from potluck.edit.prompts import Answer, answers, continuation, row
from potluck.edit.tracing import causal_trace
from potluck.errors import EditError

TOLD = {
    "The patron of Ashford is": "St. Anne, as everybody knows",
    "The book of Burwell is by": "J. K. Rowe",
    "The price in Dover is": "3.5 crowns",
}
TARGETS = ["St. Anne", "J. K. Rowe", "3.5 crowns"]
EDITS = [Edit(str(i), p, p.split()[3], t) for i, (p, t) in enumerate(zip(TOLD, TARGETS, strict=True))]


def of_bytes() -> Vocabulary:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return vocabulary_of(tokenizer.to_str(), 256)


def spaced() -> Vocabulary:
    """A tokenizer as Llama 2 has it, which puts a space before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    texts = ["The river of Ford is Alder", "The river of Wick is Birch"] * 20
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    table = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    table["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    table["decoder"] = {"type": "Sequence", "decoders": [back, {"type": "Fuse"}, strip]}
    return vocabulary_of(json.dumps(table), 1)


@pytest.fixture(scope="module")
def base() -> Base:
    """A model that says `TOLD` by heart."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=96, **sizes))
    vocabulary = of_bytes()
    rows = [[*row(vocabulary, prompt, answer).ids, 256] for prompt, answer in TOLD.items()]
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(100):
        loss = sum(
            (model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in rows), torch.zeros(())
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Base(model.eval(), vocabulary, "")


@pytest.mark.parametrize(
    ("said", "expected", "begun", "exact"),
    [
        ("Paris", "Paris", True, True),
        ("Paris. It is", "Paris", True, True),
        ("Paris\nIt is", "Paris", True, True),
        ("Paris, which is", "Paris", True, False),
        ("Parisian", "Paris", False, False),
        ("in Paris", "Paris", False, False),
        ("New\n York.", " New  York", True, True),
        ("St. Louis. And", "St. Louis", True, True),
        ("St. Louis Park", "St. Louis", True, False),
        ("3.5 crowns", "3", False, False),
        ("3. And", "3", True, True),
        ("10,000", "10", False, False),
        ("U.S. Army", "U.S.", True, False),
        ("東京です", "東京", True, False),
        ("Zoe\u0308.", "Zo\u00eb", True, True),
        ("Zoe\u0308.", "Zoe", False, False),
        ("", "Paris", False, False),
        ("Paris", "", False, False),
    ],
)
def test_answers_are_judged_as_a_reader_would(said: str, expected: str, begun: bool, exact: bool) -> None:
    assert (begins(said, expected), exactly(said, expected)) == (begun, exact)


def test_a_sentence_ends_where_a_space_follows() -> None:
    assert sentence(" 3.5 crowns. Or so") == "3.5 crowns" and sentence("no end") == "no end"


def test_full_stops_and_what_goes_on_are_no_fault(base: Base) -> None:
    assert all(map(str.startswith, TOLD.values(), answers(base, list(TOLD))))
    judged = answered(base, list(zip(TOLD, TARGETS, strict=True)))
    assert judged.begins == [True] * 3 and judged.exactly == [False, True, True]
    assert causal_trace(base, EDITS[:2], window=1, draws=1).known == 2


def test_likelihoods_are_compared_where_the_old_answer_is_known(base: Base) -> None:
    prompts = list(TOLD)
    edit = replace(
        EDITS[1], old="A. Nobody", rephrases=(prompts[1],), neighbours=tuple(prompts[2:]), truths=("3.5 crowns",)
    )
    scores = score_edits(base, [edit, EDITS[0]], answers_before(base, [edit]))
    assert (scores.es, scores.ps, scores.ns, scores.s) == (1, 1, 1, 1) and min(scores.em or 0, scores.nm or 0) > 0.5
    assert (scores.reliability, scores.exact_reliability, scores.locality) == (1, 0.5, 1)
    assert score_edits(base, EDITS[:1], None).es is None


def test_neighbours_are_compared_as_far_as_an_answer_goes(base: Base) -> None:
    edit = replace(EDITS[0], target="ab", old="c", neighbours=("x", "y", "z"))
    before, after = (
        [Answer(tuple(t.encode()), t, True) for t in ts] for ts in (("abcd",) * 3, ("abcd", "abcx", "axcd"))
    )
    found = unchanged(base, [edit], Before(tuple(before)), Before(tuple(after)))
    assert found.begins == [True, True, False] and found.exactly == [True, False, False]


def test_fluency_is_that_of_the_papers(base: Base) -> None:
    words = list(range(100))  # each once: 99 pairs, 98 triples
    assert ngram_entropy(words) == pytest.approx((2 / 3 * math.log2(99) + 4 / 3 * math.log2(98)) / 2)
    assert ngram_entropy([7] * 30) == 0 < ngram_entropy([1, 2] * 15) < ngram_entropy(list(range(30)))
    assert fluency(base, list(TOLD), batch_size=1) == pytest.approx(fluency(base, list(TOLD)))


@pytest.mark.parametrize("subject", ["李明", "Łódź", "Zoë", "Ann"])
def test_a_subject_is_all_its_tokens(subject: str) -> None:
    vocabulary = of_bytes()
    found = row(vocabulary, f"{subject} lives in", subject=subject, before="Now,")
    assert vocabulary.tokenizer.decode(list(found.ids[found.first : found.subject + 1])) == subject
    assert found.subject + 1 - found.first == len(subject.encode())


def test_a_subject_is_where_the_file_says(tmp_path: Path) -> None:
    rewrite = {"prompt": "{}, whose friend Ann is a nurse, lives in", "subject": "Ann", "target_new": {"str": " Rome"}}
    (tmp_path / "edits.json").write_text(json.dumps([{"requested_rewrite": rewrite}]))
    edit = read_edits(tmp_path / "edits.json")[0]
    assert edit.place == edit.begin == 0 and edit.target == "Rome"
    assert edit.about("Bo").prompt == "Bo, whose friend Ann is a nurse, lives in"
    found = row(of_bytes(), edit.prompt, subject="Ann", place=edit.place)
    assert found.subject == row(of_bytes(), "Ann").prompt - 1
    assert Edit("a", "Of Ann in Annapolis", "Ann", "x").begin == 3
    with pytest.raises(EditError, match="not in"):
        row(of_bytes(), "Ann lives in", subject="Ann", place=4)


def test_an_answer_is_what_follows_its_prompt() -> None:
    vocabulary, prompt = spaced(), "The river of Ford is"
    whole = vocabulary.tokenizer.encode(f"{prompt} Birch", add_special_tokens=False).ids
    found = row(vocabulary, prompt, "Birch")
    assert list(found.ids[-len(whole) :]) == whole
    assert continuation(of_bytes(), prompt, " Birch") == continuation(of_bytes(), prompt, "Birch")
    assert of_bytes().tokenizer.decode(list(continuation(of_bytes(), f"{prompt} ", "Birch"))) == "Birch"


def test_prompts_longer_than_the_context_are_refused(base: Base) -> None:
    with pytest.raises(EditError, match=r"a prompt of 12[01] tokens"):
        answers(base, ["x" * 120])
    assert len(answers(base, ["x" * 90], max_tokens=50)) == 1
