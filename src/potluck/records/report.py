"""What a run or a comparison has shown: ``report.html`` for people, ``report.json`` for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from potluck.files import without_folders, write_text
from potluck.recipe.load import shareable
from potluck.records.card import command_of
from potluck.records.charts import PALETTE, RIVAL, STRONG, Line, Panel, draw_svg
from potluck.records.curves import (
    LONE,
    Comparison,
    EvaluationRecord,
    RunRecord,
    comparison_headline,
    is_comparison,
    mean_loss,
    read_comparison,
    read_run,
    summary_table,
)
from potluck.records.folder import POOLED, open_run
from potluck.records.page import Chart, comparison_page, run_page
from potluck.records.units import count_text

REPORT_SCHEMA = 1
MAX_PANELS = 24
NARROW = 4.4  # inches across of what a phone shows: letters of 10 points stay that large
PANELS_FROM = 20.0  # percent of the run


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``report.json`` into a run folder or a comparison folder.

    Returns:
        The path of ``report.html``, which needs no other file and no network.

    Raises:
        RunFolderError: The folder is neither, or its recipe was changed.
        CheckpointError: An event log is damaged.
        MissingExtra: matplotlib is not installed.
        StorageError: The report cannot be written.
    """
    if (folder / "run.json").exists():
        open_run(folder)  # its recipe is the one that the run began with
    recipe = _recipe_text(folder)
    if is_comparison(folder):
        comparison = read_comparison(folder)
        data = comparison_data(comparison, recipe, _with_pooled(folder))
        page = comparison_page(data, _comparison_charts(comparison))
    else:
        run = read_run(folder)
        data = run_data(run, recipe)
        page = run_page(data, _run_charts(run))
    write_text(folder / "report.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    write_text(folder / "report.html", page)
    return folder / "report.html"


def run_data(run: RunRecord, recipe: str) -> dict[str, Any]:
    """A run's report as plain data."""
    return {
        "schema": REPORT_SCHEMA,
        "kind": "run",
        "headline": _run_headline(run),
        "command": command_of(run.variant, recipe),
        **{key: getattr(run, key) for key in ("name", "variant", "potluck", "recipe_hash", "time", "parameters")},
        **{key: getattr(run, key) for key in ("planned_rounds", "local_steps", "tokens_per_step", "resumed")},
        **{key: getattr(run, key) for key in ("finished", "state_hash", "total_tokens")},
        "trainers": list(run.trainers),
        "rounds": len(run.rounds),
        **_traffic(run, None),
        "seconds": _time_split(run),
        "participants": [_participant_data(run, name) for name in _names(run)],
        "trouble": _trouble(run),
        "evaluations": [_evaluation_data(item) for item in run.evaluations],
        "training_loss": [
            {"round": number, "tokens": tokens, "nats_per_token": loss}
            for number, tokens, loss in _training_loss(run, None)
        ],
        "environment": dict(run.environment),
        "recipe": recipe,
    }


def comparison_data(comparison: Comparison, recipe: str, with_pooled: bool = True) -> dict[str, Any]:
    """A comparison's report as plain data; each run without its copy of the recipe."""
    summary = summary_table(comparison)
    pooled = comparison.pooled
    return {
        "schema": REPORT_SCHEMA,
        "kind": "comparison",
        "name": comparison.together.name,
        "headline": comparison_headline(summary),
        "command": "potluck compare recipe.toml" + ("" if with_pooled else " --no-pooled"),
        "summary": summary,
        "together": run_data(comparison.together, ""),
        "alone": {name: run_data(run, "") for name, run in comparison.alone.items()},
        "pooled": run_data(pooled, "") if pooled else None,
        "recipe": recipe,
    }


def _run_headline(run: RunRecord) -> str:
    who = f"{len(run.trainers)} participants" if len(run.trainers) > 1 else run.trainers[0]
    size = count_text(run.parameters)
    text = f"{who} trained a model of {size} parameters on {count_text(run.total_tokens)} tokens."
    known = run.union_curve
    if len(known) > 1:
        moved = "fell" if known[-1] < known[0] else "rose"
        text += f" {_whose(run)} {moved} from {known[0]:.3f} to {known[-1]:.3f} bits per byte."
    if not run.finished:
        text += f" The run is not finished: {len(run.rounds)} of {run.planned_rounds} rounds are done."
    return text


def _whose(run: RunRecord) -> str:
    last = run.evaluations[-1]
    if not last.missing:
        return "Everyone's held-out text"
    count = len(last.participants)
    return f"The held-out text of {count} of {count + len(last.missing)} participants, those who evaluated last,"


def _participant_data(run: RunRecord, name: str) -> dict[str, Any]:
    mine = [item for item in run.contributions if item.participant == name]
    held = next((asdict(item) for item in run.participants if item.name == name), {"name": name})
    last = run.evaluations[-1].participants.get(name) if run.evaluations else None
    return held | {
        "trains": name in run.trainers,
        **{status: sum(item.status == status for item in mine) for status in ("ok", "failed", "rejected")},
        "trained_tokens": sum(item.tokens for item in mine),
        "skipped_steps": sum(item.skipped_steps for item in mine),
        "epochs": _epochs(run, name),
        **_traffic(run, name),
        "seconds": sum(item.seconds for item in mine),
        "bits_per_byte": last.bits_per_byte if last else None,
    }


def _traffic(run: RunRecord, name: str | None) -> dict[str, int | None]:
    """Bytes sent; ``None`` of a run by one trainer in one place, which sends nothing to anybody."""
    if run.variant in LONE:
        return {"down_bytes": None, "up_bytes": None}
    return {"down_bytes": run.transferred("down_bytes", name), "up_bytes": run.transferred("up_bytes", name)}


def _epochs(run: RunRecord, name: str) -> float:
    """Passes over its own text; of the pooled run, over everybody's."""
    held = [item.train_tokens for item in run.participants if name in (item.name, POOLED)]
    trained = sum(item.tokens for item in run.contributions if item.participant == name)
    return trained / sum(held) if sum(held) else 0.0


def _evaluation_data(item: EvaluationRecord) -> dict[str, Any]:
    return asdict(item) | {"missing": {name: without_folders(why) for name, why in item.missing.items()}}


def _trouble(run: RunRecord) -> list[dict[str, Any]]:
    found = [(item.round, item.participant, item.status, item.reason) for item in run.contributions]
    found += [
        (item.round, name, "not evaluated", why) for item in run.evaluations for name, why in item.missing.items()
    ]
    return [
        {"round": number, "participant": name, "status": status, "reason": without_folders(reason or "")}
        for number, name, status, reason in sorted(found)
        if status != "ok"
    ]


def _names(run: RunRecord) -> list[str]:
    """Everyone who holds text or trains; in a pooled run the trainer holds none of its own."""
    return list(dict.fromkeys([*(item.name for item in run.participants), *run.trainers]))


def _time_split(run: RunRecord) -> dict[str, float]:
    """Seconds of local steps, evaluation and all else (aggregation, checkpoints, start)."""
    local = sum(item.seconds for item in run.contributions)
    evaluation = sum(item.seconds for item in run.evaluations)
    total = max(run.seconds, sum(item.seconds for item in run.rounds) + evaluation)
    return {
        "local_steps": local,
        "evaluation": evaluation,
        "other": max(0.0, total - local - evaluation),
        "total": total,
    }


def _training_loss(run: RunRecord, name: str | None) -> list[tuple[int, int, float | None]]:
    """Round, tokens so far and loss, of one participant or the mean of all."""
    return [
        (
            item.round,
            item.total_tokens,
            mean_loss(c for c in run.contributions if c.round == item.round and name in (None, c.participant)),
        )
        for item in run.rounds
    ]


def _run_charts(run: RunRecord) -> dict[str, Chart]:
    names, everyone = list(run.trainers), len(run.trainers) > 1
    holders = [item.name for item in run.participants]
    colours = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(dict.fromkeys([*holders, *names]))}
    dashes = {name: ("-", "--", ":")[number // len(PALETTE) % 3] for number, name in enumerate(colours)}
    if len(colours) > MAX_PANELS:
        colours, dashes = dict.fromkeys(colours, "#8c8c8c"), dict.fromkeys(colours, "-")
    held_out = [Line(label="everyone", points=_held_out(run, None), colour="#7f8081", width=3)] + [
        Line(label=name, points=_held_out(run, name), colour=colours[name], dash=dashes[name]) for name in holders
    ]
    loss = [Line(label="mean", points=_loss(run, None), colour="#7f8081", width=3)] if everyone else []
    loss += [Line(label=name, points=_loss(run, name), colour=colours[name], dash=dashes[name]) for name in names]
    axis = "tokens trained on by all participants"
    charts = {}
    if run.evaluations:
        charts["held_out"] = _chart(held_out[: MAX_PANELS + 1], axis, "bits per byte")
    if run.rounds:
        charts["loss"] = _chart(loss[: MAX_PANELS + 1], axis, "nats per token")
    return charts


def _comparison_charts(comparison: Comparison) -> dict[str, Chart]:
    together, pooled = comparison.together, comparison.pooled
    axis = "tokens trained, % of each run"

    def lines(points: Callable[[RunRecord], list[tuple[float, float | None]]], own: str | None) -> list[Line]:
        rivals = {name: run for name, run in comparison.alone.items() if own in (None, name)}
        label = "alone" if own else "each alone"
        drawn = [
            Line(label=label if number == 0 else "_", points=_share(run, points(run)), colour=RIVAL,
                 width=1.8 if own else 0.9)
            for number, run in enumerate(rivals.values())
        ]  # fmt: skip
        drawn.append(Line(label="together", points=_share(together, points(together)), colour=STRONG, width=2.4))
        if pooled:
            drawn.append(Line(label="pooled", points=_share(pooled, points(pooled)), dash="--", width=1.6))
        return drawn

    panels = [
        Panel(title=item.name, lines=_later(lines(partial(_held_out, name=item.name), item.name)))
        for item in together.participants[:MAX_PANELS]
    ]
    return {
        "union": _chart(lines(partial(_held_out, name=None), None), axis, "bits per byte"),
        "participants": _panels(panels, axis, "bits per byte"),
        "loss": _chart(lines(partial(_loss, name=None), None), axis, "nats per token"),
    }


def _later(lines: list[Line]) -> list[Line]:
    """Curves without their steep beginning, which would flatten what small panels are there to show."""
    if min(len(line.points) for line in lines) < 6:
        return lines
    return [replace(line, points=[point for point in line.points if point[0] >= PANELS_FROM]) for line in lines]


def _chart(lines: list[Line], x_label: str, y_label: str) -> Chart:
    panels = [Panel(title="", lines=lines)]
    few = 0.2 * -(-len(lines) // 2)  # rows of the legend, which stands above where there is no room beside
    return (
        draw_svg(panels, 1, x_label, y_label, (9.2, 3.6)),
        draw_svg(panels, 1, x_label, y_label, (NARROW, 3.2 + few), "outside upper left"),
    )


def _panels(panels: list[Panel], x_label: str, y_label: str) -> Chart:
    return (
        draw_svg(panels, 4, x_label, y_label, (2.3, 2.1), "outside upper left"),
        draw_svg(panels, 2, x_label, y_label, (NARROW / 2, 1.9), "outside upper left"),
    )


def _held_out(run: RunRecord, name: str | None) -> list[tuple[float, float | None]]:
    if name is None:
        return list(run.union_points)
    found = [(item.tokens, item.participants.get(name)) for item in run.evaluations]
    return [(tokens, value.bits_per_byte if value else None) for tokens, value in found]


def _loss(run: RunRecord, name: str | None) -> list[tuple[float, float | None]]:
    return [(tokens, loss) for _, tokens, loss in _training_loss(run, name)]


def _share(run: RunRecord, points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Tokens as percent of the run as planned, so that runs of unlike length lie over each other."""
    done = len(run.rounds) / run.planned_rounds if run.rounds else 1.0
    whole = run.total_tokens / done or 1.0
    return [(100 * tokens / whole, value) for tokens, value in points]


def _with_pooled(folder: Path) -> bool:
    """Whether a comparison was asked for with the pooled run."""
    return not (folder / "run.json").exists() or POOLED in open_run(folder)[1].trainers


def _recipe_text(folder: Path) -> str:
    try:
        return shareable((folder / "recipe.toml").read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return ""
