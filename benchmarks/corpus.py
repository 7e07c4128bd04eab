"""Text to tokens to batches.

Shard building is ``build_corpus`` from the source files of installed packages to shards on disk: reading, choosing
sides, hashing, encoding, writing, forcing to disk; the BPE is trained beforehand and timed on its own. Its peer is
`tokenizers` alone, encoding the same text already in memory in one batch; it uses all cores, as does building.
Drawing is timed inside the plain training loop of ``benchmarks.overhead``, where caches are as cold as they are.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import Measurement, main, measured, paired, seconds
from benchmarks.overhead import PlainLoop
from potluck.corpus.batches import Batches
from potluck.corpus.holdings import kept_documents
from potluck.corpus.shards import Corpus, build_corpus
from potluck.corpus.tokenizer import build_vocabulary
from potluck.recipe import Recipe
from potluck.recipe.load import parse_recipe

TOKENIZERS: tuple[dict[str, Any], ...] = ({"kind": "bytes"}, {"kind": "bpe", "vocab_size": 2048})


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured: bytes of text per participant, pairs of builds, local steps."""

    text_bytes: int
    builds: int
    steps: int
    packages: tuple[str, ...] = ("stdlib", "torch", "transformers", "sympy")
    model: tuple[tuple[str, Any], ...] = (("preset", "tiny"),)


SIZES = {
    "short": Size(text_bytes=500_000, builds=3, steps=60),
    "full": Size(text_bytes=5_000_000, builds=7, steps=300),
}


@dataclass
class TimedBatches:
    """Batches that know how long each draw took."""

    batches: Batches
    times: list[float] = field(default_factory=list)

    def draw(self, cursor: int, count: int) -> np.ndarray:
        drawn: list[np.ndarray] = []
        self.times.append(seconds(lambda: drawn.append(self.batches.draw(cursor, count))))
        return drawn[0]


def measure(size: Size) -> list[Measurement]:
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for tokenizer in TOKENIZERS:
            recipe = _recipe(size, tokenizer, scratch)
            results += _building(recipe, size.builds)
        return [*results, *_drawing(recipe, build_corpus(recipe), size.steps)]


def _recipe(size: Size, tokenizer: dict[str, Any], folder: str) -> Recipe:
    caps = {"train_bytes": size.text_bytes, "validation_bytes": size.text_bytes // 10}
    sources = [{"name": p, "source": {"package": p, "order": "shuffled"}} for p in size.packages]
    return parse_recipe(
        {
            "data": {**caps, "shards": folder},
            "participants": sources,
            "tokenizer": tokenizer,
            "model": dict(size.model),
            "compute": {"device": "cpu"},
        }
    )


def _building(recipe: Recipe, builds: int) -> list[Measurement]:
    kind, shards = recipe.tokenizer.kind, Path(recipe.data.shards)
    training = seconds(lambda: build_vocabulary(recipe))
    vocabulary = build_vocabulary(recipe)
    texts = [kept.document.text for kept in kept_documents(recipe)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def build() -> Corpus:
        for manifest in shards.glob("*/manifest.json"):
            shutil.rmtree(manifest.parent)
        return build_corpus(recipe)

    holdings = build().holdings.values()
    tokens = sum(len(shard.tokens) for holding in holdings for shard in (holding.train, holding.validation))
    encode = vocabulary.tokenizer.encode_batch_fast
    times = paired(build, lambda: encode(texts, add_special_tokens=False), builds)
    case, peer = f"shards of {megabytes:.1f} MB, {kind}", "tokenizers.encode_batch_fast in memory"
    results = [
        measured(case, [tokens / ours for ours, _ in times], "tokens/s"),
        measured(f"{case}: wall time", [ours / theirs for ours, theirs in times], "x encoding alone", peer=peer),
    ]
    if kind == "bpe":
        results.append(measured(f"training a BPE on {megabytes:.1f} MB", [training], "s"))
    return results


def _drawing(recipe: Recipe, corpus: Corpus, steps: int) -> list[Measurement]:
    local = recipe.local
    holding = next(iter(corpus.holdings.values()))
    batches = TimedBatches(Batches(holding.train.tokens, local.sequence_length, seed=0))
    loop = PlainLoop(recipe, corpus.vocabulary, batches)
    loop.train(2)  # warms up
    batches.times.clear()
    of_steps = [seconds(lambda: loop.train(1)) for _ in range(steps)]
    shares = [draw / step for draw, step in zip(batches.times, of_steps, strict=True)]
    case = f"drawing {local.batch_size} x {local.sequence_length} tokens"
    return [
        measured(case, [recipe.tokens_per_step / draw for draw in batches.times], "tokens/s"),
        measured(f"{case}: share of a local step", shares, "of its wall time", at_most=0.01, peer="plain PyTorch loop"),
    ]


if __name__ == "__main__":
    main(measure, SIZES)
