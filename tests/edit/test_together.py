"""Edits of many at once: the sums against one party with all edits, claims, masks, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from potluck.aggregation.masks import fixed, floating, mask
from potluck.aggregation.statistics import SummedStatistics
from potluck.compose.base import load_base
from potluck.contribution import Contribution, Header, Task
from potluck.corpus.world import documents_of, facts
from potluck.edit.closed_form import RIDGE, alphaedit_update, asked_in, memit_update, null_space
from potluck.edit.facts import Edit, write_edits
from potluck.edit.layout import layout_of
from potluck.edit.together import site as site_module
from potluck.edit.together.edit_hashes import (
    Decisions,
    claim_tensors,
    claims_of,
    read_claims,
    read_decisions,
    read_secret,
    resolved,
)
from potluck.edit.together.exchange import Exchange, update_of
from potluck.edit.together.maps import Map, maps_of
from potluck.edit.together.site import Site
from potluck.edit.together.sums import (
    Hiding,
    Wire,
    edit_shapes,
    edit_sums,
    message_bytes,
    packed,
    read_sum,
    received,
    upper,
    wire_of,
)
from potluck.errors import EditError
from potluck.local.network import place
from potluck.models.flat import state_hash
from potluck.recipe.editing import Editing
from potluck.recipe.schema import Compute

WORLD = Path(__file__).parents[1] / "assets/world"
NAMES = tuple(f"p{i}" for i in range(8))
SECRET = b"what the coordinator never sees"
D_IN, D_OUT, LAYERS = 64, 12, (1, 2, 3)
MAPS = {layer: Map(i * D_IN * D_OUT, D_OUT, D_IN, turned=i == 1) for i, layer in enumerate(LAYERS)}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEXT = {layer: normal(400, D_IN, seed=layer) * torch.logspace(0.5, -1.5, D_IN, dtype=torch.float64) for layer in LAYERS}
THETA = normal(len(LAYERS) * D_IN * D_OUT, seed=9)


@dataclass
class Party:
    """A participant whose model is linear: the residual stream at the end is the sum of what all maps give."""

    name: str
    edits: int = 50
    wrong: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None
    claims: list[Edit] = field(default_factory=list)

    def __post_init__(self) -> None:
        seed = 100 + NAMES.index(self.name)
        self.keys = {layer: normal(self.edits, D_IN, seed=seed * 10 + layer) for layer in LAYERS}
        self.z = 3 * normal(self.edits, D_OUT, seed=seed)
        self.claims = self.claims or [Edit(str(i), f"{self.name} {i} is", self.name, "x") for i in range(self.edits)]

    def end(self, theta: Tensor) -> Tensor:
        return sum((self.keys[layer] @ MAPS[layer].of(theta).T for layer in LAYERS), torch.zeros(1))

    def answer(self, kind: str, about: Header, theta: Tensor, wire: Wire) -> Contribution:
        header: dict[str, Any] = {"base": state_hash(theta), "count": self.edits, "contexts": "[]", "told": self.edits}
        if kind == "claims":
            return Contribution(kind=kind, revision=0, tensors=claim_tensors(claims_of(self.name, self.claims, SECRET)))
        if kind == "moments":
            header["count"] = len(TEXT[1])
            sums = {f"{layer}.moment": upper(text.T @ text) for layer, text in TEXT.items()}
        else:
            layers = [int(part) for part in str(about["layers"]).split(",")]
            out = {int(part) for part in str(about["left_out"]).split(",") if part}
            kept = [i for i in range(self.edits) if i not in out]
            residual = ((self.z - self.end(theta)) / int(about["share"]))[kept]
            keys = {layer: self.keys[layer][kept] for layer in layers}
            sums = edit_sums(keys, {} if about["phase"] == "after" else dict.fromkeys(layers, residual))
        hiding = None
        if wire.fraction is not None:
            parties = tuple(str(about["parties"]).split(","))
            hiding = Hiding(SECRET, self.name, parties, f"{about['nonce']} {kind}")
        tensors = packed(sums, wire, hiding)
        if self.wrong is not None and kind == "edit":
            self.wrong(tensors, header)
        return Contribution(kind=kind, revision=0, header=header, tensors=tensors)


@dataclass
class World:
    """All parties, as an exchange asks them; those that are ``gone`` do not answer to statistics."""

    parties: Mapping[str, Party]
    wire: Wire
    gone: tuple[str, ...] = ()
    asked: list[tuple[str, str]] = field(default_factory=list)

    def __call__(
        self, kind: str, arguments: Mapping[str, Header], theta: Tensor, maps: Mapping[int, Tensor]
    ) -> Iterator[tuple[str, Contribution | str]]:
        for name, about in arguments.items():
            self.asked.append((kind, name))
            if kind == "edit" and name in self.gone:
                yield name, "it left"
            else:
                yield name, self.parties[name].answer(kind, about, theta, self.wire)


def editing_of(**keys: Any) -> Editing:
    return Editing.model_validate({"layers": LAYERS, "moment_weight": 3.0, "free_directions": 0.5, **keys})


def exchange_of(editing: Editing, parties: Mapping[str, Party] | None = None, **more: Any) -> Exchange:
    parties = parties or {name: Party(name) for name in NAMES}
    gone = more.pop("gone", ())
    return Exchange(editing, MAPS, tuple(parties), World(parties, wire_of(editing), gone), **more)


def pooled(editing: Editing, parties: Mapping[str, Party], past: Mapping[int, Tensor] | None = None) -> Tensor:
    """The edit of one party with everybody's edits, by the plain formulas."""
    theta, start = THETA.clone(), THETA.clone()
    eye = torch.eye(D_IN, dtype=torch.float64)
    for i, layer in enumerate(LAYERS):
        one_shot = editing.form == "one-shot"
        seen, share = (start, len(LAYERS)) if one_shot else (theta, len(LAYERS) - i)
        k = torch.cat([party.keys[layer] for party in parties.values()]).T
        r = torch.cat([(party.z - party.end(seen)) / share for party in parties.values()]).T
        c, g_past = TEXT[layer].T @ TEXT[layer] / len(TEXT[layer]), (past or {}).get(layer, torch.zeros_like(eye))
        if editing.method == "memit":
            c = c + RIDGE * c.diagonal().median() * eye
            delta = r @ k.T @ torch.linalg.inv(editing.moment_weight * c + g_past + k @ k.T)
        else:
            u = null_space(c, editing.free_directions)
            p = u @ u.T
            ridge = editing.null_weight * float((u.T @ k).square().sum()) / k.shape[1]
            delta = torch.linalg.solve(p @ (k @ k.T + g_past) + ridge * eye, p @ k @ r.T).T
        MAPS[layer].of(theta).add_(delta)
    return theta


