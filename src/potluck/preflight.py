"""What can be known of a run before any slow work, without loading torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from potluck.corpus.sources import text_bytes
from potluck.corpus.tokenizer import folder_vocabulary, vocabulary_from_words, word_counts
from potluck.corpus.tokenizer_json import check_ids
from potluck.errors import CorpusError, ModelError
from potluck.footprint import footprint, moments
from potluck.measured import WHERE
from potluck.models.shapes import check_context, parameter_shapes
from potluck.recipe import Recipe
from potluck.recipe.outer import outer_warnings
from potluck.recipe.schema import Bpe, Bytes
from potluck.recipe.updates import (
    BlockTopK,
    DctTopK,
    DeltaDownload,
    ErrorFeedback,
    LowRank,
    Quantize,
    RandomK,
    Sign,
    Streaming,
    TopK,
)
from potluck.records.folder import POOLED
from potluck.traffic import Messages, exchanges, most_changed
from potluck.untrusted import load_json

# English text and source code; only a guess, and shown as one.
_BYTES_PER_TOKEN = {"bytes": 1.0, "bpe": 3.0, "folder": 3.5}
_COUNTED_TEXT = 4_000_000  # bytes on which a BPE is trained to know how many tokens it gets: two seconds
_FILL = 14.0  # tokens that a BPE finds at most in text, by the root of its bytes; 11 to 17 were seen


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Attributes:
        text_bytes: Text of each participant, before it is divided and capped; ``None`` if it must be read to be known.
        parameters: Trainable parameters, tied ones once.
        vocabulary_is_bound: The text may fill fewer tokens, and the model be smaller.
        device_bytes, participant_bytes, coordinator_bytes, process_bytes: See `potluck.footprint.Footprint`.
        update_bytes, peak_update_bytes: What a participant sends in a round: the mean over the fragments, the largest.
        download_bytes, peak_download_bytes: What one that was there in the last round is sent in a round.
        up_bytes, down_bytes: All transfers of the run, headers and evaluations included. Everybody downloads a state
            that is evaluated; one that a participant already holds is not sent to it again.
        download_is_bound: Downloads depend on the text; their figures are the most that they can be.
        epochs: Passes over its own text that a participant makes in the run, estimated.
        warnings: Settings that have no effect, and figures that look wrong.
    """

    participants: tuple[str, ...]
    text_bytes: dict[str, int | None]
    parameters: int
    vocabulary_size: int
    vocabulary_is_bound: bool
    device_bytes: int
    participant_bytes: int
    coordinator_bytes: int
    process_bytes: int | None
    update_bytes: int
    peak_update_bytes: int
    download_bytes: int
    peak_download_bytes: int
    up_bytes: int
    down_bytes: int
    download_is_bound: bool
    tokens_per_step: int
    local_steps: int
    tokens_per_round: int
    total_tokens: int
    asked_per_round: int
    rounds: int
    epochs: float | None
    warnings: tuple[str, ...]


_NO_ACTIVATIONS = "memory of activations is not estimated: the model's config does not name its widths"


