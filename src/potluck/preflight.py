"""What can be known of a run before any slow work, without loading torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from potluck.corpus.sources import text_bytes
from potluck.errors import CorpusError, ModelError
from potluck.models.shapes import check_context, parameter_count, shape_of
from potluck.recipe import Recipe
from potluck.recipe.schema import AdamW, Bpe, Bytes, Muon, OuterAdagrad, OuterAdam, OuterNesterov, OuterYogi
from potluck.records.folder import POOLED

# English text and source code; only a guess, and shown as one.
_BYTES_PER_TOKEN = {"bytes": 1.0, "bpe": 3.0, "folder": 3.5}
_FP32 = 4


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Attributes:
        text_bytes: Text of each participant, before it is divided and capped; ``None`` if it must be read to be known.
        parameters: Trainable parameters, tied ones once.
        device_bytes: Weights, gradients and a rough estimate of activations on the device of the local steps.
        participant_bytes: Optimizer state of one participant, in host memory.
        coordinator_bytes: Shared state, mean and outer optimizer.
        transfer_bytes: One full state: to and from each participant that is asked, per round.
        up_bytes, down_bytes: All transfers of the run. Everybody downloads a state that is evaluated; one that a
            participant already holds is not sent to it again. Headers of a few hundred bytes are left out.
        epochs: Passes over its own text that a participant makes in the run, estimated.
        warnings: Settings that have no effect, and figures that look wrong.
    """

    participants: tuple[str, ...]
    text_bytes: dict[str, int | None]
    parameters: int
    vocabulary_size: int
    device_bytes: int
    participant_bytes: int
    coordinator_bytes: int
    transfer_bytes: int
    up_bytes: int
    down_bytes: int
    tokens_per_step: int
    local_steps: int
    tokens_per_round: int
    total_tokens: int
    asked_per_round: int
    rounds: int
    epochs: float | None
    warnings: tuple[str, ...]


def forecast(recipe: Recipe) -> Forecast:
    """Check a recipe against the files it names and work out what it costs.

    Raises:
        CorpusError, ModelError, RecipeError: The first thing that would stop the run.
    """
    texts = _texts(recipe)
    vocabulary = _vocabulary_size(recipe)
    parameters = parameter_count(recipe.model, vocabulary)
    check_context(recipe.model, recipe.local.sequence_length)
    local, asked = recipe.local, recipe.asked_per_round
    tokens_per_round = asked * recipe.local_steps * recipe.tokens_per_step
    epochs = _epochs(recipe, texts)
    return Forecast(
        participants=recipe.participant_names,
        text_bytes=texts,
        parameters=parameters,
        vocabulary_size=vocabulary,
        device_bytes=2 * _FP32 * parameters + _activations(recipe, vocabulary),
        participant_bytes=_FP32 * parameters * _moments(local.optimizer),
        coordinator_bytes=_FP32 * parameters * (2 + _outer_vectors(recipe)),
        transfer_bytes=_FP32 * parameters,
        up_bytes=_FP32 * parameters * asked * recipe.rounds.count,
        down_bytes=_FP32 * parameters * _downloads(recipe),
        tokens_per_step=recipe.tokens_per_step,
        local_steps=recipe.local_steps,
        tokens_per_round=tokens_per_round,
        total_tokens=tokens_per_round * recipe.rounds.count,
        asked_per_round=asked,
        rounds=recipe.rounds.count,
        epochs=epochs,
        warnings=tuple(_warnings(recipe, epochs)),
    )


def _texts(recipe: Recipe) -> dict[str, int | None]:
    """Bytes of text per participant; a split source is taken to be divided evenly."""
    if recipe.data.split is not None:
        assert recipe.data.source is not None
        whole = text_bytes(recipe.data.source)
        share = None if whole is None else whole // recipe.data.split.participants
        texts: dict[str, int | None] = {name: share for name in recipe.participant_names}
    else:
        texts = {}
        for participant in recipe.participants:
            try:
                texts[participant.name] = text_bytes(participant.source)
            except CorpusError as error:
                raise CorpusError(f"participant {participant.name}: {error}", error.hint) from None
    needed = recipe.local.batch_size * recipe.local.accumulation * recipe.local.sequence_length
    for name, size in texts.items():
        if size is not None and size < needed and recipe.data.split is None:  # a token has at least one byte
            raise CorpusError(
                f"participant {name}: {size} bytes of text are less than one local step's {needed} tokens",
                "give it more text, or lower local.batch_size or local.sequence_length",
            )
    return texts


