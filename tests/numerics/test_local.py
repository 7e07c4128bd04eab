"""What a participant does between two rounds."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from potluck.contribution import Task
from potluck.corpus.shards import Shard
from potluck.errors import NotFinite, RecipeError, TrainingError
from potluck.local import evaluate
from potluck.local.optimizers import InnerOptimizer, hidden_matrices
from potluck.local.steps import local_steps
from potluck.local_state import new_state
from potluck.models import footprint
from potluck.models.flat import flatten
from potluck.recipe.local import Constant, Cosine, Muon, WarmupStableDecay
from potluck.recipe.schedules import rate_factor, schedule_fault

PLAIN_SGD = {"optimizer": {"kind": "sgd", "learning_rate": 1.0}, "clip_norm": 0.0}
OPTIMIZERS = [
    {"kind": "adamw"}, {"kind": "sgd", "momentum": 0.9}, {"kind": "sgd"}, {"kind": "muon"},
]  # fmt: skip
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: "-".join(map(str, o.values())))


def tokens_of(seed: int, rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 60, (rows, length + 1)))


def steps_of(recipe, network, batches, moments=None):
    """One local step for each list of batches, at the peak rate; the anchor is zero."""
    optimizer = InnerOptimizer(recipe.local.optimizer, network.flat, network.model)
    optimizer.bind(torch.zeros(optimizer.size) if moments is None else moments, 0)
    anchor = torch.zeros_like(network.flat.vector)
    return local_steps(network, optimizer, recipe.local, batches.__getitem__, [1.0] * len(batches), anchor)


def gradient(recipe, network, batches):
    """What one plain SGD step at rate 1 takes away."""
    before = network.flat.vector.clone()
    steps_of(recipe, network, [batches])
    return before - network.flat.vector


# --- schedules ------------------------------------------------------------------------------------

warmups, finals = st.integers(0, 30), st.floats(0, 1)


@given(
    st.one_of(
        st.builds(Constant, warmup_steps=warmups),
        st.builds(Cosine, warmup_steps=warmups, final_fraction=finals),
        st.builds(WarmupStableDecay, warmup_steps=warmups, final_fraction=finals, decay_fraction=st.floats(0.01, 0.5)),
    ),
    st.integers(60, 200),
)
def test_schedules_at_their_defining_points(schedule, total) -> None:
    warmup, final = schedule.warmup_steps, getattr(schedule, "final_fraction", 1.0)
    factors = [rate_factor(schedule, step, total) for step in range(total + 1)]
    assert all(0 < factor < 1 for factor in factors[:warmup])
    assert factors[warmup] == 1.0
    assert factors[total] == pytest.approx(final)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rate_factor(Cosine(warmup_steps=20, final_fraction=0.2), 60, 100) == pytest.approx(0.6)


def test_warmup_stable_decay_is_stable_and_then_one_minus_sqrt() -> None:
    schedule = WarmupStableDecay(warmup_steps=10, decay_fraction=0.2)
    assert {rate_factor(schedule, step, 100) for step in range(10, 81)} == {1.0}
    assert rate_factor(schedule, 85, 100) == pytest.approx(1 - math.sqrt(0.25))


@given(
    st.one_of(
        st.builds(Constant, warmup_steps=warmups),
        st.builds(Cosine, warmup_steps=warmups, final_fraction=finals),
        st.builds(WarmupStableDecay, warmup_steps=warmups, final_fraction=finals, decay_fraction=st.floats(0.01, 1)),
    ),
    st.integers(1, 100),
)
def test_a_schedule_that_fits_has_no_jump(schedule, total) -> None:
    warmup = schedule.warmup_steps
    decay = round(getattr(schedule, "decay_fraction", 0) * total) or 1
    is_wsd = isinstance(schedule, WarmupStableDecay)
    fault = schedule_fault(schedule, total)
    assert bool(fault) == (warmup >= total or (is_wsd and warmup + decay > total))
    if not fault:
        steepest = max(1 / (warmup + 1), math.sqrt(1 / decay) if is_wsd else math.pi / 2 / (total - warmup))
        factors = [rate_factor(schedule, step, total) for step in range(total)]
        assert all(abs(b - a) <= steepest + 1e-9 for a, b in pairwise(factors))


def test_a_recipe_whose_warmup_runs_into_the_decay_is_refused(make_recipe) -> None:
    schedule = {"kind": "wsd", "warmup_steps": 60, "decay_fraction": 0.5}
    with pytest.raises(RecipeError, match=r"60 steps of warm-up and 50 of decay .* more than the run's 100"):
        make_recipe(1, local={"schedule": schedule}, rounds={"count": 10, "local_steps": 10})


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("moving", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
def test_muon_moves_the_matrices_of_layers_and_adamw_the_rest(make_recipe, make_network, moving, tied) -> None:
    still = {"weight_decay": 0.0, "adamw_learning_rate" if moving == "muon" else "learning_rate": 1e-30}
    model = {"layers": 1, "width": 32, "heads": 2, "feedforward": 64, "context": 64, "tied": tied}
    recipe = make_recipe(1, model=model, local={"optimizer": {"kind": "muon", **still}})
    network = make_network(recipe)
    before = network.flat.vector.clone()
    steps_of(recipe, network, [[tokens_of(0)]])
    pairs = zip(network.flat.manifest, network.flat.parameters, network.flat.views(before), strict=True)
    moved = {entry.name for entry, now, then in pairs if not torch.equal(now, then)}
    layers = {entry.name for entry in network.flat.manifest if entry.name.endswith("_proj.weight")}
    assert moved == (layers if moving == "muon" else {e.name for e in network.flat.manifest} - layers)


TINY = {
    "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=16)),
    "opt": OPTForCausalLM(
        OPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=12, vocab_size=16,
                  max_position_embeddings=16, word_embed_proj_dim=8)
    ),
    "bloom": BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=16)),
    "mixtral": MixtralForCausalLM(
        MixtralConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                      intermediate_size=12, num_local_experts=2, vocab_size=16)
    ),
}  # fmt: skip
HIDDEN = {
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "opt": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"},
    "bloom": {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "mixtral": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
}


@pytest.mark.parametrize("kind", TINY)
def test_muon_takes_no_embedding_of_positions_and_no_router(kind) -> None:
    hidden = hidden_matrices(TINY[kind])
    names = [name for name, parameter in TINY[kind].named_parameters() if id(parameter) in hidden]
    assert {name.removesuffix(".weight").split(".0.", 1)[1] for name in names} == HIDDEN[kind]


def test_muon_steps_a_matrix_stored_the_other_way_round_like_its_transpose() -> None:
    """GPT-2 stores (in, out): the step, and its decay, are those of the linear layer that does the same."""
    torch.manual_seed(0)
    plain, turned = nn.Linear(4, 12), Conv1D(12, 4)
    turned.weight.data, weight = plain.weight.data.T.clone(), plain.weight.data.clone()
    gradient = torch.randn(12, 4)
    for layer, grad in ((plain, gradient), (turned, gradient.T)):
        flat = flatten(layer, torch.device("cpu"))
        optimizer = InnerOptimizer(Muon(), flat, layer)
        optimizer.bind(torch.zeros(optimizer.size), 0)
        layer.weight.grad = grad.clone()
        optimizer.step(0.5)
    torch.testing.assert_close(turned.weight.T, plain.weight, atol=1e-6, rtol=0)
    assert not torch.equal(plain.weight, weight)


def test_the_proximal_gradient_is_that_of_the_penalty(make_recipe, make_network) -> None:
    rho = 0.3
    recipe = make_recipe(1, local={**PLAIN_SGD, "proximal": rho})
    network, tokens = make_network(recipe), tokens_of(1)
    model = copy.deepcopy(network.model).double()
    logits = model(tokens[:, :-1]).logits.flatten(0, 1)
    penalty = sum((p**2).sum() for p in model.parameters()) * rho / 2  # the anchor is zero
    (cross_entropy(logits, tokens[:, 1:].flatten()) + penalty).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient(recipe, network, [tokens]).double(), expected, atol=1e-5, rtol=1e-4)


def test_accumulation_is_one_big_batch(make_recipe, make_network) -> None:
    recipe, tokens = make_recipe(1, local=PLAIN_SGD), tokens_of(2, rows=8)
    whole = gradient(recipe, make_network(recipe), [tokens])
    parts = gradient(recipe, make_network(recipe), list(tokens.split(2)))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("clip", [0.0, 0.01, 100.0])
def test_the_gradient_is_clipped_by_its_norm(make_recipe, make_network, clip) -> None:
    plain, clipped = (make_recipe(1, local={**PLAIN_SGD, "clip_norm": c}) for c in (0.0, clip))
    norm = float(gradient(plain, make_network(plain), [tokens_of(3)]).norm())
    expected = min(clip, norm) if clip else norm
    assert float(gradient(clipped, make_network(clipped), [tokens_of(3)]).norm()) == pytest.approx(expected, rel=1e-3)


# --- what is not finite ---------------------------------------------------------------------------

GOOD, BAD = tokens_of(4), torch.full((2, 17), 60)  # the embedding of token 60 will be infinite


def spoilt(make_network, recipe):
    network = make_network(recipe)
    network.model.get_input_embeddings().weight.data[60] = torch.inf
    return network


def untied(make_recipe, **local):
    model = {"layers": 1, "width": 32, "heads": 2, "feedforward": 64, "context": 64, "tied": False}
    return make_recipe(1, model=model, local={"schedule": {"kind": "constant"}, **local})


@each_optimizer
def test_a_step_that_is_not_finite_is_skipped_and_leaves_no_trace(make_recipe, make_network, optimizer) -> None:
    recipe = untied(make_recipe, optimizer=optimizer, max_skipped_steps=2)
    network, undisturbed = spoilt(make_network, recipe), spoilt(make_network, recipe)
    report = steps_of(recipe, network, [[GOOD], [BAD], [GOOD], [BAD], [BAD, GOOD], [GOOD]])
    assert (report.steps, report.skipped_steps, report.examples, report.tokens) == (3, 3, 6, 96)
    same = steps_of(recipe, undisturbed, [[GOOD]] * 3)
    assert torch.equal(network.flat.vector, undisturbed.flat.vector)
    assert report.loss == same.loss


def test_too_many_in_a_row_fail_the_participant(make_recipe, make_network) -> None:
    recipe = untied(make_recipe, max_skipped_steps=1)
    with pytest.raises(NotFinite, match="2 local steps in a row"):
        steps_of(recipe, spoilt(make_network, recipe), [[GOOD], [BAD], [GOOD], [BAD], [BAD], [GOOD]])


# --- taking turns ---------------------------------------------------------------------------------


def train(participant, theta, first_step=0, steps=2):
    parameters = {"first_step": first_step, "steps": steps}
    done = participant.perform(Task(kind="train", revision=0, parameters=parameters, tensors={"parameters": theta}))
    return done.tensors["parameters"].clone()


@each_optimizer
def test_taking_turns_in_one_network_is_having_ones_own(make_recipe, make_network, make_participant, optimizer) -> None:
    recipe = make_recipe(2, local={"optimizer": optimizer})
    network = make_network(recipe)
    shared = InnerOptimizer(recipe.local.optimizer, network.flat, network.model)
    together = [make_participant(recipe, name, network, shared) for name in ("p0", "p1")]
    apart = [make_participant(recipe, name, make_network(recipe)) for name in ("p0", "p1")]
    for people in (together, apart):
        people[0].network.flat.vector.zero_()  # what lies in the network does not matter: the task brings theta
    theta = make_network(recipe).flat.vector.clone()
    for number in range(3):
        reached = [[train(person, theta, 2 * number) for person in people] for people in (together, apart)]
        assert all(torch.equal(*pair) for pair in zip(*reached, strict=True))
        theta = (reached[0][0] + reached[0][1]) / 2
    assert not torch.equal(*reached[0])
    assert together[0].state.cursor == 12 and together[0].state.tokens == 6 * recipe.tokens_per_step


@each_optimizer
@pytest.mark.parametrize("keep", [True, False])
def test_the_optimizer_is_kept_or_reset(make_recipe, make_network, make_participant, optimizer, keep) -> None:
    recipe = make_recipe(1, local={"optimizer": optimizer, "keep_optimizer": keep})
    person = make_participant(recipe, "p0", make_network(recipe))
    theta = train(person, make_network(recipe).flat.vector)
    fresh = make_participant(recipe, "p0", make_network(recipe))
    fresh.state.cursor = person.state.cursor
    stateless = not new_state(person.network, person.optimizer, recipe, person.fragments).moments.numel()
    same = torch.equal(train(person, theta, 2), train(fresh, theta, 2))
    assert same == (stateless or not keep)


def test_an_unknown_task_is_refused(make_recipe, make_network, make_participant) -> None:
    person = make_participant(make_recipe(1), "p0", make_network(make_recipe(1)))
    with pytest.raises(TrainingError, match="p0 does not know how to 'dance'"):
        person.perform(Task(kind="dance", revision=0))


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds", [{"_TOKENS_AT_ONCE": 48}, {"_LOGITS_AT_ONCE": 2 * 16 * 60, "_LOSSES_AT_ONCE": 5 * 60}], ids=str
)
@pytest.mark.parametrize("length", [1, 2, 10, 16, 17, 18, 33, 100])
def test_evaluation_predicts_every_token_but_the_first_once(
    make_recipe, make_network, monkeypatch, length, bounds
) -> None:
    for name, bound in bounds.items():
        monkeypatch.setattr(footprint, name, bound)
    network = make_network(make_recipe(1))
    stream = np.random.default_rng(0).integers(0, 60, length).astype(np.uint16)
    model, tokens, expected = network.model.double(), torch.from_numpy(stream.astype(np.int64)), 0.0
    model.requires_grad_(False)
    for position in range(1, length):
        start = (position - 1) // 16 * 16
        logits = model(tokens[None, start:position]).logits[0, -1]
        expected -= float(logits.log_softmax(0)[tokens[position]])
    nats, count = evaluate.negative_log_likelihood(make_network(make_recipe(1)), stream, 16)
    assert count == length - 1
    assert nats == pytest.approx(expected, rel=1e-5)


def test_evaluation_holds_no_more_logits_than_it_says(make_recipe, make_network) -> None:
    network, sizes = make_network(make_recipe(1)), list[int]()
    network.model.get_output_embeddings().register_forward_hook(lambda _, __, out: sizes.append(out.numel()))
    network.model.config.vocab_size = vocabulary = 1 << 21  # as it says; the head is small
    evaluate.negative_log_likelihood(network, np.zeros(200, np.uint16), 4)
    rows, head = 50, network.model.get_output_embeddings().weight.shape[0]
    assert footprint.evaluated_at_once(vocabulary, 4) * vocabulary * 4 <= footprint._LOGITS_AT_ONCE
    assert max(sizes) == 4 * head * footprint.evaluated_at_once(vocabulary, 4) < 4 * head * rows


def test_a_participant_answers_with_the_sums_of_its_held_out_text(
    make_recipe, make_network, make_participant, tmp_path
) -> None:
    person = make_participant(make_recipe(1), "p0", make_network(make_recipe(1)))
    theta = person.network.flat.vector.clone()
    stream = np.arange(50, dtype=np.uint16)
    task = Task(kind="evaluate", revision=4, tensors={"parameters": theta})
    with pytest.raises(TrainingError, match="p0 has no held-out text"):
        person.perform(task)
    person = replace(person, validation=Shard(stream, 1, 123, tmp_path / "index"))
    done = person.perform(task)
    nats, _ = evaluate.negative_log_likelihood(person.network, stream, 16)
    assert (done.revision, dict(done.header)) == (4, {"nats": nats, "tokens": 49, "bytes": 123})
    assert person.state.cursor == 0 and torch.equal(person.network.flat.vector, theta)
