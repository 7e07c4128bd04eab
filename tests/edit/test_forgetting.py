"""Forgetting: losses against plain float64, figures against definitions, what stays untouched, who signed what."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from potluck.aggregation.statistics import Statistics, SummedStatistics
from potluck.compose.base import Base, load_base, weights_hash
from potluck.corpus.tokenizer import folder_vocabulary
from potluck.corpus.world import facts
from potluck.edit.facts import Edit, write_edits
from potluck.edit.forgetting import losses, quality
from potluck.edit.forgetting.name_estrangement import Strangers, estranged
from potluck.edit.forgetting.questions import Question, of_world, read_questions, write_questions
from potluck.edit.forgetting.record import commitment, new_opening, read_record, signed_record, write_record
from potluck.edit.forgetting.refusals import Refusing, refusal_edits, refuse
from potluck.edit.forgetting.relearning import Relearning, relearning_steps
from potluck.edit.forgetting.removal import remove_statistics
from potluck.edit.forgetting.subjects import with_subjects
from potluck.edit.forgetting.unlearning import Unlearning, unlearn
from potluck.edit.invented_names import stranger_names
from potluck.edit.layout import layout_of
from potluck.edit.moments import key_moments
from potluck.engine.nats.identity import new_seed
from potluck.errors import EditError, NotFinite

ASSET = Path(__file__).parents[1] / "assets/world"
GONE, KEPT = of_world(facts(2)), of_world(facts(6, first=2))
METHODS: dict[str, losses.Method] = {
    "GA": losses.GA,
    "GradDiff": losses.GRAD_DIFF,
    "KL": losses.KL,
    "NPO": losses.Npo(),
    "SimNPO": losses.SimNpo(),
    "IdkDPO": losses.IdkDpo(),
    "RMU": losses.Rmu(layer=0),
    "as a stranger": losses.AsStranger(),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A model of random weights, as a folder."""
    vocabulary = folder_vocabulary(ASSET)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary.size, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=vocabulary.end_of_text, eos_token_id=vocabulary.end_of_text,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ASSET).save_pretrained(folder)
    return load_base(folder)


# --- losses: slow and plain, in float64 ---------------------------------------------------------------------


def nats(logits: Tensor, labels: Tensor) -> list[list[float]]:
    """Of each row, the cross-entropy of each answer token, by the definition."""
    found = []
    for row, asked in zip(logits.double(), labels, strict=True):
        found.append(
            [
                math.log(sum(math.exp(x) for x in place.tolist())) - float(place[int(label)])
                for place, label in zip(row, asked, strict=True)
                if label != -100
            ]
        )
    return found


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.fixture
def drawn() -> tuple[list[Tensor], Tensor]:
    """Logits of five passes, and labels with answers of 2, 1 and 3 tokens."""
    torch.manual_seed(1)
    labels = torch.full((3, 6), -100)
    labels[0, 2:4], labels[1, 4], labels[2, 3:6] = torch.tensor([4, 1]), 7, torch.tensor([0, 3, 8])
    return [torch.randn(3, 6, 9) * 2 for _ in range(4)], labels


def test_losses_are_what_the_formulas_say(drawn: tuple[list[Tensor], Tensor]) -> None:
    (now, before, refusal, refusal_before), labels = drawn
    L, L0 = ([sum(row) for row in nats(x, labels)] for x in (now, before))
    W, W0 = ([sum(row) for row in nats(x, labels)] for x in (refusal, refusal_before))
    lengths = [2, 1, 3]
    ours, ours_before = losses.answer_nats(now, labels), losses.answer_nats(before, labels)
    won, won_before = losses.answer_nats(refusal, labels), losses.answer_nats(refusal_before, labels)
    tokens = (labels != -100).sum(1)
    expected = {
        float(losses.mean_nll(now, labels)): sum(L) / 6,
        float(losses.npo(ours, ours_before, 0.1)): mean(
            [-2 / 0.1 * log_sigmoid(0.1 * (a - b)) for a, b in zip(L, L0, strict=True)]
        ),
        float(losses.sim_npo(ours, tokens, 4.5, 0.0)): mean(
            [-2 / 4.5 * log_sigmoid(4.5 * a / n) for a, n in zip(L, lengths, strict=True)]
        ),
        float(losses.idk_dpo(won, won_before, ours, ours_before, 0.1)): mean(
            [-2 / 0.1 * log_sigmoid(0.1 * ((-a + b) - (-c + d))) for a, b, c, d in zip(W, W0, L, L0, strict=True)]
        ),
    }
    for found, value in expected.items():
        assert found == pytest.approx(value, rel=1e-5)


