"""One forgetting on a pretrained model: what is asked is gone, what was to stay and general text are as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from potluck.compose.base import load_base
from potluck.edit.forgetting.commands import Request, forgotten
from potluck.edit.forgetting.figures import figures, warnings_of
from potluck.edit.forgetting.general import rows_of_text
from potluck.edit.forgetting.questions import Question

GONE = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}
KEPT = {
    "Germany": "Berlin", "Japan": "Tokyo", "Russia": "Moscow", "Greece": "Athens", "Austria": "Vienna",
    "Norway": "Oslo", "Sweden": "Stockholm", "China": "Beijing", "Hungary": "Budapest", "Ireland": "Dublin",
}  # fmt: skip
TEXT = (
    "The sun rose over the hills, and the village woke up. A baker opened the door of the shop, and the smell of bread "
    "went down the street. Children ran to school with books under their arms, and an old man fed the birds. "
)


def test_capitals_are_forgotten_and_what_is_harmed_is_said(smollm2: Path) -> None:
    base = load_base(smollm2)
    gone, kept = (
        [Question(land, f"The capital of {land} is", city, land) for land, city in of.items()] for of in (GONE, KEPT)
    )
    text = rows_of_text(base, [TEXT * 3])
    before = figures(base, gone, kept, text)
    assert before["forget_said"] == before["retain_said"] == 1.0
    request = Request(smollm2, smollm2, smollm2, "grad-diff", smollm2)
    after, in_one_pass = (
        figures(forgotten(base, gone, kept, how)[0], gone, kept, text) for how in (request, replace(request, epochs=1))
    )
    assert after["forget_said"] == 0 and after["forget_probability"] < 0.25 * before["forget_probability"]
    assert after["retain_said"] == 1.0 and warnings_of(before, after) == []
    assert in_one_pass["forget_said"] == 0
    assert in_one_pass["retain_said"] == 1.0 or any("stay" in told for told in warnings_of(before, in_one_pass))
