"""A run as it goes on: a table that renews itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from potluck.records.curves import LONE, Summary, SummaryRow, lowest
from potluck.records.events import Event
from potluck.records.units import bytes_text, count_text, duration_text, one_line
from potluck.terminal import table

REFRESH_SECONDS = 0.1
_STYLES = {"ok": "green", "late": "yellow", "failed": "red", "rejected": "magenta", "waiting": "dim"}


@dataclass
class _Row:
    """The last that is known of one participant."""

    status: str = "waiting"
    reason: str = ""
    round: int = 0
    tokens: int = 0
    loss: float | None = None
    held_out: float | None = None
    change: float | None = None
    down_bytes: int = 0
    up_bytes: int = 0


@dataclass
class _Standing:
    """Where a run stands, after the events so far."""

    started: Event = field(default_factory=dict)
    rows: dict[str, _Row] = field(default_factory=dict)
    round: int = 0
    asked: int = 0
    round_losses: list[tuple[float, int]] = field(default_factory=list)
    round_tokens: int = 0
    arrived: int = 0
    tokens: int = 0
    rate: float = 0.0
    down_bytes: int = 0
    up_bytes: int = 0
    union: float | None = None
    union_of: list[str] = field(default_factory=list)
    change: float | None = None
    evaluated: int = -1
    round_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=5))

    @property
    def planned(self) -> int:
        return int(self.started.get("rounds", 0))

    @property
    def lone(self) -> bool:
        """Whether it trains by itself, so that nothing travels."""
        return self.started.get("variant") in LONE

    @property
    def loss(self) -> float | None:
        tokens = sum(count for _, count in self.round_losses)
        return sum(loss * count for loss, count in self.round_losses) / tokens if tokens else None

    @property
    def seconds_left(self) -> float | None:
        if not self.round_seconds:
            return None
        return sum(self.round_seconds) / len(self.round_seconds) * max(0, self.planned - self.round)

    def take(self, event: Event) -> None:
        """Bring the standing up to one event."""
        match event["event"]:
            case "run_started":
                self.started, self.asked = event, len(event["trainers"])
                self.rows = {name: _Row() for name in event["trainers"]}
            case "contribution":
                self._contribution(event)
            case "round":
                self.round, self.asked, self.arrived = event["round"], event["asked"], 0
                self.round_tokens, self.tokens = event["total_tokens"] - self.tokens, event["total_tokens"]
                self.rate = self.round_tokens / event["seconds"] if event["seconds"] else 0.0
                self.round_seconds.append(event["seconds"])
            case "evaluation":
                self._evaluation(event)

    def _contribution(self, event: Event) -> None:
        if event["round"] > self.round and not self.arrived:
            self.round_losses = []
        self.arrived += 1
        row = self.rows.setdefault(event["participant"], _Row())
        row.status, row.reason = event["status"], one_line(event.get("reason") or "")
        row.round, row.tokens = event["round"], row.tokens + event.get("tokens", 0)
        row.loss = event.get("loss")
        if row.status == "ok" and row.loss is not None:
            self.round_losses.append((row.loss, event["tokens"]))
        self._transfer(row, event)

    def _transfer(self, row: _Row, transfer: Mapping[str, Any]) -> None:
        for total in (row, self):
            total.down_bytes += transfer["down_bytes"]
            total.up_bytes += transfer["up_bytes"]

    def _evaluation(self, event: Event) -> None:
        for name, transfer in event["transfers"].items():
            self._transfer(self.rows.get(name, _Row()), transfer)
        for name in self.rows.keys() & event["participants"].keys():
            row, value = self.rows[name], event["participants"][name]["bits_per_byte"]
            row.held_out, row.change = value, _difference(value, row.held_out)
        value, before = event["union"]["bits_per_byte"] if event["union"] else None, self.union
        same = self.union_of == list(event["participants"])  # unions of other texts cannot be compared
        self.union, self.change, self.evaluated = value, _difference(value, before) if same else None, event["round"]
        self.union_of = list(event["participants"])
        if self.round_seconds and event["round"]:
            self.round_seconds[-1] += event["seconds"]


class View:
    """Shows one run; a listener of its event log and a context manager around it."""

    def __init__(self, console: Console, name: str, prefix: str, history: Iterable[Event]) -> None:
        self._console, self._name, self._prefix = console, name, prefix
        self._standing = _Standing()
        for event in history:
            self._standing.take(event)
        self._pending: Event | None = None
        self._shown_at = 0.0
        # Redrawn only on events: no thread takes time from training.
        self._live = (
            Live(console=console, auto_refresh=False, redirect_stdout=False, transient=bool(prefix))
            if console.is_terminal
            else None
        )

    def __enter__(self) -> View:
        if self._live:
            self._live.start(refresh=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        if self._live:
            self._live.update(self._screen(), refresh=True)
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take one event and show what it changes."""
        standing, kind = self._standing, event["event"]
        if self._pending and not (kind == "evaluation" and event["round"] == self._pending["round"]):
            self._flush()
        standing.take(event)
        if self._live:
            self._draw(at_once=kind not in ("contribution", "checkpoint"))
        if kind == "round":
            self._pending = event  # its line waits for the evaluation that may follow
        if self._pending and standing.evaluated == self._pending["round"]:
            self._flush()
        if line := _plain_line(standing, event):
            self._print(event, line, always=kind in ("run_resumed", "run_interrupted", "run_finished"))

    def _flush(self) -> None:
        if self._pending:
            self._print(self._pending, _round_line(self._standing, self._pending))
            self._pending = None

    def _print(self, event: Event, line: str, always: bool = False) -> None:
        if self._live and not always:
            return
        clock = datetime.fromisoformat(event["time"]).astimezone().strftime("%H:%M:%S")
        words = f"{clock}  {self._prefix}  {line}" if self._prefix else f"{clock}  {line}"
        self._console.print(words)

    def _draw(self, at_once: bool) -> None:
        now = time.monotonic()
        if self._live and (at_once or now - self._shown_at >= REFRESH_SECONDS):
            self._live.update(self._screen(), refresh=True)
            self._shown_at = now

    def _screen(self) -> RenderableType:
        standing = self._standing
        title = Text(" · ", no_wrap=True, overflow="ellipsis").join(
            [Text(part, style="bold" if part == self._prefix else "") for part in self._title() if part]
        )
        return Group(title, _progress(standing), _figures(standing), _participants(standing))

    def _title(self) -> list[str]:
        started = self._standing.started
        if not started:
            return [self._prefix, self._name]
        size = f"{count_text(started['parameters'])} parameters"
        return [self._prefix, self._name, started["variant"], _people(len(started["trainers"])), size]


