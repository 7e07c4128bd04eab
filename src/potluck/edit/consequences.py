"""What edits did, measured before and after, and said aloud where they had no effect or did harm.

An edit can fail silently: nothing is written where a threshold leaves no direction free, and a model that answers every
edit may have forgotten how to go on. So some answers, the loss of a text and how varied longer texts are stand beside
every edit. `potluck evaluate --edits` asks more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from potluck.compose.base import Base, token_stream
from potluck.compose.training import loss_on
from potluck.edit.contexts import contexts
from potluck.edit.evaluation import Before, answered, answers_before, unchanged
from potluck.edit.facts import Edit
from potluck.edit.fluency import fluency

HELD = 8_000  # characters of a text whose loss is measured, at most a tenth of it
_NEIGHBOURS = 100  # prompts about others that are asked, at most
_TOKENS = 8  # of their answers
_WRITING = 8  # longer texts, at most, all from prompts of one length, so that they are written together
_OWN, _OWN_TOKENS = 16, 48  # texts that the model writes itself, where there is no other
_LENGTH = 128
CHANGED, RISE, FLAT = 0.2, 0.05, 0.85  # of neighbours; in nats a token; share of the fluency: beyond it is harm


@dataclass(frozen=True)
class Watch:
    """A model before it is edited.

    Attributes:
        edits: All of them.
        asked: Edits with those of their neighbours that are asked.
        before: What it says of these.
        stream: Tokens whose loss is measured.
        loss: Nats a token.
        fluency: Of longer texts from the edits' prompts.
    """

    edits: tuple[Edit, ...]
    asked: tuple[Edit, ...]
    before: Before
    stream: np.ndarray
    loss: float
    fluency: float


def parted(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """A text without its end, and the end, whose loss is measured: a tenth, at most `HELD` characters."""
    waiting = min(HELD, sum(map(len, texts)) // 10)
    left, held = list(texts), list[str]()
    while waiting > 0 and left:
        last = left.pop()
        size = min(waiting, len(last))
        held.insert(0, last[len(last) - size :])
        if size < len(last):
            left.append(last[: len(last) - size])
        waiting -= size
    return left, held


def watch(base: Base, edits: Sequence[Edit], held: Sequence[str] = (), seed: int = 0) -> Watch:
    """Measure the model before it is edited.

    Args:
        held: Text whose loss is measured; what the model writes itself if there is none.
        seed: Of what it writes.
    """
    asked = _sampled(edits)
    own = held or contexts(base, seed + 2, _OWN, _OWN_TOKENS)
    stream = token_stream(own, base.vocabulary)
    return Watch(tuple(edits), asked, _said(base, asked), stream, *_wellbeing(base, edits, stream, seed))


def consequences(base: Base, watched: Watch, seed: int = 0) -> dict[str, Any]:
    """The same after the edits, shares between 0 and 1, and what is wrong, ``warnings``, if something is."""
    told = answered(base, [(edit.prompt, edit.target) for edit in watched.edits])
    found: dict[str, Any] = {
        "edits": len(watched.edits),
        "told": _share(told.begins),
        "told_exactly": _share(told.exactly),
    }
    if watched.before.said:
        same = unchanged(base, watched.asked, watched.before, _said(base, watched.asked))
        found |= {"neighbours": len(same.begins), "neighbours_unchanged": _share(same.begins)}
    loss, fluent = _wellbeing(base, watched.edits, watched.stream, seed)
    found |= {"loss_before": watched.loss, "loss": loss, "fluency_before": watched.fluency, "fluency": fluent}
    missed = [edit.id for edit, right in zip(watched.edits, told.begins, strict=True) if not right]
    if warnings := _warnings(found, missed):
        found["warnings"] = warnings
    return found


def _wellbeing(base: Base, edits: Sequence[Edit], stream: np.ndarray, seed: int) -> tuple[float, float]:
    lengths: dict[int, list[str]] = {}
    for edit in edits:
        lengths.setdefault(len(base.vocabulary.prompt(edit.prompt)), []).append(edit.prompt)
    prompts = max(lengths.values(), key=len)[:_WRITING]
    return loss_on(base.model, stream, _LENGTH), fluency(base, prompts, seed=seed)


def _said(base: Base, asked: Sequence[Edit]) -> Before:
    return answers_before(base, asked, tokens=_TOKENS)


def _sampled(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """The edits with at most `_NEIGHBOURS` prompts about others in all, alike many of each."""
    each = max(1, _NEIGHBOURS // max(1, len(edits)))
    some = edits[:: max(1, len(edits) // _NEIGHBOURS)]
    return tuple(replace(edit, neighbours=edit.neighbours[:each]) for edit in some)


def _warnings(found: dict[str, Any], missed: Sequence[str]) -> list[str]:
    warnings = []
    if len(missed) == found["edits"]:
        warnings.append("the edits had no effect: the model answers none of them; other layers or `--at` may do")
    elif missed:
        shown = ", ".join(missed[:10]) + (" …" if len(missed) > 10 else "")
        warnings.append(f"{len(missed)} of {found['edits']} edits are not answered: {shown}")
    changed = 1 - found.get("neighbours_unchanged", 1.0)
    if changed > CHANGED:
        warnings.append(f"{changed:.0%} of {found['neighbours']} answers about others changed")
    if not found["loss"] - found["loss_before"] <= RISE:
        warnings.append(f"the text's loss rose from {found['loss_before']:.3f} to {found['loss']:.3f} nats a token")
    if found["fluency"] < FLAT * found["fluency_before"]:
        warnings.append(
            f"what the model writes repeats itself: fluency fell from {found['fluency_before']:.0f} to "
            f"{found['fluency']:.0f}"
        )
    return warnings


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
