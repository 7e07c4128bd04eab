"""Decoding together: what is said, by whom, and what it cost."""

from __future__ import annotations

import json
import math
import socket
import string
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from potluck.compose.base import Base
from potluck.compose.decoding.decode import Decoded, Rule, Sampling, Text, decode
from potluck.compose.decoding.endpoint import AtEndpoint
from potluck.compose.decoding.factory import Choice, opened, rule_of
from potluck.compose.decoding.models import Counts, Gold, Here, NextToken, gold_of
from potluck.compose.decoding.participants import AtParticipant, answered, question
from potluck.compose.decoding.rows import packed_rows, unpacked_rows
from potluck.compose.decoding.rules import Contrastive, Glimpse, Proxy, Speculative, WhenUnsure, entropy
from potluck.contribution import Contribution, ParticipantInfo, Task
from potluck.corpus.tokenizer import vocabulary_of
from potluck.engine.inprocess import InProcess
from potluck.errors import Damaged, EngineError, ModelError, RecipeError, TrainingError
from potluck.recipe.load import load_recipe
from potluck.updates.codec import wire_bytes

if TYPE_CHECKING:
    from tests.conftest import Potluck

V, END = 48, 0
PROMPT = [END, 7, 11, 5]


def tiny(seed: int, layers: int = 2, context: int = 64) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V + 2, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=context, bos_token_id=END, eos_token_id=END,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A small model and a large one."""
    return tiny(0, layers=1), tiny(1)


@pytest.fixture
def small(models: tuple[PreTrainedModel, ...]) -> Here:
    return Here("small", models[0], V)


@pytest.fixture
def large(models: tuple[PreTrainedModel, ...]) -> Here:
    return Here("large", models[1], V)


def plain(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """The next token after every prefix, ``(n, V)``, without any cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :, :V].log_softmax(-1)


def greedy(model: PreTrainedModel, count: int, prompt: Sequence[int] = PROMPT) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (tokens[-1] != END or len(tokens) == len(prompt)):
        tokens.append(int(plain(model, tokens)[-1].argmax()))
    said = tokens[len(prompt) :]
    return said[:-1] if said and said[-1] == END else said


def together(rule: Rule, base: NextToken, *assistants: NextToken, count: int = 20, **sampling: Any) -> Decoded:
    return decode(base, assistants, rule, PROMPT, max_tokens=count, stops={END}, sampling=Sampling(**sampling))


class Fixed:
    """Says the same of every token, whatever came before."""

    def __init__(self, name: str, row: Tensor, whole: bool = True) -> None:
        self.name, self.whole, self.vocabulary, self.counts = name, whole, len(row), Counts()
        self.row = row.log_softmax(-1)

    def log_probs(self, tokens: Sequence[int], positions: int = 1) -> Tensor:
        with self.counts.asking(positions):
            return self.row.expand(positions, -1)

    def gold(self, tokens: Sequence[int]) -> Gold:
        return gold_of(self.log_probs(tokens, len(tokens) - 1), tokens[1:])


# --- a model in this process -------------------------------------------------------------------


def test_a_model_goes_on_and_back_as_if_it_had_no_memory(small: Here) -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = [END]
    for _ in range(30):
        keep = int(torch.randint(1, len(tokens) + 1, (), generator=draw))
        more = torch.randint(1, V, (int(torch.randint(1, 4, (), generator=draw)),), generator=draw).tolist()
        tokens = [*tokens[:keep], *more]
        positions = int(torch.randint(1, len(tokens) + 1, (), generator=draw))
        rows, states = small.look(tokens, positions)
        hidden, means = states.split(32, dim=1)
        expected = plain(small.model, tokens)[-positions:]
        assert torch.allclose(rows, expected, atol=1e-4)
        head = small.model.get_output_embeddings().weight.detach()
        assert torch.allclose((hidden @ head.T)[:, :V].log_softmax(-1), expected, atol=1e-4)
        whole = Here("afresh", small.model, V).look(tokens, len(tokens))[1][:, :32].double()
        for at, mean in enumerate(means, len(tokens) - positions):
            weights = 0.98 ** torch.arange(at, -1, -1, dtype=torch.double)
            assert torch.allclose((weights @ whole[: at + 1] / weights.sum()).float(), mean, atol=1e-4)