def forecast(recipe: Recipe) -> Forecast:
    """Check a recipe against the files it names and work out what it costs.

    Raises:
        CorpusError, ModelError, RecipeError: The first thing that would stop the run.
    """
    texts = _texts(recipe)
    vocabulary, bound = _tokens_of(recipe, texts)
    shapes = parameter_shapes(recipe.model, vocabulary)
    check_context(recipe.model, recipe.local.sequence_length)
    messages = Messages(recipe, shapes)
    parameters, asked = messages.size, recipe.asked_per_round
    updates, downloads = _sizes(messages)
    sent = [(exchange.up * len(exchange.names), sum(exchange.down)) for exchange in exchanges(recipe, shapes)]
    tokens_per_round = asked * recipe.local_steps * recipe.tokens_per_step
    epochs = _epochs(recipe, texts)
    memory = footprint(recipe, messages, vocabulary, _held_out(recipe, texts))
    return Forecast(
        participants=recipe.participant_names,
        text_bytes=texts,
        parameters=parameters,
        vocabulary_size=vocabulary,
        vocabulary_is_bound=bound,
        device_bytes=memory.device,
        participant_bytes=memory.participant,
        coordinator_bytes=memory.coordinator,
        process_bytes=memory.process,
        update_bytes=sum(updates) // len(updates),
        peak_update_bytes=max(updates),
        download_bytes=sum(downloads) // len(downloads),
        peak_download_bytes=max(downloads),
        up_bytes=sum(up for up, _ in sent),
        down_bytes=sum(down for _, down in sent),
        download_is_bound=any(most_changed(recipe, fragment) < fragment.size for fragment in messages.fragments)
        and isinstance(recipe.updates.download, DeltaDownload),
        tokens_per_step=recipe.tokens_per_step,
        local_steps=recipe.local_steps,
        tokens_per_round=tokens_per_round,
        total_tokens=tokens_per_round * recipe.rounds.count,
        asked_per_round=asked,
        rounds=recipe.rounds.count,
        epochs=epochs,
        warnings=tuple(
            [
                *_vocabulary_warnings(recipe, vocabulary),
                *([] if memory.activations_known else [_NO_ACTIVATIONS]),
                *_warnings(recipe, epochs),
                *_waiting_warnings(recipe),
                *_update_warnings(recipe, messages),
            ]
        ),
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
                texts[participant.name] = None if participant.source is None else text_bytes(participant.source)
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


def vocabulary_size(recipe: Recipe) -> int:
    """Tokens that the run's tokenizer will have, or for much text at most.

    Raises:
        ModelError: A tokenizer folder cannot be read.
    """
    try:
        texts = _texts(recipe) if isinstance(recipe.tokenizer, Bpe) else {}
    except CorpusError:  # the text is elsewhere
        texts = {}
    return _tokens_of(recipe, texts)[0]


def _tokens_of(recipe: Recipe, texts: dict[str, int | None]) -> tuple[int, bool]:
    """Tokens of the recipe's tokenizer, and whether they are only the most that it can have."""
    match recipe.tokenizer:
        case Bytes():
            return 257, False
        case Bpe(vocab_size=asked):
            return _filled(recipe, texts, asked)
        case table:
            return _folder_tokens(Path(table.path)), False


def _filled(recipe: Recipe, texts: dict[str, int | None], asked: int) -> tuple[int, bool]:
    """Little text has fewer tokens than a BPE is asked for: there it is trained, to know how many."""
    known = [size for size in texts.values() if size is not None]
    if not known or len(known) < len(texts):
        return asked, True
    cap = recipe.data.train_bytes or max(known)
    read = sum(min(size * (1 - recipe.data.validation_fraction), cap) for size in known)
    if asked < _FILL / 2 * math.sqrt(read):
        return asked, False
    if sum(known) > _COUNTED_TEXT:
        return min(asked, int(_FILL * math.sqrt(read))), True
    return vocabulary_from_words(word_counts(recipe), asked).size, False


def _folder_tokens(folder: Path) -> int:
    path = folder / "tokenizer.json"
    try:
        tokenizer = load_json(path)
        ids = tokenizer["model"]["vocab"]
        if isinstance(ids, dict):
            check_ids(ids)
        last = max(ids.values()) if isinstance(ids, dict) else len(ids) - 1
        return 1 + max(int(last), *(int(token["id"]) for token in tokenizer.get("added_tokens", ())), 0)
    except FileNotFoundError:  # a tokenizer in an older form, which only transformers reads
        return folder_vocabulary(folder).size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a Hugging Face tokenizer ({error})") from None


def _vocabulary_warnings(recipe: Recipe, vocabulary: int) -> Iterator[str]:
    if isinstance(recipe.tokenizer, Bpe) and vocabulary < recipe.tokenizer.vocab_size:
        yield (
            f"tokenizer.vocab_size {recipe.tokenizer.vocab_size}: the training text has no more than "
            f"{vocabulary} tokens; the model will know as many"
        )


def _held_out(recipe: Recipe, texts: dict[str, int | None]) -> dict[str, int | None]:
    """Tokens of each participant's held-out text, estimated."""
    share, cap = recipe.data.validation_fraction, recipe.data.validation_bytes
    bytes_per_token = _BYTES_PER_TOKEN[recipe.tokenizer.kind]
    return {
        name: None if size is None else int(min(size * share, cap or size) / bytes_per_token)
        for name, size in texts.items()
    }


def _epochs(recipe: Recipe, texts: dict[str, int | None]) -> float | None:
    """Passes of the participant with the least text over it."""
    known = [size for size in texts.values() if size is not None]
    if len(known) < len(texts):
        return None
    cap = recipe.data.train_bytes or max(known)
    least = min(min(size * (1 - recipe.data.validation_fraction), cap) for size in known)
    rounds = recipe.rounds.count * recipe.asked_per_round / len(texts)
    return rounds * recipe.local_steps * recipe.tokens_per_step * _BYTES_PER_TOKEN[recipe.tokenizer.kind] / least


def _sizes(messages: Messages) -> tuple[list[int], list[int]]:
    """Of each fragment, in the midst of a run: an update, and the task that brings what the last round changed."""
    count = len(messages.fragments)
    return (
        [messages.update(place) for place in range(count)],
        [messages.task("train", revision - 1, revision) for revision in range(count, 2 * count)],
    )


def _warnings(recipe: Recipe, epochs: float | None) -> Iterator[str]:
    rounds, names = recipe.rounds, recipe.participant_names
    if "sampling" in rounds.model_fields_set and recipe.asked_per_round == len(names):
        yield "rounds.sampling has no effect: everybody is asked each round"
    if rounds.evaluate_every > max(1, rounds.count):
        yield f"rounds.evaluate_every {rounds.evaluate_every}: only the first state and the last are evaluated"
    if recipe.records.checkpoint_every > max(1, rounds.count):
        yield f"records.checkpoint_every {recipe.records.checkpoint_every}: only the first state and the last are saved"
    steps = rounds.count // recipe.fragments
    yield from outer_warnings(recipe.outer, recipe.local.optimizer, recipe.fragments * recipe.local_steps, steps)
    if epochs is not None and epochs > 40:
        yield f"each participant passes over its own text about {epochs:.0f} times: expect it to be learnt by heart"
    if not recipe.local.keep_optimizer and not moments(recipe.local.optimizer):
        yield "local.keep_optimizer has no effect: this optimizer has no state"
    if recipe.local.adaptive_batch is not None:
        yield (
            "local.adaptive_batch: the batch grows, so tokens, passes and memory are lower bounds; lone and pooled "
            "runs of a comparison choose their own"
        )
    if not recipe.data.validation_fraction:
        yield "data.validation_fraction is 0: no text is held out, nothing is evaluated, no checkpoint is the best"
    if recipe.data.split is not None and recipe.data.split.participants == 1:
        yield "data.split with one participant divides nothing"
    if POOLED in names:
        yield f"a participant is called {POOLED!r}: `potluck compare` will refuse this name"


def _waiting_warnings(recipe: Recipe) -> Iterator[str]:
    rounds = recipe.rounds
    waits = [f"rounds.{key}" for key in ("deadline", "grace", "late") if key in rounds.model_fields_set]
    if waits and recipe.deadline is None:
        yield f"{' and '.join(waits)} has no effect: in one process without device profiles nobody is waited for"
    elif rounds.grace is not None and recipe.min_contributors == recipe.asked_per_round:
        yield "rounds.grace has no effect: rounds.min_contributors asks for everybody"
    elif rounds.late == "keep" and rounds.deadline is None and rounds.grace is None:
        yield "rounds.late has no effect: everybody is waited for; set rounds.deadline or rounds.grace"


def _update_warnings(recipe: Recipe, messages: Messages) -> Iterator[str]:
    """About links, download and streaming."""
    links, streaming, steps = recipe.updates.links, recipe.rounds.streaming, recipe.rounds.count // recipe.fragments
    feedback = any(isinstance(link, ErrorFeedback) for link in links)
    lossy: list[str] = [link.kind for link in links if isinstance(link, TopK | BlockTopK | DctTopK | LowRank | Sign)]
    lossy += ["random-k with unbiased = false" for link in links if isinstance(link, RandomK) and not link.unbiased]
    lossy += ["quantize to 2 bits" for link in links if isinstance(link, Quantize) and link.bits == 2]
    if lossy and not feedback:
        yield (
            f"updates.links: {' and '.join(lossy)} without error-feedback before it: what an update loses is lost "
            "for good"
        )
    if lossy and feedback and steps < 100:
        yield (
            f"updates.links: {' and '.join(lossy)} over {steps} outer steps: error feedback may end with much that was "
            "never sent. Sparse 2-bit updates lost half of what training gains over 5 outer steps, and from a trained "
            f"model a third over 20 ({WHERE}); of other links nothing was measured over so few"
        )
    every = all(most_changed(recipe, fragment) == fragment.size for fragment in messages.fragments)
    if isinstance(recipe.updates.download, DeltaDownload) and every:
        yield (
            'updates.download "delta" saves nothing: every parameter changes in a round; it pays with top-k, '
            "block-top-k or random-k and an outer optimizer without momentum"
        )
    if isinstance(streaming, Streaming) and streaming.fragments == 1 and not streaming.overlap:
        yield "rounds.streaming with one fragment and no overlap saves nothing; leave it out"
