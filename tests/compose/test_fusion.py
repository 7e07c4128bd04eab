"""Frozen models in one: at first the primary alone, bit for bit; only the head learns; the weights say who spoke."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from potluck.compose.fusion import attribution, fuse_models, fused, prefit
from potluck.compose.training import Lesson, loss_on, train_part
from potluck.corpus.tokenizer import build_vocabulary
from potluck.errors import CorpusError, ModelError, PotluckError, RecipeError, StorageError
from potluck.local.network import place
from potluck.models.build import load_folder
from potluck.models.export import export_folder
from potluck.models.flat import flatten, frozen_hash
from potluck.models.fused import DECAYS, AdaFusion, FusedForCausalLM, track_record
from potluck.models.shapes import context_length, form_of
from potluck.recipe.load import parse_recipe
from potluck.recipe.schema import Bpe, Bytes, Compute, ModelFolder

VOCABULARY = build_vocabulary(parse_recipe({"data": {"source": {"path": "."}, "split": {"participants": 1}}}))
NAMES = ("ada", "bob", "eve")
CPU = torch.device("cpu")


def llama(width: int, layers: int, *, tied: bool = True, seed: int = 0, size: int = 257) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(width: int) -> PreTrainedModel:
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=257, n_embd=width, n_layer=2, n_head=2, n_positions=48, bos_token_id=256, eos_token_id=256
    )
    return GPT2LMHeadModel(config).eval()


def parts() -> dict[str, PreTrainedModel]:
    return {"ada": llama(16, 1), "bob": gpt2(24), "eve": llama(8, 3, tied=False, seed=2)}


def save(model: PreTrainedModel, folder: Path) -> Path:
    export_folder(model, Bytes(), VOCABULARY.tokenizer, VOCABULARY.end_of_text, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    return {name: save(model, root / name) for name, model in parts().items()}


@pytest.fixture
def moved() -> FusedForCausalLM:
    """A fused model whose head is anywhere."""
    model = fused(parts(), "bob", 6)
    with torch.no_grad():
        for parameter in model.fusion.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return model


def tokens(rows: int = 2, length: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(0, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("primary", NAMES)
def test_it_starts_as_the_primary_bit_for_bit(folders: dict[str, Path], tmp_path: Path, primary: str) -> None:
    facts = fuse_models(folders, tmp_path / "fused", primary, width=4)
    model, alone = load_folder(tmp_path / "fused"), load_folder(folders[primary])
    output = model.eval()(tokens())
    assert torch.equal(output.logits, alone.eval()(tokens()).logits)
    assert (output.weights == torch.eye(3)[NAMES.index(primary)]).all()
    head = model.num_parameters(only_trainable=True)
    assert (facts["parameters"], facts["frozen"]) == (head, sum(p.num_parameters() for p in parts().values()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fused"]


def test_the_head_alone_learns_and_travels(folders: dict[str, Path], tmp_path: Path) -> None:
    fuse_models(folders, tmp_path / "fused", "ada", width=4)
    folder = ModelFolder(path=str(tmp_path / "fused"))
    model = load_folder(tmp_path / "fused").train()
    manifest = flatten(model, CPU).manifest
    assert all(entry.name.startswith("fusion.") for entry in manifest)
    assert sorted(form_of(folder, 257).learns) == sorted((entry.name, entry.shape) for entry in manifest)
    assert form_of(folder, 257).frozen == sum(part.num_parameters() for part in parts().values())
    assert context_length(folder) == 48
    assert model.fusion.training and not any(module.training for part in model.parts for module in part.modules())


def test_what_is_frozen_must_be_the_same_everywhere() -> None:
    model = fused(parts(), "ada", 4)
    before, layout = frozen_hash(model), place(model, Compute(device="cpu")).layout
    assert layout[-1] == ["frozen", before]
    model.parts[1].transformer.wte.weight.data[3, 3] += 1e-3
    assert frozen_hash(model) != before
    with pytest.raises(RecipeError, match="not for a potluck_fused model"):
        place(model, Compute(device="cpu", gradient_checkpointing=True))
    plain = llama(8, 1)
    assert place(plain, Compute(device="cpu")).layout == [[n, list(p.shape)] for n, p in plain.named_parameters()]


# --- equations --------------------------------------------------------------------------------------


def slowly_attended(fusion: AdaFusion, features: list[Tensor], evidence: Tensor) -> tuple[Tensor, Tensor]:
    """One place at a time, in fp64."""
    vs = [projection.double() @ h.double() for h, projection in zip(features, fusion.projections, strict=True)]
    scores = [
        fusion.prompt.double() @ v / v.norm() + fusion.trust.double() @ e.double() + b.double()
        for v, e, b in zip(vs, evidence, fusion.bias, strict=True)
    ]
    attention = torch.softmax(torch.stack(scores), 0)
    return sum(a * v for a, v in zip(attention, vs, strict=True)), attention


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 7), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_attention_is_the_papers(widths: list[int], common: int, evidence: int, seed: int) -> None:
    torch.manual_seed(seed)
    fusion = AdaFusion(widths, common, evidence)
    for parameter in fusion.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    features = [torch.randn(3, 2, width) for width in widths]
    known = torch.randn(3, 2, len(widths), evidence)
    z, attention = fusion(features, known)
    for place_ in np.ndindex(3, 2):
        slow_z, slow_a = slowly_attended(fusion, [h[place_] for h in features], known[place_])
        torch.testing.assert_close(z[place_].double(), slow_z, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(attention[place_].double(), slow_a, atol=1e-4, rtol=1e-4)


def test_at_first_all_weigh_the_same() -> None:
    _, attention = AdaFusion([5, 3, 9], 4, 2)([torch.randn(6, w) for w in (5, 3, 9)], torch.randn(6, 3, 2))
    assert torch.allclose(attention, torch.full((6, 3), 1 / 3))


def test_the_prediction_is_the_weighted_mean_of_predictions(moved: FusedForCausalLM) -> None:
    with torch.no_grad():
        moved.fusion.residual.zero_()
        output = moved(tokens())
        each = torch.stack([part(tokens()).logits.double().softmax(-1) for part in moved.parts], dim=2)
    expected = torch.einsum("btm,btmv->btv", output.weights.double(), each)
    torch.testing.assert_close(output.logits.double().softmax(-1), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(output.weights.sum(-1), torch.ones(2, 20))
    assert 0 < moved.fusion.opened.item() < 1 and (output.weights > 0).all()


@pytest.mark.parametrize("length", [1, 2, 9, 300])
def test_a_track_record_is_a_decaying_mean(length: int) -> None:
    x = tokens(2, length)
    log_probs = [torch.log_softmax(torch.randn(2, length, 257, generator=torch.manual_seed(s)), -1) for s in (1, 2)]
    record, means = track_record(log_probs, x), torch.zeros(2, 2, len(DECAYS), dtype=torch.float64)
    decays = torch.tensor(DECAYS, dtype=torch.float64)
    for t in range(length):
        if t:
            new = torch.stack([each[torch.arange(2), t - 1, x[:, t]] for each in log_probs], 1).double()
            means = decays * means + (1 - decays) * new[..., None]
        torch.testing.assert_close(record[:, t].double(), means, atol=0.1 if t > 255 else 1e-4, rtol=1e-4)


def test_nothing_is_known_of_what_comes(moved: FusedForCausalLM) -> None:
    x = tokens()
    y = x.clone()
    y[:, 11:] = tokens(seed=5)[:, 11:]
    with torch.no_grad():
        torch.testing.assert_close(moved(x).logits[:, :11], moved(y).logits[:, :11])


def test_padding_on_the_left_changes_nothing(moved: FusedForCausalLM) -> None:
    x = tokens(1, 12)
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), x], 1), torch.ones(1, 15, dtype=torch.int64)
    mask[:, :3] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = moved(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
        torch.testing.assert_close(found, moved(x).logits, atol=1e-5, rtol=1e-4)


def test_it_generates_what_it_predicts(moved: FusedForCausalLM) -> None:
    start = tokens(2, 5)
    with torch.no_grad():
        found = moved.generate(start, max_new_tokens=6, do_sample=False, pad_token_id=256, eos_token_id=None)
        for _ in range(6):
            start = torch.cat([start, moved(start).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, start)


def test_prefit_projections_are_the_best_linear_autoencoders() -> None:
    draw = torch.Generator().manual_seed(0)
    features = [torch.randn(50, width, generator=draw) @ torch.randn(width, width, generator=draw) for width in (9, 3)]
    fusion = AdaFusion([9, 3], 4)
    prefit(fusion, features)
    for h, projection in zip(features, fusion.projections, strict=True):
        lost = (h - h @ projection.T @ projection).square().sum()
        torch.testing.assert_close(lost, torch.linalg.svdvals(h)[4:].square().sum(), atol=1e-2, rtol=1e-3)


# --- learning ---------------------------------------------------------------------------------------


def streams(count: int = 2, length: int = 1500) -> list[np.ndarray]:
    """Texts that are easy, each in its own way."""
    draw = np.random.default_rng(0)
    return [draw.choice(257, size=3 + place, replace=False)[np.arange(length) % (3 + place)] for place in range(count)]


def test_learning_beats_every_part_and_leaves_them_alone() -> None:
    texts = streams()
    lesson = Lesson(steps=30, batch_size=4, sequence_length=16, learning_rate=1e-2, device="cpu")
    each = {"ada": llama(16, 1), "bob": llama(24, 1, seed=1)}
    for model, text in zip(each.values(), texts, strict=True):
        train_part(model, [text], lesson)
    model = fused(each, "ada", 4)
    before = frozen_hash(model)

    def loss(of: PreTrainedModel) -> float:
        return sum(loss_on(of, text, 16, "cpu") for text in texts)

    singles = [loss(part) for part in each.values()]
    assert loss(model) == pytest.approx(singles[0], abs=1e-6)
    train_part(model, texts, lesson)
    assert loss(model) < 0.5 * min(singles)
    assert frozen_hash(model) == before
    for name, text in zip(each, texts, strict=True):
        weights = attribution(model, text, 16)
        assert sum(weights.values()) == pytest.approx(1) and weights[name] > 0.7


def test_a_text_that_is_too_short_has_no_attribution() -> None:
    with pytest.raises(CorpusError, match="shorter than 16"):
        attribution(fused(parts(), "ada", 4), np.arange(15), 16)


# --- what cannot be fused ---------------------------------------------------------------------------


def _other_tokenizer(folder: Path) -> None:
    counts = {"some": 5, "words": 4}
    from potluck.corpus.tokenizer import vocabulary_from_words

    other = vocabulary_from_words(counts, 257)
    export_folder(llama(8, 1), Bpe(vocab_size=257), other.tokenizer, other.end_of_text, folder)


REFUSED: dict[str, tuple[Callable[[dict[str, Path], Path], object], type[PotluckError], str]] = {
    "one": (lambda f, out: fuse_models({"ada": f["ada"]}, out, "ada"), RecipeError, "two models at least"),
    "nobody": (lambda f, out: fuse_models(f, out, "zoe"), RecipeError, "'zoe' as the primary"),
    "width": (lambda f, out: fuse_models(f, out, "ada", width=0), RecipeError, "width 0"),
    "taken": (lambda f, out: fuse_models(f, f["ada"], "ada"), StorageError, "something here already"),
    "absent": (lambda f, out: fuse_models({**f, "zoe": out / "no"}, out, "ada"), ModelError, "no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fused(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    attempt, kind, message = REFUSED[case]
    with pytest.raises(kind) as raised:
        attempt(folders, tmp_path / "fused")
    assert message in f"{raised.value} {raised.value.hint}"
    assert list(tmp_path.iterdir()) == []


def test_models_of_other_vocabularies_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    _other_tokenizer(tmp_path / "other")
    save(llama(8, 1, size=300), tmp_path / "larger")
    fuse_models(folders, tmp_path / "fused", "ada", width=4)
    for name, message in (("other", "its tokenizer is not that of"), ("larger", "predicts 300 tokens"),
                          ("fused", "cannot be a part")):  # fmt: skip
        with pytest.raises(ModelError, match=message):
            fuse_models({"ada": folders["ada"], "zoe": tmp_path / name}, tmp_path / "out", "ada")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"names": ["ada"]}, {"primary": 3}, {"parts": []}, {"width": 5}])
def test_a_damaged_folder_is_refused(folders: dict[str, Path], tmp_path: Path, change: dict[str, object]) -> None:
    fuse_models(folders, tmp_path / "fused", "ada", width=4)
    path = tmp_path / "fused" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=r"cannot be loaded|is stored as"):
        load_folder(tmp_path / "fused")
