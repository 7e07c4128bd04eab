"""What a run asks of a participant, read from what the coordinator says, and held against the participant's policy."""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from pydantic import BaseModel

from potluck.contribution import Contribution, Header
from potluck.corpus.tokenizer import PIECE_CHARACTERS, word_counts
from potluck.engine.nats.about import About
from potluck.errors import PolicyError, TrainingError
from potluck.recipe import Recipe
from potluck.recipe.engine import Nats
from potluck.recipe.load import parse_recipe
from potluck.recipe.part import Part, Policy
from potluck.recipe.schema import Bpe, ModelFolder
from potluck.untrusted import Count, ShortText, checked, loads

MAX_WORD_BYTES = 64 << 20


@dataclass(frozen=True)
class Asks:
    """What a run will ask, for a person to see before joining.

    Attributes:
        kinds: Kinds of tasks.
        message_bytes: Tensors of the largest message; ``None`` where the model's size is not known yet.
    """

    recipe: str
    rounds: int
    local_steps: int
    tokens_per_round: int
    kinds: tuple[str, ...]
    parameters: int | None
    message_bytes: int | None
    blobs: str


def about_asks(about: About) -> tuple[Asks, Recipe]:
    """What a run is about, checked as a recipe from outside is.

    Raises:
        RecipeError: It is none.
    """
    recipe = parse_recipe(about.recipe, "the coordinator's recipe")
    kinds = [recipe.training_kind, "evaluate"]
    if isinstance(recipe.tokenizer, Bpe):
        kinds.append("words")
    if recipe.editing is not None:
        kinds += ["claims", "moments", "edit"]
    parameters = about.parameters
    return Asks(
        recipe=recipe.name,
        rounds=recipe.rounds.count,
        local_steps=recipe.local_steps,
        tokens_per_round=recipe.local_steps * recipe.tokens_per_step,
        kinds=tuple(kinds),
        parameters=parameters,
        message_bytes=None if parameters is None else 4 * parameters,
        blobs=recipe.engine.blobs if isinstance(recipe.engine, Nats) else "jetstream",
    ), recipe


def refusals(asks: Asks, policy: Policy) -> list[str]:
    """Why a policy does not let a participant take part; empty if it does."""
    found = [f"tasks of kind `{kind}`" for kind in asks.kinds if kind not in policy.kinds]
    if asks.local_steps > policy.max_local_steps:
        found.append(f"{asks.local_steps} local steps in a task, the policy allows {policy.max_local_steps}")
    if asks.parameters is not None and asks.parameters > policy.max_parameters:
        found.append(f"{asks.parameters:,} parameters, the policy allows {policy.max_parameters:,}")
    if asks.message_bytes is not None and asks.message_bytes > policy.max_bytes:
        found.append(f"messages of {asks.message_bytes:,} bytes, the policy allows {policy.max_bytes:,}")
    if asks.blobs != "jetstream" and not any(_within(asks.blobs, store) for store in policy.stores):
        found.append(
            f"large messages in {asks.blobs}, the policy allows {', '.join(policy.stores) or 'no other store'}"
        )
    return found


def _within(url: str, store: str) -> bool:
    """Whether a URL is that of a store or of a folder in it: a name that only begins alike is somebody else's."""
    asked, allowed = urlsplit(url), urlsplit(store)
    path, root = (one.path.strip("/").split("/") for one in (asked, allowed))
    inside = root == [""] or path[: len(root)] == root
    same = (asked.scheme, asked.netloc, asked.query) == (allowed.scheme, allowed.netloc, allowed.query)
    return same and inside and ".." not in unquote(asked.path).split("/")


class _Fields(BaseModel):
    kind: ShortText
    revision: Count
    header: dict[str, str | int | float | bool]


class _Steps(BaseModel, extra="forbid"):
    first_step: Count
    steps: Count
    overlap: Count = 0
    lost: bool = False


class _Nothing(BaseModel, extra="forbid"):
    pass


_TABLES: Mapping[str, type[BaseModel]] = {
    **dict.fromkeys(("train", "stream", "eager"), _Steps),
    **dict.fromkeys(("evaluate", "words"), _Nothing),
}


@dataclass(frozen=True)
class Request:
    """What one task asks, typed and within the policy; whoever performs it relies on that.

    Attributes:
        parameters: Of kinds that take local steps all that they need; of `predict` and of edits what they look into
            themselves.
    """

    kind: str
    revision: int
    parameters: Header


def request_of(policy: Policy, recipe: Recipe, fields: Mapping[str, Any], payload_bytes: int) -> Request:
    """Read one task and hold it against the policy, before anything of it is fetched: all tasks come by here.

    Args:
        recipe: The run's; no revision and no local step is beyond it.
        fields: Of the task's message, from outside.
        payload_bytes: Of its tensors.

    Raises:
        TrainingError: It is no task.
        PolicyError: It goes beyond the policy.
    """
    try:
        found = checked(_Fields, fields)
        if found.kind not in policy.kinds:
            raise PolicyError(f"not allowed here: a task of kind {found.kind!r}")
        if (table := _TABLES.get(found.kind)) is not None:
            checked(table, found.header)
    except ValueError as error:
        raise TrainingError(f"not a task: {error}") from None
    if _TABLES.get(found.kind) is _Steps and found.kind != recipe.training_kind:
        raise PolicyError(f"not allowed here: this run takes no tasks of kind {found.kind!r}")
    first, steps, overlap = (int(found.header.get(key, 0)) for key in ("first_step", "steps", "overlap"))
    if steps + overlap > policy.max_local_steps:
        raise PolicyError(f"not allowed here: {steps} + {overlap} local steps, at most {policy.max_local_steps}")
    if found.revision > recipe.rounds.count or first > recipe.total_local_steps:
        raise PolicyError(f"not allowed here: revision {found.revision}, step {first} are beyond the run")
    if payload_bytes > policy.max_bytes:
        raise PolicyError(f"not allowed here: a message of {payload_bytes} bytes, at most {policy.max_bytes}")
    return Request(found.kind, found.revision, found.header)


