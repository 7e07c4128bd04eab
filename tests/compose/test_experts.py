"""Experts trained apart, assembled, and gone without a trace."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM
from typer.testing import CliRunner

from potluck.cli.experts import expert as verbs
from potluck.compose import effect
from potluck.compose.adapter import load_adapter
from potluck.compose.base import Base, load_base, texts_of, token_stream
from potluck.compose.effect import held_out
from potluck.compose.experts import flex_olmo
from potluck.compose.experts.assembly import assembled, routing_shares, tune_router
from potluck.compose.experts.parts import Expert, load_expert, save_expert
from potluck.compose.experts.requests import Mixed, assemble, remove, train
from potluck.compose.experts.training import fresh_mixture, mean_inputs, train_expert
from potluck.compose.routing.evidence import token_profile
from potluck.compose.training import Lesson, default_rate, loss_on, only_training, train_part
from potluck.corpus.tokenizer import build_vocabulary
from potluck.errors import CorpusError, ModelError, PotluckError, RecipeError
from potluck.models.build import load_folder
from potluck.models.export import export_folder
from potluck.recipe.schema import Bytes

WORDS = {
    "ada": "engine number card loop store add carry wheel",
    "bob": "river fish boat water stone rain cloud bank",
    "eve": "apple bread soup salt spoon plate oven honey",
}
SIZES: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256,
    "pad_token_id": None,
}  # fmt: skip
LESSON = Lesson(steps=12, batch_size=4, sequence_length=32, learning_rate=1e-2, device="cpu")
RANKS = {"ada": None, "bob": 2, "eve": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, everybody's text and public text, and an expert of each participant beside each base."""
    root = tmp_path_factory.mktemp("experts")
    table = Bytes(kind="bytes")
    vocabulary = build_vocabulary(type("Recipe", (), {"tokenizer": table})())
    torch.manual_seed(0)
    bases = {"llama": LlamaForCausalLM(LlamaConfig(**SIZES)), "olmo2": Olmo2ForCausalLM(Olmo2Config(**SIZES))}
    for kind, model in bases.items():
        export_folder(model, table, vocabulary.tokenizer, vocabulary.end_of_text, root / kind)
    draw = random.Random(0)
    for name, words in WORDS.items():
        (root / f"{name}.txt").write_text(" ".join(draw.choices(words.split(), k=400)))
    everything = " ".join(WORDS.values()).split()
    (root / "public.txt").write_text(" ".join(draw.choices(everything, k=600)))
    for name, rank in RANKS.items():
        save_expert(trained(root, "llama", name, rank), root / "llama-experts" / name)
        save_expert(trained(root, "olmo2", name, None), root / "olmo2-experts" / name)
    return root


def tokens(root: Path, base: Base, name: str) -> np.ndarray:
    return token_stream(texts_of(root / f"{name}.txt"), base.vocabulary)


def trained(root: Path, kind: str, name: str, rank: int | None) -> Expert:
    base = load_base(root / kind)
    return train_expert(base, tokens(root, base, name), tokens(root, base, "public"), LESSON, name, rank)


@pytest.fixture
def base(place: Path) -> Base:
    return load_base(place / "llama")


@pytest.fixture
def experts(place: Path) -> list[Expert]:
    return [load_expert(place / "llama-experts" / name) for name in WORDS]


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = torch.arange(60).view(2, 30) if ids is None else ids
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def test_a_trained_expert_leaves_the_base_as_it_was_and_learns_its_text(place: Path, base: Base) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    own = tokens(place, base, "ada")
    for rank in (None, 3):
        expert = train_expert(base, own, tokens(place, base, "public"), LESSON, "ada", rank)
        assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
        alone = assembled(base, [expert])
        assert loss_on(alone, own, 32, "cpu") < loss_on(base.model, own, 32, "cpu") - 0.01
        assert torch.equal(expert.evidence, token_profile(own, tokens(place, base, "public"), 257))
    again = train_expert(base, own, tokens(place, base, "public"), LESSON, "ada", 3)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in expert.weights.items())


