"""What can be known of a run before it runs, without loading torch.

Text is read, divided and tokenised by the code that a run begins with (`potluck.corpus`), and is kept for the run.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck.corpus.shards import Corpus, build_corpus
from potluck.corpus.tokenizer import Progress, build_vocabulary, folder_vocabulary, silent
from potluck.errors import CorpusError, StorageError
from potluck.footprint import checkpoint_bytes, footprint, moments, with_period
from potluck.measured import WHERE
from potluck.models.shapes import Shapes, check_context, form_of
from potluck.recipe import Recipe
from potluck.recipe.engine import Nats
from potluck.recipe.outer import outer_warnings
from potluck.recipe.schema import Bpe, Bytes, ModelFolder
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
from potluck.records.folder import POOLED, run_folder
from potluck.records.units import bytes_text
from potluck.traffic import Messages, exchanges, most_changed

Text = dict[str, Any]
_FELT_TOKENS = 10_000_000  # evaluated in a run: below, nobody waits for them


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Attributes:
        texts: What each participant trains on and holds out: documents, bytes, tokens; ``None`` if it is elsewhere.
        parameters: Trainable parameters, tied ones once.
        vocabulary_is_bound: The text may fill fewer tokens, and the model be smaller.
        device_bytes, participant_bytes, coordinator_bytes, process_bytes: See `potluck.footprint.Footprint`.
        update_bytes, peak_update_bytes: What a participant sends in a round: the mean over the fragments, the largest.
        download_bytes, peak_download_bytes: What one that was there in the last round is sent in a round.
        up_bytes, down_bytes: All transfers of the run, headers and evaluations included. Everybody downloads a state
            that is evaluated; one that a participant already holds is not sent to it again.
        download_is_bound: Downloads depend on the text; their figures are the most that they can be.
        checkpoint_bytes: One checkpoint.
        checkpoint_every: Rounds between two.
        disk_bytes: What the run folder comes to: checkpoints that are kept, one that is being written, the model.
        evaluation_tokens: Held-out tokens of an evaluation; ``None`` if the text is elsewhere.
        evaluation_share: Work of all evaluations over that of all local steps: a token of the former, which has no
            backward pass, is a third of one of the latter.
        epochs: Passes over its own text that the participant with the least of it makes in the run.
        warnings: Settings that have no effect, figures that look wrong, and text that is left out.
    """

    participants: tuple[str, ...]
    texts: dict[str, Text | None]
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
    checkpoint_bytes: int
    checkpoint_every: int
    disk_bytes: int
    evaluation_tokens: int | None
    evaluation_share: float | None
    epochs: float | None
    warnings: tuple[str, ...]


_NO_ACTIVATIONS = "memory of activations is not estimated: the model's config does not name its widths"


def forecast(recipe: Recipe, corpus: Corpus | None = None, progress: Progress = silent) -> Forecast:
    """Check a recipe against the files it names and work out what it costs.

    Args:
        recipe: The recipe.
        corpus: Its text, if that was opened before; else it is prepared here, if it is on this machine.
        progress: Told before slow work.

    Raises:
        CorpusError, ModelError, RecipeError, StorageError: The first thing that would stop the run.
    """
    corpus = corpus or opened_text(recipe, progress)
    texts = {name: None if corpus is None else corpus.holdings[name].facts for name in recipe.participant_names}
    vocabulary, bound = _tokens_of(recipe, corpus)
    form = form_of(recipe.model, vocabulary)
    _check_rows(recipe, form.rows, vocabulary)
    messages = Messages(recipe, form.learns)
    parameters, asked = messages.size, recipe.asked_per_round
    disk: dict[str, Any] = _disk(recipe, parameters, form.frozen)
    evaluation_tokens, evaluation_share = _evaluation(recipe, texts)
    tokens_per_round = asked * recipe.local_steps * recipe.tokens_per_step
    epochs = _epochs(recipe, texts)
    held_out = {name: None if text is None else int(text["validation_tokens"]) for name, text in texts.items()}
    memory = footprint(recipe, messages, vocabulary, held_out, form.frozen)
    return Forecast(
        participants=recipe.participant_names,
        texts=texts,
        parameters=parameters,
        vocabulary_size=vocabulary,
        vocabulary_is_bound=bound,
        device_bytes=memory.device,
        participant_bytes=memory.participant,
        coordinator_bytes=memory.coordinator,
        process_bytes=memory.process,
        **_traffic(recipe, messages, form.learns),
        tokens_per_step=recipe.tokens_per_step,
        local_steps=recipe.local_steps,
        tokens_per_round=tokens_per_round,
        total_tokens=tokens_per_round * recipe.rounds.count,
        asked_per_round=asked,
        rounds=recipe.rounds.count,
        **disk,
        evaluation_tokens=evaluation_tokens,
        evaluation_share=evaluation_share,
        epochs=epochs,
        warnings=(
            *(corpus.notes if corpus else []),
            *_vocabulary_warnings(recipe, vocabulary),
            *([] if memory.activations_known else [_NO_ACTIVATIONS]),
            *_warnings(recipe, epochs),
            *_evaluation_warnings(recipe, evaluation_tokens, evaluation_share),
            *_disk_warnings(recipe, disk["disk_bytes"]),
            *_waiting_warnings(recipe),
            *_update_warnings(recipe, messages),
        ),
    )


def opened_text(recipe: Recipe, progress: Progress = silent) -> Corpus | None:
    """The participants' text as a run will have it; ``None`` if it is where they join from.

    Raises:
        CorpusError, ModelError, RecipeError, StorageError: As ``forecast``.
    """
    check_context(recipe.model, recipe.local.sequence_length)  # before any slow work
    return build_corpus(recipe, progress) if text_is_here(recipe) else None