def check_size(policy: Policy, contribution: Contribution) -> None:
    """Hold an answer against the policy, before anything of it leaves.

    Raises:
        PolicyError: It is larger than that.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in contribution.tensors.values())
    if size > policy.max_bytes:
        raise PolicyError(f"not allowed here: an answer of {size} bytes, at most {policy.max_bytes}")


def check_kept(policy: Policy, states: int, each: int) -> None:
    """Hold what is kept for a coordinator that goes back to its last checkpoint against the policy.

    Args:
        states: After so many tasks, at most.
        each: Bytes of one.

    Raises:
        PolicyError: They take more room than that.
    """
    if states * each > policy.max_disk:
        hint = "raise `max_disk` in the policy, or ask the coordinator for a shorter `records.checkpoint_every`"
        raise PolicyError(f"{states} states of {each:,} bytes on disk; the policy allows {policy.max_disk:,}", hint)


def local_recipe(recipe: Recipe, name: str, part: Part, shards: str) -> Recipe:
    """The run's recipe as one participant uses it: its own text, model folder and machine, and nobody else's.

    Raises:
        PolicyError: The run is not for this participant, or needs a model folder that it does not name.
    """
    if name not in recipe.participant_names:
        raise PolicyError(f"{name} takes no part in {recipe.name}", f"it is for {', '.join(recipe.participant_names)}")
    others = tuple(
        p.model_copy(update={"source": part.source if p.name == name else None}) for p in recipe.participants
    )
    changes: dict[str, Any] = {
        "participants": others,
        "compute": recipe.compute.model_copy(update={"device": part.device, "threads": part.threads}),
        "data": recipe.data.model_copy(update={"shards": shards}),
    }
    if isinstance(recipe.model, ModelFolder):
        if part.model is None:
            hint = 'name your own copy of it: `model = "FOLDER"` in your part, or --model FOLDER'
            raise PolicyError("the run goes on from a model folder", hint)
        changes["model"] = ModelFolder(path=part.model)
    return recipe.model_copy(update=changes)


def words_contribution(recipe: Recipe, revision: int) -> Contribution:
    """A participant's words and how often they stand in its training text, the words as a JSON list of texts.

    Of more words than `MAX_WORD_BYTES` hold the rarest stay out.
    """
    counts = word_counts(recipe)
    words = _listed(counts)
    text = json.dumps(words, ensure_ascii=False, separators=(",", ":")).encode()
    tensors = {
        "words": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        "counts": torch.tensor([counts[word] for word in words], dtype=torch.int64),
    }
    return Contribution(kind="words", revision=revision, header={"words": len(words)}, tensors=tensors)


def _listed(counts: Counter[str], most_bytes: int = MAX_WORD_BYTES) -> list[str]:
    """Words in order; the most frequent of them, if all are more than fits."""
    often = sorted(counts, key=lambda word: (-counts[word], word))
    ends = accumulate(len(json.dumps(word, ensure_ascii=False).encode()) + 1 for word in often)
    return sorted(word for word, end in zip(often, ends, strict=True) if end < most_bytes)


def words_of(contribution: Contribution, most_bytes: int | None = None) -> Counter[str]:
    """The counts in a contribution of unknown origin.

    Args:
        most_bytes: A participant trains on no more text than that.

    Raises:
        TrainingError: They are none.
    """
    words, counts = contribution.tensors.get("words"), contribution.tensors.get("counts")
    if words is None or counts is None or (words.dtype, counts.dtype) != (torch.uint8, torch.int64) or counts.ndim != 1:
        raise TrainingError("not a count of words")
    try:
        listed = loads(words.numpy().tobytes(), most_bytes=MAX_WORD_BYTES, depth=1)
    except ValueError as error:
        raise TrainingError(f"not a count of words: the words cannot be read ({error})") from None
    numbers = counts.tolist()
    if not isinstance(listed, list) or len(listed) != len(numbers) or any(n < 1 for n in numbers):
        raise TrainingError("not a count of words: words and counts do not match")
    if not all(isinstance(word, str) and 0 < len(word) <= PIECE_CHARACTERS for word in listed) or sum(numbers) > 10**12:
        raise TrainingError("not a count of words: what is counted is not text")
    sizes = [len(word.encode()) for word in listed]
    if len(set(listed)) < len(listed):
        raise TrainingError("not a count of words: a word is counted twice")
    size = sum(map(operator.mul, sizes, numbers))
    if most_bytes is not None and size > most_bytes:
        raise TrainingError(f"words of {size} bytes in all; data.train_bytes is {most_bytes}")
    return Counter(dict(zip(listed, numbers, strict=True)))
