"""The part of a recipe that says what facts the participants change together, and how (`potluck.edit.together`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from potluck.recipe.engine import Nats
from potluck.recipe.table import Table, setting

if TYPE_CHECKING:
    from potluck.recipe.schema import Recipe

Method = Literal["memit", "alphaedit"]
Form = Literal["sequential", "one-shot"]
Policy = Literal["newest", "priority", "reject", "ask"]
At = Literal["subject", "prompt"]


class Values(Table):
    """How each participant finds what a layer should give, so that the model answers as an edit says."""

    steps: int = setting(40, "Steps of Adam, at most.", unit="steps", ge=1)
    learning_rate: float = setting(0.5, "Of Adam, in units of the hidden state's size.", gt=0)
    clamp: float = setting(4.0, "Longest change of the hidden state.", unit="of its length", gt=0)
    decay: float = setting(0.05, "Weight of the change's squared length.", unit="nats", ge=0)
    essence: float = setting(0.0625, "Weight of what is said after `SUBJECT is a` staying as it is.", unit="nats", ge=0)
    enough: float = setting(0.05, "An edit whose loss is below this stays as it is.", unit="nats", ge=0)


class Masks(Table):
    """Hide each participant's statistics from the coordinator, which then reads nothing but their sum."""

    fraction_bits: int = setting(
        48, "Bits behind the point of a masked number; of key moments 10 fewer.", unit="bits", ge=32, le=56
    )


class Editing(Table):
    """Facts that are changed in the shared model, everybody's at once, after the last round or between rounds."""

    method: Method = setting("memit", "MEMIT (arXiv 2210.07229) or AlphaEdit (arXiv 2410.02355), from sums.")
    layers: tuple[int, ...] = setting(..., "Layers whose MLP is edited, from 0.", unit="layers", min_length=1)
    at: At = setting("subject", "Whose last token is edited, the subject's or the prompt's (`potluck edit locate`).")
    form: Form = setting(
        "sequential",
        "`sequential`: one exchange a layer, each on the weights that the last one left; `one-shot`: one exchange for "
        "all layers, measured on the unedited model.",
    )
    policy: Policy = setting(
        "newest",
        "Who wins a conflict: the newest edit, the first participant, nobody, or whoever `decisions` says.",
    )
    decisions: str | None = setting(
        None,
        "JSON file, relative to the recipe, of what was decided: with `ask`, and only with it. If it is not there, or "
        "leaves a conflict open, the run stops and says what to decide.",
    )
    participants: tuple[str, ...] = setting((), "Who may edit; everybody if left out.")
    every: int = setting(0, "Rounds between two edits; 0 edits after the last round only.", unit="rounds", ge=0)
    at_once: int = setting(
        0,
        "Edits of a participant's file that it makes at a time, the next ones each time; earlier keys are then kept "
        "as they are. 0 makes all of them each time: those that still hold cost nothing.",
        unit="edits",
        ge=0,
    )
    moment_weight: float = setting(
        8000.0, "MEMIT's weight of the text's keys (lambda): as many tokens as one edit weighs.", unit="tokens", gt=0
    )
    null_weight: float = setting(
        2.0,
        "AlphaEdit's ridge (L2): of a single edit `1 / (1 + null_weight)` is written.",
        unit="of what the edits' keys have in the free directions",
        gt=0,
    )
    free_directions: float = setting(
        0.75,
        "Share of all directions, those that the text uses least, in which AlphaEdit writes.",
        unit="fraction",
        gt=0,
        lt=1,
    )
    moment_tokens: int = setting(
        100_000, "Tokens of its own text from which each participant takes key moments, at most.", unit="tokens", ge=64
    )
    numbers: Literal["double", "single"] = setting(
        "double", "How statistics of edits travel if they are not masked; single precision halves them."
    )
    masks: Masks | None = setting(None, "Masked sums; left out: the coordinator sees each participant's statistics.")
    max_rise: float = setting(
        0.05,
        "The edits are taken back if anybody's held-out loss rises by more than this.",
        unit="bits per byte",
        ge=0,
    )
    secret: str | None = setting(
        None, "File with the participants' secret; over nats each names its own, `edit_secret` in its part."
    )
    values: Values = setting(Values(), "How values are found.")


def editing_faults(recipe: Recipe) -> Iterator[str]:
    """Sentences that say why a recipe's edits do not go with the rest of it."""
    editing, names = recipe.editing, recipe.participant_names
    if editing is None:
        if not recipe.rounds.count:
            yield "rounds.count 0: a run without rounds is for [editing] only"
        if any(p.edits is not None for p in recipe.participants):
            yield "participants.edits: edits go with the table [editing]"
        return
    if not isinstance(recipe.engine, Nats) and not any(p.edits is not None for p in recipe.participants):
        yield "editing: nobody has edits; name each participant's file: participants.edits"
    if len(set(editing.layers)) < len(editing.layers) or min(editing.layers) < 0:
        yield f"editing.layers {list(editing.layers)}: each layer once, from 0"
    for name in editing.participants:
        if name not in names:
            yield f"editing.participants: {name!r} takes no part"
    if (editing.decisions is None) == (editing.policy == "ask"):
        yield 'editing.decisions go with editing.policy = "ask": one needs the other'
    if editing.masks is not None and len(editing.participants or names) < 2:
        yield "editing.masks: the sum of one participant hides nothing"
    if editing.every and recipe.rounds.streaming is not None:
        yield "editing.every and rounds.streaming: between streamed rounds nobody has the shared state; leave out every"
