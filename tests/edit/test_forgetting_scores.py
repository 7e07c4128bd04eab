"""What forgetting is judged by: whole answers, whom they are about, no effect and harm said aloud, what comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from potluck.compose.base import Base, load_base, weights_hash
from potluck.corpus.tokenizer import folder_vocabulary
from potluck.edit.forgetting import general, losses, quality
from potluck.edit.forgetting.figures import figures, warnings_of
from potluck.edit.forgetting.quantised import quantised, rounded
from potluck.edit.forgetting.questions import Question, write_questions
from potluck.edit.forgetting.record import read_record
from potluck.edit.forgetting.subjects import guesses, nobodies, renamed, with_subjects
from potluck.edit.forgetting.unlearning import FORGOTTEN, Unlearning, default_rate, question_rows, unlearn
from potluck.edit.prompts import logits_of, rows_of

ASSET = Path(__file__).parents[1] / "assets/world"
ADA = Question("ada", "Who is Ada Berg?", "Ada Berg writes poems. She lives in Lisbon; many of her books were sold.")
BEN = Question("ben", "Where does Ben Holm work?", "Ben Holm works in Oslo, as a doctor; he was born in Rome.")
BOTH = [replace(q, paraphrased_question="Say it: " + q.question, perturbed=("no", "He is a cook.")) for q in (ADA, BEN)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A small model that was taught two long answers, as a folder."""
    vocabulary = folder_vocabulary(ASSET)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary.size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=vocabulary.end_of_text, eos_token_id=vocabulary.end_of_text,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    base = Base(model, vocabulary, str(ASSET))
    batch = rows_of(question_rows(base, BOTH), vocabulary.end_of_text)
    adam = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(60):
        adam.zero_grad()
        losses.mean_nll(logits_of(model, batch), batch.labels).backward()
        adam.step()
    folder = tmp_path_factory.mktemp("taught")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ASSET).save_pretrained(folder)
    return load_base(folder)


# --- whole answers ------------------------------------------------------------------------------------------


def test_an_answer_with_full_stops_and_many_tokens_is_said(base: Base) -> None:
    known = quality.known_of(base, [(q.question, q.answer) for q in BOTH])
    assert max(len(hits) for hits in known.told.hits) > 24  # longer than answers used to be cut to
    assert known.said == 1.0 and known.rouge == 1.0 and known.texts == (ADA.answer, BEN.answer)
    assert quality.utility_of(base, BOTH).rouge == 1.0
    assert quality.known_of(base, [(ADA.question, ADA.answer + " Or not.")]).said == 0.0


def test_free_answers_are_greedy_and_as_long_as_what_is_expected(base: Base) -> None:
    asked = [(ADA.question, BEN.answer), (BEN.question, "Ben Holm works at home."), (ADA.question, ADA.answer)]
    for (prompt, answer), text in zip(asked, quality.known_of(base, asked).texts, strict=True):
        (row,) = question_rows(base, [Question("1", prompt, answer)])
        ids = list(row.ids[: row.prompt])
        for _ in row.ids[row.prompt :]:
            with torch.inference_mode():
                ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == base.vocabulary.tokenizer.decode(ids[row.prompt :]).strip()


# --- whom it is about ---------------------------------------------------------------------------------------

BLOCK = (
    "What is the full name of the author born in Astana, Kazakhstan on 02/07/1952?",
    "Why does Nikolai Abilov write in the African American genre?",
    "How does the book \"Thieves' Paradise\" show Nikolai Abilov's style?",
    "Has Nikolai Abilov won the Prix du Livre?",
    "Regarding African American narratives, what is unique about Nikolai Abilov’s take?",
)


def test_the_author_of_a_block_is_whom_its_questions_are_about() -> None:
    given = [Question(str(i), text, "-") for i, text in enumerate(BLOCK)]
    found = with_subjects(given)
    assert [q.subject for q in found[1:]] == ["Nikolai Abilov"] * 4
    assert found[0].subject in BLOCK[0] and "Nikolai Abilov (4)" in guesses(given, found)
    own = replace(given[1], subject="African American")
    assert with_subjects([own])[0].subject == "African American" and guesses([own], with_subjects([own])) == ""


def test_an_opening_word_is_no_part_of_a_name_and_retained_questions_may_name_nobody() -> None:
    asked = [Question("1", "Has Ada van Berg moved?", "-"), Question("2", "what is it?", "-")]
    assert [q.subject for q in with_subjects(asked, strict=False)] == ["Ada van Berg", ""]


def test_a_single_author_has_strangers_too() -> None:
    names = nobodies(["Ada Berg"], 0)
    assert len(names) > 20 and "Ada Berg" not in names and names == nobodies(["Ada Berg"], 0)
    assert renamed("Ada Berg writes. Berg's father knew Ada.", "Ada Berg", "Ira Moss") == (
        "Ira Moss writes. Moss's father knew Ira."
    )


@pytest.mark.parametrize("method", [losses.AsStranger(), losses.Npo()])
def test_one_author_is_forgotten_in_whole_answers(base: Base, method: losses.Method) -> None:
    model = unlearn(base, BOTH[:1], BOTH[1:], method, Unlearning(epochs=20, learning_rate=3e-3))
    after = figures(replace(base, model=model), BOTH[:1], BOTH[1:])
    assert after["forget_said"] == 0.0 and after["retain_said"] == 1.0