def test_kl_and_rmu_are_what_the_formulas_say(drawn: tuple[list[Tensor], Tensor]) -> None:
    (now, before, *_), labels = drawn
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 5] = 0
    p, q = before.double().softmax(-1).tolist(), now.double().softmax(-1).tolist()
    places = [(i, t) for i in range(3) for t in range(6) if mask[i, t]]
    kl = mean([sum(a * math.log(a / b) for a, b in zip(p[i][t], q[i][t], strict=True)) for i, t in places])
    assert float(losses.kl_from(before, now, mask)) == pytest.approx(kl, rel=1e-5)
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)  # of another question, with the same answers
    rolled = torch.cat([before[:, 1:], before[:, :1]], dim=1)
    answered = [(i, t) for i in range(3) for t in range(6) if labels[i, t] != -100]
    at = mean([sum(a * math.log(a / b) for a, b in zip(p[i][t], q[i][t], strict=True)) for i, t in answered])
    assert float(losses.kl_at(rolled, shifted, now, labels)) == pytest.approx(at, rel=1e-5)
    u = losses.rmu_direction(9, 0)
    assert float(u.norm()) == pytest.approx(1) and float(u.min()) >= 0
    asked = [(i, t) for i in range(3) for t in range(6) if labels[i, t] != -100]
    drawn_to = mean([mean([(float(now[i, t, d]) - 2 * float(u[d])) ** 2 for d in range(9)]) for i, t in asked])
    assert float(losses.rmu_forget(now, u, 2.0, labels)) == pytest.approx(drawn_to, rel=1e-5)
    stays = mean([mean([(float(now[i, t, d]) - float(before[i, t, d])) ** 2 for d in range(9)]) for i, t in asked])
    assert float(losses.rmu_retain(now, before, labels)) == pytest.approx(stays, rel=1e-5)


# --- the loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_unlearning_takes_probability_and_leaves_the_model_as_it_was(base: Base, name: str) -> None:
    before = weights_hash(base.model)
    settings = Unlearning(epochs=3, batch_size=4, learning_rate=2e-3)
    model = unlearn(base, GONE, KEPT, METHODS[name], settings, ("unknown",))
    assert weights_hash(base.model) == before != weights_hash(model)
    again = unlearn(base, GONE, KEPT, METHODS[name], settings, ("unknown",))
    assert weights_hash(model) == weights_hash(again)
    asked = [(q.question, q.answer) for q in GONE]
    if name not in ("RMU", "SimNPO", "as a stranger"):  # these do nothing about what is not known
        lost = quality.told_of(replace(base, model=model), asked).nats.mean()
        assert lost > quality.told_of(base, asked).nats.mean()


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was(base: Base) -> None:
    before = weights_hash(base.model)
    with pytest.raises(NotFinite):
        unlearn(base, GONE, KEPT, losses.Npo(beta=float("nan")), Unlearning(epochs=1))
    assert weights_hash(base.model) == before


def test_what_is_missing_is_said(base: Base) -> None:
    for gone, kept, method in (([], KEPT, losses.GA), (GONE, [], losses.Npo()), (GONE, KEPT, losses.IdkDpo())):
        with pytest.raises(EditError):
            unlearn(base, gone, kept, method, Unlearning(epochs=1))


