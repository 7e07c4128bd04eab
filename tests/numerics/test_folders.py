"""Every model folder is opened as `transformers` opens it, or refused by the name of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from potluck.compose.merging.geometry import Linear
from potluck.compose.merging.models import merge_models
from potluck.errors import ModelError
from potluck.models.build import build_model, load_folder
from potluck.models.check import checked_folder
from potluck.models.flat import flatten
from potluck.models.folder import copy_tokenizer
from potluck.models.shapes import parameter_count, parameter_shapes
from potluck.recipe.schema import ModelFolder

State = dict[str, Tensor]
EMBEDDING, HEAD, DOWN = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip


def llama(folder: Path, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **settings))
    model.save_pretrained(folder)
    return model


def gpt2(folder: Path, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    model.save_pretrained(folder)
    return model


def restored(folder: Path, change: Callable[[State], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in {**config, **changes}.items() if changes.get(key, value) != "leave out"}
    (folder / "config.json").write_text(json.dumps(kept))


def holds_the_same(folder: Path, model: PreTrainedModel) -> None:
    """Loaded, counted and listed as the model that was saved."""
    loaded = load_folder(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    table = ModelFolder(path=str(folder))
    assert parameter_count(table, 40) == model.num_parameters()
    flat = flatten(build_model(table, 40, 0, 0), torch.device("cpu"))
    assert parameter_shapes(table, 40) == tuple((entry.name, entry.shape) for entry in flat.manifest)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(DOWN), f"the tensor {DOWN} is missing"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "LlamaForCausalLM has no place for .* extra"),
        (lambda tensors: tensors.update({DOWN: torch.ones(3, 4)}), rf"{DOWN} is stored as \[3, 4\]"),
        (lambda tensors: tensors.update({DOWN: torch.ones(16, 24).char()}), f"{DOWN} is stored as I8"),
    ],
    ids=["missing", "unexpected", "shape", "type"],
)
@pytest.mark.parametrize("verb", ["load", "count", "merge"])
def test_each_verb_names_the_tensor(verb: str, change: Callable[[State], object], said: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        llama(tmp_path / name)
        restored(tmp_path / name, change)
    verbs: dict[str, Callable[[], object]] = {
        "load": lambda: load_folder(tmp_path / "a"),
        "count": lambda: parameter_count(ModelFolder(path=str(tmp_path / "a")), 40),
        "merge": lambda: merge_models([tmp_path / "a", tmp_path / "b"], tmp_path / "out", Linear()),
    }
    with pytest.raises(ModelError, match=said):
        verbs[verb]()


def test_a_tied_weight_is_one_under_either_name(tmp_path: Path) -> None:
    models = [llama(tmp_path / name, seed, tie_word_embeddings=True) for seed, name in enumerate("ab")]
    restored(tmp_path / "a", lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    restored(tmp_path / "b", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    for name, model in zip("ab", models, strict=True):
        holds_the_same(tmp_path / name, model)
    merge_models([tmp_path / "a", tmp_path / "b"], tmp_path / "out", Linear())
    merged, mean = load_file(tmp_path / "out/model.safetensors"), sum(m.lm_head.weight for m in models) / 2
    assert HEAD not in merged
    torch.testing.assert_close(merged[EMBEDDING], mean)
    restored(tmp_path / "b", lambda tensors: tensors[HEAD].add_(1))
    with pytest.raises(ModelError, match="are tied, and are stored with two values"):
        load_folder(tmp_path / "b")


def test_a_class_ties_where_the_configuration_says_nothing(tmp_path: Path) -> None:
    model, _ = gpt2(tmp_path / "a", 0), gpt2(tmp_path / "b", 1)
    for name in "ab":
        configured(tmp_path / name, tie_word_embeddings="leave out")
    restored(tmp_path / "a", lambda tensors: tensors.update({HEAD: tensors["transformer.wte.weight"].clone()}))
    holds_the_same(tmp_path / "a", model)
    merge_models([tmp_path / "a", tmp_path / "b"], tmp_path / "out", Linear())


def test_names_and_buffers_of_old_files(tmp_path: Path) -> None:
    """As the first GPT-2 files: names of the model without its head, and its causal mask stored."""
    model = gpt2(tmp_path / "old")
    mask = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in (0, 1)}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items() if name != HEAD}
    save_file({**bare, **mask}, tmp_path / "old/model.safetensors", {"format": "pt"})
    holds_the_same(tmp_path / "old", model)
    gpt2(tmp_path / "new", 1)
    merge_models([tmp_path / "new", tmp_path / "old"], tmp_path / "out", Linear())
    whole = llama(tmp_path / "llama")
    restored(tmp_path / "llama", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    holds_the_same(tmp_path / "llama", whole)


def test_the_files_are_those_that_transformers_takes(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        llama(tmp_path / name, 5 + seed).save_pretrained(tmp_path / name, max_shard_size="5KB")
        old = {path.name: path.read_bytes() for path in (tmp_path / name).glob("model-0*")}
        llama(tmp_path / name, seed)  # now in one file; the index stays, and so do its files
        for file, data in old.items():
            (tmp_path / name / file).write_bytes(data)
        restored(tmp_path / name, lambda tensors: None)
        copy = {f"layers.{key}": tensor for key, tensor in load_file(tmp_path / name / "model.safetensors").items()}
        save_file(copy, tmp_path / name / "consolidated.safetensors")
    assert (tmp_path / "a/model.safetensors.index.json").is_file()
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab"]
    holds_the_same(tmp_path / "a", models[0])
    merge_models([tmp_path / "a", tmp_path / "b"], tmp_path / "out", Linear())
    mean = sum(model.lm_head.weight for model in models) / 2
    torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors")[HEAD], mean)


def test_an_index_whose_file_is_gone_is_refused(tmp_path: Path) -> None:
    llama(tmp_path / "a").save_pretrained(tmp_path / "a", max_shard_size="5KB")
    (tmp_path / "a/model.safetensors").unlink(missing_ok=True)
    min((tmp_path / "a").glob("model-0*")).unlink()
    with pytest.raises(ModelError, match=r"model-00001-of-\d+.safetensors: cannot be read"):
        load_folder(tmp_path / "a")


def test_positions_are_compared_in_whichever_form_they_are_said(tmp_path: Path) -> None:
    for name, theta in (("old", 1e4), ("new", 1e4), ("other", 1e6)):
        llama(tmp_path / name, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    configured(tmp_path / "old", rope_parameters="leave out", rope_theta=10000.0, rope_scaling=None)
    merge_models([tmp_path / "old", tmp_path / "new"], tmp_path / "out", Linear())
    with pytest.raises(ModelError, match=r"other: rope_parameters is .*1000000.0"):
        merge_models([tmp_path / "old", tmp_path / "other"], tmp_path / "wrong", Linear())


def test_vocabularies_without_tokenizer_json_are_compared(tmp_path: Path) -> None:
    ends = {key: "<e>" for key in ("eos_token", "bos_token", "unk_token")}
    words = ["<e>", *"abcdefg"]
    for name, order in (("a", words), ("same", words), ("other", [words[0], *reversed(words[1:])])):
        llama(tmp_path / name)
        vocabulary = {word: number for number, word in enumerate(order)}
        (tmp_path / name / "vocab.json").write_text(json.dumps(vocabulary, indent=1 if name == "same" else None))
        (tmp_path / name / "merges.txt").write_text("#version: 0.2\n")
        table = {"tokenizer_class": "GPT2Tokenizer", **ends}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(table))
    merge_models([tmp_path / "a", tmp_path / "same"], tmp_path / "out", Linear())
    with pytest.raises(ModelError, match="other: its tokenizer has other tokens"):
        merge_models([tmp_path / "a", tmp_path / "other"], tmp_path / "wrong", Linear())


def test_what_is_no_plain_model_is_refused(tmp_path: Path) -> None:
    llama(tmp_path / "a")
    (tmp_path / "a/adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter beside a model"):
        load_folder(tmp_path / "a")
    (tmp_path / "a/adapter_config.json").unlink()
    configured(tmp_path / "a", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match="are quantised"):
        load_folder(tmp_path / "a")


def test_experts_that_are_stored_apart_are_counted_as_they_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2))
    model.save_pretrained(tmp_path)
    assert len(checked_folder(tmp_path).stored) > len(model.state_dict())  # one file entry an expert
    holds_the_same(tmp_path, model)
    restored(tmp_path, lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"))
    with pytest.raises(ModelError, match=r"input_layernorm.weight is missing"):
        load_folder(tmp_path)


def test_a_configuration_of_countless_parts_is_refused_before_they_are_made(tmp_path: Path) -> None:
    llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, said in (
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, at most 1000"),
        ({"text_config": {"n_layer": 1001}}, "n_layer = 1001"),
        ({"parts": [{"base": {"n_layer": 1001}}]}, "n_layer = 1001"),
        ({"parts": [{"n_layer": 900}] * 9}, "n_layer = 900, at most 1000"),
        ({"num_local_experts": 10**6}, "num_local_experts"),
        ({"num_labels": 10**10}, "num_labels"),
        ({"hidden_size": 1 << 40, "intermediate_size": 1 << 40}, "cannot be loaded"),
        ({"max_position_embeddings": "long"}, "cannot be loaded|context of 'long'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=said):
            checked_folder(tmp_path)


def test_layers_that_only_the_configurations_class_counts(tmp_path: Path) -> None:
    config = {"model_type": "nemotron_h", "hybrid_override_pattern": "M" * 3000, "vocab_size": 8, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="num_hidden_layers = 3000, at most 1000"):
        checked_folder(tmp_path)


def test_a_link_in_a_strangers_folder_fetches_nothing_of_mine(tmp_path: Path) -> None:
    own, model, out = tmp_path / "own", tmp_path / "model", tmp_path / "out"
    for folder in (own, model, out):
        folder.mkdir()
    (own / "secret").write_text("mine")
    (model / "LICENSE").symlink_to("../own/secret")
    with pytest.raises(ModelError, match="a link to another file"):
        copy_tokenizer(model, out)
    assert not (out / "LICENSE").exists()


def test_links_to_shared_files_are_followed(tmp_path: Path) -> None:
    cached, blobs, out = (tmp_path / place for place in ("snapshots/1", "blobs", "out"))
    for folder in (cached, blobs, out):
        folder.mkdir(parents=True)
    (blobs / "ab12").write_text("MIT")
    (blobs.parent / "merges.txt").write_text("a b")
    (cached / "merges.txt").symlink_to("../../merges.txt")  # of the same name: folders that share their files
    (cached / "LICENSE").symlink_to("../../blobs/ab12")
    copy_tokenizer(cached, out)
    assert (out / "LICENSE").read_text() == "MIT" and (out / "merges.txt").read_text() == "a b"