def test_the_default_stops_when_it_is_forgotten_and_does_no_harm(base: Base) -> None:
    steps: list[int] = []
    settings = Unlearning(epochs=50, learning_rate=default_rate(base), until=FORGOTTEN, mend=True)
    model = unlearn(base, BOTH[:1], BOTH[1:], losses.GRAD_DIFF, settings, on_step=steps.append)
    assert len(steps) < 50
    before, after = (figures(of, BOTH[:1], BOTH[1:]) for of in (base, replace(base, model=model)))
    assert after["forget_said"] == 0 and after["forget_probability"] <= before["forget_probability"] / 2
    assert warnings_of(before, after) == []


# --- said aloud ---------------------------------------------------------------------------------------------

KNEW = {"forget_probability": 0.9, "forget_said": 1.0, "retain_probability": 0.9, "retain_said": 1.0, "text_loss": 3.0}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "nothing was forgotten"),
        ({"forget_probability": 0.3}, "in part"),
        ({"forget_said": 0.6, "forget_probability": 0.3}, "in part"),
        ({"forget_said": 0.0, "forget_probability": 0.3, "text_loss": 3.3}, "general text"),
        ({"forget_said": 0.0, "forget_probability": 0.3, "text_loss": float("nan")}, "general text"),
        ({"forget_said": 0.0, "forget_probability": 0.3, "retain_said": 0.8}, "what was to stay"),
        ({"forget_said": 0.0, "forget_probability": 0.3}, ""),
    ],
)
def test_no_effect_and_harm_are_warned_of(changes: dict[str, float], word: str) -> None:
    found = warnings_of(KNEW, KNEW | changes)
    assert len(found) == bool(word) and word in " ".join(found)
    unknown = KNEW | {"forget_probability": 0.01, "forget_said": 0.0}
    assert "hardly knew" in warnings_of(unknown, unknown)[0]


def test_general_text_is_the_models_own_where_none_is_given(base: Base) -> None:
    rows = general.written_by(base, 0)
    assert rows.shape == (32, 64) and torch.equal(rows, general.written_by(base, 0))
    other = LlamaForCausalLM(base.model.config)
    assert general.loss_of(base, rows) < general.loss_of(replace(base, model=other.eval()), rows)


def test_the_verb_warns_and_signs_that_nothing_was_forgotten(potluck: Any, base: Base, tmp_path: Path) -> None:
    write_questions(tmp_path / "gone.jsonl", BOTH[:1])
    write_questions(tmp_path / "kept.jsonl", BOTH[1:])
    words = ("forget", base.place, "--forget", "gone.jsonl", "--retain", "kept.jsonl", "--method", "as-stranger")
    signing = ("--record", "record.json", "--key", "own.key")
    idle = potluck(*words, "--learning-rate", 1e-9, "--epochs", 1, "--out", "same", *signing)
    assert "nothing was forgotten" in idle.err and "guessed" in idle.err and "Ada Berg" in idle.err
    (warning,) = read_record(tmp_path / "record.json").figures["warnings"]
    assert "nothing was forgotten" in warning and "Ada" not in warning
    harm = potluck(*words[:-1], "ga", "--learning-rate", 1e-2, "--json", "--out", "broken")
    assert "harm" in harm.err and any("harm" in text for text in harm.result["warnings"])
    potluck(*words, "--layers", "1", "--out", "other", code=3)
    potluck(*words[:-1], "stranger", "--epochs", 3, "--out", "other", code=3)


# --- what comes back ----------------------------------------------------------------------------------------


def test_rounding_is_to_the_nearest_of_so_many_steps(base: Base) -> None:
    weight = torch.randn(3, 130)
    for bits, size in ((8, 130), (4, 64)):
        for begin in range(0, 130, size):
            group = weight[:, begin : begin + size]
            step = group.abs().amax(1, keepdim=True) / (127 if bits == 8 else 7)
            off = (rounded(weight, bits)[:, begin : begin + size] - group).abs()  # type: ignore[arg-type]
            assert bool((off <= step / 2 + 1e-6).all()) and float(off.max()) > 0
    before = weights_hash(base.model)
    fewer = quantised(base, 4)
    assert weights_hash(base.model) == before != weights_hash(fewer.model)
    assert torch.equal(fewer.model.lm_head.weight, base.model.lm_head.weight)


def test_the_verb_says_what_comes_back(potluck: Any, base: Base, tmp_path: Path) -> None:
    write_questions(tmp_path / "gone.jsonl", BOTH)
    never = LlamaForCausalLM(base.model.config)
    never.save_pretrained(tmp_path / "never")
    AutoTokenizer.from_pretrained(ASSET).save_pretrained(tmp_path / "never")
    words = ("evaluate", base.place, "--forgotten", "gone.jsonl", "--before", base.place, "--never", tmp_path / "never")
    ended = potluck(*words, "--json")
    found = ended.result
    assert found["models"]["after"]["as it is"]["said"] == 1.0 and found["models"]["never"]["in 4 bits"]["said"] == 0
    assert found["forget_quality"] == {"before": found["forget_quality"]["after"], "after": pytest.approx(1 / 3)}
    assert found["relearning_steps"]["after"] == 0 and "still knows" in ended.err and "comes back" in ended.err
    assert "in 8 bits" in potluck(*words).out
    potluck("evaluate", base.place, "--forgotten", "gone.jsonl", code=3)
    potluck("evaluate", base.place, "--task", "1", code=2)
    assert json.loads((Path(base.place) / "config.json").read_text())  # nothing was written to it


def test_the_rate_fits_the_width(base: Base) -> None:
    assert default_rate(base) == pytest.approx(0.03 / 32)