def _vocabulary_size(recipe: Recipe) -> int:
    match recipe.tokenizer:
        case Bytes():
            return 257
        case Bpe(vocab_size=size):
            return size
        case table:
            path = Path(table.path) / "tokenizer.json"
            try:
                tokenizer = json.loads(path.read_text(encoding="utf-8"))
                ids = list(tokenizer["model"]["vocab"])
                return max(len(ids), 1 + max((t["id"] for t in tokenizer.get("added_tokens", ())), default=0))
            except FileNotFoundError:  # a tokenizer in an older form, which only transformers reads
                from potluck.corpus.tokenizer import folder_vocabulary

                return folder_vocabulary(Path(table.path)).size
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{path}: not a Hugging Face tokenizer ({error})") from None


def _epochs(recipe: Recipe, texts: dict[str, int | None]) -> float | None:
    """Passes of the participant with the least text over it."""
    known = [size for size in texts.values() if size is not None]
    if len(known) < len(texts):
        return None
    cap = recipe.data.train_bytes or max(known)
    least = min(min(size * (1 - recipe.data.validation_fraction), cap) for size in known)
    rounds = recipe.rounds.count * recipe.asked_per_round / len(texts)
    return rounds * recipe.local_steps * recipe.tokens_per_step * _BYTES_PER_TOKEN[recipe.tokenizer.kind] / least


def _downloads(recipe: Recipe) -> int:
    """Shared states sent to participants: each evaluated one to everybody, each other one to those who are asked."""
    count, every = recipe.rounds.count, recipe.rounds.evaluate_every
    evaluated_before_training = -(-count // every)  # revisions 0, every, 2 every, ... below count
    everybody = (evaluated_before_training + 1) * len(recipe.participant_names)  # and the last revision
    return everybody + (count - evaluated_before_training) * recipe.asked_per_round


def _activations(recipe: Recipe, vocabulary: int) -> int:
    """About what one forward pass keeps for the backward pass: a rough estimate."""
    shape = shape_of(recipe.model)
    tokens = recipe.local.batch_size * recipe.local.sequence_length
    if shape is None:
        return 0
    per_layer = 12 * shape.width + 4 * shape.feedforward
    layers = 1 + shape.layers * shape.width / per_layer if recipe.compute.gradient_checkpointing else shape.layers
    return int(_FP32 * tokens * (layers * per_layer + 3 * vocabulary))


def _moments(optimizer: object) -> int:
    """fp32 vectors of the inner optimizer, in multiples of the model (for Muon an upper bound)."""
    if isinstance(optimizer, AdamW | Muon):
        return 2
    return 1 if getattr(optimizer, "momentum", 0.0) else 0


def _outer_vectors(recipe: Recipe) -> int:
    match recipe.outer:
        case OuterAdam() | OuterYogi() | OuterAdagrad():
            return 2
        case OuterNesterov():
            return 1
        case sgd:
            return 1 if sgd.momentum else 0


def _warnings(recipe: Recipe, epochs: float | None) -> Iterator[str]:
    rounds, names = recipe.rounds, recipe.participant_names
    if "sampling" in rounds.model_fields_set and recipe.asked_per_round == len(names):
        yield "rounds.sampling has no effect: everybody is asked each round"
    if rounds.evaluate_every > rounds.count:
        yield f"rounds.evaluate_every {rounds.evaluate_every}: only the first state and the last are evaluated"
    if recipe.records.checkpoint_every > rounds.count:
        yield f"records.checkpoint_every {recipe.records.checkpoint_every}: only the first state and the last are saved"
    if isinstance(recipe.outer, OuterNesterov) and recipe.outer.momentum >= 0.9 and rounds.count < 100:
        yield (
            f"outer.momentum {recipe.outer.momentum} over {rounds.count} rounds: below about 100 rounds "
            'plain averaging (outer.kind = "sgd") usually does better'
        )
    if epochs is not None and epochs > 40:
        yield f"each participant passes over its own text about {epochs:.0f} times: expect it to be learnt by heart"
    if not recipe.local.keep_optimizer and not _moments(recipe.local.optimizer):
        yield "local.keep_optimizer has no effect: this optimizer has no state"
    if shape_of(recipe.model) is None:
        yield "memory of activations is not estimated for a model folder"
    if recipe.data.split is not None and recipe.data.split.participants == 1:
        yield "data.split with one participant divides nothing"
    if POOLED in names:
        yield f"a participant is called {POOLED!r}: `potluck compare` will refuse this name"
