"""How soon what was forgotten comes back: fine-tuning on a tenth of it, watching the other nine."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from potluck.compose.base import Base
from potluck.edit.forgetting.losses import mean_nll
from potluck.edit.forgetting.quality import told_of
from potluck.edit.forgetting.questions import Question
from potluck.edit.forgetting.unlearning import default_rate, question_rows
from potluck.edit.prompts import logits_of, rows_of
from potluck.errors import EditError


@dataclass(frozen=True)
class Relearning:
    """How it is tried.

    Attributes:
        share: Of the questions, that are learned again; at least one.
        learning_rate: Of AdamW.
        max_steps: After which it is taken not to come back.
        seed: Decides which questions.
    """

    share: float = 0.1
    learning_rate: float = 1e-4
    max_steps: int = 50
    seed: int = 0


def relearning_rate(base: Base) -> float:
    """Twice the rate of forgetting (`potluck.edit.forgetting.unlearning.default_rate`)."""
    return 2 * default_rate(base)


def relearning_steps(base: Base, forgotten: Sequence[Question], knew: float, settings: Relearning) -> int:
    """Steps until the questions that are not learned again have half of their probability back, on a copy.

    Args:
        knew: Their mean probability before anything was forgotten.

    Returns:
        0 if they never lost it; ``max_steps + 1`` if they do not get it back.

    Raises:
        EditError: There are fewer than two questions.
    """
    if len(forgotten) < 2:
        raise EditError("relearning needs two questions at least: one is learned, the other watched")
    count = max(1, round(settings.share * len(forgotten)))
    again = set(random.Random(settings.seed).sample(range(len(forgotten)), count))
    watched = [(q.question, q.answer) for i, q in enumerate(forgotten) if i not in again]
    rows = question_rows(base, [forgotten[i] for i in sorted(again)])
    model = copy.deepcopy(base.model)
    copied = replace(base, model=model)
    batch = rows_of(rows, base.vocabulary.end_of_text).to(model.device)
    model.requires_grad_(True)
    adam = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.0)
    for step in range(settings.max_steps + 1):
        if float(told_of(copied, watched).probabilities.mean()) >= knew / 2:
            return step
        if step < settings.max_steps:
            adam.zero_grad(set_to_none=True)
            mean_nll(logits_of(model, batch), batch.labels).backward()
            adam.step()
    return settings.max_steps + 1
