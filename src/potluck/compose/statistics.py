"""What a participant measures on its own text, so that its adapter can be merged by what matters to it.

``gram``: ``G = Σ x xᵀ`` over the inputs of each adapted linear map, for RegMean. ``fisher``: ``Σ g²`` and ``Σ x²`` over
its outputs' gradients and its inputs, for Fisher merging. Both are taken with the adapter at work, summed over all
tokens in float64, in the memory of their result. With fewer tokens than inputs a Gram matrix shows the span of these
inputs: who minds sends it into a masked sum only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from potluck.aggregation.statistics import Statistics
from potluck.compose.adapter import Adapter, Factors
from potluck.compose.base import Base
from potluck.compose.lora import attached
from potluck.errors import CorpusError, ModelError
from potluck.files import storing
from potluck.tensors import load_tensors, read_header

STATISTICS_FILE = "statistics.safetensors"
KINDS = ("gram", "fisher")
_FORMAT = "potluck-statistics-1"
_SEQUENCES = 8  # in a batch


def gram_statistics(base: Base, adapter: Adapter, stream: np.ndarray, sequence_length: int = 128) -> Statistics:
    """Gram matrices of the inputs of every map that the adapter adds to, ``PATH.gram``: ``(d_in, d_in)``.

    Args:
        stream: Token ids, ``(T,)``; what does not fill a sequence is left out.

    Raises:
        CorpusError: The text is shorter than one sequence.
        ModelError: The adapter was not trained on a model of this shape.
    """
    sums = {path: torch.zeros(2 * [f.down.shape[1]], dtype=torch.float64) for path, f in adapter.modules.items()}

    def take(path: str, x: Tensor, y: Tensor) -> None:
        inputs = x.flatten(0, -2).double()
        sums[path] += (inputs.T @ inputs).cpu()

    tokens = 0
    with attached(base.model, adapter), _watched(base.model, adapter, take), torch.inference_mode():
        for batch in _batches(stream, sequence_length):
            base.model(input_ids=batch.to(base.model.device), use_cache=False)
            tokens += batch.numel()
    return Statistics("gram", {f"{path}.gram": gram for path, gram in sums.items()}, tokens, base.content_hash)


def fisher_statistics(
    base: Base, adapter: Adapter, stream: np.ndarray, sequence_length: int = 128, seed: int = 0
) -> Statistics:
    """``PATH.rows``, ``Σ g²`` of each output, and ``PATH.columns``, ``Σ x²`` of each input, of every adapted map.

    g is the gradient of ``log p`` of tokens drawn from the model itself, as the Fisher information is defined.

    Args:
        stream: Token ids, ``(T,)``; what does not fill a sequence is left out.
        seed: Of the drawn tokens.

    Raises:
        CorpusError: The text is shorter than one sequence.
        ModelError: The adapter was not trained on a model of this shape.
    """
    rows = {path: torch.zeros(f.up.shape[0], dtype=torch.float64) for path, f in adapter.modules.items()}
    columns = {path: torch.zeros(f.down.shape[1], dtype=torch.float64) for path, f in adapter.modules.items()}

    def take(path: str, x: Tensor, y: Tensor) -> None:
        columns[path] += _sum_of_squares(x)
        y.register_hook(partial(take_gradient, path))

    def take_gradient(path: str, g: Tensor) -> None:
        rows[path] += _sum_of_squares(g)

    model, draw, tokens = base.model, torch.Generator().manual_seed(seed), 0
    model.requires_grad_(False)
    with attached(model, adapter), _watched(model, adapter, take):
        for batch in _batches(stream, sequence_length):
            entered = model.get_input_embeddings()(batch.to(model.device)).requires_grad_()
            logits = model(inputs_embeds=entered, use_cache=False).logits.float().flatten(0, 1)
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draw).flatten()
            torch.autograd.grad(cross_entropy(logits, drawn.to(logits.device), reduction="sum"), entered)
            tokens += batch.numel()
    sums = {f"{path}.rows": row for path, row in rows.items()} | {f"{p}.columns": c for p, c in columns.items()}
    return Statistics("fisher", sums, tokens, base.content_hash)


def save_statistics(statistics: Statistics, folder: Path) -> None:
    """Write ``statistics.safetensors`` beside an adapter, whole or not at all.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    facts = {"kind": statistics.kind, "count": str(statistics.count), "base_hash": statistics.base_hash}
    partial = folder / f".{STATISTICS_FILE}.partial"
    with storing(folder / STATISTICS_FILE):
        try:
            tensors = {name: tensor.contiguous() for name, tensor in statistics.tensors.items()}
            save_file(tensors, partial, metadata={"format": _FORMAT, **facts})
            partial.replace(folder / STATISTICS_FILE)
        finally:
            partial.unlink(missing_ok=True)


