"""What `potluck evaluate --edits` prints: how well edits hold in a model folder or a run's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potluck.compose.base import load_base, texts_of, token_stream
from potluck.compose.training import loss_on
from potluck.edit.evaluation import answers_before, as_percent, neighbours_of, score_edits
from potluck.edit.facts import read_edits
from potluck.errors import ModelError, RecipeError

_LENGTH = 128


def evaluate_edits(
    model: Path, edits: Path, before: Path | None = None, text: Path | None = None, batch_size: int = 16
) -> dict[str, Any]:
    """Shares in percent, free answers first; see `potluck.edit.evaluation`.

    Args:
        before: The unedited model: what locality compares with.
        text: Text whose loss is measured, with the unedited model beside if it is given.

    Raises:
        EditError: The file of edits is wrong.
        ModelError: A model cannot be used, or the two do not share a tokenizer.
        CorpusError: The text is missing or too short.
    """
    left_out: list[str] = []
    asked = read_edits(edits, left_out=left_out)
    edited, unedited = load_base(model, "auto"), None if before is None else load_base(before, "auto")
    if before is not None and unedited is not None:
        if unedited.vocabulary.content_hash != edited.vocabulary.content_hash:
            raise ModelError(f"{before}: has another tokenizer than {model}", "name the model before it was edited")
        if not neighbours_of(asked):
            raise RecipeError("--before has no effect: no edit has neighbours", "leave it out, or give neighbours")
    kept = None if unedited is None else answers_before(unedited, asked, batch_size)
    found: dict[str, Any] = {"edits": len(asked), **as_percent(score_edits(edited, asked, kept, batch_size))}
    if kept is None:
        found["locality"] = "not known: name the unedited model with --before"
        del found["exact_locality"], found["given_locality"]
    if left_out:
        found["left_out"] = left_out
    if text is not None:
        stream = token_stream(texts_of(text), edited.vocabulary)
        found["loss"] = loss_on(edited.model, stream, _LENGTH)
        if unedited is not None:
            found["loss_before"] = loss_on(unedited.model, stream, _LENGTH)
    return found
