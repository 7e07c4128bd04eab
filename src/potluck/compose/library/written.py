"""The text that a base writes for its library's yardstick: as much as is affordable, in pieces that are kept.

A large base writes slowly, so each piece lies in the library as soon as it is written, and whoever stopped goes on
from there. Every piece has a seed of its own: where one stopped changes nothing. A piece that is damaged, or of another
base, is written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from transformers import GenerationConfig

from potluck.compose.base import Base
from potluck.compose.effect import affordable
from potluck.compose.library.storage import Storage
from potluck.compose.library.tensors import packed, unpacked
from potluck.compose.training import placed
from potluck.errors import ModelError
from potluck.recipe.seeds import seed_of

FOLDER = "begun"
_OPERATIONS, _FEWEST, _MOST = 2.5e12, 64, 512  # of all windows: a minute on one CPU core
_AT_ONCE, _FEW_AT_ONCE, _MANY_AT_ONCE = 1.3e12, 16, 128  # of a piece

Say = Callable[[str], None]


def written_by(
    base: Base, window: int, device: str, seed: int, keep: Storage | None = None, say: Say = lambda text: None
) -> np.ndarray:
    """Windows that the base writes, each from nothing, as one stream of token ids.

    There are 512, or fewer of a large base: what 2.5e12 operations pay for, but 64 at least.

    Args:
        seed: Decides what is written.
        keep: Where pieces lie until `forget` is called.
        say: Told how far it is.

    Raises:
        StorageError: ``keep`` cannot be read or written.
    """
    count = affordable(base.model, window, _OPERATIONS, _FEWEST, _MOST)
    at_once = affordable(base.model, window, _AT_ONCE, _FEW_AT_ONCE, _MANY_AT_ONCE)
    sizes = [min(at_once, count - first) for first in range(0, count, at_once)]
    written: list[np.ndarray] = []
    for number, size in enumerate(sizes, 1):
        about = {"base_hash": base.content_hash, "seed": seed, "window": window, "windows": size, "piece": number}
        tokens = None if keep is None else _kept(keep, about, base)
        if tokens is None:
            say(f"the base writes text of its own, {size * window} tokens: part {number} of {len(sizes)}")
            tokens = _piece(base, size, window, device, seed_of(seed, "yardstick", number))
            if keep is not None:
                facts = {**about, "sha256": _digest(tokens)}
                keep.write(_name(about), packed({"tokens": torch.from_numpy(tokens.astype(np.int32))}, facts))
        written.append(tokens)
    return np.concatenate(written)


def forget(keep: Storage) -> None:
    """Remove all pieces.

    Raises:
        StorageError: They cannot be listed or removed.
    """
    for name in keep.listed(FOLDER):
        keep.remove(name)


def _piece(base: Base, windows: int, window: int, device: str, seed: int) -> np.ndarray:
    network, end = placed(base.model, device), base.vocabulary.end_of_text
    begun = base.vocabulary.prompt("")
    settings = GenerationConfig(
        min_new_tokens=window, max_new_tokens=window, do_sample=True, top_k=0, pad_token_id=end, eos_token_id=None
    )
    start = torch.tensor([begun] * windows, device=network.device)
    torch.manual_seed(seed)
    with torch.no_grad():
        model = cast(Any, network.model)
        whole = model.generate(start, attention_mask=torch.ones_like(start), generation_config=settings)
    return np.asarray(whole[:, len(begun) :].flatten().cpu().numpy())


def _kept(keep: Storage, about: dict[str, Any], base: Base) -> np.ndarray | None:
    """A piece that was written before, if it is whole and the one that is wanted."""
    count = about["windows"] * about["window"]
    content = keep.read(_name(about), 8 * count + (1 << 16))
    if content is None:
        return None
    try:
        tensors, facts = unpacked(content, _name(about))
    except ModelError:
        return None
    tokens = tensors.get("tokens", torch.zeros(0)).long().numpy()
    fits = tokens.shape == (count,) and tokens.min() >= 0 and tokens.max() < base.model.config.vocab_size
    return tokens if fits and facts == {**about, "sha256": _digest(tokens)} else None


def _name(about: dict[str, Any]) -> str:
    return f"{FOLDER}/{about['base_hash'][:16]}-{about['seed']}-{about['piece']}.safetensors"


def _digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int64).data).hexdigest()
