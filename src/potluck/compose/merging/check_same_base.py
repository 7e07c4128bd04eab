"""Whether model folders can be merged: one architecture, one vocabulary, the same tensors."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path

from transformers.configuration_utils import PreTrainedConfig

from potluck.compose.merging.shards import FLOATS, StoredTensor
from potluck.corpus.tokenizer import folder_tokens, vocabulary_files
from potluck.errors import ModelError

# Settings that may differ: where a model came from, how it is stored, and how it generates.
_ITS_OWN = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id"}
)
_MIXABLE = frozenset(FLOATS)
_UNMERGEABLE = frozenset({"F64", "F8_E4M3", "F8_E5M2"})


def check_same_architecture(reference: Path, expected: PreTrainedConfig, folder: Path, found: PreTrainedConfig) -> None:
    """Compare what `transformers` makes of two configurations, in whichever form they say it.

    Settings that the architecture does not know are compared where both state them.

    Raises:
        ModelError: naming the first setting that differs.
    """
    ours, theirs = expected.to_dict(), found.to_dict()
    for key in sorted((ours.keys() & theirs.keys()) - _ITS_OWN):
        if ours[key] != theirs[key]:
            hint = "only models of one architecture can be merged"
            raise ModelError(f"{folder}: {key} is {theirs[key]!r}, that of {reference} {ours[key]!r}", hint)


def check_same_vocabulary(reference: Path, folder: Path) -> None:
    """Compare the tokenizers' tokens, if both folders hold a tokenizer of whatever form.

    Raises:
        ModelError: A token has another number, or a tokenizer cannot be read.
    """
    ours, theirs = vocabulary_files(reference), vocabulary_files(folder)
    if not ours or not theirs:
        return
    if ours == theirs and all(filecmp.cmp(reference / name, folder / name, shallow=False) for name in ours):
        return
    if folder_tokens(reference) != folder_tokens(folder):
        hint = "rows of the embeddings mean different tokens: train all models from one base"
        raise ModelError(f"{folder}: its tokenizer has other tokens than that of {reference}", hint)


def check_same_tensors(
    reference: Path, expected: Mapping[str, StoredTensor], folder: Path, found: Mapping[str, StoredTensor]
) -> None:
    """Compare names, shapes and types; the types F32, F16 and BF16 may be mixed.

    Raises:
        ModelError: naming the first tensor that differs.
    """
    for name in [*expected, *found]:
        if name not in found or name not in expected:
            lacks, has = (folder, reference) if name in expected else (reference, folder)
            raise ModelError(f"{lacks}: has no tensor {name}, which {has} has")
        one, other = expected[name], found[name]
        if one.shape != other.shape:
            rows_differ = "embed" in name and one.shape[1:] == other.shape[1:]
            hint = "their vocabularies differ in size, and such models cannot be merged" if rows_differ else ""
            raise ModelError(f"{folder}: {name} is {list(other.shape)}, that of {reference} {list(one.shape)}", hint)
        if other.dtype in _UNMERGEABLE:
            raise ModelError(f"{folder}: {name} is stored as {other.dtype}", "save the model as bfloat16 first")
        if one.dtype != other.dtype and not {one.dtype, other.dtype} <= _MIXABLE:
            raise ModelError(f"{folder}: {name} is {other.dtype}, that of {reference} {one.dtype}")
