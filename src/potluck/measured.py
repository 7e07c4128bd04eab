"""What was measured of the ways to exchange: all that `potluck plan` knows of loss, without torch.

Every row is a run beside one of as many local steps that exchanges everything in full precision every 10 local steps:
two participants, plain averaging, a Llama of 0.2M parameters (``python -m benchmarks.outer_steps --full``; the table is
in ``docs/results``). A way to exchange is near full precision where its run ended at most `MOST_OVER` above that one in
loss, and kept all but `MOST_LOST` of what training gained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from potluck.files import page
from potluck.recipe.updates import BlockTopK, ErrorFeedback, LinkTable, Quantize, QuantizedDownload, Updates

RANDOM, TRAINED = "random weights", "a trained model"
PARAMETERS = 217_728
WHERE = f"{page('results/README.md')}, how many outer steps a codec needs"
MOST_OVER, MOST_LOST = 2.0, 10.0  # percent
FULL = "fp32"
_LINKS: dict[str, tuple[LinkTable, ...]] = {
    FULL: (),
    "int8": (Quantize(bits=8, block=256),),
    "int4": (Quantize(bits=4, block=64),),
    "sparse": (ErrorFeedback(decay=0.95), BlockTopK(k=64, block=4096), Quantize(bits=2, block=64)),
}
_DOWN = QuantizedDownload(bits=8, block=256)
CODECS: dict[str, Updates] = {
    **{name: Updates(links=links) for name, links in _LINKS.items()},
    **{f"{name}, down int8": Updates(links=links, download=_DOWN) for name, links in _LINKS.items() if links},
}


@dataclass(frozen=True)
class Measured:
    """One run beside its reference.

    Attributes:
        start: What it started from.
        fragments, overlap: 1, 0 exchanges everything at once and waits.
        period: Local steps between two exchanges of the same parameters, H.
        outer_steps: Of each parameter.
        loss: Bits per byte of held-out text at the end.
    """

    start: str
    codec: str
    period: int
    outer_steps: int
    loss: float
    fragments: int = 1
    overlap: int = 0

    @property
    def over(self) -> float:
        """Loss above the reference's, in percent."""
        _, reference = REFERENCES[self.start, self.period * self.outer_steps]
        return 100 * (self.loss / reference - 1)

    @property
    def lost(self) -> float:
        """Of what the reference gained in loss, in percent."""
        before, reference = REFERENCES[self.start, self.period * self.outer_steps]
        return 100 * (self.loss - reference) / (before - reference)

    @property
    def near(self) -> bool:
        """Whether it counts as near full precision."""
        return self.over <= MOST_OVER and self.lost <= MOST_LOST