def test_an_expert_is_read_as_it_was_written(place: Path, experts: list[Expert], tmp_path: Path) -> None:
    for expert in experts:
        save_expert(expert, tmp_path / expert.name)
        found = load_expert(tmp_path / expert.name)
        assert found.facts == expert.facts
        assert all(torch.equal(found.weights[name], tensor) for name, tensor in expert.weights.items())
        assert torch.equal(found.embedding, expert.embedding)
    facts = json.loads((tmp_path / "ada" / "expert.json").read_text())
    text = tokens(place, load_base(place / "llama"), "ada")
    assert facts["about"]["text"] == {"tokens": len(text), "distinct_tokens": len(set(text.tolist()))}


def test_the_domain_embedding_is_the_mean_input_of_each_layer(place: Path, base: Base) -> None:
    own = tokens(place, base, "bob")[: 32 * 40]
    seen: list[list[torch.Tensor]] = [[], []]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, given, n=n: seen[n].append(given[0]))
        for n, layer in enumerate(base.model.model.layers)
    ]
    for row in torch.from_numpy(own).view(-1, 32):
        logits(base.model, row[None])
    for hook in hooks:
        hook.remove()
    expected = torch.stack([torch.cat(of).double().mean((0, 1)) for of in seen])
    torch.testing.assert_close(mean_inputs(base.model, own, LESSON).double(), expected, rtol=1e-4, atol=1e-5)


def test_everybodys_text_goes_to_its_own_expert(place: Path, base: Base, experts: list[Expert]) -> None:
    model = assembled(base, experts)
    for name in WORDS:
        shares = routing_shares(model, tokens(place, base, name), 32)
        assert sum(shares.values()) == pytest.approx(1)
        assert max(shares, key=lambda who: shares[who]) == name
    cautious = assembled(base, experts, bias=-5.0)
    assert routing_shares(cautious, tokens(place, base, "public"), 32)["base"] > 0.9


def test_tuning_changes_the_router_alone(place: Path, base: Base, experts: list[Expert]) -> None:
    model = assembled(base, experts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tune_router(model, tokens(place, base, "public"), LESSON)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {"router.evidence", "router.bias"}


def test_a_mixture_of_the_same_shape_can_be_trained_jointly(place: Path, base: Base, experts: list[Expert]) -> None:
    evidence = {expert.name: expert.evidence for expert in experts}
    joint = fresh_mixture(base, [expert.shape for expert in experts], evidence, experts_per_token=2, seed=0)
    assert len(joint.expert_parameters()) == 2 * (3 + 6 + 6)
    streams = [tokens(place, base, name) for name in WORDS]
    with only_training(joint, joint.learning()):
        train_part(joint, streams, LESSON)
    union = np.concatenate(streams)
    assert loss_on(joint, union, 32, "cpu") < loss_on(base.model, union, 32, "cpu") - 0.01


FORMS: dict[str, tuple[str, Mixed, bool, bool]] = {  # base, how, public text to assemble, public text to remove
    "untuned": ("llama", Mixed(), False, False),
    "all of them, biased": ("llama", Mixed(experts_per_token=9, bias=-1.0), False, False),
    "tuned anew": ("llama", Mixed(router_steps=3, seed=4), True, True),
    "flex-olmo": ("olmo2", Mixed(form="flex-olmo"), True, False),
    "flex-olmo, tuned anew": ("olmo2", Mixed(form="flex-olmo", router_steps=3), True, True),
}


@pytest.mark.parametrize("gone", WORDS)
@pytest.mark.parametrize("form", FORMS)
def test_an_expert_that_left_was_never_there(place: Path, tmp_path: Path, form: str, gone: str) -> None:
    kind, how, public, again = FORMS[form]
    known = place / "public.txt"
    parts = {name: place / f"{kind}-experts" / name for name in WORDS}
    given = known if public else None
    assemble(place / kind, list(parts.values()), tmp_path / "all", how, given, "cpu")
    left = remove(tmp_path / "all", gone, tmp_path / "left", known if again else None, device="cpu")
    others = [folder for name, folder in parts.items() if name != gone]
    never = assemble(place / kind, others, tmp_path / "never", how, given, "cpu")
    assert left["experts"] == never["experts"] == [name for name in WORDS if name != gone]
    same_folders(tmp_path / "left", tmp_path / "never")
    one, other, whole = (load_folder(tmp_path / name) for name in ("left", "never", "all"))
    assert float((logits(one) - logits(other)).abs().max()) == 0.0
    text = torch.from_numpy(tokens(place, load_base(place / kind), gone)[:60]).view(1, -1)
    assert not torch.equal(logits(one, text), logits(whole, text))


def test_a_tuned_router_can_be_left_untuned(place: Path, tmp_path: Path) -> None:
    parts = [place / "llama-experts" / name for name in WORDS]
    tuned = Mixed(router_steps=3, seed=1)
    assemble(place / "llama", parts, tmp_path / "all", tuned, place / "public.txt", "cpu")
    with pytest.raises(RecipeError, match="learned of it"):
        remove(tmp_path / "all", "bob", tmp_path / "left")
    with pytest.raises(ModelError, match="not the text"):
        remove(tmp_path / "all", "bob", tmp_path / "left", place / "ada.txt", device="cpu")
    assert not (tmp_path / "left").exists()
    remove(tmp_path / "all", "bob", tmp_path / "left", untuned=True)
    assemble(place / "llama", [parts[0], parts[2]], tmp_path / "never", Mixed())
    same_folders(tmp_path / "left", tmp_path / "never")


def same_folders(one: Path, other: Path) -> None:
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    for name in files:
        if name.endswith(".safetensors"):
            here, there = load_file(one / name), load_file(other / name)
            assert here.keys() == there.keys()
            assert all(torch.equal(here[key], there[key]) for key in here), name
        else:
            assert (one / name).read_text() == (other / name).read_text(), name


def test_flex_olmo_computes_what_our_own_class_does(place: Path) -> None:
    base = load_base(place / "olmo2")
    experts = [load_expert(place / "olmo2-experts" / name) for name in WORDS]
    ours = assembled(base, experts, experts_per_token=3)
    theirs = flex_olmo.exported(base, experts, tokens(place, base, "public"), LESSON, 3)
    with torch.no_grad():  # everybody alike, in both
        ours.router.evidence.zero_()
        for layer in theirs.model.layers:
            layer.mlp.gate.weight.zero_()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)


