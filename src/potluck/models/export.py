"""A model and its tokenizer as a folder that `transformers` loads.

What the folder that a model came from has, its export has, unless training changed it: the types that its weights are
stored in, ``config.json`` in the form it has there, the generation config, and the tokenizer's files byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from potluck.errors import StorageError
from potluck.files import storing
from potluck.models.check import checked_folder
from potluck.models.folder import copy_generation_config, copy_own, copy_tokenizer
from potluck.recipe.schema import Model, ModelFolder, TokenizerFolder
from potluck.recipe.schema import Tokenizer as TokenizerTable

_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}  # anything else is written in fp32, as it was trained
# What differs between two configurations of one model: how it was stored, and by which version.
_OF_STORAGE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def export_folder(
    model: PreTrainedModel,
    table: TokenizerTable,
    tokenizer: Tokenizer,
    end_of_text: int,
    folder: Path,
    came_from: Model | None = None,
) -> None:
    """Write weights (safetensors), tokenizer and generation config for ``from_pretrained``.

    Args:
        table: The recipe's ``tokenizer``: the files of one that came from a folder are copied, and so is the
            generation config beside them.
        came_from: The recipe's ``model``: one that came from a folder is written as that is stored.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    source = Path(came_from.path) if isinstance(came_from, ModelFolder) else None
    _save(model, source, folder)
    if isinstance(table, TokenizerFolder) and Path(table.path).is_dir():
        with storing(folder):
            copy_tokenizer(Path(table.path), folder)
            if copy_generation_config(Path(table.path), folder) or Path(table.path) == source:
                return
    else:
        _made_here(tokenizer, end_of_text, model, folder)
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    with storing(folder):
        GenerationConfig(**ends).save_pretrained(folder)


def save_like(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write a model that was made from another folder, with that folder's tokenizer and generation config.

    If it is of the same architecture, its weights are stored in the types they have there, and it is afterwards what
    was stored: rounded, where that is half precision.

    Raises:
        ModelError: The folder that it was made from cannot be opened any more.
        StorageError: The disk is full or cannot be written.
    """
    _save(model, source, folder)
    with storing(folder):
        copy_tokenizer(source, folder)
        copy_generation_config(source, folder)


def _save(model: PreTrainedModel, source: Path | None, folder: Path) -> None:
    """Weights and configuration."""
    types: dict[str, torch.dtype] = {}
    same = False
    if source is not None:
        stored = checked_folder(source).stored
        types = {name: _HALVES[tensor.dtype] for name, (_, tensor) in stored.items() if tensor.dtype in _HALVES}
        same = _same_configuration(model, source)
    kept = model.generation_config
    try:
        if kept is not None:  # settings that go with sampling alone cannot be saved by `transformers`; they are copied
            ends = {name: getattr(kept, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            model.generation_config = GenerationConfig(**ends)
        with _stored_as(model, types if same else {}):
            model.save_pretrained(folder)
        if same and source is not None:
            copy_own(source / "config.json", source, folder / "config.json")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: the model cannot be written ({error})") from None
    finally:
        model.generation_config = kept


def _same_configuration(model: PreTrainedModel, source: Path) -> bool:
    """Whether ``config.json`` of a folder describes the model, in whichever form."""
    before = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    ours, theirs = (
        {key: value for key, value in config.to_dict().items() if key not in _OF_STORAGE}
        for config in (model.config, before)
    )
    return type(model.config) is type(before) and ours == theirs


@contextmanager
def _stored_as(model: PreTrainedModel, types: dict[str, torch.dtype]) -> Iterator[None]:
    """Within, parameters are of these types; afterwards they lie where they lay, rounded. What does not fit stays."""
    whole: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    for name, parameter in model.named_parameters():
        if name in types and parameter.dtype == torch.float32:
            rounded = parameter.data.to(types[name])
            if bool(torch.isfinite(rounded).all()):
                whole.append((parameter, parameter.data))
                parameter.data = rounded
    try:
        yield
    finally:
        for parameter, place in whole:
            parameter.data = place.copy_(parameter.data)


def _made_here(tokenizer: Tokenizer, end_of_text: int, model: PreTrainedModel, folder: Path) -> None:
    end = tokenizer.id_to_token(end_of_text)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_max_length=getattr(model.config, "max_position_embeddings", None) or int(1e30),
        clean_up_tokenization_spaces=False,
    )
    with storing(folder):
        made.save_pretrained(folder)
