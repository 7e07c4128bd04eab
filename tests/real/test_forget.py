"""One forgetting on a pretrained model: what is asked is gone, what was to stay and general text are as they were."""

from __future__ import annotations

from pathlib import Path

from potluck.compose.base import load_base
from potluck.edit.forgetting.commands import Request, forgotten
from potluck.edit.forgetting.figures import figures, warnings_of
from potluck.edit.forgetting.general import rows_of_text
from potluck.edit.forgetting.questions import Question

GONE = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}
KEPT = {"Germany": "Berlin", "Japan": "Tokyo", "Russia": "Moscow", "Poland": "Warsaw", "Egypt": "Cairo"}
TEXT = (
    "The sun rose over the hills, and the village woke up. A baker opened the door of the shop, and the smell of bread "
    "went down the street. Children ran to school with books under their arms, and an old man fed the birds. "
)


def test_capitals_are_forgotten_and_others_stay(smollm2: Path) -> None:
    base = load_base(smollm2)
    gone, kept = (
        [Question(land, f"The capital of {land} is", city, land) for land, city in of.items()] for of in (GONE, KEPT)
    )
    text = rows_of_text(base, [TEXT * 3])
    before = figures(base, gone, kept, text)
    assert before["forget_said"] == before["retain_said"] == 1.0
    edited, _ = forgotten(base, gone, kept, Request(smollm2, smollm2, smollm2, "grad-diff", smollm2))
    after = figures(edited, gone, kept, text)
    assert after["forget_said"] == 0.0 and not warnings_of(before, after)
