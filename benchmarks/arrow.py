"""Arrow with 16 adapters, of which every token goes through 4, beside PEFT's Arrow on the same model.

**Generation.** Tokens a second of a greedy ``generate``: a prompt and new tokens, one at a time, with a cache. Both in
turn in one process; what is judged is how many times as many ours writes.

**Prefill.** Tokens a second of one pass over as many prompts as there are in a batch, four times as long.

**Equality.** The largest difference between the logits of both for one prompt. The adapters are random, with singular
values that fall by half from one to the next, so that the power iteration by which PEFT finds a prototype ends where
the singular vector is.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks._measure import Measurement, main, measured, paired
from potluck.compose.adapter import Adapter, Factors, save_adapter
from potluck.compose.lora import linear_maps, sizes
from potluck.compose.routing.arrow import Arrow, arrow

ADAPTERS, TOP_K, VOCABULARY = 16, 4, 512
TARGET = 1.5


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        widths: d of the models; the feed-forward is 4 d wide, a head 64.
        layers: Of each model; adapters are on all 7 linear maps of a layer.
        ranks: Of all adapters.
        batches: Texts that are written side by side.
        prompt: Tokens that are there before.
        new: Tokens that are written.
        runs: Runs of each.
    """

    widths: tuple[int, ...]
    layers: int
    ranks: tuple[int, ...]
    batches: tuple[int, ...]
    prompt: int
    new: int
    runs: int


SIZES = {
    "short": Size(widths=(256,), layers=6, ranks=(16,), batches=(1, 8), prompt=32, new=16, runs=3),
    "full": Size(widths=(256, 1024), layers=6, ranks=(8, 16), batches=(1, 8), prompt=32, new=32, runs=5),
}


def measure(size: Size) -> list[Measurement]:
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # PEFT's own
        logging.getLogger("transformers").setLevel(logging.ERROR)
        return [
            result
            for width in size.widths
            for rank in size.ranks
            for result in _beside_peft(size, width, rank, Path(folder) / f"{width}-{rank}")
        ]


def model_of(width: int, layers: int, context: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=context,
    )
    return LlamaForCausalLM(config).eval()


def adapters_of(model: PreTrainedModel, rank: int) -> dict[str, Adapter]:
    draw = torch.Generator().manual_seed(0)
    return {f"p{number}": _adapter(model, rank, draw) for number in range(ADAPTERS)}


def _adapter(model: PreTrainedModel, rank: int, draw: torch.Generator) -> Adapter:
    modules, root = {}, 2.0 ** (-torch.arange(rank) / 2)
    for path, module in linear_maps(model).items():
        d_in, d_out = sizes(module)
        down = torch.linalg.qr(torch.randn(d_in, rank, generator=draw))[0].T
        up = torch.linalg.qr(torch.randn(d_out, rank, generator=draw))[0]
        modules[path] = Factors(root[:, None] * down, up * root)
    return Adapter(modules)


def peft_arrow(model: PreTrainedModel, adapters: Mapping[str, Adapter], folder: Path) -> Any:
    """The same model and adapters, routed by PEFT."""
    from peft import ArrowConfig, create_arrow_model

    for name, adapter in adapters.items():
        save_adapter(adapter, folder / name)
    paths = [str(folder / name) for name in adapters]
    return create_arrow_model(copy.deepcopy(model), paths, ArrowConfig(top_k=TOP_K)).eval()


def write(model: Any, tokens: Tensor, new: int) -> Tensor:
    settings = GenerationConfig(do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    found: Tensor = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return found


def read(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _beside_peft(size: Size, width: int, rank: int, folder: Path) -> Iterator[Measurement]:
    model = model_of(width, size.layers, 4 * size.prompt + size.new)
    adapters = adapters_of(model, rank)
    theirs = peft_arrow(model, adapters, folder)
    draw = torch.Generator().manual_seed(1)
    what = f"d {width}, rank {rank}"
    with torch.inference_mode(), arrow(model, adapters, Arrow(top_k=TOP_K)):
        tokens = torch.randint(VOCABULARY, (1, size.prompt), generator=draw)
        apart = float((read(model, tokens) - read(theirs, tokens)).abs().max())
        yield measured(f"{what}: largest difference of logits", [apart], "", at_most=1e-5)
        for batch in size.batches:
            tokens = torch.randint(VOCABULARY, (batch, size.prompt), generator=draw)
            writing, reading = partial(write, tokens=tokens, new=size.new), partial(read, tokens=tokens.repeat(1, 4))
            name = f"{what}, batch {batch}"
            yield _compared(f"{name}: generation", batch * size.new, writing, model, theirs, size.runs, TARGET)
            yield _compared(f"{name}: prefill", 4 * tokens.numel(), reading, model, theirs, size.runs)


def _compared(
    name: str,
    tokens: int,
    work: Callable[[Any], Tensor],
    ours: Any,
    theirs: Any,
    runs: int,
    target: float | None = None,
) -> Measurement:
    work(ours), work(theirs)
    times = paired(partial(work, ours), partial(work, theirs), runs)
    rates = [tokens / median(kind) for kind in zip(*times, strict=True)]
    peer = f"PEFT {rates[1]:.4g} tokens/s, ours {rates[0]:.4g}"
    return measured(name, [peft / own for own, peft in times], "times PEFT's speed", at_least=target, peer=peer)


if __name__ == "__main__":
    main(measure, SIZES)
