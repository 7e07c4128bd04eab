"""Text from a network."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from potluck.corpus.tokenizer import Vocabulary


def generate(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> str:
    """The prompt's continuation, up to ``max_tokens`` tokens or one of the vocabulary's ``stops``.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_p: Draw from the likeliest tokens that together have this probability.
        seed: The same seed gives the same text.
    """
    context = vocabulary.prompt(prompt)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    settings = GenerationConfig(
        max_new_tokens=max_tokens,
        eos_token_id=sorted(vocabulary.stops),
        pad_token_id=vocabulary.end_of_text,
        **sampling,
    )
    torch.manual_seed(seed)
    model.eval()
    tokens = torch.tensor([context], device=model.device)
    with torch.inference_mode():
        output = cast(Any, model).generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return str(vocabulary.tokenizer.decode(output[0, len(context) :].tolist()))
