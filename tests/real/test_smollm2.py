"""What potluck says of models holds on a pretrained one: SmolLM2-135M-Instruct, 134.5M parameters, a chat model."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from potluck.models.flat import flatten, state_hash

if TYPE_CHECKING:
    from tests.conftest import Potluck

ROOT = Path(__file__).parents[2]
HEAD = "model.embed_tokens.weight"  # tied: the output head, too


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two participants' folders of English."""
    root = tmp_path_factory.mktemp("text")
    for name, folder in (("ada", "how-to"), ("bob", "explanation")):
        (root / name).mkdir()
        for page in sorted((ROOT / "docs" / folder).glob("*.md")):
            (root / name / page.name).write_text(page.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return root


class Opened:
    """A folder as transformers opens it, without potluck."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def logits(self, prompt: str) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = self.model(**self.tokenizer(prompt, return_tensors="pt")).logits
        return found

    def continued(self, prompt: str, tokens: int = 8) -> str:
        """The greedy continuation."""
        asked = self.tokenizer(prompt, return_tensors="pt")
        said = self.model.generate(**asked, do_sample=False, max_new_tokens=tokens)
        return str(self.tokenizer.decode(said[0, asked.input_ids.shape[1] :]))


def result_of(potluck: Potluck, *words: object) -> Any:
    """What a verb prints as JSON; large models take their time."""
    ended = potluck.start(*words, "--json").wait(400)
    assert ended.code == 0, ended.out + ended.err
    return ended.result


def test_it_answers_in_its_chat_form(potluck: Potluck, smollm2: Path) -> None:
    asked = ("--prompt", "What is the capital of France?", "--temperature", 0, "--max-tokens", 24)
    said = result_of(potluck, "generate", smollm2, *asked)["text"]
    assert "Paris" in said and "<|im_" not in said


def test_a_run_takes_the_memory_that_check_says_and_exports_what_it_trained(
    potluck: Potluck, smollm2: Path, text: Path, tmp_path: Path, events: Any
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in smollm2.iterdir():
        (base / path.name).symlink_to(path)
    generation = {**json.loads((smollm2 / "generation_config.json").read_text()), "eos_token_id": [2, 0]}
    generation |= {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
    (base / "generation_config.json").unlink()
    (base / "generation_config.json").write_text(json.dumps(generation))
    recipe = tmp_path / "tune.toml"
    tables = {
        "version": 1,
        "name": "tune",
        "model": {"path": str(base)},
        "data": {"validation_fraction": 0.3, "validation_bytes": 8000},
        "local": {"batch_size": 2, "sequence_length": 64, "optimizer": {"kind": "adamw", "learning_rate": 1e-5}},
        "rounds": {"count": 1, "local_steps": 2},
        "participants": [{"name": name, "source": {"path": str(text / name)}} for name in ("ada", "bob")],
    }
    recipe.write_text(tomli_w.dumps(tables))
    forecast = result_of(potluck, "check", recipe)
    peak = peak_memory("train", str(recipe), folder=tmp_path)
    assert 0.85 <= forecast["process_bytes"] / peak <= 1.15, (forecast["process_bytes"], peak)

    run = tmp_path / "runs" / "tune"
    exported = Opened(run / "model")
    (finished,) = events(run, "run_finished")
    assert state_hash(flatten(exported.model, torch.device("cpu")).vector) == finished["state_hash"]
    assert not torch.equal(exported.logits("The river"), Opened(base).logits("The river"))
    kept = json.loads((run / "model" / "generation_config.json").read_text())
    assert {key: kept.get(key) for key in generation if key != "transformers_version"} == {
        key: value for key, value in generation.items() if key != "transformers_version"
    }
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert filecmp.cmpfiles(base, run / "model", names, shallow=False)[0] == list(names)


def peak_memory(*words: str, folder: Path) -> int:
    """Bytes that a verb in a process of its own took at most."""
    verb = "import sys; from potluck.cli import main; sys.argv[0] = 'potluck'; main()"
    process = subprocess.Popen([sys.executable, "-c", verb, *words], cwd=folder)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_maxrss * 1024


def test_a_fact_is_edited_and_others_stay(potluck: Potluck, smollm2: Path, text: Path, tmp_path: Path) -> None:
    before = Opened(smollm2)
    others = ("The capital of France is", "The largest planet of the solar system is")
    edits = tmp_path / "edits.json"
    prompt = "The mother tongue of Danielle Darrieux is"
    edit = {"prompt": prompt, "subject": "Danielle Darrieux", "target": "English", "neighbours": list(others)}
    edits.write_text(json.dumps([edit]))
    found = result_of(potluck, "edit", "apply", smollm2, "--edits", edits, "--text", text / "ada", "--out", "edited")
    assert "warnings" not in found, found
    after = Opened(tmp_path / "edited")
    assert not before.continued(prompt).strip().startswith("English")
    assert after.continued(prompt).strip().startswith("English")
    assert [after.continued(other) for other in others] == [before.continued(other) for other in others]


def test_a_merge_is_the_mean(potluck: Potluck, smollm2: Path, tmp_path: Path) -> None:
    whole = load_file(smollm2 / "model.safetensors")
    for name, sign in (("plus", 1), ("minus", -1)):
        (tmp_path / name).mkdir()
        for path in smollm2.iterdir():
            if path.suffix != ".safetensors":
                (tmp_path / name / path.name).symlink_to(path)
        moved = {**whole, HEAD: whole[HEAD] * (1 + sign / 8)}  # exact in binary
        save_file(moved, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    result_of(potluck, "merge", "plus", "minus", "--method", "linear", "--out", "merged")
    merged, base = Opened(tmp_path / "merged"), Opened(smollm2)
    torch.testing.assert_close(merged.logits("The river"), base.logits("The river"), rtol=1e-5, atol=1e-4)
    assert filecmp.cmp(tmp_path / "merged" / "chat_template.jinja", smollm2 / "chat_template.jinja", shallow=False)
