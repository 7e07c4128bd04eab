"""What a base folder has, its export has, unless training changed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from potluck.compose.adapter import Adapter, Factors, save_adapter
from potluck.compose.merging.geometry import Linear
from potluck.compose.merging.models import merge_models
from potluck.models.build import load_folder
from potluck.models.export import save_like

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 7, "eos_token_id": [258, 256]}
AS_THEY_WERE = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("additional_chat_templates/tools.jinja", "LICENSE"),
)


def base_of(folder: Path, kind: str, dtype: torch.dtype) -> Path:
    """A chat model with all that such folders have."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 257, "eos_token_id": 258, "tie_word_embeddings": kind == "tied"}
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=16, n_layer=1, n_head=2, n_positions=64, **ends))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=260, **shape, max_position_embeddings=64, **ends))
    model.to(dtype).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if kind != "gpt2":  # the older form
        config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps({**config, "of_our_own": 3}))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text(TEMPLATE)
    (folder / "LICENSE").write_text("as you like")
    return folder


def has_all_of(folder: Path, base: Path) -> None:
    for name in AS_THEY_WERE:
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name
    stored, before = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    assert {key: tensor.dtype for key, tensor in stored.items()} == {key: t.dtype for key, t in before.items()}
    turn = [{"role": "user", "content": "hello"}]
    ours, theirs = (AutoTokenizer.from_pretrained(place).apply_chat_template(turn) for place in (folder, base))
    assert ours == theirs and ours["input_ids"][0] == 257
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [258, 256]


@pytest.mark.parametrize(("kind", "dtype"), [("tied", "bfloat16"), ("untied", "float32"), ("gpt2", "float16")])
def test_a_trained_export(potluck: Potluck, tables: Tables, tmp_path: Path, kind: str, dtype: str) -> None:
    base = base_of(tmp_path / "base", kind, getattr(torch, dtype))
    own = {key: value for key, value in tables.items() if key != "tokenizer"}
    recipe = potluck.recipe(own, model={"path": str(base)}, rounds={"count": 1, "local_steps": 1})
    potluck("train", recipe, "--set", "records.folder=run")
    has_all_of(tmp_path / "run/model", base)

    from potluck.embedded import prepare
    from potluck.recipe import load_recipe
    from potluck.records.checkpoint import load_checkpoint

    trained = prepare(load_recipe(tmp_path / "run/recipe.toml"), lambda _: None).network
    trained.flat.vector.copy_(load_checkpoint(tmp_path / "run/checkpoints").parts["shared"]["theta"])
    changed = 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(exported[name], tensor.to(getattr(torch, dtype))), name
        changed += not torch.equal(exported[name], before[name])
    assert changed


def test_what_is_written_is_what_is_held(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "tied", torch.float16)
    model = load_folder(base)
    place = model.model.norm.weight.data_ptr()
    with torch.no_grad():
        model.model.norm.weight += 1e-4
        model.model.embed_tokens.weight[0, 0] = 1e5  # float16 ends below
    (tmp_path / "out").mkdir()
    save_like(model, base, tmp_path / "out")
    assert model.model.norm.weight.data_ptr() == place
    for name, tensor in load_folder(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_merge_and_an_adapter_in_its_base(potluck: Potluck, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "untied", torch.bfloat16)
    other = base_of(tmp_path / "other", "untied", torch.bfloat16)
    (base / "experts.json").write_text("{}")  # a record of what was done to the base, not of the merge
    merge_models([base, other], tmp_path / "merged", Linear())
    has_all_of(tmp_path / "merged", base)
    assert not (tmp_path / "merged/experts.json").exists()
    path = "model.layers.0.mlp.down_proj"
    save_adapter(Adapter({path: Factors(torch.ones(1, 24), torch.ones(16, 1))}), tmp_path / "adapter")
    potluck("merge", "adapter", "--method", "sum", "--into-base", base, "--out", "whole")
    has_all_of(tmp_path / "whole", base)
