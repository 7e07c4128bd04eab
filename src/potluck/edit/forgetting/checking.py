"""What `potluck evaluate --forgotten` prints: whether what was forgotten is gone, or comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from potluck.compose.base import Base, load_base
from potluck.edit.forgetting.quality import forget_quality, known_of, truth_ratios
from potluck.edit.forgetting.quantised import Bits, quantised
from potluck.edit.forgetting.questions import Question, read_questions
from potluck.edit.forgetting.relearning import Relearning, relearning_rate, relearning_steps
from potluck.errors import EditError, ModelError, RecipeError

_FORMS: dict[str, Bits | None] = {"as it is": None, "in 8 bits": 8, "in 4 bits": 4}
_BACK, _SOON = 0.5, 5  # a share of the probability before; steps


def check_forgotten(
    model: Path,
    forgotten: Path,
    before: Path | None,
    never: Path | None = None,
    task: str = "",
    on_step: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Ask for what was forgotten: as it is, in 8 and in 4 bits, while a tenth of it is learned again.

    Args:
        before: The model before it forgot.
        never: One that was trained in the same way, without what was to be forgotten: gives the forget quality.

    Raises:
        EditError: The file of questions is wrong, or has no wrong answers, which ``never`` needs.
        ModelError: A model cannot be used, or has another tokenizer.
        RecipeError: The model before it forgot is missing.
    """
    if before is None:
        raise RecipeError("--forgotten needs --before: the model before it forgot")
    questions = read_questions(forgotten, task)
    after = load_base(model, "auto")
    models = {"before": _like(before, after), "after": after}
    if never is not None:
        models["never"] = _like(never, after)
        if not all(q.perturbed for q in questions):
            raise EditError(f"{forgotten}: a question has no wrong answers", "--never needs perturbed_answer")
    on_step("asking each model, also in 8 and in 4 bits")
    asked = {
        name: {form: _asked(base, questions, bits) for form, bits in _FORMS.items()} for name, base in models.items()
    }
    found: dict[str, Any] = {"questions": len(questions), "models": asked}
    if len(questions) > 1:
        on_step("learning a tenth again")
        settings = Relearning(learning_rate=relearning_rate(after))
        knew = asked["before"]["as it is"]["probability"]
        found["relearning_steps"] = {
            name: relearning_steps(models[name], questions, knew, settings) for name in models if name != "before"
        }
    if never is not None:
        ratios = {name: truth_ratios(base, questions) for name, base in models.items()}
        found["truth_ratio"] = {name: float(ratio.log().mean().exp()) for name, ratio in ratios.items()}
        found["forget_quality"] = {name: forget_quality(ratios[name], ratios["never"]) for name in ("before", "after")}
    return found | {"warnings": warnings_of_checks(found)}


def warnings_of_checks(found: Mapping[str, Any]) -> list[str]:
    """What a person has to be told: what still knows it, and what brings it back."""
    asked, told = found["models"], []
    knew = asked["before"]["as it is"]["probability"]
    for form, figures in asked["after"].items():
        if figures["probability"] > _BACK * knew or figures["said"] > _BACK * asked["before"]["as it is"]["said"]:
            told.append(
                f"{form} the model still knows it: probability {figures['probability']:.3f} (before: {knew:.3f}), "
                f"said word for word {figures['said']:.0%}"
            )
    steps = found.get("relearning_steps", {}).get("after")
    if steps is not None and steps <= _SOON:
        told.append(f"it comes back after {steps} steps of learning a tenth of it")
    return told


def _asked(base: Base, questions: Sequence[Question], bits: Bits | None) -> dict[str, float]:
    base = base if bits is None else quantised(base, bits)
    known = known_of(base, [(q.question, q.answer) for q in questions])
    strengths = known.told.extraction_strengths
    return {
        "probability": float(known.told.probabilities.mean()),
        "said": known.said,
        "rouge": known.rouge,
        "extraction_strength": sum(strengths) / len(strengths),
    }


def _like(place: Path, model: Base) -> Base:
    other = load_base(place, "auto")
    if other.vocabulary.content_hash != model.vocabulary.content_hash:
        raise ModelError(f"{place}: has another tokenizer than {model.place}", "name a model of the same kind")
    return other