def off(found: Tensor | None, expected: Tensor) -> float:
    """Distance of two edited states, relative to the edit."""
    assert found is not None
    return float((found - expected).norm() / (expected - THETA).norm())


@pytest.mark.parametrize("form", ["sequential", "one-shot"])
@pytest.mark.parametrize("method", ["memit", "alphaedit"])
@pytest.mark.parametrize(
    ("how", "bound"), [({}, 1e-9), ({"masks": {}}, 1e-9), ({"numbers": "single"}, 1e-5)], ids=["plain", "masks", "f32"]
)
def test_eight_participants_make_the_edit_of_one(form: str, method: str, how: dict[str, Any], bound: float) -> None:
    editing = editing_of(form=form, method=method, **how)
    exchange = exchange_of(editing)
    outcome = exchange.edited(THETA)
    assert isinstance(exchange.ask, World)
    expected = pooled(editing, exchange.ask.parties)
    assert off(outcome.theta, expected) <= bound
    asked = [name for kind, name in exchange.ask.asked if kind == "edit"]
    assert len(asked) == 8 * (2 if form == "one-shot" else 1 + len(LAYERS))
    assert outcome.edits == dict.fromkeys(NAMES, 50) and sum(outcome.told.values()) == 400
    assert bool(off(outcome.theta, THETA.clone().zero_()) > 1e-3)


