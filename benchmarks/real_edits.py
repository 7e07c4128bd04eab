"""Editing a real pretrained model: every method of `potluck edit apply` at its defaults, on ten facts of CounterFact.

All at once, and one after the other; the model is asked after the last. ``--model`` is its folder, such as
SmolLM2-135M-Instruct, ``--edits`` a file of edits, ``--text`` a text: its end, held out, is that whose loss is
measured, what is before it is what edits of weights leave alone (key moments are kept in ``--keep``).

**begins**, **rephrase**: free answers that begin with the target, to the prompt and to its rephrases; **exact**: those
that are the target. **neighbours**: free answers about others that begin as before. **ES**, **PS**, **NS** are
CounterFact's. **loss**: of the text, nats a token. ``--count`` edits are taken, with ``--neighbours`` and as many
rephrases of each.

``python -m benchmarks.real_edits --full --model FOLDER --edits FILE --text FILE [--methods memit,wise] [--ways once]``
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks._measure import Measurement, main, measured
from potluck.compose.base import Base, load_base, texts_of, token_stream
from potluck.compose.training import loss_on
from potluck.corpus.world import documents_of
from potluck.edit.consequences import parted
from potluck.edit.evaluation import Before, answers_before, as_percent, score_edits
from potluck.edit.facts import Edit, read_edits
from potluck.edit.requests import BESIDE, IN_WEIGHTS, TUNED, Request, default_layers, edited
from potluck.edit.side_memory import attached
from potluck.edit.weights import WeightEditor
from potluck.edit.world_edits import changed_world

ASSET = Path(__file__).parents[1] / "tests/assets/world"
METHODS = (*IN_WEIGHTS, *BESIDE, *TUNED)
_TOKENS = 8  # of an answer about others
_FLUENT = 3  # edits whose longer answers are looked at
WAYS = {"once": 0, "one by one": 1}  # edits in a batch
SHOWN = {
    "begins": "reliability", "rephrase": "rephrase", "neighbours": "locality", "exact": "exact_reliability",
    "ES": "es", "PS": "ps", "NS": "ns", "fluency": "fluency",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        model: Folder of the pretrained model.
        edits: File of edits, of which the first ``count`` are made, each judged by ``neighbours`` prompts about others
            and as many rephrases, at most.
        text: Whose loss is measured, and which is left alone.
        keep: Where key moments are kept.
        methods: Of `potluck edit apply`.
        ways: In which the edits are made.
    """

    model: Path | None = None
    edits: Path | None = None
    text: Path | None = None
    keep: Path = Path("runs/moments")
    count: int = 10
    neighbours: int = 3
    methods: tuple[str, ...] = METHODS
    ways: tuple[str, ...] = tuple(WAYS)


SIZES = {"short": Size(count=2, methods=("memit", "grace"), ways=("once",)), "full": Size()}


@dataclass(frozen=True)
class Asked:
    """Edits, a text that edits of weights leave alone, and a text whose loss is measured."""

    edits: list[Edit]
    protected: list[str]
    held: list[str]
    keep: Path


def measure(size: Size) -> list[Measurement]:
    """Figures of each method; without a model the short form takes that of the tests and facts of its world."""
    if size.model and size.edits and size.text:
        some = read_edits(size.edits, left_out=[])[: size.count]
        return of_model(size, load_base(size.model), Asked(_fewer(some, size), *parted(texts_of(size.text)), size.keep))
    if size.model or size.count > 2:
        return [measured("editing a real model", [], "", peer="needs --model, --edits and --text")]
    with TemporaryDirectory() as keep:
        some = _fewer(changed_world(size.count, 0), size)
        return of_model(size, load_base(ASSET), Asked(some, *parted(list(documents_of(40))), Path(keep)))


def of_model(size: Size, base: Base, asked: Asked) -> list[Measurement]:
    """Figures of each method and way on one model."""
    before, stream = answers_before(base, asked.edits, tokens=_TOKENS), token_stream(asked.held, base.vocabulary)
    found = _rows("as it was", _figures(base, asked.edits, before, loss_on(base.model, stream, 128)))
    for method in size.methods:
        for way in size.ways:
            name = f"{method}, {way}"
            copied = replace(base, model=copy.deepcopy(base.model))
            request = Request(Path(base.place), Path(), Path(), method, at_once=WAYS[way])
            layers = default_layers(copied, method)
            began = time.perf_counter()
            made = edited(copied, request, layers, asked.edits, asked.protected, asked.keep)
            seconds, own = time.perf_counter() - began, not (made is None or isinstance(made, WeightEditor))
            with attached(copied, made) if own else nullcontext():  # type: ignore[arg-type]
                figures = _figures(copied, asked.edits, before, loss_on(copied.model, stream, 128))
            found += _rows(name, {**figures, "seconds": seconds})
    return found


def _figures(base: Base, edits: Sequence[Edit], before: Before, loss: float) -> dict[str, float]:
    scores = as_percent(score_edits(base, edits, before, fluent=_FLUENT, tokens=_TOKENS))
    shown = {name: scores[field] for name, field in SHOWN.items()}
    return {name: value for name, value in shown.items() if value is not None} | {"loss": loss}


def _rows(name: str, figures: dict[str, float]) -> list[Measurement]:
    print(name, {figure: round(value, 3) for figure, value in figures.items()}, file=sys.stderr, flush=True)
    units = {"fluency": "", "loss": "nats a token", "seconds": "s"}
    return [measured(f"{name}: {figure}", [v], units.get(figure, "percent")) for figure, v in figures.items()]


def _fewer(edits: Sequence[Edit], size: Size) -> list[Edit]:
    n = size.neighbours
    return [
        replace(edit, neighbours=edit.neighbours[:n], truths=edit.truths[:n], rephrases=edit.rephrases[:n])
        for edit in edits
    ]


def given(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Where model, edits and text are, and the arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--edits", "--text", "--keep"):
        parser.add_argument(name, type=Path)
    for name in ("--count", "--neighbours"):
        parser.add_argument(name, type=int)
    for name in ("--methods", "--ways"):
        parser.add_argument(name, type=lambda names: tuple(names.split(",")))
    options, rest = parser.parse_known_args(arguments)
    return {name: value for name, value in vars(options).items() if value is not None}, rest


if __name__ == "__main__":
    places, left = given(sys.argv[1:])
    main(measure, {name: replace(size, **places) for name, size in SIZES.items()}, left)