# Bits per byte before the local steps, and after them in full precision every 10.
REFERENCES = {
    (RANDOM, 50): (7.9050, 4.4156),
    (RANDOM, 200): (7.9050, 3.8845),
    (RANDOM, 500): (7.9050, 3.2394),
    (TRAINED, 50): (3.4518, 3.3055),
    (TRAINED, 200): (3.4518, 3.1114),
    (TRAINED, 500): (3.4518, 2.8875),
}
MEASURED = (
    *(Measured(start, FULL, 10, steps // 10, reference) for (start, steps), (_, reference) in REFERENCES.items()),
    Measured(RANDOM, "int8", 10, 5, 4.4157),
    Measured(RANDOM, "int8", 10, 20, 3.8749),
    Measured(RANDOM, "int8", 10, 50, 3.2502),
    Measured(RANDOM, "int4", 10, 5, 4.4151),
    Measured(RANDOM, "int4", 10, 20, 3.8778),
    Measured(RANDOM, "int4", 10, 50, 3.2449),
    Measured(RANDOM, "sparse", 10, 5, 6.2695),
    Measured(RANDOM, "sparse", 10, 20, 3.9498),
    Measured(RANDOM, "sparse", 10, 50, 3.4590),
    Measured(RANDOM, "int8, down int8", 10, 5, 4.4158),
    Measured(RANDOM, "int8, down int8", 10, 20, 3.8267),
    Measured(RANDOM, "int8, down int8", 10, 50, 3.2452),
    Measured(RANDOM, "int4, down int8", 10, 5, 4.4152),
    Measured(RANDOM, "int4, down int8", 10, 20, 3.8202),
    Measured(RANDOM, "int4, down int8", 10, 50, 3.2494),
    Measured(RANDOM, "sparse, down int8", 10, 5, 6.2691),
    Measured(RANDOM, "sparse, down int8", 10, 20, 3.9550),
    Measured(RANDOM, "sparse, down int8", 10, 50, 3.4662),
    Measured(TRAINED, "int8", 10, 5, 3.3055),
    Measured(TRAINED, "int8", 10, 20, 3.1115),
    Measured(TRAINED, "int4", 10, 5, 3.3058),
    Measured(TRAINED, "int4", 10, 20, 3.1111),
    Measured(TRAINED, "sparse", 10, 5, 3.3678),
    Measured(TRAINED, "sparse", 10, 20, 3.2377),
    Measured(TRAINED, "sparse", 10, 50, 3.0118),
    Measured(TRAINED, "int8, down int8", 10, 5, 3.3055),
    Measured(TRAINED, "int8, down int8", 10, 20, 3.1115),
    Measured(TRAINED, "int4, down int8", 10, 5, 3.3058),
    Measured(TRAINED, "sparse, down int8", 10, 5, 3.3677),
    Measured(TRAINED, "sparse, down int8", 10, 20, 3.2373),
    Measured(RANDOM, FULL, 50, 10, 3.4163),
    Measured(RANDOM, FULL, 100, 5, 3.4517),
    Measured(RANDOM, "int8, down int8", 50, 10, 3.3964),
    Measured(RANDOM, FULL, 20, 25, 3.3478, fragments=4, overlap=1),
    Measured(TRAINED, FULL, 40, 5, 3.1363),
    Measured(TRAINED, FULL, 50, 10, 2.9310),
    Measured(TRAINED, FULL, 100, 5, 2.9499),
    Measured(TRAINED, FULL, 20, 10, 3.1358, fragments=4, overlap=1),
)


@dataclass(frozen=True)
class Judgement:
    """What is known of a setting.

    Attributes:
        near: Near full precision, or not; ``None`` if nothing was measured.
        row: What says so.
    """

    near: bool | None
    row: Measured | None = None

    def __str__(self) -> str:
        if self.row is None:
            return "not measured"
        row = self.row
        return (
            f"measured from {row.start}, {row.outer_steps} outer steps of {row.period} local steps: loss "
            f"{row.over:+.1f}%, {row.lost:.0f}% of the gain lost"
        )


def judged(start: str, codec: str, fragments: int, overlap: int, period: int, outer_steps: int) -> Judgement:
    """What the measured runs say of a setting; the figures are those of `Measured`.

    It is far from full precision if a run with as many outer steps or more, as close to each other or closer, was. It
    is near if the run with the most outer steps, at most its own and as far from each other or further, was.
    """
    rows = list(_rows(start, codec, fragments, overlap))
    far = [row for row in rows if not row.near and row.outer_steps >= outer_steps and row.period <= period]
    if far:
        return Judgement(False, min(far, key=lambda row: row.outer_steps))
    reached = [row for row in rows if row.outer_steps <= outer_steps and row.period >= period]
    if codec != FULL and period < min((row.period for row in rows), default=0):
        reached = []  # of a smaller step a code may lose more
    last = max(reached, key=lambda row: row.outer_steps, default=None)
    return Judgement(True, last) if last is not None and last.near else Judgement(None)


def _rows(start: str, codec: str, fragments: int, overlap: int) -> Iterator[Measured]:
    for row in MEASURED:
        if (row.start, row.codec) != (start, codec):
            continue
        alike = (row.fragments, row.overlap) == (fragments, overlap)
        if alike or (fragments > 1 and row.fragments >= fragments and row.overlap >= overlap):
            yield row