def test_averages_and_sums_of_local_edits_are_something_else() -> None:
    editing = editing_of(form="one-shot")
    exchange = exchange_of(editing)
    assert isinstance(exchange.ask, World)
    parties = exchange.ask.parties
    expected = pooled(editing, parties)
    local = [pooled(editing, {name: party}) - THETA for name, party in parties.items()]
    total = torch.stack(local).sum(0)
    assert off(THETA + total, expected) > 0.3 and off(THETA + total / 8, expected) > 0.3


@pytest.mark.parametrize("how", [{}, {"masks": {}}], ids=["plain", "masks"])
def test_who_drops_out_was_never_there(how: dict[str, Any]) -> None:
    editing = editing_of(**how)
    with_all = exchange_of(editing, gone=("p3",)).edited(THETA)
    rest = {name: Party(name) for name in NAMES if name != "p3"}
    never = exchange_of(editing, rest).edited(THETA)
    assert with_all.refused == {"p3": "it left"}
    assert with_all.theta is not None and never.theta is not None
    assert off(with_all.theta, never.theta) <= 1e-12
    with pytest.raises(EditError, match="p3 could not take part in the edit: it left"):
        exchange_of(editing, gone=("p3",)).edited(THETA, stop_on_failure=True)


def test_masked_sums_need_two() -> None:
    with pytest.raises(EditError, match="too few participants are left to edit with: p1: it left"):
        exchange_of(editing_of(masks={}), {n: Party(n) for n in NAMES[:2]}, gone=("p1",)).edited(THETA)


def test_revocation_is_a_subtraction() -> None:
    editing, wire = editing_of(form="one-shot"), Wire()
    parties = [Party(name) for name in NAMES]
    layer, base = 1, state_hash(THETA)
    about: Header = {"layers": "1", "left_out": "", "share": 1, "phase": "all"}
    sent = [
        received(p.name, p.answer("edit", about, THETA, wire), edit_shapes(MAPS, [layer]), base, wire, 1000)
        for p in parties
    ]
    total, never = SummedStatistics("edit", base), SummedStatistics("edit", base)
    for part in sent:
        total.accumulate(part)
    total.remove(sent[3])
    for part in sent[:3] + sent[4:]:
        never.accumulate(part)
    c = TEXT[1].T @ TEXT[1] / 400
    deltas = []
    for found in (total, never):
        sums = read_sum(found.finish(), wire)
        deltas.append(update_of(editing, sums["1.product"], sums["1.gram"], c, torch.zeros_like(c), 1))
    assert float((deltas[0] - deltas[1]).norm() / deltas[1].norm()) <= 1e-9


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_later_edits_respect_the_keys_of_earlier_ones(method: str) -> None:
    editing = editing_of(method=method, at_once=50)
    first = exchange_of(editing)
    outcome = first.edited(THETA)
    assert isinstance(first.ask, World)
    keys = {layer: torch.cat([p.keys[layer] for p in first.ask.parties.values()]) for layer in LAYERS}
    assert all(torch.allclose(outcome.keys[layer], keys[layer].T @ keys[layer]) for layer in LAYERS)
    later = {name: Party(name, edits=4) for name in NAMES[:2]}
    found = exchange_of(editing, later, past=outcome.keys).edited(THETA)
    assert off(found.theta, pooled(editing, later, outcome.keys)) <= 1e-9
    forgetful = exchange_of(editing, later).edited(THETA)
    assert found.theta is not None and forgetful.theta is not None
    moved = [(keys[1] @ MAPS[1].of(theta - THETA).T).norm() for theta in (found.theta, forgetful.theta)]
    assert moved[0] < 0.8 * moved[1]


