"""Text from a network."""

from __future__ import annotations

from typing import Any, cast

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    end_of_text: int,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> str:
    """The prompt's continuation, up to ``max_tokens`` tokens or the end of a document.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_p: Draw from the likeliest tokens that together have this probability.
        seed: The same seed gives the same text.
    """
    context = [end_of_text, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    settings = GenerationConfig(
        max_new_tokens=max_tokens, eos_token_id=end_of_text, pad_token_id=end_of_text, **sampling
    )
    torch.manual_seed(seed)
    model.eval()
    tokens = torch.tensor([context], device=model.device)
    with torch.inference_mode():
        output = cast(Any, model).generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return str(tokenizer.decode(output[0, len(context) :].tolist()))