def text_is_here(recipe: Recipe) -> bool:
    """Whether the participants' text is on this machine, and not where they join from."""
    return not isinstance(recipe.engine, Nats)


def vocabulary_size(recipe: Recipe) -> int:
    """Tokens that the run's tokenizer will have; where the text for it is elsewhere, at most.

    Raises:
        ModelError: A tokenizer folder cannot be read.
    """
    if isinstance(recipe.tokenizer, Bpe) and text_is_here(recipe):
        try:
            return build_vocabulary(recipe).size
        except CorpusError:  # a plan needs no text
            pass
    return _tokens_of(recipe, None)[0]


def _tokens_of(recipe: Recipe, corpus: Corpus | None) -> tuple[int, bool]:
    """Tokens of the recipe's tokenizer, and whether they are only the most that it can have."""
    if corpus is not None:
        return corpus.vocabulary.size, False
    match recipe.tokenizer:
        case Bytes():
            return 257, False
        case Bpe(vocab_size=asked):
            return asked, True
        case table:
            return folder_vocabulary(Path(table.path)).size, False


def _traffic(recipe: Recipe, messages: Messages, shapes: Shapes) -> dict[str, Any]:
    """Bytes of one message and of all."""
    updates, downloads = _sizes(messages)
    sent = [(exchange.up * len(exchange.names), sum(exchange.down)) for exchange in exchanges(recipe, shapes)]
    return {
        "update_bytes": sum(updates) // len(updates),
        "peak_update_bytes": max(updates),
        "download_bytes": sum(downloads) // len(downloads),
        "peak_download_bytes": max(downloads),
        "up_bytes": sum(up for up, _ in sent),
        "down_bytes": sum(down for _, down in sent),
        "download_is_bound": any(most_changed(recipe, fragment) < fragment.size for fragment in messages.fragments)
        and isinstance(recipe.updates.download, DeltaDownload),
    }


def _check_rows(recipe: Recipe, rows: int, vocabulary: int) -> None:
    """Refuse a tokenizer with more tokens than the model folder knows."""
    if isinstance(recipe.model, ModelFolder):
        from potluck.models.check import check_vocabulary

        check_vocabulary(recipe.model.path, rows, vocabulary)


def _vocabulary_warnings(recipe: Recipe, vocabulary: int) -> Iterator[str]:
    if isinstance(recipe.tokenizer, Bpe) and vocabulary < recipe.tokenizer.vocab_size:
        yield (
            f"tokenizer.vocab_size {recipe.tokenizer.vocab_size}: the training text has no more than "
            f"{vocabulary} tokens; the model will know as many"
        )


def _epochs(recipe: Recipe, texts: Mapping[str, Text | None]) -> float | None:
    """Passes of the participant with the least text over it."""
    known = [text["train_tokens"] for text in texts.values() if text is not None]
    if len(known) < len(texts):
        return None
    rounds = recipe.rounds.count * recipe.asked_per_round / len(texts)
    return rounds * recipe.local_steps * recipe.tokens_per_step / float(min(known))


def _disk(recipe: Recipe, parameters: int, frozen: int) -> dict[str, int]:
    """Checkpoints and the model, in bytes; what is kept of the best are its weights.

    Raises:
        StorageError: There is no room for the first checkpoint.
    """
    trainers, records = len(recipe.participant_names), recipe.records
    one = checkpoint_bytes(recipe, parameters, trainers)
    if (free := _free_bytes(recipe)) < one:
        raise StorageError(
            f"{run_folder(recipe)}: {bytes_text(free)} free, and the first checkpoint has {bytes_text(one)}",
            "make room, or choose another records.folder",
        )
    every = with_period(recipe, parameters, trainers).records.checkpoint_every or 1
    kept = min(records.keep_last, 1 + -(-recipe.rounds.count // every))
    whole = (kept + 1) * one + 4 * parameters * records.keep_best + 4 * (parameters + frozen)
    return {"checkpoint_bytes": one, "checkpoint_every": every, "disk_bytes": whole}


def _free_bytes(recipe: Recipe) -> int:
    folder = run_folder(recipe).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _disk_warnings(recipe: Recipe, needed: int) -> Iterator[str]:
    if (free := _free_bytes(recipe)) < needed:
        yield (
            f"{run_folder(recipe)}: {bytes_text(free)} free, and the run comes to {bytes_text(needed)}; lower "
            "records.keep_last, or choose another records.folder"
        )


def _evaluation(recipe: Recipe, texts: Mapping[str, Text | None]) -> tuple[int | None, float | None]:
    """Tokens of an evaluation, and the share that all of them have in the work."""
    known = [text["validation_tokens"] for text in texts.values() if text is not None]
    if len(known) < len(texts):
        return None, None
    rounds = recipe.rounds
    trained = rounds.count * recipe.asked_per_round * recipe.local_steps * recipe.tokens_per_step
    times = 1 + -(-rounds.count // rounds.evaluate_every)
    return sum(known), times * sum(known) / 3 / trained if trained else None


def _evaluation_warnings(recipe: Recipe, tokens: int | None, share: float | None) -> Iterator[str]:
    """Of evaluations that cost more than training and long enough to be felt."""
    if (
        tokens is None
        or share is None
        or share <= 1
        or tokens * recipe.rounds.count / recipe.rounds.evaluate_every < _FELT_TOKENS
    ):
        return
    every = math.ceil(share * recipe.rounds.evaluate_every)
    yield (
        f"evaluations take {share:.1f} times the work of all local steps, {tokens:,} tokens of held-out text each: "
        f"rounds.evaluate_every = {every} or a smaller data.validation_bytes makes it less"
    )


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
    if (recipe.records.checkpoint_every or 1) > max(1, rounds.count):
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