def view(console: Console, name: str = "", prefix: str = "", history: Iterable[Event] = ()) -> View:
    """A view of one run; make one per run.

    Args:
        console: A console on stderr; whether it is a terminal decides the form.
        name: The recipe's name.
        prefix: Stands before every line of one run out of several, e.g. ``alone numpy``; with one, the
            terminal's table vanishes at the end of the run and leaves a line behind.
        history: Events of the log that a resumed run continues; they are taken silently.
    """
    return View(console, name, prefix, history)


def comparison_table(summary: Summary) -> Table:
    """A comparison's bits per byte as a table for the terminal; the best of each row is bold."""
    title = "Held-out text, bits per byte (lower is better)"
    pooled = summary["union"]["pooled"] is not None
    figures = ("alone", "together", "change", *(["pooled"] if pooled else []), "best alone")
    shown = table("text", *figures, "by", title=title, title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in shown.columns[1:-1]:
        column.justify = "right"
    for row in summary["rows"]:
        shown.add_row(*_comparison_cells(row, row["alone"], pooled))
    shown.add_section()
    shown.add_row(*_comparison_cells(summary["union"], summary["union"]["best_alone"], pooled))
    return shown


def _comparison_cells(row: SummaryRow, rival: float | None, pooled: bool) -> list[Text]:
    together = row["together"]
    better = None if rival is None or together is None else together < rival
    change = "" if better is None or not rival else f"{100 * (together / rival - 1):+.1f}%"  # type: ignore[operator]
    best = lowest(row)
    alone, shared, all_text, rivals = (
        Text(_bits(value, 3), style="bold" if _bits(value, 3) == best else "")
        for value in (row["alone"], together, row["pooled"], row["best_alone"])
    )
    return [
        Text(row["text"], style="bold" if row["text"] == "union" else ""),
        alone,
        shared,
        Text(change, style={True: "green", False: "red", None: ""}[better]),
        *([all_text] if pooled else []),
        rivals,
        Text(row["best_alone_by"] or "", style="dim"),
    ]


def _plain_line(standing: _Standing, event: Event) -> str:
    match event["event"]:
        case "run_started":
            environment = event["environment"]
            return (
                f"{event['variant']}  {_people(len(event['trainers']))}  {count_text(event['parameters'])} parameters"
                f"  {event['rounds']} rounds of {event['local_steps']} local steps"
                f"  {environment.get('device', '')} {environment.get('precision', '')}"
            ).rstrip()
        case "run_resumed":
            return f"resumed from round {event['round']}"
        case "contribution" if event["status"] != "ok":
            reason = one_line(event.get("reason") or "") or "no reason given"
            return f"round {event['round']}/{standing.planned}  {event['participant']} {event['status']}: {reason}"
        case "evaluation" if event.get("missing"):
            missing = "; ".join(f"{name}: {one_line(why)}" for name, why in event["missing"].items())
            return f"round {event['round']}/{standing.planned}  held-out text without {missing}"
        case "evaluation" if event["round"] == 0:
            return f"before training  held-out {_bits(standing.union)} bits/byte"
        case "run_interrupted":
            return f"interrupted after round {event['round']}/{standing.planned}"
        case "edit":
            kept = "kept" if event["kept"] else f"taken back: {one_line(event['reason'])}"
            counts = f"{sum(event['edits'].values())} facts of {_people(len(event['edits']))}"
            told = sum(event["told"].values())  # of those that were made
            effect = f"{told} answered now" if told or not event["edits"] else "none answered: no effect"
            return f"round {event['round']}/{standing.planned}  edited {counts}, {effect}, {kept}"
        case "run_finished":
            held_out = f"  held-out {_bits(standing.union)} bits/byte" if standing.union is not None else ""
            spent = duration_text(event["seconds"])
            return f"finished  {event['rounds']} rounds  {count_text(event['total_tokens'])} tokens  {spent}{held_out}"
    return ""


def _round_line(standing: _Standing, event: Event) -> str:
    parts = [
        f"round {event['round']}/{standing.planned}",
        f"{event['contributors']}/{event['asked']} ok",
        f"loss {standing.loss:.2f}" if standing.loss is not None else "loss -",
    ]
    if standing.evaluated == event["round"]:
        parts.append(f"held-out {_bits(standing.union)} bits/byte")
    parts.append(f"{count_text(standing.rate)} tokens/s")
    if not standing.lone:
        parts.append(f"sent up {bytes_text(standing.up_bytes)} down {bytes_text(standing.down_bytes)}")
    if standing.seconds_left:
        parts.append(f"left {duration_text(standing.seconds_left)}")
    return "  ".join(parts)


def _progress(standing: _Standing) -> RenderableType:
    within = min(1.0, standing.arrived / standing.asked) if standing.asked else 0.0
    left = standing.seconds_left
    words = f"round {standing.round}/{standing.planned}" + (f"  {duration_text(left)} left" if left else "")
    grid = Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=max(1, standing.planned), completed=standing.round + within, width=40), words)
    return grid