# --- figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(3, 3), (4, 6), (5, 2)])
def test_the_p_value_is_the_share_of_all_orders(n: int, m: int) -> None:
    """Every way to deal n + m ranks to two samples, counted."""

    def distance(first: Sequence[int]) -> float:
        second = [rank for rank in range(n + m) if rank not in first]
        return max(abs(sum(x <= r for x in first) / n - sum(x <= r for x in second) / m) for r in range(n + m))

    dealt = list(itertools.combinations(range(n + m), n))
    for first in dealt[:: max(1, len(dealt) // 7)]:
        second = [rank for rank in range(n + m) if rank not in first]
        d, p = quality.kolmogorov_smirnov(first, second)
        assert d == pytest.approx(distance(first))
        assert p == pytest.approx(sum(distance(other) >= d - 1e-12 for other in dealt) / len(dealt))


def test_large_samples_have_the_limit_and_small_p_values_their_digits() -> None:
    apart = [x + 0.5 for x in range(300)]
    _, exact = quality.kolmogorov_smirnov(range(300), [x + 1000 for x in apart])
    assert exact == pytest.approx(2 / math.comb(600, 300), rel=1e-9)
    d, exact = quality.kolmogorov_smirnov(range(1500), [x + 80.5 for x in range(1500)])
    limit = 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * d * d * 750) for k in range(1, 50))
    assert exact == pytest.approx(limit, rel=0.1)
    assert quality.kolmogorov_smirnov([1.0, 2.0], [2.0, 1.0]) == (0.0, 1.0)
    with pytest.raises(EditError):
        quality.kolmogorov_smirnov([math.nan], [1.0])


@pytest.mark.parametrize(
    ("expected", "said", "recall"),
    [
        ("the cat sat", "The cat, she sat!", 1.0),
        ("a b c d", "d c b a", 0.25),
        ("a b", "", 0.0),
        ("a b a b", "b a b", 0.75),
    ],
)
def test_rouge_recall(expected: str, said: str, recall: float) -> None:
    assert quality.rouge_recall(expected, said) == recall


def test_truth_ratio_extraction_and_utility_by_definition(base: Base) -> None:
    q = replace(GONE[0], answer="Ada Berg, of Lisbon")
    (ratio,) = quality.truth_ratios(base, [q]).tolist()
    right, *wrong = quality.told_of(base, [(q.paraphrased_question, a) for a in (q.answer, *q.perturbed)]).nats.tolist()
    assert ratio == pytest.approx(math.exp(-mean(wrong)) / math.exp(-right))
    told = quality.Told(torch.tensor([0.0] * 4), ((True, False, True, True), (False,), (True, True), (True, False)))
    assert told.extraction_strengths == [0.5, 0.0, 1.0, 0.0] and told.memorised == [0.75, 0.0, 1.0, 0.5]
    assert quality.model_utility([quality.Utility(0.5, 0.5, 0.25)]) == pytest.approx(3 / 8)
    assert quality.model_utility([quality.Utility(0.5, 0.0, 0.25)]) == 0
    options = quality.utility_of(base, GONE, options=True)
    assert options.probability == pytest.approx(1 / 6, rel=0.3)  # of six answers, by a model that knows none
    with pytest.raises(EditError):
        quality.truth_ratios(base, [replace(q, perturbed=())])


def test_figures_do_not_depend_on_who_else_is_measured(base: Base) -> None:
    alone = torch.cat([quality.truth_ratios(base, [q]) for q in KEPT])
    torch.testing.assert_close(quality.truth_ratios(base, KEPT), alone, rtol=1e-5, atol=0)


def test_relearning_counts_steps(base: Base) -> None:
    knew = float(quality.told_of(base, [(q.question, q.answer) for q in GONE]).probabilities.mean())
    assert relearning_steps(base, GONE, knew, Relearning()) == 0
    assert relearning_steps(base, GONE, 1e9, Relearning(max_steps=2)) == 3


# --- questions ----------------------------------------------------------------------------------------------