def load_statistics(path: Path, adapter: Adapter) -> Statistics:
    """Statistics of an adapter, from a file or from beside the adapter in its folder.

    Raises:
        ModelError: They are missing or damaged, or not those of this adapter's maps and base.
    """
    path = path / STATISTICS_FILE if path.is_dir() else path
    try:
        stored, facts = read_header(path)
        kind, count = facts.get("kind", ""), facts.get("count", "")
        if facts.get("format") != _FORMAT or kind not in KINDS or not (count.isdecimal() and len(count) < 16):
            raise ModelError(f"{path}: not the statistics of an adapter")
        expected = _forms(kind, adapter)
        for name in sorted(expected.keys() ^ stored.keys()):
            raise ModelError(f"{path}: {name} is {'missing' if name in expected else 'not of this adapter'}")
        for name, form in expected.items():
            if stored[name].shape != form:
                raise ModelError(f"{path}: {name} has another shape than the adapter")
        tensors = load_tensors(path)
    except (OSError, ValueError) as error:
        hint = "its participant writes it with potluck.compose.statistics"
        raise ModelError(f"{path}: cannot be read ({error})", hint) from None
    _check_values(path, kind, tensors)
    known = adapter.about.get("base_hash", facts.get("base_hash"))
    if facts.get("base_hash") != known or not int(count):
        raise ModelError(f"{path}: measured on another base than the adapter's")
    return Statistics(kind, tensors, int(count), str(known))


def _forms(kind: str, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    def forms(path: str, factors: Factors) -> Mapping[str, tuple[int, ...]]:
        d_out, d_in = factors.up.shape[0], factors.down.shape[1]
        if kind == "gram":
            return {f"{path}.gram": (d_in, d_in)}
        return {f"{path}.rows": (d_out,), f"{path}.columns": (d_in,)}

    return {name: form for path, f in adapter.modules.items() for name, form in forms(path, f).items()}


def _check_values(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        squares = tensor.diagonal() if kind == "gram" else tensor
        if not (tensor.is_floating_point() and torch.isfinite(tensor).all() and (squares >= 0).all()):
            raise ModelError(f"{path}: {name} holds what no sum of squares can be")
        if kind == "gram" and not torch.allclose(tensor, tensor.T, rtol=1e-6, atol=1e-6 * float(squares.max())):
            raise ModelError(f"{path}: {name} is not symmetric")


def _batches(stream: np.ndarray, sequence_length: int) -> Iterator[Tensor]:
    count = len(stream) // sequence_length
    if not count:
        raise CorpusError(f"the text is shorter than one sequence of {sequence_length} tokens")
    rows = torch.from_numpy(stream[: count * sequence_length].astype(np.int64)).view(count, sequence_length)
    yield from rows.split(_SEQUENCES)


@contextmanager
def _watched(model: nn.Module, adapter: Adapter, take: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within, ``take`` is told the path, the input and the output of every adapted map, each time it computes."""

    def told(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda module, inputs, output: take(path, inputs[0], output)

    with ExitStack() as stack:
        for path in adapter.modules:
            stack.callback(model.get_submodule(path).register_forward_hook(told(path)).remove)
        yield


def _sum_of_squares(x: Tensor) -> Tensor:
    return x.detach().flatten(0, -2).double().square().sum(0).cpu()
