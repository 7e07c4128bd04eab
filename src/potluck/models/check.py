"""The one check of model folders: what `transformers` makes of the configuration, against what is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from potluck.errors import ModelError
from potluck.models.folder import Stored, check_counts, folder_config, stored_tensors
from potluck.models.register import register

_WEIGHT_TYPES = {"F64", "F32", "F16", "BF16"}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Checked:
    """A model folder that can be opened.

    Attributes:
        config: As `transformers` understands ``config.json``, whichever of its forms that has.
        learns, frozen: Name and shape of each parameter in the order of the flat vector, tied ones once.
        stored: Where each weight lies, by the name that the model gives it; a tied one once, and no buffers that the
            model makes itself. By the stored names for models whose weights `transformers` converts while loading.
        rows: Of the input embedding.
    """

    config: PreTrainedConfig
    learns: tuple[tuple[str, tuple[int, ...]], ...]
    frozen: tuple[tuple[str, tuple[int, ...]], ...]
    stored: Mapping[str, tuple[str, Stored]]
    rows: int


def checked_folder(folder: Path) -> Checked:
    """Check a model folder by its configuration and the headers of its weights; no weight is loaded.

    Raises:
        ModelError: Naming what is wrong: a tensor is missing, has no place in the model, is of another shape or of a
            type that is no weight's; a tied weight is stored twice with two values; the weights are quantised; the
            folder is damaged, or of a model that `transformers` does not know.
    """
    raw = folder_config(folder)
    if raw.get("quantization_config"):
        raise ModelError(f"{folder}: its weights are quantised", "save them dequantised, as bfloat16 or float32")
    if (folder / "adapter_config.json").is_file():
        hint = "`potluck merge ADAPTER --method sum --into-base BASE` writes an adapter into its base"
        raise ModelError(f"{folder}: holds an adapter beside a model; transformers would add it", hint)
    tensors = stored_tensors(folder)
    register(raw.get("model_type"))
    model = _skeleton(folder)
    parameters = [(name, p, tuple(p.shape)) for name, p in model.named_parameters()]  # tied ones come once
    if _converted(model):
        stored = {name: (name, tensor) for name, tensor in tensors.items()}
    else:
        stored = _placed(folder, model, tensors)
        _check_forms(folder, model, stored)
    return Checked(
        model.config,
        tuple((name, shape) for name, p, shape in parameters if p.requires_grad),
        tuple((name, shape) for name, p, shape in parameters if not p.requires_grad),
        stored,
        int(model.get_input_embeddings().weight.shape[0]),  # type: ignore[index]
    )


def check_vocabulary(place: object, rows: int, vocabulary_size: int) -> None:
    """Refuse a tokenizer with token ids that the model has no embedding for.

    Raises:
        ModelError: naming both.
    """
    if rows < vocabulary_size:
        raise ModelError(
            f"{place}: the model knows {rows} tokens, the tokenizer has {vocabulary_size}",
            "use the tokenizer the model was trained with: leave out [tokenizer]",
        )


def first_line(error: BaseException) -> str:
    """An error of `transformers` in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _skeleton(folder: Path) -> PreTrainedModel:
    """The model without memory for its weights."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)  # some count the letters of a text
        check_counts(folder, {"num_hidden_layers": layers})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)  # type: ignore[no-any-return]
    except ModelError:
        raise
    except Exception as error:  # transformers raises many types for a damaged folder
        raise ModelError(f"{folder}: the model cannot be loaded: {first_line(error)}") from error


def _converted(model: PreTrainedModel) -> bool:
    """Whether names or shapes change between file and model (experts that are stacked, and the like)."""
    modules = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    keys = {key for module in modules for key in (type(module).__name__, module.config.model_type) if key}
    return any(get_checkpoint_conversion_mapping(key) is not None for key in keys)


def _placed(folder: Path, model: PreTrainedModel, tensors: Mapping[str, Stored]) -> dict[str, tuple[str, Stored]]:
    """Each weight of the model with the name and place it is stored under."""
    expected, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    ties: Mapping[str, str] = model.all_tied_weights_keys
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    made = {name for name, _ in model.named_buffers()} - set(expected)
    placed: dict[str, tuple[str, Stored]] = {}
    for name, tensor in tensors.items():
        place = next((place for place in (name, f"{prefix}{name}", name.removeprefix(prefix)) if place in expected), "")
        if not place:
            if name in made or f"{prefix}{name}" in made or any(re.search(pattern, name) for pattern in ignored):
                continue
            hint = "config.json describes another model, or the file is of another one"
            raise ModelError(f"{folder}: {type(model).__name__} has no place for the stored tensor {name}", hint)
        shared = ties.get(place, place)
        if shared in placed and not _same_values(placed[shared][1], tensor):
            hint = "say tie_word_embeddings = false in config.json if both are meant"
            raise ModelError(f"{folder}: {placed[shared][0]} and {name} are tied, and are stored with two values", hint)
        if shared not in placed or place == shared:
            placed[shared] = (name, tensor)
    optional = [re.compile(pattern) for pattern in (model._keys_to_ignore_on_load_missing or ())]
    for name in expected:
        if ties.get(name, name) not in placed and not any(pattern.search(name) for pattern in optional):
            raise ModelError(f"{folder}: the tensor {name} is missing", "the folder is incomplete: get it again")
    order = [name for name in expected if name in placed]
    return {name: placed[name] for name in order}


def _check_forms(folder: Path, model: PreTrainedModel, stored: Mapping[str, tuple[str, Stored]]) -> None:
    """Shapes as the configuration says, and numbers that are weights."""
    state = model.state_dict()
    for name, (called, tensor) in stored.items():
        if tensor.shape != tuple(state[name].shape):
            expected = list(state[name].shape)
            hint = "config.json describes another model"
            raise ModelError(f"{folder}: {called} is stored as {list(tensor.shape)}, the model's is {expected}", hint)
        if state[name].is_floating_point() and tensor.dtype not in _WEIGHT_TYPES:
            raise ModelError(f"{folder}: {called} is stored as {tensor.dtype}", "save the model as bfloat16 first")


def _same_values(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        left = one.nbytes
        while left:
            count = min(left, _CHUNK)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True