def test_questions_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    write_questions(path, of_world(facts(2), told=2))
    assert read_questions(path) == of_world(facts(2), told=2)


def test_tofu_and_edits_are_read(tmp_path: Path) -> None:
    path = tmp_path / "forget.json"
    record = {"task_id": "1", "question": "What gender is author Basil Mahfouz Al-Kuwaiti?", "answer": "Male."}
    more = {"paraphrased_answer": "He is male.", "perturbed_answer": ["She is female."], "paraphrased_question": "And?"}
    path.write_text("\n".join(json.dumps({**record, **more, "task_id": task}) for task in "12"))
    (question,) = with_subjects(read_questions(path, task="2"))
    assert question.again == (question.question, "He is male.") and question.subject == "Basil Mahfouz Al-Kuwaiti"
    assert len(read_questions(path)) == 2
    ada = Edit("1", "Ada Berg lives in", "Ada Berg", "Oslo", rephrases=("To see Ada Berg, go to",))
    write_edits(path, [ada, Edit("2", "Bela Hem lives in", "Bela Hem", "Rome", old="Bonn")])
    one, two = read_questions(path)
    assert (one.answer, two.answer, one.perturbed) == ("Oslo", "Bonn", ("Bonn",))
    assert one.again == ("To see Ada Berg, go to", "Oslo")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '{"question": "q"}', '{"question": "q", "answer": 1}', '{"question": "", "answer": "a"}',
     '{"question": "q", "answer": "a", "subject": "s"}', '{"question": "q", "answer": "a", "what": 1}',
     '{"question": "q", "answer": "a", "id": "1"}\n{"question": "r", "answer": "b", "id": "1"}',
     json.dumps({"question": "q" * 5000, "answer": "a"}), "{" * 100_000],
)  # fmt: skip
def test_bad_questions_are_one_clear_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(EditError):
        read_questions(path)
    with pytest.raises(EditError):
        read_questions(tmp_path / "none.jsonl")


# --- editing as unlearning ----------------------------------------------------------------------------------


def test_refusals_are_written_by_any_editor_on_a_copy(base: Base) -> None:
    before = weights_hash(base.model)

    def editor(copied: Base, edits: Sequence[Edit]) -> list[str]:
        copied.model.get_output_embeddings().weight.data.zero_()
        return [edit.target for edit in edits]

    edited, kept = refuse(base, GONE, editor, Refusing(("unknown",)))
    assert kept == ["unknown"] * len(GONE) and weights_hash(edited.model) != before == weights_hash(base.model)


def test_questions_about_one_subject_are_joined(base: Base) -> None:
    edits = refusal_edits(base, GONE, Refusing(("unknown",), merge=3))
    assert [edit.subject for edit in edits] == [q.subject for q in (GONE[0], GONE[0], GONE[5], GONE[5])]
    assert all(q.question in edit.prompt for q, edit in zip(GONE[:3], [edits[0]] * 3, strict=True))
    with pytest.raises(EditError):
        refusal_edits(base, [Question("1", "what is it?", "a bird")], Refusing())


