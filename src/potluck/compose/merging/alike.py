"""Whether model folders can be merged: one architecture, one vocabulary, the same tensors."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from potluck.compose.merging.shards import FLOATS, StoredTensor
from potluck.errors import ModelError
from potluck.models.shapes import folder_config

# Settings that may differ: where a model came from, how it is stored, and how it generates.
_ITS_OWN = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
    | {"bos_token_id", "eos_token_id", "pad_token_id"}
)
_MIXABLE = frozenset(FLOATS)
_UNMERGEABLE = frozenset({"F64", "F8_E4M3", "F8_E5M2"})


def check_same_architecture(reference: Path, folder: Path) -> None:
    """Compare what both configurations state; what one leaves out is taken to be the other's.

    Raises:
        ModelError: naming the first setting that differs.
    """
    expected, found = folder_config(reference), folder_config(folder)
    for key in sorted((expected.keys() & found.keys()) - _ITS_OWN):
        if expected[key] != found[key]:
            hint = "only models of one architecture can be merged"
            raise ModelError(f"{folder}: {key} is {found[key]!r}, that of {reference} {expected[key]!r}", hint)


def check_same_vocabulary(reference: Path, folder: Path) -> None:
    """Compare the tokenizers' tokens, where both folders hold a ``tokenizer.json``.

    Raises:
        ModelError: A token has another number, or a tokenizer cannot be read.
    """
    one, other = reference / "tokenizer.json", folder / "tokenizer.json"
    if not (one.is_file() and other.is_file()) or filecmp.cmp(one, other, shallow=False):
        return
    try:
        same = Tokenizer.from_file(str(one)).get_vocab() == Tokenizer.from_file(str(other)).get_vocab()
    except Exception as error:  # the library raises plain Exception for a broken file
        raise ModelError(f"{folder}: its tokenizer cannot be compared ({error})") from None
    if not same:
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
