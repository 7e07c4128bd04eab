"""How varied a model's longer texts are: an edited model that is damaged says one thing again and again.

The figure is ROME's and MEMIT's (arXiv 2202.05262): texts of 100 tokens, prompt and all, each token drawn from the five
likeliest; of the words of each, ``½ (⅔ H₂ + 4/3 H₃)`` with ``H_n`` the entropy of its n-grams in bits; the mean of
these, times 100. Healthy models have about 620.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from potluck.compose.base import Base
from potluck.edit.prompts import row, said

TOKENS = 100  # of one text
_TOP = 5  # tokens among which the next is drawn
_WORDS = re.compile(r"\w+|[^\w\s]")


def fluency(base: Base, prompts: Sequence[str], batch_size: int = 16, seed: int = 0) -> float:
    """Mean entropy of the texts that the model writes from prompts, in bits times 100; 0 without prompts."""
    texts = written(base, prompts, batch_size, seed)
    return 100 * sum(ngram_entropy(_WORDS.findall(text)) for text in texts) / max(1, len(texts))


def written(base: Base, prompts: Sequence[str], batch_size: int = 16, seed: int = 0) -> list[str]:
    """Texts of `TOKENS` tokens, each prompt and what the model draws after it; the batch size changes nothing."""
    found = [""] * len(prompts)
    lengths: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        lengths.setdefault(len(row(base.vocabulary, prompt).ids), []).append(place)
    for length, places in lengths.items():
        draws = [torch.Generator().manual_seed(seed * 1_000_003 + place) for place in places]

        def choose(logits: Tensor, rows: Sequence[int], draws: Sequence[torch.Generator] = draws) -> Tensor:
            top = logits.topk(min(_TOP, logits.shape[-1]))
            parts = top.values.softmax(-1).cumsum(-1).cpu()
            drawn = torch.stack([torch.rand((), generator=draws[i]) for i in rows])
            chosen = (parts < drawn[:, None]).sum(-1, keepdim=True).clamp(max=parts.shape[-1] - 1)
            return top.indices.gather(-1, chosen.to(top.indices.device))

        some = [prompts[place] for place in places]
        for place, answer in zip(places, said(base, some, batch_size, max(1, TOKENS - length), choose), strict=True):
            found[place] = f"{prompts[place]} {answer.text}"
    return found


def ngram_entropy(words: Sequence[object]) -> float:
    """``½ (⅔ H₂ + 4/3 H₃)``, H_n the entropy of a text's n-grams in bits: low where it repeats itself."""
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[object], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0
