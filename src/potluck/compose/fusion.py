"""Several participants' frozen models in one folder, in which `potluck train` then trains the small head alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from potluck.corpus.tokenizer import Vocabulary, folder_vocabulary
from potluck.errors import CorpusError, ModelError, RecipeError
from potluck.files import appearing
from potluck.models.build import load_folder
from potluck.models.export import export_folder
from potluck.models.fused import AdaFusion, FusedConfig, FusedForCausalLM
from potluck.recipe.schema import TokenizerFolder

_MOST_WIDTH = 4096


def fuse_models(
    folders: Mapping[str, Path], out: Path, primary: str, width: int = 32, seed: int = 0
) -> Mapping[str, Any]:
    """Write a model folder in which several models are fused (`potluck.models.fused`).

    At first it predicts what the primary predicts, bit for bit. Train its head on text that the parts have not
    learnt: on their own text each is surer of itself than it deserves.

    Args:
        folders: Whose model lies where; models of any width, depth and kind, with one vocabulary.
        primary: Whose model the fusion begins as.
        width: The common width c of the head.
        seed: Decides the head's first projections.

    Returns:
        The folder, the names, and the parameters that learn and that are frozen.

    Raises:
        RecipeError: Fewer than two models, or a primary that is none of them.
        ModelError: A model cannot be used, or their vocabularies differ.
        StorageError: There is something at ``out``, or it cannot be written.
    """
    if len(folders) < 2 or primary not in folders:
        raise RecipeError(
            f"fusing {', '.join(folders) or 'nothing'} with {primary!r} as the primary",
            "name two models at least, and one of them as the primary",
        )
    if not 1 <= width <= _MOST_WIDTH:
        raise RecipeError(f"width {width}: the head's common width is 1 to {_MOST_WIDTH}")
    with appearing(out) as being_written:
        vocabulary = _one_vocabulary(folders)
        parts = {name: load_folder(folder) for name, folder in folders.items()}
        _check_parts(parts, folders)
        torch.manual_seed(seed)
        model = fused(parts, primary, width)
        table = TokenizerFolder(path=str(folders[primary]))
        export_folder(model, table, vocabulary.tokenizer, vocabulary.end_of_text, being_written)
    learns = model.num_parameters(only_trainable=True)
    return {"model": str(out), "parts": list(folders), "parameters": learns, "frozen": model.num_parameters() - learns}


def fused(parts: Mapping[str, PreTrainedModel], primary: str, width: int) -> FusedForCausalLM:
    """The model of these parts, which are copied; the head is drawn from torch's generator."""
    names = list(parts)
    configs = [part.config for part in parts.values()]
    config = FusedConfig(
        parts=[each.to_dict() for each in configs],
        names=names,
        primary=names.index(primary),
        width=width,
        vocab_size=configs[0].vocab_size,
        max_position_embeddings=min(each.max_position_embeddings for each in configs),
        num_hidden_layers=max(each.num_hidden_layers for each in configs),
    )
    model = FusedForCausalLM(config)
    for mine, given in zip(model.parts, parts.values(), strict=True):
        mine.load_state_dict(given.state_dict())
    return model.train(False)


def attribution(model: FusedForCausalLM, stream: np.ndarray, sequence_length: int = 128) -> dict[str, float]:
    """What each participant's model weighs in the predictions of a text, on average; the weights add up to 1.

    Args:
        stream: Token ids, ``(T,)``; read in stretches of ``sequence_length``.

    Raises:
        CorpusError: The text is shorter than one stretch.
    """
    rows = len(stream) // sequence_length
    if not rows:
        raise CorpusError(f"the text is shorter than {sequence_length} tokens")
    tokens = torch.from_numpy(stream[: rows * sequence_length].astype(np.int64)).view(rows, sequence_length)
    with torch.inference_mode():
        weights = [model.train(False)(batch.to(model.device)).weights.flatten(0, 1) for batch in tokens.split(16)]
    mean = torch.cat(weights).double().mean(dim=0)
    return dict(zip(model.config.names or [], mean.tolist(), strict=True))


def prefit(fusion: AdaFusion, features: Sequence[Tensor]) -> None:
    """Begin with projections that keep the most of each model's features: linear autoencoders, in closed form.

    The best linear autoencoder of width c encodes by the c leading eigenvectors of ``E[h hᵀ]`` (Baldi and Hornik,
    1989), a sum over participants: whoever pools ``Σ h hᵀ`` gets what the pooled features give.

    Args:
        features: h_m of each model, ``(N, d_m)``. Where d_m < c the directions left over are zero.
    """
    with torch.no_grad():
        for projection, h in zip(fusion.projections, features, strict=True):
            _, directions = torch.linalg.eigh(h.double().T @ h.double())  # ascending
            kept = directions.flip(1).T[: len(projection)]
            projection.zero_()
            projection[: len(kept)] = kept.to(projection)


def _one_vocabulary(folders: Mapping[str, Path]) -> Vocabulary:
    vocabularies = {name: folder_vocabulary(folder) for name, folder in folders.items()}
    (first, vocabulary), *others = vocabularies.items()
    for name, other in others:
        if other.content_hash != vocabulary.content_hash:
            hint = "only models that were trained with the same tokenizer can be fused"
            raise ModelError(f"{folders[name]}: its tokenizer is not that of {folders[first]}", hint)
    return vocabulary


def _check_parts(parts: Mapping[str, PreTrainedModel], folders: Mapping[str, Path]) -> None:
    rows = {name: part.config.get_text_config().vocab_size for name, part in parts.items()}
    (first, size), *others = rows.items()
    for name, other in others:
        if other != size:
            raise ModelError(f"{folders[name]}: predicts {other} tokens, {folders[first]} predicts {size}")
    for name, part in parts.items():
        sizes = ("hidden_size", "num_hidden_layers", "max_position_embeddings")
        if isinstance(part, FusedForCausalLM) or not all(hasattr(part.config, size) for size in sizes):
            raise ModelError(f"{folders[name]}: a {part.config.model_type} model cannot be a part of another")
