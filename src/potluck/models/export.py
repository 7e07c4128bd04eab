"""A model and its tokenizer as a folder that `transformers` loads."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from potluck.errors import StorageError
from potluck.recipe.schema import Tokenizer as TokenizerTable
from potluck.recipe.schema import TokenizerFolder


def export_folder(
    model: PreTrainedModel, table: TokenizerTable, tokenizer: Tokenizer, end_of_text: int, folder: Path
) -> None:
    """Write weights (safetensors), tokenizer and generation config for ``from_pretrained``.

    Args:
        table: The recipe's ``tokenizer``: one that came from a folder is written as it came.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=end_of_text, pad_token_id=end_of_text
    )
    try:
        model.save_pretrained(folder)
        _for_transformers(table, tokenizer, end_of_text, model).save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: the model cannot be written ({error})") from None


def _for_transformers(
    table: TokenizerTable, tokenizer: Tokenizer, end_of_text: int, model: PreTrainedModel
) -> PreTrainedTokenizerBase:
    if isinstance(table, TokenizerFolder) and Path(table.path).is_dir():
        return AutoTokenizer.from_pretrained(table.path, local_files_only=True, trust_remote_code=False)
    end = tokenizer.id_to_token(end_of_text)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_max_length=getattr(model.config, "max_position_embeddings", None) or int(1e30),
        clean_up_tokenization_spaces=False,
    )
