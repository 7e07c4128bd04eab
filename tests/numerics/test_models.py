"""Networks from shapes and folders, and one flat view of their parameters."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from potluck.errors import ModelError
from potluck.models.build import build_model
from potluck.models.flat import flatten, state_hash
from potluck.models.shapes import context_length, parameter_count
from potluck.recipe.schema import ModelFolder, Preset, Shape

SMALL = {"layers": 2, "width": 32, "heads": 4, "feedforward": 48, "context": 64}
SHAPES = [
    Shape(**SMALL, **variant)
    for variant in ({}, {"kv_heads": 1}, {"kv_heads": 2, "qk_norm": True}, {"tied": False}, {"qk_norm": True})
]
GPT2 = GPT2Config(vocab_size=70, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
LLAMA = LlamaConfig(
    vocab_size=70, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
CPU = torch.device("cpu")


def build(model, vocabulary=61, seed=0):
    return build_model(model, vocabulary, 0, seed)


@pytest.fixture(params=[(GPT2LMHeadModel, GPT2), (LlamaForCausalLM, LLAMA)], ids=["gpt2", "llama"])
def saved(request, tmp_path):
    """A model and the folder it was saved in."""
    kind, config = request.param
    torch.manual_seed(5)
    model = kind(config)
    model.save_pretrained(tmp_path / "model")
    return model, ModelFolder(path=str(tmp_path / "model"))


@pytest.mark.parametrize("model", [*(Preset(preset=name) for name in ("tiny", "small", "35m", "125m")), *SHAPES])
@pytest.mark.parametrize("vocabulary", [257, 32768])
def test_the_number_of_parameters_is_the_models(model, vocabulary) -> None:
    with torch.device("meta"):
        built = build(model, vocabulary)
    assert parameter_count(model, vocabulary) == built.num_parameters()


def test_a_seed_gives_the_same_weights() -> None:
    hashes = [state_hash(flatten(build(Preset(), seed=seed), CPU).vector) for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("shape", SHAPES)
def test_flat_parameters_are_the_models_memory(shape) -> None:
    model, untouched = build(shape), build(shape)
    tokens = torch.arange(20)[None]
    flat = flatten(model, CPU)
    assert torch.equal(model(tokens).logits, untouched(tokens).logits)
    assert [e.name for e in flat.manifest] == [name for name, _ in untouched.named_parameters()]
    assert [e.offset + e.size for e in flat.manifest] == [*(e.offset for e in flat.manifest[1:]), len(flat.vector)]
    for parameter, view, before in zip(flat.parameters, flat.views(flat.vector), untouched.parameters(), strict=True):
        assert parameter.data_ptr() == view.data_ptr() and torch.equal(parameter, before)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == shape.tied
    flat.vector.zero_()
    assert all(not p.any() for p in model.parameters()) and not head.any()
    flat.parameters[0].data[0] = 1.0
    assert flat.vector[: shape.width].all()


def test_what_does_not_train_is_not_in_the_vector() -> None:
    model = build(SHAPES[0])
    model.get_input_embeddings().weight.requires_grad_(False)
    flat = flatten(model, CPU)
    assert flat.manifest[0].name != "model.embed_tokens.weight"
    assert len(flat.vector) == model.num_parameters(only_trainable=True) < model.num_parameters()


def test_a_saved_folder_is_loaded(saved) -> None:
    model, folder = saved
    tokens = torch.arange(20)[None]
    loaded = build(folder)
    torch.testing.assert_close(loaded.eval()(tokens).logits, model.eval()(tokens).logits, atol=1e-6, rtol=0)
    assert parameter_count(folder, 61) == model.num_parameters() == len(flatten(loaded, CPU).vector)
    assert context_length(folder) == 32


def test_a_folder_in_half_precision_is_widened(saved) -> None:
    model, folder = saved
    model.half().save_pretrained(folder.path)
    assert {p.dtype for p in build(folder).parameters()} == {torch.float32}


def test_weights_that_are_not_finite_are_refused(saved) -> None:
    model, folder = saved
    next(model.parameters()).data[3, 3] = torch.nan
    model.save_pretrained(folder.path)
    with pytest.raises(ModelError, match=r"(wte|embed_tokens)\.weight holds NaN"):
        build(folder)


def test_a_vocabulary_larger_than_the_models_is_refused(saved) -> None:
    with pytest.raises(ModelError, match="knows 70 tokens, the tokenizer has 71"):
        build(saved[1], vocabulary=71)


def test_nothing_pickled_is_loaded(saved, tmp_path) -> None:
    model, folder = saved
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    for attempt in (build, lambda folder: parameter_count(folder, 61)):
        with pytest.raises(ModelError, match="safetensors"):
            attempt(folder)


@pytest.mark.parametrize("damage", ["empty", "cut", "config", "gone"])
def test_a_damaged_folder_is_refused(saved, tmp_path, damage) -> None:
    weights, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    match damage:
        case "empty":
            weights.write_bytes(b"")
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "config":
            config.write_text("[]")
        case "gone":
            config.unlink()
    with pytest.raises(ModelError, match="model"):
        build(saved[1])
