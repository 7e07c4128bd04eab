"""Text from a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from potluck.corpus.tokenizer import Vocabulary
from potluck.errors import ModelError

TEMPERATURE, TOP_P = 0.8, 0.95  # where neither the user nor the model says one
_KEPT = ("top_k", "min_p", "typical_p", "repetition_penalty")  # of a model that says how it samples


def generate(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    context: Sequence[int],
    *,
    max_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """What follows on a context, up to ``max_tokens`` tokens, one of the vocabulary's ``stops``, or the model's limit.

    Args:
        context: Token ids, such as ``vocabulary.prompt(text)`` or `chat_turn`.
        temperature: 0 takes the likeliest token each time. If left out, the model's own where its generation config
            samples, else 0.8.
        top_p: Draw from the likeliest tokens that together have this probability. If left out, the model's own where
            its generation config samples, else 0.95.
        seed: The same seed gives the same text.

    Raises:
        ModelError: The context leaves no room for a token.
    """
    settings = GenerationConfig(
        max_new_tokens=min(max_tokens, room(model, context)),
        eos_token_id=sorted(vocabulary.stops),
        pad_token_id=vocabulary.end_of_text,
        **sampling(model.generation_config, temperature, top_p),
    )
    torch.manual_seed(seed)
    model.eval()
    tokens = torch.tensor([list(context)], device=model.device)
    with torch.inference_mode():
        output = cast(Any, model).generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return str(vocabulary.tokenizer.decode(output[0, len(context) :].tolist()))


def room(model: PreTrainedModel, context: Sequence[int]) -> int:
    """How many tokens a model may say after a context.

    Raises:
        ModelError: None.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    left = (limit or 1 << 30) - len(context)
    if left < 1:
        hint = f"shorten the prompt to {limit - 1} tokens at most" if limit else ""
        raise ModelError(f"the prompt has {len(context)} tokens, the model's context is {limit}", hint)
    return left


def sampling(own: GenerationConfig | None, temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """How tokens are drawn, as `transformers` takes it: as asked for, else as the model's own config says."""
    says = own is not None and bool(own.do_sample)
    if temperature is None:
        temperature = _first(own.temperature, 1.0) if says and own else TEMPERATURE
    if top_p is None:
        top_p = _first(own.top_p, 1.0) if says and own else TOP_P
    if not temperature:
        return {"do_sample": False}
    kept = {name: getattr(own, name, None) for name in _KEPT} if says else {}
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return drawn | {name: value for name, value in kept.items() if value is not None}


def chat_turn(folder: Path, text: str) -> list[int]:
    """Token ids of a user's turn and the beginning of the answer, by the chat template of a tokenizer folder.

    Special strings in the template, and in the text, are special tokens here.

    Raises:
        ModelError: The template cannot be used.
    """
    turn = [{"role": "user", "content": text}]
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # templates and their sandbox raise many types
        hint = "--raw continues the prompt without it"
        raise ModelError(f"{folder}: its chat template cannot be used ({error})", hint) from error
    return list(cast(Sequence[int], ids))


def _first(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else float(value)