def _figures(standing: _Standing) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    if standing.union is not None:
        line.append("held-out ").append(f"{_bits(standing.union)} bits/byte", style="bold")
        line.append_text(_arrow(standing.change)).append("  ")
    line.append(f"{count_text(standing.rate)} tokens/s  " if standing.rate else "")
    line.append(f"{count_text(standing.tokens)} tokens")
    if not standing.lone:
        line.append(f"  up {bytes_text(standing.up_bytes)}  down {bytes_text(standing.down_bytes)}")
    return line


def _participants(standing: _Standing) -> Table:
    figures = ("tokens", "loss", "bits/byte", *(() if standing.lone else ("up", "down")))
    shown = table("participant", "status", *figures, header_style="dim", padding=(0, 2, 0, 0))
    for column in shown.columns[2:]:
        column.justify, column.no_wrap = "right", True
    reasons = any(row.reason for row in standing.rows.values())
    if reasons:  # in full in the log and in the report: here a line is a line
        shown.add_column("reason", no_wrap=True, overflow="ellipsis", ratio=1)
    for name, row in standing.rows.items():
        earlier = "dim " if row.round <= standing.round and standing.arrived else ""
        cells = [
            Text(name),
            Text(row.status, style=f"{earlier}{_STYLES.get(row.status, '')}".strip()),
            Text(count_text(row.tokens)),
            Text("" if row.loss is None else f"{row.loss:.2f}"),
            Text(_bits(row.held_out) if row.held_out is not None else "").append_text(_arrow(row.change)),
            *([] if standing.lone else [Text(bytes_text(row.up_bytes)), Text(bytes_text(row.down_bytes))]),
        ]
        shown.add_row(*cells, *([Text(row.reason, style="dim")] if reasons else []))
    return shown


def _arrow(change: float | None) -> Text:
    if change is None:
        return Text("  ")
    if abs(change) < 0.0005:
        return Text(" =", style="dim")
    return Text(" ↓", style="green") if change < 0 else Text(" ↑", style="red")


def _bits(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _people(count: int) -> str:
    return f"{count} participant" + ("" if count == 1 else "s")


def _difference(value: float | None, before: float | None) -> float | None:
    return None if value is None or before is None else value - before
