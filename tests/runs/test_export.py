"""What leaves us is what was trained."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import Potluck, Tables

SHAPES: dict[str, Any] = {
    "llama": {"layers": 1, "width": 32, "heads": 2, "feedforward": 64, "context": 64},
    "qwen3": {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "feedforward": 64, "context": 64,
              "qk_norm": True, "tied": False},
}  # fmt: skip
TOKENIZERS = {"llama": {"kind": "bytes"}, "qwen3": {"kind": "bpe", "vocab_size": 300}}
TEXT = "the river ran under the bridge, ÄÖ 橋 <|endoftext|>\n\tand on"


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_exported_model_is_the_trained_one(potluck: Potluck, tables: Tables, tmp_path: Path, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from potluck.corpus.tokenizer import load_vocabulary
    from potluck.embedded import prepare
    from potluck.recipe import load_recipe
    from potluck.records.checkpoint import load_checkpoint

    potluck("train", potluck.recipe(tables, model=SHAPES[kind], tokenizer=TOKENIZERS[kind]), "--set",
            "records.folder=run")  # fmt: skip
    run = tmp_path / "run"
    trained = prepare(load_recipe(run / "recipe.toml"), lambda _: None).network
    trained.flat.vector.copy_(load_checkpoint(run / "checkpoints").parts["shared"]["theta"])
    exported = AutoModelForCausalLM.from_pretrained(run / "model")
    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = trained.model.eval()(input_ids=tokens).logits, exported(input_ids=tokens).logits
    assert float((ours - theirs).abs().max()) <= 1e-5

    vocabulary, tokenizer = load_vocabulary(run / "tokenizer"), AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == vocabulary.tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_token_id == vocabulary.end_of_text == exported.generation_config.eos_token_id
    assert (run / "model" / "README.md").exists() and (run / "model" / "recipe.toml").exists()


def test_an_exported_model_can_be_trained_further(potluck: Potluck, tables: Tables, done: Path) -> None:
    own = {key: value for key, value in tables.items() if key != "tokenizer"}
    recipe = potluck.recipe(own, model={"path": str(done / "model")}, rounds={"count": 1, "local_steps": 1})
    assert potluck("check", recipe, "--json").result["parameters"] == 18_560
    before = potluck("evaluate", done, "--json").result["union"]["bits_per_byte"]
    after = potluck("train", recipe, "--set", "records.folder=further", "--json").result["bits_per_byte"]
    assert after == pytest.approx(before, abs=0.3)
    potluck("generate", "further/model", "--max-tokens", 2)


def test_an_export_of_an_earlier_round(potluck: Potluck, done: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from potluck.records.checkpoint import load_checkpoint

    potluck("export", done, "--to", "six", "--round", 6)
    exported = load_file(tmp_path / "six" / "model.safetensors")
    theta = load_checkpoint(done / "checkpoints", 6).parts["shared"]["theta"]
    assert sum(tensor.numel() for tensor in exported.values()) == theta.numel()
    assert sum(float(tensor.double().sum()) for tensor in exported.values()) == pytest.approx(
        float(theta.double().sum())
    )


def test_what_is_shown_to_others_says_nothing_of_this_machine(
    potluck: Potluck, tables: Tables, done: Path, texts: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home" / "ada lovelace"
    shutil.copytree(done / "model", home / "base")
    shutil.copytree(texts, home / "texts")
    people = [{"name": "ada", "source": {"path": str(home / "texts" / "ada")}},
              {"name": "bob", "source": {"path": str(home / "texts" / "bob"), "glob": "*.txt"}}]  # fmt: skip
    own = {key: value for key, value in tables.items() if key != "tokenizer"}
    recipe = potluck.recipe(own, model={"path": str(home / "base")}, participants=people,
                            data={**tables["data"], "shards": str(home / "shards")},
                            rounds={"count": 1, "local_steps": 1})  # fmt: skip
    run = home / "run"
    potluck("train", recipe, "--set", f"records.folder={run}")
    shown = [path for path in (run / "model").rglob("*") if path.is_file()] + [*run.glob("report.*")]
    assert len(shown) > 6
    assert [str(path) for path in shown if b"lovelace" in path.read_bytes()] == []
    exported = tomllib.loads((run / "model" / "recipe.toml").read_text())
    assert exported["model"]["path"] == "base"
    assert [p["source"]["path"] for p in exported["participants"]] == ["ada", "bob"]
    assert 'base_model: "base"' in (run / "model" / "README.md").read_text()
    assert str(home / "texts" / "ada") in (run / "recipe.toml").read_text()  # the run itself goes on from it


def test_a_base_that_was_moved_is_asked_for_by_its_new_place(
    potluck: Potluck, tables: Tables, done: Path, tmp_path: Path
) -> None:
    """The run's recipe may name it: where a base lies decides nothing."""
    base, run = tmp_path / "base", tmp_path / "onward"
    shutil.copytree(done / "model", base)
    own = {key: value for key, value in tables.items() if key != "tokenizer"}
    recipe = potluck.recipe(own, model={"path": str(base)}, rounds={"count": 1, "local_steps": 1})
    potluck("train", recipe, "--set", f"records.folder={run}")
    base.rename(tmp_path / "moved")
    for words in (("evaluate", run), ("generate", run), ("check", recipe)):
        said = potluck(*words, code=5).err
        assert f"{base}" in said and "no such" in said and "was it moved?" in said, said
    place = run / "recipe.toml"
    place.write_text(place.read_text().replace(str(base), str(tmp_path / "moved")))
    potluck("generate", run, "--prompt", "x", "--max-tokens", 2)
