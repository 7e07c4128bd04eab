"""ROME, MEMIT and AlphaEdit: the closed forms against plain references, and what an editor keeps and takes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from potluck.aggregation.statistics import Statistics
from potluck.compose.base import Base
from potluck.corpus.tokenizer import Vocabulary, vocabulary_from_words
from potluck.corpus.world import documents_of
from potluck.edit.closed_form import (
    alphaedit_update,
    asked_in,
    memit_update,
    null_space,
    regular,
    rome_update,
    sums,
)
from potluck.edit.contexts import keys_at, prompt_row
from potluck.edit.facts import Edit
from potluck.edit.layout import from_layer, layout_of
from potluck.edit.moments import kept_moments, key_moments
from potluck.edit.prefix_cache import tails_of
from potluck.edit.prompts import answer_nll, logits_of, rows_of
from potluck.edit.values import ValueSettings, targets
from potluck.edit.weights import Method, WeightEditor, WeightSettings, weight_editor
from potluck.errors import EditError, ModelError


def random_sums(edits: int = 7, d_in: int = 24, d_out: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(edits, d_in, generator=draw, dtype=torch.float64)
    residuals = torch.randn(edits, d_out, generator=draw, dtype=torch.float64)
    text = torch.randn(200, d_in, generator=draw, dtype=torch.float64) * torch.logspace(
        0, -2, d_in, dtype=torch.float64
    )
    return keys, residuals, text.T @ text / 200


def test_rome_makes_one_key_true() -> None:
    keys, residuals, moment = random_sums()
    delta = rome_update(keys[0], residuals[0], moment, 1e-9)
    assert torch.allclose(delta @ keys[0], residuals[0], atol=1e-9)
    direct = torch.linalg.inv(moment) @ keys[0]
    assert torch.allclose(delta, torch.outer(residuals[0], direct) / (direct @ keys[0]), rtol=1e-4)


def test_memit_is_ridge_regression() -> None:
    keys, residuals, moment = random_sums()
    ridge = 0.1 * moment.diagonal().median() * torch.eye(len(moment), dtype=torch.float64)
    expected = residuals.T @ keys @ torch.linalg.inv(3 * (moment + ridge) + keys.T @ keys)
    assert torch.allclose(memit_update(*sums(keys, residuals), moment, 3.0, 0.1), expected, atol=1e-8)


def test_memit_is_bounded_where_the_text_uses_few_directions() -> None:
    keys, residuals, moment = random_sums()
    used = torch.linalg.eigh(moment)[1][:, 12:]
    few = used @ used.T @ moment @ used @ used.T
    keys[1] = keys[0] + 1e-3 * keys[1]  # one subject, asked about in two ways
    some = sums(keys[:2], residuals[:2])
    assert memit_update(*some, few, 100.0).norm() < 0.05 * memit_update(*some, few, 100.0, 1e-12).norm()


def test_alphaedit_is_the_papers_formula_and_leaves_the_text_alone() -> None:
    keys, residuals, moment = random_sums()
    free = null_space(moment, 0.5)
    p, eye = free @ free.T, torch.eye(len(moment), dtype=torch.float64)
    past = torch.outer(keys[3], keys[3])
    m, g = sums(keys[:3], residuals[:3])
    expected = torch.linalg.solve(p @ (g + past) + 0.5 * eye, p @ m.T).T
    found = alphaedit_update(m, g, past, free, 0.5)
    assert torch.allclose(found, expected, atol=1e-10)
    assert ((found @ moment) * found).sum() <= 0.02 * moment.trace() * found.square().sum()


def test_what_cannot_be_solved_is_refused() -> None:
    _, _, moment = random_sums()
    with pytest.raises(EditError, match="not positive definite"):
        memit_update(torch.ones(6, 24, dtype=torch.float64), -2 * moment, moment, 1.0)
    with pytest.raises(EditError, match="no direction is free"):
        null_space(torch.eye(4, dtype=torch.float64), 0.2)


def test_an_attention_sink_changes_neither_null_space_nor_ridge() -> None:
    _, _, moment = random_sums()
    sink = torch.zeros(len(moment), dtype=torch.float64)
    sink[5] = 1e3 * moment.trace().sqrt()
    flooded = moment + torch.outer(sink, sink)  # more than 99.99 % of the energy in one direction
    free = null_space(flooded, 0.5)
    assert float(((free.T @ moment @ free).trace()) / moment.trace()) <= 0.05  # 0.99 of the energy left 23 of 24 free
    assert float((free.T @ sink).norm() / sink.norm()) <= 1e-6  # what the sink gives stays as it is
    added = (regular(flooded, 0.03) - flooded).diagonal()
    assert torch.allclose(added, (regular(moment, 0.03) - moment).diagonal(), rtol=0.5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_alphaedit_writes_the_same_share_whatever_the_size_of_keys(size: float) -> None:
    keys, residuals, moment = random_sums()
    keys, moment = size * keys[:1], size**2 * moment
    m, g = sums(keys, residuals[:1])
    free = null_space(moment, 0.5)
    ridge = 1.0 * asked_in(g, free, 1)
    delta = alphaedit_update(m, g, torch.zeros_like(g), free, ridge)
    assert torch.allclose(delta @ keys[0], residuals[0] / 2)


# --- on models ---------------------------------------------------------------------------------


def small(kind: str, vocabulary: Vocabulary) -> Base:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=vocabulary.size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
        )
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(vocab_size=vocabulary.size, n_embd=32, n_inner=48, n_layer=3, n_head=4)
        model = GPT2LMHeadModel(config)
    return Base(model.eval(), vocabulary, "nowhere")


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> Base:
    return small(request.param, vocabulary_from_words({"a": 2}, 300))


def edits(count: int = 4) -> list[Edit]:
    names = ("Ada Orben", "Bela Tarm", "Carl Umbo", "Dora Welk", "Emil Zorn", "Fritz Quark")
    return [Edit(str(i), f"{name} lives in", name, "ABCDEF"[i]) for i, name in enumerate(names[:count])]


def moments_of(base: Base) -> Statistics:
    layout = layout_of(base.model)
    return key_moments(base, layout, range(layout.count), documents_of(20), 64)


QUICK = ValueSettings(steps=5)


def editor_of(base: Base, method: Method = "memit") -> WeightEditor:
    layers = (1,) if method == "rome" else (0, 1)
    return weight_editor(base, moments_of(base), WeightSettings(method=method, layers=layers, values=QUICK))


@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit"])
def test_reverting_everything_gives_the_old_bits(base: Base, method: Method) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    editor = editor_of(base, method)
    editor.write(edits()[:2])
    editor.write(edits()[2:])
    changed = [name for name, tensor in base.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [f"{editor.layout.path(layer)}.weight" for layer in editor.settings.layers]
    editor.revert([edit.id for edit in edits()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    with pytest.raises(EditError, match="there is no edit 3"):
        editor.revert(["3"])


def test_one_of_a_batch_is_as_if_never_made(base: Base) -> None:
    editor = weight_editor(base, moments_of(base), WeightSettings(layers=(1,), values=QUICK))
    editor.write(edits()[:3])
    without = editor.layout.weight(1).clone()
    editor.revert(["0", "1", "2"])
    editor.write(edits())
    editor.revert(["3"])
    assert torch.allclose(editor.layout.weight(1), without, atol=1e-5)


def test_what_is_held_is_moved_less(base: Base) -> None:
    layout, hold = layout_of(base.model), edits()[3:]
    keys = keys_at(base, layout, (1,), hold, ())[1]
    original, moved = layout.weight(1).clone(), []
    for held in ((), hold):
        editor = weight_editor(
            base, moments_of(base), WeightSettings(layers=(1,), moment_weight=1.0, values=QUICK), held
        )
        editor.write(edits()[:3])
        moved.append(float(((layout.weight(1) - original).double() @ keys.T).norm()))
        editor.revert([edit.id for edit in editor.edits])
        assert torch.equal(layout.weight(1), original)
    assert moved[1] < 0.7 * moved[0]


def test_values_side_by_side_are_those_of_one_by_one(base: Base) -> None:
    layout = layout_of(base.model)
    together = targets(base, layout, 1, edits(), ("A text.",), QUICK)
    alone = torch.cat([targets(base, layout, 1, [edit], ("A text.",), QUICK) for edit in edits()])
    assert torch.allclose(together, alone, atol=1e-3)


def test_a_model_resumed_from_a_layer_is_the_model(base: Base) -> None:
    layout, rows = layout_of(base.model), rows_of([prompt_row(base, edit) for edit in edits()], 0)
    given = {"input_ids": rows.ids, "attention_mask": rows.mask, "use_cache": False}
    for layer in range(layout.count):
        below, resumed = from_layer(layout, layer, lambda: base.model.base_model(**given))
        assert torch.equal(resumed(below), base.model.base_model(**given)[0])


def test_tails_are_the_ends_of_whole_texts(base: Base) -> None:
    layout = layout_of(base.model)
    texts = [prompt_row(base, edit, context, edit.target) for edit in edits() for context in ("", "A longer text.")]
    rows = rows_of(texts, 0)
    whole = base.model.base_model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False)[0]
    for start in (rows.subject, rows.last):
        tails = tails_of(base, layout, 0, rows, start)
        for _ in range(2):  # a run leaves nothing behind for the next
            assert torch.allclose(tails.ended(tails.stream), tails.of(whole), atol=1e-5)
        nll = answer_nll(logits_of(base.model, rows), rows.labels)
        assert torch.allclose(tails.nll(base, tails.ended(tails.stream)), nll, atol=1e-5)


def test_moments_do_not_depend_on_how_text_is_cut(base: Base, tmp_path: Path) -> None:
    layout, texts = layout_of(base.model), list(documents_of(20))
    taken = key_moments(base, layout, (1,), iter(texts), 64)
    kept = kept_moments(base, layout, (1,), texts, tmp_path, 64)
    again = kept_moments(base, layout, (1,), texts, tmp_path, 64)
    (name,) = taken.tensors
    assert taken.count == kept.count == again.count and len(list(tmp_path.iterdir())) == 1
    assert torch.equal(kept.tensors[name], again.tensors[name]) and torch.equal(kept.tensors[name], taken.tensors[name])
    assert key_moments(base, layout, (1,), texts, 64, most=1).count == 1024 < taken.count  # whole batches


def test_moments_are_kept_layer_by_layer(base: Base, tmp_path: Path) -> None:
    layout, texts = layout_of(base.model), list(documents_of(20))
    one = kept_moments(base, layout, (1,), texts, tmp_path, 64)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    both = kept_moments(base, layout, (0, 1), texts, tmp_path, 64)
    assert len(list(tmp_path.iterdir())) == 2 and file.stat().st_mtime_ns == written  # layer 1 was not taken again
    name = f"{layout.path(1)}.moment"
    assert torch.equal(one.tensors[name], both.tensors[name])
    file.write_bytes(b"damaged")
    assert torch.equal(kept_moments(base, layout, (1,), texts, tmp_path, 64).tensors[name], one.tensors[name])
    kept_moments(base, layout, (1,), [*texts, "another text"], tmp_path, 64)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_subject_that_is_a_texts_first_token_is_edited_at_the_next(base: Base) -> None:
    bare = replace(base, vocabulary=replace(base.vocabulary, beginning=()))  # such as SmolLM2's
    edit = Edit("0", "A lives in", "A", "B")
    assert [prompt_row(bare, edit, before).subject for before in ("", "So.")] == [1, 5]
    assert prompt_row(base, edit).subject == 1  # after the beginning
    assert targets(bare, layout_of(base.model), 1, [edit], (), QUICK).isfinite().all()
    with pytest.raises(EditError, match="is one token"):
        prompt_row(bare, Edit("0", "A", "A", "B"))


def test_errors_leave_the_model_alone(base: Base) -> None:
    editor = editor_of(base)
    editor.write(edits()[:1])
    weight = editor.layout.weight(1).clone()
    with pytest.raises(EditError, match="there is an edit 0 already"):
        editor.write(edits()[:1])
    with pytest.raises(EditError, match="contradict"):
        editor.write([edits()[1], Edit("9", edits()[1].prompt, edits()[1].subject, "Z")])
    editor.settings = WeightSettings(layers=(0, 1), values=ValueSettings(steps=3, learning_rate=float("inf")))
    with pytest.raises(EditError, match="NaN or infinite"):
        editor.write(edits()[1:])
    assert torch.equal(editor.layout.weight(1), weight) and [edit.id for edit in editor.edits] == ["0"]


def test_what_does_not_fit_is_refused(base: Base) -> None:
    moments = moments_of(base)
    with pytest.raises(EditError, match="0 to 2"):
        weight_editor(base, moments, WeightSettings(layers=(1, 7)))
    with pytest.raises(EditError, match="rome edits one layer"):
        weight_editor(base, moments, WeightSettings(method="rome", layers=(0, 1)))
    other = Statistics(moments.kind, moments.tensors, moments.count, "another model")
    with pytest.raises(EditError, match="another mode"):
        weight_editor(base, other, WeightSettings())
    with pytest.raises(ModelError, match="not known where this model keeps facts"):
        layout_of(base.model.base_model)
