"""The common base that parts are trained on, and the text they are trained and measured with."""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from potluck.corpus.reading import LeftOut
from potluck.corpus.sources import documents
from potluck.corpus.tokenizer import Vocabulary, folder_vocabulary, pieces
from potluck.corpus.tokenizer_json import refusing
from potluck.errors import CorpusError, ModelError
from potluck.files import nearby
from potluck.models.build import embeddings, load_folder
from potluck.models.check import check_vocabulary
from potluck.recipe.sources import Folder, SeparatedFile, Source

_log = logging.getLogger(__name__)  # standard error, where nobody has said otherwise


@dataclass(frozen=True)
class Base:
    """A model folder, loaded.

    Attributes:
        model: In fp32, in evaluation mode.
        vocabulary: Its tokenizer.
        place: The folder, as the user named it.
    """

    model: PreTrainedModel
    vocabulary: Vocabulary
    place: str

    @cached_property
    def content_hash(self) -> str:
        """Hash of its weights when first asked for: parts of another base do not fit."""
        return weights_hash(self.model)


def weights_hash(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and values of a model's weights as they are now."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).data)
    return digest.hexdigest()


def load_base(folder: Path, device: Literal["cpu", "auto"] = "cpu") -> Base:
    """A model folder with its tokenizer, such as ``RUN/model``.

    Args:
        device: ``auto`` is the GPU, if there is one.

    Raises:
        ModelError: The model or its tokenizer cannot be used.
    """
    if not folder.exists():
        raise ModelError(f"{folder}: there is no such model folder", nearby(folder) or "a run's is RUN/model")
    model, vocabulary = load_folder(folder), folder_vocabulary(folder)
    check_vocabulary(folder, embeddings(model)[0].shape[0], vocabulary.size)
    if device == "auto" and torch.cuda.is_available():
        model.to(torch.device("cuda"))  # type: ignore[arg-type]  # its wrapper hides the types
    return Base(model.eval(), vocabulary, str(folder))


def text_source(path: Path) -> Source:
    """A folder of text files, or one file, cut where a line ``<<<FILE name>>>`` begins another document.

    Raises:
        CorpusError: There is no such file or folder.
    """
    if path.is_dir():
        return Folder(path=str(path))
    if not path.is_file():
        raise CorpusError(f"{path}: no such text", "name a folder of text files, or one file")
    separated = SeparatedFile(file=str(path))
    with path.open("rb") as file:
        holds_many = file.readline(1 << 16).startswith(separated.separator.encode())
    return separated if holds_many else Folder(path=str(path.parent), glob=glob.escape(path.name))


def texts_of(path: Path) -> list[str]:
    """The documents of a file or folder; a warning on standard error names the files that are no text.

    Raises:
        CorpusError: It is missing, or holds no text.
    """
    left_out = LeftOut()
    found = [document.text for document in documents(text_source(path), left_out)]
    for sentence in left_out.sentences():
        _log.warning("warning: %s: %s", path, sentence)
    return found


def token_stream(texts: Iterable[str], vocabulary: Vocabulary) -> np.ndarray:
    """Documents as one stream of token ids, int64, each begun by the end-of-text token.

    Raises:
        CorpusError: There is no text.
    """
    ids: list[int] = []
    for text in texts:
        ids.append(vocabulary.end_of_text)
        for piece in pieces(text):
            with refusing("the tokenizer cannot encode the text"):
                ids += vocabulary.tokenizer.encode(piece, add_special_tokens=False).ids
    if len(ids) < 2:
        raise CorpusError("there is no text to take tokens from")
    return np.asarray(ids, dtype=np.int64)
