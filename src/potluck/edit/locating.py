"""What `potluck edit locate` prints and draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from potluck.compose.base import load_base
from potluck.edit.facts import read_edits
from potluck.edit.tracing import KINDS, PLACES, Trace, causal_trace
from potluck.errors import MissingExtra, RecipeError, StorageError
from potluck.files import storing

_TITLES = {"layer": "one layer's output", "mlp": "MLPs of {} layers", "attention": "attention of {} layers"}
_FORMATS = (".png", ".svg", ".pdf")


def locate(
    model: Path,
    facts: Path,
    window: int | None = None,
    draws: int = 10,
    plot: Path | None = None,
    seed: int = 0,
    on_fact: Callable[[int], None] = lambda number: None,
) -> dict[str, Any]:
    """Trace the facts of a file, and say which layers to edit.

    Raises:
        EditError: The file is wrong, or the model knows none of its facts.
        ModelError: The model cannot be used.
        MissingExtra: A plot was asked for, and matplotlib is not installed.
        StorageError: The plot cannot be written.
    """
    if plot is not None and plot.suffix not in _FORMATS:
        raise RecipeError(f"{plot}: a plot ends in {', '.join(_FORMATS)}")
    if plot is not None and plot.exists():
        raise StorageError(f"{plot}: there is something here already", "name a new file")
    left_out: list[str] = []
    asked = read_edits(facts, left_out=left_out)
    trace = causal_trace(load_base(model, "auto"), asked, window, draws=draws, seed=seed, on_fact=on_fact)
    if plot is not None:
        draw(trace, plot)
    return {
        "layers": list(trace.layers),
        "at": trace.at,
        "facts": trace.asked,
        **({"left_out": left_out} if left_out else {}),
        "known": trace.known,
        "clean": trace.clean,
        "blurred": trace.blurred,
        "window": trace.window,
        **{
            kind: {place: [round(float(p), 4) for p in trace.restored[kind][i]] for i, place in enumerate(PLACES)}
            for kind in KINDS
        },
    } | ({"plot": str(plot)} if plot is not None else {})


def draw(trace: Trace, path: Path) -> None:
    """Three maps, token by layer: how probable the answer is again after one thing was put back.

    Raises:
        MissingExtra: matplotlib is not installed.
        StorageError: The file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("a plot needs matplotlib", "pip install 'potluck[report]'") from None
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for panel, kind in zip(panels, KINDS, strict=True):
        image = panel.imshow(
            trace.restored[kind].tolist(), aspect="auto", vmin=trace.blurred, vmax=trace.clean, cmap="Purples"
        )
        panel.set_title(_TITLES[kind].format(trace.window), fontsize=10)
        panel.set_xlabel("layer")
        panel.set_yticks(range(len(PLACES)), PLACES)
    figure.colorbar(image, ax=panels, label="probability of the answer")
    with storing(path):
        figure.savefig(path)
