"""Results of verbs, for people, on standard output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from potluck.preflight import Forecast
from potluck.records.live import comparison_table
from potluck.records.units import bytes_text, count_text


def show_forecast(expected: Forecast) -> None:
    """What a run of the recipe needs."""
    rows = [
        ("participants", f"{len(expected.participants)}, {expected.asked_per_round} asked each round"),
        ("parameters", f"{count_text(expected.parameters)} with a vocabulary of {expected.vocabulary_size}"),
        ("rounds", f"{expected.rounds} of {expected.local_steps} local steps"),
        ("tokens", f"{count_text(expected.tokens_per_round)} a round, {count_text(expected.total_tokens)} in all"),
        ("a transfer", f"{bytes_text(expected.transfer_bytes)} each way per participant and round"),
        (
            "the whole run",
            f"{bytes_text(expected.up_bytes)} up, {bytes_text(expected.down_bytes)} down, all participants",
        ),
        ("memory, local steps", f"about {bytes_text(expected.device_bytes)}"),
        (
            "memory, participants",
            f"{bytes_text(expected.participant_bytes)} of optimizer state each, "
            f"{bytes_text(expected.participant_bytes * len(expected.participants))} in one process",
        ),
        ("memory, coordinator", bytes_text(expected.coordinator_bytes)),
        ("epochs", "unknown" if expected.epochs is None else f"about {expected.epochs:.1f} over the least text"),
    ]
    facts = Table(show_header=False, box=None)
    for name, value in rows:
        facts.add_row(f"[dim]{name}[/]", value)
    texts = Table("participant", "text", box=None, title="Text found", title_justify="left")
    for name, size in expected.text_bytes.items():
        texts.add_row(name, "known once read" if size is None else bytes_text(size))
    console = Console(highlight=False)
    console.print(texts, facts, sep="\n")
    for warning in expected.warnings:
        console.print(f"[yellow]warning:[/] {warning}")
    console.print("[green]ok[/]")


def show_result(result: Mapping[str, Any]) -> None:
    """A verb's result: tables where there are some, then the plain facts."""
    console = Console(highlight=False, soft_wrap=True)
    if "rows" in result:
        console.print(comparison_table(result))  # type: ignore[arg-type]
    if "participants" in result:
        table = Table("held-out text", "bits per byte", "tokens", title_justify="left")
        for name, row in (*result["participants"].items(), ("union", result["union"])):
            table.add_row(name, f"{row['bits_per_byte']:.4f}", count_text(row["tokens"]))
        console.print(table)
    for key in ("run", "round", "rounds", "total_tokens", "bits_per_byte", "model", "report"):
        if result.get(key) is not None:
            console.print(f"{key.replace('_', ' ')}: {result[key]}", markup=False)