# --- what is refused ---------------------------------------------------------------------------


def put(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def wrong(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        if key in tensors:
            tensors[key] = value(tensors[key])

    return wrong


def say(key: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, header: header.__setitem__(key, value)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (put("1.product", lambda t: t[:, :-1]), r"1.product is torch.int64 \(12, 63\), not torch.int64 \(12, 64\)"),
        (put("1.gram", lambda t: t.float()), "1.gram is torch.float32"),
        (lambda tensors, header: tensors.pop("1.gram", None), "not those that were asked for: 1.gram"),
        (say("base", "f" * 64), "of another model, ffffffffffff"),
        (put("1.product", lambda t: torch.full_like(t, 0x7FF8 << 48)), "1.product holds NaN or infinite"),
        (put("1.gram", lambda t: (-t.view(torch.float64)).view(torch.int64)), "1.gram is no sum of squares"),
        (say("count", -1), "a count of -1"),
    ],
    ids=["shape", "type", "missing", "model", "nan", "negative", "count"],
)
def test_statistics_that_cannot_be_used_are_left_out(wrong: Any, reason: str) -> None:
    before = THETA.clone()
    parties = {name: Party(name, edits=5, wrong=wrong if name == "p2" else None) for name in NAMES[:4]}
    outcome = exchange_of(editing_of(), parties).edited(THETA)
    assert list(outcome.refused) == ["p2"]
    with pytest.raises(EditError, match=reason):
        exchange_of(editing_of(), parties).edited(THETA, stop_on_failure=True)
    assert torch.equal(THETA, before)
    del parties["p2"]
    assert off(outcome.theta, pooled(editing_of(), parties)) <= 1e-9


def test_who_may_not_edit_is_not_asked() -> None:
    editing = editing_of(participants=NAMES[:3])
    exchange = exchange_of(editing, {name: Party(name, edits=5) for name in NAMES[:4]})
    outcome = exchange.edited(THETA)
    assert isinstance(exchange.ask, World)
    assert {name for kind, name in exchange.ask.asked if kind != "moments"} == set(NAMES[:3])
    with pytest.raises(Exception, match="p3 was not asked, and may not edit"):
        replace(exchange, ask=Intruder(exchange.ask)).collect(  # type: ignore[arg-type]
            "claims", {"p0": {}}, THETA, (), lambda name, answer: None
        )
    assert set(outcome.edits) == set(NAMES[:3])


@dataclass
class Intruder:
    """Somebody answers who was not asked."""

    world: World

    def __call__(self, kind: str, arguments: Any, theta: Tensor, maps: Any) -> Iterator[Any]:
        yield "p3", self.world.parties["p3"].answer(kind, {}, theta, self.world.wire)


def test_masked_sums_that_are_no_sums_of_squares_are_refused() -> None:
    parties = {n: Party(n, edits=5, wrong=put("1.gram", lambda t: t - (1 << 60)) if n == "p1" else None) for n in NAMES}
    with pytest.raises(EditError, match=r"the sum: 1\.gram is no sum of squares"):
        exchange_of(editing_of(masks={}), parties).edited(THETA, stop_on_failure=True)


# --- masks -------------------------------------------------------------------------------------


def test_masks_cancel_and_hide() -> None:
    masks = {name: mask(SECRET, "once", name, NAMES, 1000) for name in NAMES}
    total = torch.zeros(1000, dtype=torch.int64)
    for covered in masks.values():
        total += covered
    assert not total.any()
    assert len({int(covered[0]) for covered in masks.values()}) == len(NAMES)
    assert not torch.equal(masks["p0"], mask(SECRET, "twice", "p0", NAMES, 1000))
    assert not torch.equal(masks["p0"], mask(b"another secret", "once", "p0", NAMES, 1000))
    assert abs(int((masks["p0"] > 0).sum()) - 500) < 80


def test_fixed_point_is_as_exact_as_it_says() -> None:
    numbers = normal(100, seed=0) * 100
    assert float((floating(fixed(numbers, 44, 8), 44) - numbers).abs().max()) <= 2**-45
    for bad in (1e9, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="does not fit beside 44 bits"):
            fixed(torch.tensor([bad]), 44, 8)


# --- claims ------------------------------------------------------------------------------------


def two_of(pairs: int = 200) -> dict[str, list[Edit]]:
    """Pairs of edits that answer one question differently; the second participant's are newer."""
    found: dict[str, list[Edit]] = {"ada": [], "ben": []}
    for fact in facts(pairs // 5):
        targets = [value for value in fact.relation.values if value != fact.value]
        for name, target, made_at in zip(found, targets, (100.0, 200.0), strict=False):
            edit = Edit(str(len(found[name])), fact.told[0], fact.person, target, relation=fact.relation.name)
            found[name].append(replace(edit, made_at=made_at))
    return found


def claims_in(files: Mapping[str, list[Edit]]) -> list[Any]:
    sent = {name: claim_tensors(claims_of(name, edits, SECRET)) for name, edits in files.items()}
    return [claim for name, tensors in sent.items() for claim in read_claims(name, tensors)]


@pytest.mark.parametrize(
    ("policy", "order", "out"),
    [
        ("newest", ("ada", "ben"), {"ada"}),
        ("newest", ("ben", "ada"), {"ada"}),
        ("priority", ("ada", "ben"), {"ben"}),
        ("priority", ("ben", "ada"), {"ada"}),
        ("reject", ("ada", "ben"), {"ada", "ben"}),
    ],
)
def test_200_conflicts_are_resolved_as_the_policy_says(policy: Any, order: tuple[str, ...], out: set[str]) -> None:
    found = resolved(claims_in(two_of()), policy, order)
    assert len(found.conflicts) == 200 and found.overlaps == 0
    assert found.left_out == {name: tuple(range(200)) for name in out}


def test_200_conflicts_are_asked_about(tmp_path: Path) -> None:
    claims = claims_in(two_of())
    with pytest.raises(EditError, match=r"200 edits are in conflict .* ada 0 against ben 0; ") as error:
        resolved(claims, "ask", ("ada", "ben"))
    assert error.value.hint and '{"keep": [["NAME", NUMBER], ...]' in error.value.hint
    path = tmp_path / "decisions.json"
    keep = [["ada" if i % 2 else "ben", i] for i in range(199)]
    path.write_text(json.dumps({"keep": keep}))
    with pytest.raises(EditError, match=r"1 edits are in conflict .* ada 199 against ben 199$"):
        resolved(claims, "ask", ("ada", "ben"), read_decisions(path))
    path.write_text(json.dumps({"keep": keep, "drop": [["ada", 199], ["ben", 199]]}))
    found = resolved(claims, "ask", ("ada", "ben"), read_decisions(path))
    assert found.left_out["ada"] == (*range(0, 199, 2), 199) and found.left_out["ben"] == tuple(range(1, 200, 2))
    with pytest.raises(EditError, match="the decisions keep ada 0 and ben 0, which contradict"):
        resolved(claims, "ask", ("ada", "ben"), Decisions(frozenset({("ada", 0), ("ben", 0)})))


def test_what_overlaps_is_made_once() -> None:
    same = Edit("0", "Rome is the capital of", "Rome", "Italy")
    files = {"ada": [same], "ben": [replace(same, id="b")], "cleo": [replace(same, target="Spain", made_at=9.0)]}
    found = resolved(claims_in({n: files[n] for n in ("ada", "ben")}), "newest", ("ben", "ada"))
    assert (found.left_out, found.overlaps, found.conflicts) == ({"ada": (0,)}, 1, ())
    found = resolved(claims_in(files), "priority", ("ada", "ben", "cleo"))
    assert (found.left_out, found.overlaps) == ({"ben": (0,), "cleo": (0,)}, 1)
    assert resolved(claims_in(files), "newest", ("ada", "ben", "cleo")).left_out == {"ada": (0,), "ben": (0,)}


def test_claims_say_nothing_without_the_secret() -> None:
    edit = Edit("0", "Rome is the capital of", "Rome", "Italy")
    (mine,), (other,) = (claims_of("ada", [edit], secret) for secret in (SECRET, b"another one, as long as"))
    assert mine.asks != other.asks and mine.says != other.says and mine.asks != mine.says


@pytest.mark.parametrize(
    "wrong",
    [
        {"asks": torch.zeros(2, 31, dtype=torch.uint8)},
        {"numbers": torch.tensor([0, 0])},
        {"numbers": torch.tensor([-1, 0])},
        {"made_at": torch.zeros(2)},
        {"says": torch.zeros(3, 32, dtype=torch.uint8)},
    ],
)
def test_claims_of_unknown_origin(wrong: dict[str, Tensor]) -> None:
    edits = [Edit(str(i), f"Rome {i} is", "Rome", "big") for i in range(2)]
    good = claim_tensors(claims_of("ada", edits, SECRET))
    assert len(read_claims("ada", good)) == 2 and read_claims("ada", {}) == []
    with pytest.raises(EditError, match="ada"):
        read_claims("ada", {**good, **wrong})


def test_secrets_have_to_be_secret(tmp_path: Path) -> None:
    for text in ("", "short", "a" * 64):
        (tmp_path / "secret").write_text(text)
        with pytest.raises(EditError, match="too short or too simple"):
            read_secret(tmp_path / "secret")
    (tmp_path / "secret").write_text("3f9a0c5d7e1b2a4864c0f1e2d3b4a596\n")
    assert read_secret(tmp_path / "secret") == b"3f9a0c5d7e1b2a4864c0f1e2d3b4a596"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_maps_are_found_in_the_flat_vector(kind: str) -> None:
    """Square ones too: what is turned is told by how a layer stores its weight, not by its shape."""
    sizes = {"vocab_size": 300}
    if kind == "llama":
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **shape))
    else:
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_embd=16, n_inner=16, n_layer=3, n_head=2))
    network = place(model, Compute(device="cpu"))
    layout = layout_of(model)
    maps = maps_of(layout, network.flat.manifest, (1, 0))
    assert list(maps) == [0, 1] and maps[0].turned is (kind == "gpt2")
    for layer, found in maps.items():
        assert torch.equal(found.of(network.flat.vector), layout.weight(layer))
    maps[1].of(network.flat.vector).add_(1.0)
    assert torch.equal(maps[1].of(network.flat.vector), layout.weight(1))
    with pytest.raises(EditError, match="layer 2 is the model's last"):
        maps_of(layout, network.flat.manifest, (1, 2))
    with pytest.raises(EditError, match="no part of what is trained together"):
        maps_of(layout, network.flat.manifest[:1], (1,))


