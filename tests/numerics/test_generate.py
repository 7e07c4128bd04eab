"""A model answers as its folder says: by its template, to every end that it names, within its context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoTokenizer

from potluck.compose.base import Base, load_base
from potluck.errors import ModelError
from potluck.local.generate import chat_turn, generate, sampling
from tests.numerics.test_exports import base_of

if TYPE_CHECKING:
    from tests.conftest import Potluck


def always(base: Base, token: int) -> list[int]:
    """Let a model say one token whatever comes before, and count how often it is asked."""
    asked: list[int] = []
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            parameter.fill_(float("embed_tokens" in name or "norm" in name))
        base.model.get_parameter("lm_head.weight")[token] = 1.0
    base.model.register_forward_hook(lambda *_: asked.append(1))
    return asked


@pytest.mark.parametrize(("token", "said"), [(70, "g" * 9), (256, ""), (258, "")])
def test_every_named_end_ends_it(token: int, said: str, tmp_path: Path) -> None:
    base = load_base(base_of(tmp_path / "base", "untied", torch.float32))
    letters = AutoTokenizer.from_pretrained(tmp_path / "base").convert_ids_to_tokens(70)
    asked = always(base, token)
    text = generate(base.model, base.vocabulary, base.vocabulary.prompt("hello"), max_tokens=9, temperature=0)
    assert text == said.replace("g", letters) and len(asked) == max(1, len(said))


def test_it_ends_at_the_context(tmp_path: Path) -> None:
    base = load_base(base_of(tmp_path / "base", "gpt2", torch.float32))
    said = generate(base.model, base.vocabulary, [70] * 60, max_tokens=30, temperature=0)
    assert len(said) <= 4
    with pytest.raises(ModelError, match="the prompt has 64 tokens, the model's context is 64"):
        generate(base.model, base.vocabulary, [70] * 64, max_tokens=30, temperature=0)


def test_a_turn_s_markup_is_special_tokens(tmp_path: Path) -> None:
    base = load_base(base_of(tmp_path / "base", "tied", torch.float32))
    turn = chat_turn(tmp_path / "base", "hi")
    words = base.vocabulary.tokenizer.encode("user\nhi", add_special_tokens=False).ids
    line = base.vocabulary.tokenizer.encode("\n", add_special_tokens=False).ids
    assert turn == [257, *words, 258, *line]
    (tmp_path / "base/chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(ModelError, match="chat template cannot be used"):
        chat_turn(tmp_path / "base", "hi")


def test_sampling_is_the_model_s_own_unless_asked_for(tmp_path: Path) -> None:
    own = load_base(base_of(tmp_path / "base", "tied", torch.float32)).model.generation_config
    drawn: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 7}
    assert sampling(own, None, None) == drawn
    assert sampling(own, 0.3, None) == {**drawn, "temperature": 0.3}
    assert sampling(own, 0, None) == {"do_sample": False}
    assert own is not None
    own.do_sample = False
    assert sampling(own, None, None) == {**drawn, "temperature": 0.8, "top_p": 0.95, "top_k": 0}


def test_the_verb_says_what_a_prompt_is_taken_for(potluck: Potluck, tmp_path: Path) -> None:
    base_of(tmp_path / "chat", "tied", torch.float32)
    done = potluck("generate", "chat", "--prompt", "hi", "--max-tokens", 60, "--json")
    assert set(done.result) == {"prompt", "text"}
    assert "a turn of a chat" in done.err and "leaves room for 54, not 60" in done.err
    plain = potluck("generate", "chat", "--prompt", "hi", "--max-tokens", 2, "--raw")
    assert plain.out.startswith("hi") and "chat" not in plain.err
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja"):
        (tmp_path / "chat" / name).unlink()
    config = json.loads((tmp_path / "chat/tokenizer_config.json").read_text())
    (tmp_path / "chat/tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    assert "--raw has no effect" in potluck("generate", "chat", "--raw", code=3).err