def test_a_domains_row_is_its_density_ratio_to_public_text() -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(50, 6, generator=draw, dtype=torch.float64)
    public, own = (torch.rand(50, generator=draw, dtype=torch.float64) for _ in range(2))
    public, own = public / public.sum(), own / own.sum()
    weighted = states * public.sqrt()[:, None]
    expected = torch.linalg.lstsq(weighted, (own / public - 1) * public.sqrt()).solution
    moment = weighted.T @ weighted
    rows = flex_olmo.domain_rows((own @ states)[None], public @ states, moment)
    assert torch.equal(rows[0], torch.zeros(6))
    assert torch.nn.functional.cosine_similarity(rows[1], expected.float(), dim=0) > 0.999


def damaged(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None], out: Path) -> Path:
    weights, facts = load_file(folder / "expert.safetensors"), json.loads((folder / "expert.json").read_text())
    change(weights, facts)
    out.mkdir()
    save_file(weights, out / "expert.safetensors")
    (out / "expert.json").write_text(json.dumps(facts))
    return out


DAMAGE: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "another base": (lambda w, f: f.update(base_hash="0" * 64), "whose weights differ"),
    "another public text": (lambda w, f: f.update(public_hash="0" * 64), "another public text"),
    "the same name": (lambda w, f: f.update(name="bob"), "two experts are named bob"),
    "a path for a name": (lambda w, f: f.update(name="../bob"), "no name for an expert"),
    "an unknown kind": (lambda w, f: f.update(kind="wide"), "is not known"),
    "a rank that is not its own": (lambda w, f: f.update(rank=3), "should be"),
    "a negative rank": (lambda w, f: f.update(rank=-1), "is not known"),
    "no facts": (lambda w, f: f.clear(), "not an expert"),
    "a tensor too many": (lambda w, f: w.update(more=torch.zeros(1)), "nothing of this name"),
    "a tensor too few": (lambda w, f: w.pop("layers.1.up_proj.down"), "missing"),
    "no evidence": (lambda w, f: w.pop("router.evidence"), "cannot be read"),
    "a wrong shape": (lambda w, f: w.update({"router.evidence": torch.zeros(5)}), "should be"),
    "NaN": (lambda w, f: w["layers.0.gate_proj.up"].fill_(float("nan")), "NaN"),
    "another precision": (lambda w, f: w.update({"router.evidence": torch.zeros(257).half()}), "not fp32"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_parts_that_do_not_go_together_are_refused(place: Path, tmp_path: Path, kind: str) -> None:
    change, message = DAMAGE[kind]
    wrong = damaged(place / "llama-experts" / "eve", change, tmp_path / "wrong")
    with pytest.raises(ModelError, match=message):
        assemble(place / "llama", [place / "llama-experts" / "bob", wrong], tmp_path / "out", Mixed())
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_refused(place: Path, tmp_path: Path) -> None:
    parts = [place / "llama-experts" / name for name in WORDS]
    out, public = tmp_path / "out", place / "public.txt"
    refused: list[tuple[type[PotluckError], str, Callable[[], Any]]] = [
        (RecipeError, "above 0", lambda: assemble(place / "llama", parts, out, Mixed(bias=0.5))),
        (RecipeError, "together", lambda: assemble(place / "llama", parts, out, Mixed(router_steps=3))),
        (RecipeError, "together", lambda: assemble(place / "llama", parts, out, Mixed(), public)),
        (RecipeError, "--seed", lambda: assemble(place / "llama", parts, out, Mixed(seed=3))),
        (ModelError, "Olmo 2", lambda: assemble(place / "llama", parts, out, Mixed(form="flex-olmo"), public, "cpu")),
        (RecipeError, "needs --public", lambda: assemble(place / "olmo2", parts, out, Mixed(form="flex-olmo"))),
        (
            RecipeError,
            "--bias",
            lambda: assemble(place / "olmo2", parts, out, Mixed(form="flex-olmo", bias=-1.0), public),
        ),
        (ModelError, "no record", lambda: remove(place / "llama", "ada", out)),
        (ModelError, "no expert", lambda: assembled(load_base(place / "llama"), [])),
    ]
    for kind, message, attempt in refused:
        with pytest.raises(kind, match=message):
            attempt()
        assert not out.exists()
    low = trained(place, "olmo2", "ada", 2)
    base = load_base(place / "olmo2")
    with pytest.raises(ModelError, match="full size only"):
        flex_olmo.exported(base, [low], tokens(place, base, "public"), LESSON)
    assemble(place / "llama", parts[:1], tmp_path / "one", Mixed())
    for name, message in (("zoe", "no expert zoe"), ("ada", "the only expert")):
        with pytest.raises(ModelError, match=message):
            remove(tmp_path / "one", name, out)
    with pytest.raises(RecipeError, match="not tuned"):
        remove(tmp_path / "one", "ada", out, public)


def test_options_that_do_nothing_are_refused(place: Path, tmp_path: Path) -> None:
    given = (place / "llama", place / "ada.txt", tmp_path / "out")
    with pytest.raises(RecipeError, match="--rank has no effect"):
        train(*given, "full", LESSON, rank=3, public=place / "public.txt")
    with pytest.raises(RecipeError, match="needs --public"):
        train(*given, "low-rank", LESSON)
    with pytest.raises(RecipeError, match="--sequence-length 65"):
        train(*given, "adapter", Lesson(sequence_length=65))
    with pytest.raises(ModelError, match="rank from 1 to 16"):
        train(*given, "low-rank", LESSON, rank=99, public=place / "public.txt")
    (tmp_path / "short.txt").write_text("few")
    with pytest.raises(CorpusError, match="shorter"):
        train(given[0], tmp_path / "short.txt", given[2], "adapter", LESSON)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def learned(place: Path) -> Path:
    """A base that knows everybody's words, so that there is something to harm."""
    base = load_base(place / "llama")
    with only_training(base.model, list(base.model.parameters())):
        train_part(base.model, [tokens(place, base, "public")], replace(LESSON, steps=100))
    vocabulary = base.vocabulary
    export_folder(base.model, Bytes(), vocabulary.tokenizer, vocabulary.end_of_text, place / "learned")
    return place / "learned"


@pytest.mark.parametrize("kind", ["adapter", "low-rank", "full"])
def test_a_part_tells_what_it_does_to_text_it_has_not_seen(
    place: Path, learned: Path, tmp_path: Path, kind: Any
) -> None:
    """In what is printed and in its own record; one that was trained too hard says that it does harm."""
    public, out = place / "public.txt", tmp_path / "gentle"
    gentle = train(learned, place / "ada.txt", out, kind, replace(LESSON, steps=30), public=public)
    own = gentle["effect"]["own"]
    assert own["after"] < own["before"] and not own["seen"]
    assert all("general text is worse with it" in warning for warning in gentle["warnings"])
    kept = load_adapter(out).about if kind == "adapter" else load_expert(out).about
    assert kept["effect"] == gentle["effect"] and kept["training"]["learning_rate"] == LESSON.learning_rate
    wild = replace(LESSON, learning_rate=3.0)
    found = train(learned, place / "ada.txt", tmp_path / "wild", kind, wild, public=public)["warnings"]
    assert any("does harm" in warning and "a rate of 3:" in warning for warning in found)
    idle = replace(LESSON, learning_rate=1e-9)
    (said,) = train(learned, place / "ada.txt", tmp_path / "idle", kind, idle, public=public)["warnings"]
    assert "has no effect" in said


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_part_is_measured_on_the_stretches_that_its_base_affords(
    place: Path, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a part there are more parameters, and no fewer stretches."""
    parameters = sum(parameter.numel() for parameter in load_base(place / "llama").model.parameters())
    monkeypatch.setattr(effect, "_OPERATIONS", 2 * parameters * LESSON.sequence_length * 9.01)
    given = (place / "llama", place / "ada.txt", tmp_path / "out")
    found = train(*given, kind, replace(LESSON, steps=1), public=place / "public.txt")["effect"]
    assert found["general"]["tokens"] == 9 * LESSON.sequence_length


def test_rates_fall_with_the_width_of_the_base(base: Base) -> None:
    large = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 576, "num_attention_heads": 9, "head_dim": 64}))
    for kind in ("full", "low-rank"):
        assert default_rate(large, kind) == pytest.approx(default_rate(base.model, kind) * SIZES["hidden_size"] / 576)
    assert default_rate(large, "full") < default_rate(large, "low-rank") < 4e-4


def test_what_is_kept_back_is_whole_documents_where_there_are_several(base: Base) -> None:
    texts = [f"document {number} " * 9 for number in range(40)]
    own, kept = held_out(texts, base.vocabulary, 16)
    assert kept is not None and len(own) + len(kept) == len(token_stream(texts, base.vocabulary))
    assert kept[0] == own[0] == base.vocabulary.end_of_text and len(own) / 12 < len(kept) <= len(own) / 9
    whole, none = held_out(["few words"], base.vocabulary, 16)
    assert none is None and len(whole) == 10
    start, end = held_out(["one long text " * 90], base.vocabulary, 16)
    assert end is not None and len(end) == (len(start) + len(end)) // 10


def test_the_verbs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    small = ["--steps", "2", "--batch-size", "2", "--sequence-length", "16", "--device", "cpu", "--json"]

    def said(*words: object) -> Any:
        ended = CliRunner().invoke(verbs, [str(word) for word in words])
        assert ended.exit_code == 0, (ended.output, ended.exception)
        told.append(ended.stderr)
        return json.loads(ended.stdout)

    def train_verb(name: str, *more: object) -> Any:
        return said("train", place / "llama", "--data", place / f"{name}.txt", "--out", name, *small, *more)

    public = ("--public", place / "public.txt")
    assert train_verb("ada", "--as", "full", *public)["kind"] == "full"
    assert "step 1 of 2" in told[-1]
    assert train_verb("bob", "--as", "low-rank", "--rank", 3, *public)["rank"] == 3
    assert train_verb("eve", "--as", "adapter")["rank"] == 8
    adapter = load_adapter(tmp_path / "eve")
    assert adapter.about["base_hash"] == load_base(place / "llama").content_hash
    found = said("assemble", place / "llama", "ada", "bob", "--out", "both", "--top-k", 1, "--bias", -0.5, "--json")
    assert found["experts"] == ["ada", "bob"]
    assert said("remove", "both", "ada", "--out", "one", "--json")["experts"] == ["bob"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ada", "bob", "both", "eve", "one"]
