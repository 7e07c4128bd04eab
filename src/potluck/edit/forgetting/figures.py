"""What is measured before and after, and what has to be said aloud of it: no effect, part of it, or harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from potluck.compose.base import Base
from potluck.edit.consequences import RISE
from potluck.edit.forgetting.general import loss_of
from potluck.edit.forgetting.quality import known_of, model_utility, said_rate, truth_ratios, utility_of
from potluck.edit.forgetting.questions import Question

# When something is said, as shares of what was before.
_NOTHING, _HALF, _KEPT = 0.9, 0.5, 0.9
_UNKNOWN = 0.1  # a probability below which an answer was not known


def figures(
    base: Base, questions: Sequence[Question], kept: Sequence[Question], text: Tensor | None = None
) -> dict[str, float]:
    """What a model knows of both sets, and the loss of a general text.

    A truth ratio is there only where all questions have wrong answers. "Said" and "rouge" are of free answers.

    Args:
        text: Rows of tokens (`potluck.edit.forgetting.general`).
    """
    known = known_of(base, [(q.question, q.answer) for q in questions])
    found = {
        "forget_probability": float(known.told.probabilities.mean()),
        "forget_said": known.said,
        "forget_rouge": known.rouge,
        "extraction_strength": _mean(known.told.extraction_strengths),
        "exact_memorisation": _mean(known.told.memorised),
    }
    again = [(q.paraphrased_question, q.answer) for q in questions if q.paraphrased_question]
    if again:
        found["forget_said_paraphrased"] = said_rate(base, again)
    if all(q.perturbed for q in questions):
        found["forget_truth_ratio"] = float(truth_ratios(base, questions).log().mean().exp())
    if kept:
        stays = known_of(base, [(q.question, q.answer) for q in kept])
        found["retain_probability"] = float(stays.told.probabilities.mean())
        found["retain_said"], found["retain_rouge"] = stays.said, stays.rouge
        if all(q.perturbed for q in kept):
            found["retain_utility"] = model_utility([utility_of(base, kept, known=stays)])
    if text is not None:
        found["text_loss"] = loss_of(base, text)
    return found


def warnings_of(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """What a person has to be told of a forgetting, in sentences; none if it did what it should and no harm."""
    found = []
    chance = f"probability {before['forget_probability']:.3f}, now {after['forget_probability']:.3f}"
    said = f"said word for word {before['forget_said']:.0%}, now {after['forget_said']:.0%}"
    left = [after[name] / before[name] for name in ("forget_probability", "forget_said") if before[name]]
    if before["forget_probability"] < _UNKNOWN and not before["forget_said"]:
        found.append(f"the model hardly knew these answers before ({chance}): ask as it was taught")
    elif min(left) > _NOTHING:
        found.append(f"nothing was forgotten ({chance}; {said})")
    elif max(left) > _HALF:
        found.append(f"forgotten in part only ({chance}; {said})")
    stays = [name for name in ("retain_probability", "retain_said") if before.get(name)]
    if any(not after[name] >= _KEPT * before[name] for name in stays):
        figures = "; ".join(f"{name[7:]} {before[name]:.3f}, now {after[name]:.3f}" for name in stays)
        found.append(f"harm: of what was to stay, something went, too ({figures})")
    if "text_loss" in before and not after["text_loss"] <= before["text_loss"] + RISE:
        loss = f"{before['text_loss']:.3f}, now {after['text_loss']:.3f} nats a token"
        found.append(f"harm: general text is foretold worse (loss {loss})")
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
