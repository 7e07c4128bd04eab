"""``C = E[k kᵀ]``: what the edited maps get from a text that shall stay as it is.

It is taken from the participant's own text, streamed, so that memory does not grow with it, and is kept layer by layer
under the hash of weights and text: nothing is downloaded, and a further edit of the same model computes nothing twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from potluck.aggregation.statistics import Statistics
from potluck.compose.base import Base
from potluck.corpus.tokenizer import pieces
from potluck.edit.layout import Layout, run_to
from potluck.errors import CorpusError, EditError
from potluck.files import storing
from potluck.tensors import load_tensors, read_header

KIND = "moments"
MOST_TOKENS = 1 << 17  # of a text; more change little, and cost a forward pass each
_SEQUENCES = 16  # in a batch


def key_moments(
    base: Base,
    layout: Layout,
    layers: Sequence[int],
    texts: Iterable[str],
    sequence_length: int = 128,
    most: int = MOST_TOKENS,
) -> Statistics:
    """``Σ k kᵀ`` of every layer over the tokens of the texts, float64, and how many tokens there were.

    An attention sink, such as a text's first token, has a key hundreds of times as long as others. It stays in the sum,
    so that edits leave it alone; what is set by the sum (`potluck.edit.closed_form`) goes by what most features and
    directions have, which it does not touch.

    Args:
        texts: Documents; read once, one after the other.
        most: Tokens that are read; the others are left out.

    Raises:
        CorpusError: The text is shorter than one sequence.
    """
    sequence_length = min(sequence_length, getattr(base.model.config, "max_position_embeddings", sequence_length))
    batches = islice(_batches(base, texts, sequence_length), max(1, most // (_SEQUENCES * sequence_length)))
    sums, tokens = squared_keys(base, layout, layers, batches)
    if not tokens:
        raise CorpusError(f"the text is shorter than one sequence of {sequence_length} tokens")
    return Statistics(KIND, {name_of(layout, layer): total for layer, total in sums.items()}, tokens, base.content_hash)


def squared_keys(
    base: Base, layout: Layout, layers: Sequence[int], batches: Iterable[Tensor]
) -> tuple[dict[int, Tensor], int]:
    """``Σ k kᵀ`` of every layer, ``(d_in, d_in)`` in float64, over batches of token ids ``(B, T)``; how many tokens."""
    sums = {layer: torch.zeros(layout.d_in, layout.d_in, dtype=torch.float64) for layer in layers}
    tokens = 0

    def take(layer: int, keys: Tensor, output: Tensor) -> None:
        flat = keys.flatten(0, 1).double()  # products in fp32 are off by more than small eigenvalues beside a sink's
        sums[layer] += (flat.T @ flat).cpu()

    maps = {layer: layout.map(layer) for layer in layers}
    with torch.inference_mode():
        for batch in batches:
            run_to(layout, maps, take, input_ids=batch.to(base.model.device))
            tokens += batch.numel()
    return sums, tokens


def moment_of(moments: Statistics, base_hash: str, layout: Layout, layer: int) -> Tensor:
    """``C`` of a layer, ``(d_in, d_in)``.

    Raises:
        EditError: They are of another model or kind, do not have this layer, or are no sum of squares.
    """
    tensor = moments.tensors.get(name_of(layout, layer))
    if (moments.kind, moments.base_hash) != (KIND, base_hash):
        raise EditError(f"{moments.kind} of model {moments.base_hash[:12]}, not the key moments of {base_hash[:12]}")
    if tensor is None or tensor.shape != (layout.d_in, layout.d_in):
        raise EditError(f"the key moments have no matrix of {layout.d_in} x {layout.d_in} for layer {layer}")
    if not torch.isfinite(tensor).all() or not (tensor.diagonal() >= 0).all():
        raise EditError(f"the key moments of layer {layer} are no sum of squares")
    return tensor.double() / moments.count


def kept_moments(
    base: Base,
    layout: Layout,
    layers: Sequence[int],
    texts: Sequence[str],
    folder: Path,
    sequence_length: int = 128,
    most: int = MOST_TOKENS,
) -> Statistics:
    """As `key_moments`, each layer kept in a file of its own by the hash of weights, map, text and settings.

    Raises:
        CorpusError: The text is shorter than one sequence.
        StorageError: The folder cannot be written.
    """
    digest = hashlib.sha256(f"{KIND} 3 {base.content_hash} {sequence_length} {most}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    about = digest.hexdigest()
    files = {}
    for layer in layers:
        name = hashlib.sha256(f"{about} {name_of(layout, layer)}".encode()).hexdigest()
        files[layer] = folder / f"moments-{name[:32]}.safetensors"
    held = {layer: found for layer, path in files.items() if (found := _read(path)) is not None}
    missing = [layer for layer in layers if layer not in held]
    if missing:
        taken = key_moments(base, layout, missing, texts, sequence_length, most)
        for layer in missing:
            held[layer] = (taken.tensors[name_of(layout, layer)], taken.count)
            _write(files[layer], *held[layer])
    tensors = {name_of(layout, layer): held[layer][0] for layer in layers}
    return Statistics(KIND, tensors, held[layers[0]][1], base.content_hash)


def _read(path: Path) -> tuple[Tensor, int] | None:
    """A layer's sum and how many tokens it is of; nothing if it was not taken yet, or is damaged."""
    try:
        return load_tensors(path)["moment"], int(read_header(path).about["tokens"])
    except (OSError, KeyError, ValueError):
        return None


def _write(path: Path, moment: Tensor, tokens: int) -> None:
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"moment": moment}, partial, metadata={"tokens": str(tokens)})
        partial.replace(path)


def name_of(layout: Layout, layer: int) -> str:
    """Name of a layer's matrix among statistics."""
    return f"{layout.path(layer)}.moment"


def _batches(base: Base, texts: Iterable[str], sequence_length: int) -> Iterator[Tensor]:
    """Sequences of the texts, each begun by the end-of-text token; what is left at the end is dropped."""
    waiting: list[int] = []
    enough = _SEQUENCES * sequence_length
    for text in texts:
        waiting.append(base.vocabulary.end_of_text)
        for piece in pieces(text):
            waiting += base.vocabulary.tokenizer.encode(piece, add_special_tokens=False).ids
            while len(waiting) >= enough:
                yield torch.tensor(waiting[:enough]).view(_SEQUENCES, sequence_length)
                del waiting[:enough]
    rest = len(waiting) // sequence_length
    if rest:
        yield torch.tensor(waiting[: rest * sequence_length]).view(rest, sequence_length)