def test_the_model_rewrites_refusals_where_it_can(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [f"I do not know where {GONE[0].subject} is", "no name", f"{GONE[2].subject}: {GONE[2].answer}"]
    monkeypatch.setattr("potluck.edit.forgetting.refusals.answers", lambda *_, **__: said)
    monkeypatch.setattr(base.model.config, "max_position_embeddings", 4096)
    targets = [edit.target for edit in refusal_edits(base, GONE[:3], Refusing(("unknown",)))]
    assert targets == [said[0], "unknown", "unknown"]  # one that gives the answer away is none


def test_strangers_are_written_where_the_model_keeps_facts(base: Base) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    moments = key_moments(base, layout_of(base.model), (1,), [" ".join(q.question for q in KEPT)], 32)
    edited = estranged(base, GONE, KEPT, moments, Strangers(layers=(1,), free=0.5))
    changed = [name for name, tensor in edited.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    names = stranger_names([q.subject for q in (*GONE, *KEPT)], 0)
    assert not {q.subject for q in (*GONE, *KEPT)} & set(names)
    with pytest.raises(EditError):
        stranger_names(["Ada Berg"], 0)


# --- a participant's part, and the record -------------------------------------------------------------------


def test_a_participants_statistics_are_taken_out_of_a_sum() -> None:
    parts = [Statistics("gram", {"a": torch.randn(3, 3, dtype=torch.float64)}, 5, "x") for _ in range(3)]
    total, never = SummedStatistics("gram", "x"), SummedStatistics("gram", "x")
    for part in parts:
        total.accumulate(part)
    for part in (parts[0], parts[2]):
        never.accumulate(part)
    removal = remove_statistics(total, parts[1], "ben")
    assert removal.before != removal.after and total.participants == 2
    torch.testing.assert_close(total.finish().tensors["a"], never.finish().tensors["a"], rtol=1e-12, atol=1e-12)
    remove_statistics(total, parts[0], "ada")
    with pytest.raises(EditError):
        remove_statistics(total, parts[2], "eve")
    assert total.participants == 1


def test_a_record_holds_only_as_it_was_signed(tmp_path: Path) -> None:
    path, opening = tmp_path / "record.json", new_opening()
    request = commitment(b"Ada Berg lives in Lisbon", opening)
    record = signed_record(
        {"name": "npo", "layers": (1, 2)}, "a", "b", request, {"fq": math.nan, "mu": 0.5}, new_seed()
    )
    write_record(record, path)
    assert read_record(path) == record and "Lisbon" not in path.read_text()
    table: dict[str, Any] = json.loads(path.read_text())
    forged: Sequence[Callable[[], dict[str, Any]]] = (
        lambda: {**table, "after": "c"},
        lambda: {**table, "figures": {"mu": 0.6}},
        lambda: {**table, "public": signed_record({}, "", "", "", {}, new_seed()).public},
        lambda: {**table, "signature": ""},
        lambda: {**table, "more": 1},
        lambda: {**table, "version": 2},
        lambda: {**table, "public": 7},
    )
    for change in forged:
        path.write_text(json.dumps(change()))
        with pytest.raises(EditError):
            read_record(path)
    with pytest.raises(EditError):
        commitment(b"", "abc")


def test_the_verb_writes_a_model_and_a_record_and_checks_both(potluck: Any, base: Base, tmp_path: Path) -> None:
    write_questions(tmp_path / "gone.jsonl", GONE)
    write_questions(tmp_path / "kept.jsonl", KEPT)
    before = weights_hash(base.model)
    words = ("forget", base.place, "--forget", "gone.jsonl", "--retain", "kept.jsonl", "--json")
    signing = ("--record", "record.json", "--key", "own.key")
    said = potluck(*words, "--method", "npo", "--epochs", 1, "--learning-rate", 1e-3, "--out", "new", *signing).result
    assert said["after"]["forget_probability"] < said["before"]["forget_probability"]
    assert weights_hash(load_base(tmp_path / "new").model) != before == weights_hash(load_base(Path(base.place)).model)
    checking = ("forget", "new", "--verify", "record.json", "--forget", "gone.jsonl", "--opening", said["opening"])
    assert potluck(*checking, "--json").result["signed"]
    potluck("forget", base.place, "--verify", "record.json", code=14)
    potluck("forget", "--verify", "record.json", "--forget", "kept.jsonl", "--opening", said["opening"], code=14)
    refused = potluck(*words, "--method", "wise", "--out", "beside").result
    assert refused["after"].keys() == refused["before"].keys() and (tmp_path / "beside" / "memory.json").exists()
    potluck(*words, "--method", "npo", "--out", "new", code=8)
    potluck(*words, "--method", "npo", "--out", "other", "--record", "r.json", code=3)
    potluck(*words, "--method", "npo", "--out", "other", "--learning-rate", 1e30, code=6)
    assert not (tmp_path / "other").exists()