# --- on a real model ---------------------------------------------------------------------------


def test_real_keys_of_four_participants_are_pooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each participant's keys and residuals, measured where they are, make the edit of one who had them all."""
    base = load_base(WORLD)
    network = place(base.model, Compute(device="cpu"))
    editing = Editing.model_validate({"layers": (1, 2), "values": {"steps": 3}, "masks": {}})
    layout = layout_of(base.model)
    maps = maps_of(layout, network.flat.manifest, editing.layers)
    known, sites = facts(8), {}
    tokens = np.array([i for text in documents_of(8, tellings=2) for i in base.vocabulary.tokenizer.encode(text).ids])
    for i, name in enumerate(NAMES[:4]):
        mine = known[10 * i : 10 * i + 10 : 4]
        write_edits(tmp_path / name, [Edit(str(j), f.told[0], f.person, "harp") for j, f in enumerate(mine)])
        sites[name] = Site(
            name, network, base.vocabulary, editing, maps, tmp_path / name, SECRET, tokens[i::4], sequence_length=32
        )
    measured: dict[int, list[tuple[Tensor, Tensor]]] = {1: [], 2: []}

    def noted(keys: Mapping[int, Tensor], residuals: Mapping[int, Tensor]) -> dict[str, Tensor]:
        for layer, residual in residuals.items():
            measured[layer].append((keys[layer], residual))
        return edit_sums(keys, residuals)

    monkeypatch.setattr(site_module, "edit_sums", noted)
    moments: dict[int, Tensor] = {}
    deltas: dict[int, Tensor] = {}

    def update(editing: Editing, m: Tensor, g: Tensor, moment: Tensor, past: Tensor, edits: int) -> Tensor:
        layer = 1 if not deltas else 2
        assert edits == 12
        moments[layer], deltas[layer] = moment, update_of(editing, m, g, moment, past, edits)
        return deltas[layer]

    monkeypatch.setattr("potluck.edit.together.exchange.update_of", update)
    start = network.flat.vector.clone()

    def ask(kind: str, arguments: Any, theta: Tensor, changed: Any) -> Iterator[tuple[str, Contribution]]:
        for name, about in arguments.items():
            task = Task(kind=kind, revision=0, parameters=about, state=state_hash(theta))
            yield name, sites[name].answer(task, start, sites[name].changed(start, changed))

    outcome = Exchange(editing, maps, NAMES[:4], ask).edited(start)
    assert outcome.theta is not None
    assert all(p.requires_grad for p in base.model.parameters())
    for layer, parts in measured.items():
        k, r = torch.cat([key for key, _ in parts]), torch.cat([residual for _, residual in parts])
        assert len(k) == 12
        expected = memit_update(r.T @ k, k.T @ k, moments[layer], editing.moment_weight)
        assert float((deltas[layer] - expected).norm() / expected.norm()) <= 1e-9
        alpha = Editing.model_validate({"layers": (1,), "method": "alphaedit"})
        free = null_space(moments[layer], alpha.free_directions)
        past, ridge = torch.zeros_like(moments[layer]), alpha.null_weight * asked_in(k.T @ k, free, len(k))
        one = update_of(alpha, r.T @ k, k.T @ k, moments[layer], past, len(k))
        parted = [edit_sums({layer: a}, {layer: b}) for a, b in parts]
        m = sum((part[f"{layer}.product"] for part in parted), torch.zeros(1))
        assert float((alphaedit_update(m, k.T @ k, past, free, ridge) - one).norm() / one.norm()) <= 1e-9
        written = maps[layer].of(outcome.theta) - maps[layer].of(start)
        assert float((written - deltas[layer]).norm() / deltas[layer].norm()) <= 1e-5