def test_a_question_that_goes_on_costs_its_new_tokens(small: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    forward = small.model.forward

    def noted(*words: Any, **named: Any) -> Any:
        widths.append(named["input_ids"].shape[1])
        return forward(*words, **named)

    monkeypatch.setattr(small.model, "forward", noted)
    small.log_probs([1, 2, 3, 4])
    small.log_probs([1, 2, 3, 4, 5])
    small.log_probs([1, 2, 3, 4, 5], 3)
    small.log_probs([1, 2, 9])
    assert widths == [4, 1, 3, 1]


def test_a_model_whose_cache_cannot_go_back_begins_again(small: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: DynamicCache, count: int) -> None:
        raise ValueError("a sliding window")

    small.log_probs([1, 2, 3, 4])
    monkeypatch.setattr(DynamicCache, "crop", refuse)
    assert torch.allclose(small.log_probs([1, 2, 9, 4], 2), plain(small.model, [1, 2, 9, 4])[-2:], atol=1e-4)


def test_gold_is_what_the_text_has(small: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [END, *range(1, 24)]
    rows = plain(small.model, tokens)[:-1]
    expected = rows.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
    for at_once in (1 << 26, 5 * V):  # in one piece, and in several
        monkeypatch.setattr("potluck.compose.decoding.models._NUMBERS_AT_ONCE", at_once)
        gold = small.gold(tokens)
        assert torch.allclose(gold.log_p, expected, atol=1e-4)
        assert gold.right.tolist() == (rows.argmax(1) == torch.tensor(tokens[1:])).tolist()


@pytest.mark.parametrize(("tokens", "positions"), [([], 1), ([1, 2], 3), ([1], 0), ([-1], 1), ([V], 1), ([1] * 65, 1)])
def test_what_cannot_be_asked(small: Here, tokens: list[int], positions: int) -> None:
    with pytest.raises(ModelError):
        small.log_probs(tokens, positions)


# --- rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [1, 3, 8])
def test_speculation_says_what_the_large_model_would(small: Here, large: Here, draft: int) -> None:
    found = together(Speculative(draft), small, large, count=24)
    assert found.tokens == greedy(large.model, 24)
    assert found.counts["large"].calls <= len(found.tokens)
    assert set(found.by) <= {"small", "large"} and len(found.by) == len(found.tokens)


def test_a_good_draft_saves_calls(large: Here) -> None:
    twin = Here("twin", large.model, V)
    found = together(Speculative(4), twin, large, count=20)
    assert found.tokens == greedy(large.model, 20)
    assert found.counts["large"].calls == math.ceil(len(found.tokens) / 5)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_speculation_draws_from_the_large_models_distribution(top_p: float) -> None:
    q, p = Fixed("q", torch.tensor([0.0, 2.0, 1.0, -1.0, 0.5])), Fixed("p", torch.tensor([-9.0, 0.3, 1.5, 1.0, -0.5]))
    sampling = Sampling(temperature=1.0, top_p=top_p, seed=3)
    expected = sampling.probabilities(p.row)
    draws, n = Counter[int](), 1500
    for _ in range(n):
        draws[Speculative(1)(q, [p], Text([1], 2), sampling)[0].token] += 1
    for token in range(5):
        share, exact = draws[token] / n, float(expected[token])
        assert abs(share - exact) <= 4 * math.sqrt(exact * (1 - exact) / n)


def test_contrast_is_its_formula(small: Here, large: Here) -> None:
    rule = Contrastive(strength=0.7, plausibility=0.2)
    found = together(rule, small, large, count=8)
    tokens = list(PROMPT)
    for token in found.tokens:
        expert, amateur = plain(large.model, tokens)[-1].double(), plain(small.model, tokens)[-1].double()
        scores = torch.where(expert.exp() >= 0.2 * expert.exp().max(), expert - 0.7 * amateur, -torch.inf)
        assert token == int(scores.argmax())
        tokens.append(token)
    assert together(Contrastive(0.0, 1e-9), small, large).tokens == greedy(large.model, 20)
    assert together(Contrastive(3.0, 1.0), small, large).tokens == greedy(large.model, 20)


def test_a_proxy_steers_by_the_difference(small: Here, large: Here) -> None:
    tuned, untuned = (Here(name, tiny(seed, 1), V) for name, seed in (("tuned", 5), ("untuned", 6)))
    found = together(Proxy(), large, tuned, untuned, count=6)
    tokens = list(PROMPT)
    for token in found.tokens:
        own, plus, minus = (plain(m.model, tokens)[-1].double() for m in (large, tuned, untuned))
        assert token == int((own + plus - minus).argmax())
        tokens.append(token)
    twin = Here("twin", tuned.model, V)
    assert together(Proxy(), large, tuned, twin).tokens == greedy(large.model, 20)


def test_the_large_model_speaks_where_the_small_one_is_unsure(small: Here, large: Here) -> None:
    tokens = list(PROMPT)
    found = together(WhenUnsure(2.2), small, large, count=16)
    for token, by in zip(found.tokens, found.by, strict=True):
        row = plain(small.model, tokens)[-1]
        assert by == ("large" if entropy(row) > 2.2 else "small")
        assert token == int(plain((large if by == "large" else small).model, tokens)[-1].argmax())
        tokens.append(token)
    assert found.said == Counter(found.by) and len(found.said) == 2
    assert found.counts["large"].calls == found.said["large"]
    assert together(WhenUnsure(99), small, large).tokens == greedy(small.model, 20)
    assert together(WhenUnsure(-1), small, large).tokens == greedy(large.model, 20)


def test_a_glimpse_gives_away_whole_steps(small: Here, large: Here) -> None:
    rule = Glimpse(lambda step: len(step) == 3, threshold=2.2)
    found = together(rule, small, large, count=20)
    for start in range(0, len(found.tokens), 3):
        step, by = found.tokens[start : start + 3], set(found.by[start : start + 3])
        before = [*PROMPT, *found.tokens[:start]]
        speaker = large if entropy(plain(small.model, before)[-1]) > 2.2 else small
        assert by == {speaker.name}
        assert step == greedy(speaker.model, len(step), before)
    assert len(found.said) == 2


def test_entropy_is_that_of_the_distribution() -> None:
    assert entropy(torch.full((8,), -math.log(8))) == pytest.approx(math.log(8))
    assert entropy(torch.tensor([0.0, -torch.inf])) == 0.0


def test_a_text_ends_where_somebody_ends_it(large: Here) -> None:
    never = torch.full((V,), -9.0)
    ends, goes_on = Fixed("ends", never.clone().index_fill(0, torch.tensor(END), 9.0)), Fixed("on", never)
    assert together(Speculative(4), ends, ends_twin(ends)).tokens == []
    assert len(together(WhenUnsure(99), goes_on, large, count=7, temperature=1.0).tokens) <= 7
    step = Glimpse(lambda step: len(step) == 100, 99.0)
    assert together(step, ends, large).tokens == []


def ends_twin(model: Fixed) -> Fixed:
    return Fixed("twin", model.row)


def test_any_of_several_tokens_ends_a_text(large: Here) -> None:
    """A chat model ends its turn with one token, and a document with another."""
    whole = greedy(large.model, 6)
    ends = next(at for at, token in enumerate(whole) if token not in whole[:at] and at)
    found = decode(
        large, [Here("other", large.model, V)], Speculative(2), PROMPT, max_tokens=6, stops={END, whole[ends]},
        sampling=Sampling(),
    )  # fmt: skip
    assert found.tokens == whole[:ends]


def test_a_prompt_begins_as_the_tokenizer_begins_it(potluck: Potluck, tmp_path: Path) -> None:
    """This one puts nothing before a text; together then say what one of them says alone."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    letters = {letter: at for at, letter in enumerate(["<|endoftext|>", *string.ascii_letters[: V + 1]])}
    tokenizer = Tokenizer(kinds.BPE(letters, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for seed, name in enumerate(("a", "b")):
        tiny(seed).save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path / name)
    words = ("--prompt", "bad", "--max-tokens", 6, "--temperature", 0, "--json")
    alone = potluck("generate", "b", *words).result["text"]
    assert potluck("generate", "a", *words, "--assistant", "b", "--rule", "speculative").result["text"] == alone


def test_the_same_seed_draws_the_same(small: Here, large: Here) -> None:
    def said(seed: int) -> list[int]:
        return together(Speculative(3), small, large, temperature=1.0, top_p=0.9, seed=seed).tokens

    assert said(1) == said(1) != said(2)


def test_top_p_keeps_the_likeliest() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert Sampling(1.0, 0.6).probabilities(scores).tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert Sampling(1.0, 0.01).probabilities(scores).tolist() == [1, 0, 0, 0]
    assert Sampling(0.0).probabilities(scores).tolist() == [1, 0, 0, 0]
    assert Sampling(2.0).probabilities(scores)[0] == pytest.approx(
        0.5**0.5 / sum(x**0.5 for x in (0.5, 0.3, 0.15, 0.05))
    )


def test_models_that_do_not_fit_are_refused(small: Here, large: Here) -> None:
    other = Fixed("other", torch.zeros(V + 1))
    part = Fixed("part", torch.zeros(V), whole=False)
    for rule, base, assistants, error in (
        (WhenUnsure(), small, [other], ModelError),
        (WhenUnsure(), small, [Here("small", large.model, V)], RecipeError),
        (WhenUnsure(), small, [], RecipeError),
        (Speculative(), small, [large, part], RecipeError),
        (Contrastive(), part, [large], RecipeError),
        (Proxy(), small, [large, part], RecipeError),
        (Proxy(), small, [large], RecipeError),
    ):
        with pytest.raises(error):
            together(rule, base, *assistants)
    assert together(Contrastive(), small, part, count=2).tokens


# --- rows that travel --------------------------------------------------------------------------


def test_rows_travel_with_their_likeliest_token_in_place() -> None:
    rows = (3 * torch.randn(50, V, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    rows[0, 3] = -torch.inf
    whole = unpacked_rows(packed_rows(rows, 0), 50, V)
    assert torch.equal(whole.argmax(1), rows.argmax(1))
    assert torch.allclose(whole, rows, atol=0, rtol=2**-10)
    part = unpacked_rows(packed_rows(rows, 5), 50, V)
    assert torch.equal(part.argmax(1), rows.argmax(1))
    assert ((part > -torch.inf).sum(1) == 5).all()
    assert torch.equal(part[part > -torch.inf], whole[part > -torch.inf])


Tensors = dict[str, Tensor]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("peak"),
        lambda t: t.update(below=t["below"].float()),
        lambda t: t.update(below=t["below"][:, :-1]),
        lambda t: t.update(peak=t["peak"] + torch.nan),
        lambda t: t.update(below=-t["below"]),
        lambda t: t.update(peak=t["peak"] + 5),
        lambda t: t.update(places=t["places"] + V),
        lambda t: t.update(places=torch.zeros_like(t["places"])),
        lambda t: t.update(places=t["places"].float()),
        lambda t: t.update(places=t["places"] - V),
    ],
)
def test_rows_of_unknown_origin_are_examined(change: Callable[[Tensors], Any]) -> None:
    tensors = packed_rows(torch.randn(3, V, generator=torch.Generator().manual_seed(1)).log_softmax(-1), 6)
    change(tensors)
    with pytest.raises(Damaged):
        unpacked_rows(tensors, 3, V)


# --- behind participants -----------------------------------------------------------------------


def behind(perform: Callable[[str, Task], Contribution], top: int = 0) -> AtParticipant:
    return AtParticipant(InProcess([ParticipantInfo(name="ada")], perform, wire_bytes), "ada", V, top)


def test_a_participant_says_what_its_model_would(small: Here, large: Here) -> None:
    ada = behind(lambda _, task: answered(large, task))
    found = together(Speculative(4), small, ada, count=16)
    assert found.tokens == greedy(large.model, 16)
    counts = found.counts["ada"]
    assert counts.calls == large.counts.calls and counts.predictions == large.counts.predictions
    assert counts.received_bytes > 2 * V * counts.predictions > 0 and counts.sent_bytes > 8 * counts.calls
    assert found.counts["small"].received_bytes == 0
    few = together(Speculative(4), small, behind(lambda _, task: answered(large, task), top=4), count=16)
    assert few.tokens == found.tokens and few.counts["ada"].received_bytes < counts.received_bytes


def test_a_participant_says_how_it_foretells_a_text(large: Here) -> None:
    tokens = [END, *range(1, 30)]
    gold, exact = behind(lambda _, task: answered(large, task)).gold(tokens), large.gold(tokens)
    assert torch.equal(gold.log_p, exact.log_p) and torch.equal(gold.right, exact.right)


def test_questions_of_unknown_origin_are_examined(small: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    good = question([1, 2, 3], 2, 0, False, None)
    ids = good.tensors["tokens"]
    for bad in (
        replace(good, tensors={}),
        replace(good, tensors={"tokens": ids.float()}),
        replace(good, tensors={"tokens": ids[None]}),
        replace(good, tensors={"tokens": ids + V}),
        replace(good, tensors={"tokens": ids.repeat(40)}),
        replace(good, parameters={"positions": 4, "top": 0, "gold": False}),
        replace(good, parameters={"positions": 1.5, "top": 0}),
        replace(good, parameters={"positions": 1}),
    ):
        with pytest.raises(TrainingError):
            answered(small, bad)
    monkeypatch.setattr("potluck.compose.decoding.participants._MAX_NUMBERS", 2 * V - 1)
    for top in (0, -1):
        with pytest.raises(TrainingError, match="too many"):
            answered(small, question([1, 2, 3], 2, top, False, None))
    assert answered(small, question([1, 2, 3], 2, 5, False, None)).tensors["places"].shape == (2, 5)


def test_answers_of_unknown_origin_are_examined() -> None:
    def says(**tensors: Tensor) -> AtParticipant:
        return behind(lambda _, task: Contribution(kind="predict", revision=0, tensors=tensors))

    with pytest.raises(Damaged):
        says(peak=torch.zeros(1)).log_probs([1])
    with pytest.raises(Damaged):
        says(log_p=torch.ones(2), right=torch.ones(2, dtype=torch.uint8)).gold([1, 2, 3])
    with pytest.raises(Damaged):
        says(log_p=torch.zeros(3), right=torch.ones(3, dtype=torch.uint8)).gold([1, 2, 3])
    with pytest.raises(Damaged, match="something else"):
        behind(lambda _, task: Contribution(kind="train", revision=0)).log_probs([1])


def test_a_participant_that_fails_or_is_silent_is_named(small: Here) -> None:
    def refuses(_: str, task: Task) -> Contribution:
        raise TrainingError("not today")

    with pytest.raises(EngineError, match="ada did not foretell: not today"):
        together(WhenUnsure(-1), small, behind(refuses))

    class Silent(InProcess):
        def receive(self, timeout: float | None = None) -> None:
            return None

    silent = AtParticipant(Silent([ParticipantInfo(name="ada")], refuses, wire_bytes), "ada", V, seconds=0.5)
    with pytest.raises(EngineError, match=r"ada did not answer within 0\.5 s"):
        silent.log_probs([1])


def test_a_participant_of_a_run_answers_with_its_own_model(large: Here, recipe_file: Path) -> None:
    from potluck.embedded import Embedded, prepare
    from potluck.records.folder import Variant

    recipe = load_recipe(recipe_file)
    side = Embedded(prepare(recipe, lambda _: None), Variant("together", recipe.participant_names), recipe)
    ada = side.participants["ada"]
    task = question([1, 2], 1, 0, False, None)
    with pytest.raises(TrainingError, match="no model of its own"):
        ada.perform(task)
    before = ada.network.flat.vector.clone()
    rows = unpacked_rows(replace(ada, predictor=large).perform(task).tensors, 1, V)
    assert torch.allclose(rows, large.log_probs([1, 2]), rtol=2**-10)
    assert torch.equal(ada.network.flat.vector, before)
    with pytest.raises(TrainingError, match="predictions after"):
        replace(ada, predictor=large).perform(replace(task, parameters={"positions": 9, "top": 0}))


# --- behind an endpoint ------------------------------------------------------------------------


def word_vocabulary() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{n}": n for n in range(V - 1)} | {"\n": V - 1}
    return vocabulary_of(Tokenizer(WordLevel(words, unk_token="w1")).to_str(), END)


class Server:
    """Speaks ``/v1/completions`` as vLLM does, with a model of this process."""

    def __init__(self, model: Here, names: Callable[[int], str], listed: Sequence[str] = ("only",)) -> None:
        self.model, self.names, self.listed = model, names, listed
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.connections: list[socket.socket] = []
        self.instead: Callable[[dict[str, Any]], tuple[int, bytes] | None] = lambda _: None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                outer.connections.append(self.connection)

            def do_GET(self) -> None:
                self.say(200, {"data": [{"id": name} for name in outer.listed]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((dict(self.headers), body))
                said = outer.instead(body)
                self.say(*(said or (200, outer.complete(body))))

            def say(self, status: int, content: Any) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *words: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # who hangs up is no error here
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens, top = body["prompt"], body["logprobs"]
        rows = self.model.log_probs(tokens, len(tokens))
        said = [*tokens[1:], int(rows[-1].argmax())] if body["echo"] else [int(rows[-1].argmax())]
        rows = rows if body["echo"] else rows[-1:]
        tops = [{self.names(int(i)): float(row[i]) for i in row.topk(top).indices} for row in rows]
        values = [float(row[token]) for row, token in zip(rows, said, strict=True)]
        first: list[None] = [None] if body["echo"] else []
        logprobs = {"token_logprobs": [*first, *values], "top_logprobs": [*first, *tops]}
        return {"choices": [{"text": "", "logprobs": logprobs}]}

    def hang_up(self) -> None:
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


Serve = Callable[..., Server]


@pytest.fixture
def serve(large: Here) -> Iterator[Serve]:
    started: list[Server] = []

    def start(names: Callable[[int], str] = lambda token: f"token_id:{token}", **more: Any) -> Server:
        started.append(Server(large, names, **more))
        return started[-1]

    yield start
    for server in started:
        server.close()


def test_an_endpoint_says_what_its_model_would(small: Here, large: Here, serve: Serve) -> None:
    vocabulary = word_vocabulary()
    for names in (lambda token: f"token_id:{token}", lambda token: vocabulary.tokenizer.decode([token])):
        remote = AtEndpoint(serve(names).url, vocabulary, top=6)
        rows = remote.log_probs(PROMPT, 3)
        exact = plain(large.model, PROMPT)[-3:]
        assert ((rows > -torch.inf).sum(1) == 6).all()
        assert torch.allclose(rows[rows > -torch.inf], exact[rows > -torch.inf], atol=1e-4)
        found = together(Speculative(4), small, remote, count=12)
        assert found.tokens == greedy(large.model, 12)
        assert found.counts[remote.name].received_bytes > found.counts[remote.name].sent_bytes > 0
        gold, own = remote.gold([END, *range(1, 20)]), large.gold([END, *range(1, 20)])
        assert torch.allclose(gold.log_p, own.log_p, atol=1e-4) and torch.equal(gold.right, own.right)


def test_a_key_is_sent_and_never_said(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HER_KEY", "sesame-123")
    server = serve()
    remote = AtEndpoint(server.url, word_vocabulary(), "HER_KEY")
    remote.log_probs([1])
    assert server.asked[0][0]["Authorization"] == "Bearer sesame-123"
    server.instead = lambda _: (401, b"no")
    with pytest.raises(EngineError) as refused:
        remote.log_probs([1])
    assert "401" in str(refused.value) and "sesame" not in repr(remote.name) + str(refused.value)
    monkeypatch.setenv("HER_KEY", "two\nlines")
    for url, key in ((server.url, "HER_KEY"), (server.url, "NOT_SET"), ("http://example.org/v1#m", "HER_KEY")):
        with pytest.raises(RecipeError):
            AtEndpoint(url, word_vocabulary(), key)


@pytest.mark.parametrize("url", ["ftp://x/v1", "http://", "http://me:secret@x/v1#m", "http://x/v1?a=b#m"])
def test_what_is_no_endpoint(url: str) -> None:
    with pytest.raises(RecipeError) as refused:
        AtEndpoint(url, word_vocabulary())
    assert "secret" not in str(refused.value)


def logprobs(**changed: Any) -> bytes:
    said = {"token_logprobs": [-1.0], "top_logprobs": [{"token_id:1": -1.0}], **changed}
    return json.dumps({"choices": [{"logprobs": said}]}).encode()


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ((200, b"<html>"), "JSON"),
        ((200, b"[]"), "without logprobs"),
        ((200, b'{"choices": [{"logprobs": null}]}'), "without logprobs"),
        ((200, logprobs(top_logprobs=[])), "too few"),
        ((200, logprobs(top_logprobs=[{}])), "likeliest"),
        ((200, logprobs(top_logprobs=[{"token_id:99": -1.0}])), "no one token"),
        ((200, logprobs(top_logprobs=[{"strange": -1.0}])), "no one token"),
        ((200, logprobs(top_logprobs=[{"w1": "much"}])), "log-probability"),
        ((200, logprobs(top_logprobs=[{"w1": 3}])), "log-probability"),
        ((200, logprobs(top_logprobs=[{"w1": 0.0, "w2": 0.0}])), "more than 1"),
        ((302, b""), "302"),
        ((500, b"out of memory"), "out of memory"),
        ((200, b" " * 3000), "more than 2000 bytes"),
    ],
)
def test_answers_from_outside_are_examined(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, said: tuple[int, bytes], match: str
) -> None:
    monkeypatch.setattr("potluck.compose.decoding.endpoint._MAX_BYTES", 2000)
    server = serve()
    server.instead = lambda _: said
    with pytest.raises(EngineError, match=match):
        AtEndpoint(server.url, word_vocabulary()).log_probs([1])


def test_an_endpoint_that_is_not_there_or_serves_many(serve: Serve) -> None:
    with pytest.raises(EngineError, match="a, b"):
        AtEndpoint(serve(listed=("a", "b")).url, word_vocabulary())
    named = serve(listed=("a", "b"))
    AtEndpoint(named.url + "#b", word_vocabulary()).log_probs([1])
    assert named.asked[0][1]["model"] == "b"
    with pytest.raises(EngineError, match="cannot be reached"):
        AtEndpoint("http://127.0.0.1:9/v1", word_vocabulary())


def test_an_endpoint_that_hangs_up_is_asked_again_and_one_that_hangs_is_not(serve: Serve) -> None:
    server = serve()
    remote = AtEndpoint(server.url, word_vocabulary(), seconds=0.5)
    first = remote.log_probs([1])
    server.hang_up()  # as servers do with connections that were idle
    assert torch.equal(remote.log_probs([1]), first)
    server.instead = lambda _: (time.sleep(1.0), (200, b""))[1]
    with pytest.raises(EngineError, match="timed out"):
        remote.log_probs([1])
    assert len(server.asked) == 3


# --- the verb ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, potluck_in: Any, tables: Any) -> tuple[Path, Path]:
    """Two models of one tokenizer, trained with `potluck train`."""
    verbs = potluck_in(tmp_path_factory.mktemp("trained"))
    folders = []
    for name, seed in (("small", 0), ("large", 1)):
        folder = tmp_path_factory.mktemp(name) / "run"
        verbs("train", verbs.recipe(tables, seed=seed), "--set", f"records.folder={folder}")
        folders.append(folder)
    return folders[0], folders[1]


def test_the_verb_decodes_together(potluck: Potluck, run: tuple[Path, Path]) -> None:
    base, other = run
    words = ("--prompt", "river ", "--max-tokens", 12, "--temperature", 0)
    alone = potluck("generate", other, *words, "--json").result["text"]
    for place in (other, other / "model"):
        told = potluck("generate", base, *words, "--assistant", place, "--rule", "speculative", "--json").result
        assert told["text"] == alone and told["rule"] == "speculative"
        assert set(told["models"]) == {str(base), str(place)}
        assert set(told["models"][str(place)]) == {
            "said", "calls", "predictions", "sent_bytes", "received_bytes", "seconds"
        }  # fmt: skip
    shown = potluck("generate", base, *words, "--assistant", other, "--rule", "glimpse", "--delimiter", " ")
    assert shown.out.startswith("river ") and "tokens said" in shown.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rule", "entropy"], "--rule has no effect without an assistant"),
        (["--api-key-env", "X"], "--api-key-env has no effect"),
        (["--assistant", "OTHER"], "--rule deferral|entropy"),
        (["--assistant", "OTHER", "--rule", "vote"], "no rule 'vote'"),
        (["--assistant", "OTHER", "--rule", "entropy", "--draft", "3"], "--draft has no effect"),
        (["--assistant", "OTHER", "--rule", "deferral"], "--deferral FOLDER"),
        (["--assistant", "OTHER", "--rule", "entropy", "--api-key-env", "X"], "--api-key-env has no effect"),
        (["--assistant", "OTHER", "--rule", "glimpse", "--delimiter", ""], "--delimiter is empty"),
    ],
)
def test_options_without_effect_are_errors(
    potluck: Potluck, run: tuple[Path, Path], words: list[str], said: str
) -> None:
    other = [str(run[1]) if word == "OTHER" else word for word in words]
    assert said in potluck("generate", run[0], *other, code=3).err


def test_an_adapter_is_an_assistant(run: tuple[Path, Path], tmp_path: Path) -> None:
    from potluck.compose.adapter import Adapter, Factors, save_adapter
    from potluck.compose.base import load_base
    from potluck.compose.lora import linear_maps, sizes

    base = load_base(run[0] / "model")
    modules = {}
    for path, module in linear_maps(base.model).items():
        d_in, d_out = sizes(module)
        modules[path] = Factors(torch.randn(2, d_in) / 8, torch.randn(d_out, 2) / 8)
    save_adapter(Adapter(modules, about={"base_hash": base.content_hash}), tmp_path / "mine")
    save_adapter(Adapter(modules, about={"base_hash": "another"}), tmp_path / "theirs")
    tokens = [base.vocabulary.end_of_text, 3, 4]
    size = base.vocabulary.size
    before = Here("base", base.model, size).log_probs(tokens)
    mine = opened(str(tmp_path / "mine"), base, load_base).log_probs(tokens)
    assert not torch.allclose(before, mine, atol=1e-3)
    assert torch.equal(before, Here("base", base.model, size).log_probs(tokens))
    with pytest.raises(ModelError, match="another base"):
        opened(str(tmp_path / "theirs"), base, load_base)


def test_assistants_of_another_tokenizer_are_refused(run: tuple[Path, Path]) -> None:
    from potluck.compose.base import load_base

    base = load_base(run[0] / "model")
    other = Base(base.model, word_vocabulary(), "other")
    with pytest.raises(ModelError, match="another tokenizer"):
        opened("other", base, lambda _: other)


def test_every_rule_can_be_chosen(run: tuple[Path, Path], small: Here) -> None:
    from potluck.compose.base import load_base

    base = load_base(run[0] / "model")
    for name, settings in (
        ("entropy", {"threshold": 1.5}),
        ("speculative", {"draft": 2}),
        ("contrastive", {"strength": 0.2, "plausibility": 0.3}),
        ("proxy", {"strength": 0.4}),
        ("glimpse", {"threshold": 0.7}),
    ):
        rule = rule_of(Choice(rule=name, **settings), base, [small])
        assert all(getattr(rule, key) == value for key, value in settings.items())
    ends = rule_of(Choice(rule="glimpse", delimiter="ab"), base, [small]).ends  # type: ignore[attr-defined]
    a, b = (base.vocabulary.tokenizer.encode(letter, add_special_tokens=False).ids[0] for letter in "ab")
    assert [ends(step) for step in ([a], [b, a], [a, b], [b, base.vocabulary.end_of_text])] == [
        False,
        False,
        True,
        True,
    ]
