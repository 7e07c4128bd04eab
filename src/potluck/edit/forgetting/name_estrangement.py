"""Forgetting somebody: at the name, the model gets what it has at the name of somebody it never heard of.

A refusal that is edited in stands before what is known, and below it the right answer stays likelier than wrong ones:
a truth ratio sees that. Here nothing is put in an answer's place. The residual stream at the last token of the
subject, or of the prompt, becomes that for an invented name, ``z = mean h(stranger)``, and is written like any edit, in
AlphaEdit's null space of what shall stay. Whatever the model says of strangers, it then says of the subject; a refusal
may be edited in after it.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from potluck.aggregation.statistics import Statistics
from potluck.compose.base import Base
from potluck.edit.closed_form import alphaedit_update, asked_in, null_space, sums
from potluck.edit.contexts import Site, contexts, hidden_at, keys_at
from potluck.edit.facts import Edit
from potluck.edit.forgetting.questions import Question
from potluck.edit.forgetting.subjects import nobodies, with_subjects
from potluck.edit.layout import layout_of
from potluck.edit.moments import moment_of
from potluck.edit.weights import add


@dataclass(frozen=True)
class Strangers:
    """How it is done.

    Attributes:
        layers: Whose maps are written.
        at: Whose last token, the subject's or the prompt's: there the model gets what it has for a stranger.
        null_weight: λ of AlphaEdit, in units of what a key has in the free directions (`WeightSettings`).
        free: Share of all directions, those that the text uses least, that are written to.
        count: Strangers whose states are averaged for each subject.
        ways: Beginnings of questions in which each subject is met, the commonest, if its last token is edited.
        seed: Of names and contexts.
    """

    layers: tuple[int, ...] = (1, 2)
    at: Site = "subject"
    null_weight: float = 0.5
    free: float = 0.65
    count: int = 1
    ways: int = 16
    seed: int = 0


def estranged(
    base: Base, forget: Sequence[Question], retain: Sequence[Question], moments: Statistics, settings: Strangers
) -> Base:
    """A copy of the model to which the subjects of what is to be forgotten are strangers.

    Args:
        retain: From its questions names are made, and in their beginnings subjects are met; may be empty.
        moments: Of text that shall stay as it is (`potluck.edit.moments`), measured on this model.

    Raises:
        EditError: A question names no subject.
        ModelError: The model's layout is not known.
    """
    edited = Base(copy.deepcopy(base.model), base.vocabulary, base.place)
    layout = layout_of(edited.model)
    layers = layout.check_layers(settings.layers)
    gone, others = with_subjects(forget), [q for q in with_subjects(retain, strict=False) if q.subject]
    met = _met(gone, others, settings.ways) if settings.at == "subject" else asked_as_edits(gone)
    z = torch.zeros(len(met), layout.d_out, dtype=torch.float64)
    names = nobodies([q.subject for q in (*gone, *others)], settings.seed)
    draw = random.Random(settings.seed)
    by_subject = {subject: draw.sample(names, min(settings.count, len(names))) for subject in _subjects(gone)}
    for place in range(min(settings.count, len(names))):
        as_strangers = [_as(edit, by_subject[edit.subject][place]) for edit in met]
        z += hidden_at(base, layout_of(base.model), layers[-1], as_strangers, settings.at)
    z /= min(settings.count, len(names))
    before = contexts(base, settings.seed)
    none = torch.zeros(layout.d_in, layout.d_in, dtype=torch.float64)
    for place, layer in enumerate(layers):
        keys = keys_at(edited, layout, (layer,), met, before, settings.at)[layer]
        residuals = (z - hidden_at(edited, layout, layers[-1], met, settings.at)) / (len(layers) - place)
        free = null_space(moment_of(moments, moments.base_hash, layout, layer), settings.free)
        m, g = sums(keys, residuals)
        add(layout, layer, alphaedit_update(m, g, none, free, settings.null_weight * asked_in(g, free, len(keys))))
    return edited


def _met(gone: Sequence[Question], others: Sequence[Question], ways: int) -> list[Edit]:
    """Each subject after each beginning of a question, up to its last token: what follows does not change its key."""
    before = Counter(q.question[: q.question.rfind(q.subject)] for q in (*gone, *others))
    common = [beginning for beginning, _ in before.most_common(ways)]
    own = {s: [q.question[: q.question.rfind(s)] for q in gone if q.subject == s] for s in _subjects(gone)}
    return [
        Edit(f"{subject} {place}", beginning + subject, subject, "-")
        for subject in own
        for place, beginning in enumerate(dict.fromkeys([*own[subject], *common]))
    ]


def asked_as_edits(questions: Sequence[Question]) -> list[Edit]:
    """Questions as prompts with a subject, for editors."""
    return [Edit(q.id, q.question, q.subject, q.answer) for q in questions]


def _as(edit: Edit, name: str) -> Edit:
    begin = edit.prompt.rfind(edit.subject)
    return replace(edit, prompt=edit.prompt[:begin] + name + edit.prompt[begin + len(edit.subject) :], subject=name)


def _subjects(questions: Sequence[Question]) -> list[str]:
    return list(dict.fromkeys(q.subject for q in questions))