def test_one_mask_covers_one_message(tmp_path: Path) -> None:
    base = load_base(WORLD)
    network = place(base.model, Compute(device="cpu"))
    editing = Editing.model_validate({"layers": (1,), "masks": {}})
    maps = maps_of(layout_of(base.model), network.flat.manifest, (1,))
    tokens = np.arange(640) % 300
    site = Site("p0", network, base.vocabulary, editing, maps, None, SECRET, tokens, sequence_length=32)
    theta = network.flat.vector.clone()
    about: dict[str, Any] = {"session": 0, "parties": "p0,p1", "nonce": "n"}
    task = Task(kind="moments", revision=0, parameters=about, state=state_hash(theta))
    site.answer(task, theta, theta)
    site.answer(task, theta, theta)
    site.tokens = tokens[::-1].copy()
    with pytest.raises(EditError, match="two messages under one mask"):
        site.answer(task, theta, theta)
    site.tokens = tokens
    for parties in ("p0", "p1,p2", "p0,p0"):
        with pytest.raises(EditError, match="needs two participants"):
            site.answer(replace(task, parameters={**about, "parties": parties}), theta, theta)
    inner, width = maps[1].d_in, maps[1].d_out
    assert message_bytes(maps, editing) == 8 * (inner * (inner + 1) // 2 + width * inner)
