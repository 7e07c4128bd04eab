from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from potluck.records.curves import read_comparison, summary_table
from potluck.records.events import read_events
from potluck.records.live import comparison_table, view
from potluck.records.units import bytes_text, count_text, duration_text, one_line
from potluck.terminal import results


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count_text(0), "0"), (count_text(999), "999"), (count_text(999.7), "1k"), (count_text(12_100), "12.1k"),
        (count_text(1_638_400), "1.64M"), (bytes_text(812), "812 B"), (bytes_text(34_180_000), "34.2 MB"),
        (bytes_text(5e15), "5000 TB"), (duration_text(0.25), "0.2s"), (duration_text(59.6), "1m00s"),
        (duration_text(80), "1m20s"), (duration_text(7500), "2h05m"), (one_line("a\x1b[31m\nb"), "a [31m b"),
        (one_line("x" * 9, 4), "xxx…"),
    ],
)  # fmt: skip
def test_figures(text: str, expected: str) -> None:
    assert text == expected


def test_plain_lines(tmp_path: Path, make_run: Callable[..., None]) -> None:
    stream = io.StringIO()
    with view(results(file=stream, force_terminal=False, width=40), "demo", prefix="try") as shown:
        make_run(tmp_path / "run", listeners=(shown,))
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d  try  ", line) for line in lines)
    assert [line[15:] for line in lines] == [
        "together  3 participants  1.07M parameters  4 rounds of 20 local steps  cpu fp32",
        "before training  held-out 8.00 bits/byte",
        "round 1/4  3/3 ok  loss 4.90  held-out 6.65 bits/byte  10.1k tokens/s  sent up 12 MB down 12 MB  left 20s",
        "round 2/4  sympy failed: <script src=//evil.example/x.js></script> & [red]boom[/red] [31m second line",
        "round 2/4  2/3 ok  loss 3.95  held-out 5.30 bits/byte  6.71k tokens/s  sent up 20 MB down 24 MB  left 13s",
        "round 3/4  3/3 ok  loss 2.90  held-out 3.95 bits/byte  10.1k tokens/s  sent up 32 MB down 36 MB  left 6.6s",
        "round 4/4  3/3 ok  loss 1.90  held-out 2.60 bits/byte  10.1k tokens/s  sent up 44 MB down 48 MB",
        "finished  4 rounds  225k tokens  40s  held-out 2.60 bits/byte",
    ]


def test_plain_lines_of_an_interrupted_and_resumed_run(tmp_path: Path, make_run: Callable[..., None]) -> None:
    first = io.StringIO()
    with view(results(file=first)) as shown:
        make_run(tmp_path / "run", finish=False, listeners=(shown,))
    assert [line[10:] for line in first.getvalue().splitlines()][-2:] == [
        "round 3/4  3/3 ok  loss 2.90  10.1k tokens/s  sent up 32 MB down 36 MB  left 6.4s",
        "interrupted after round 3/4",
    ]
    second = io.StringIO()
    with view(results(file=second), history=read_events(tmp_path / "run" / "events.jsonl")) as shown:
        shown({"event": "run_resumed", "time": "2026-01-01T00:00:00+00:00", "round": 3})
        shown({"event": "contribution", "time": "2026-01-01T00:00:00+00:00", "round": 4, "participant": "pip",
               "status": "rejected", "reason": "", "down_bytes": 1, "up_bytes": 1, "seconds": 1.0})  # fmt: skip
        shown({"event": "evaluation", "time": "2026-01-01T00:00:00+00:00", "round": 4, "participants": {},
               "union": None, "missing": {"pip": "gone"}, "transfers": {}, "seconds": 1.0})  # fmt: skip
    assert [line[10:] for line in second.getvalue().splitlines()] == [
        "resumed from round 3", "round 4/4  pip rejected: no reason given",
        "round 4/4  held-out text without pip: gone",
    ]  # fmt: skip


def test_terminal_view(tmp_path: Path, make_run: Callable[..., None]) -> None:
    stream = io.StringIO()
    console = results(file=stream, force_terminal=True, width=110, height=40, record=True)
    with view(console, "demo") as shown:
        make_run(tmp_path / "run", listeners=(shown,))
    text = console.export_text()
    last = text[text.rindex("round 4/4") :]
    assert "demo · together · 3 participants · 1.07M parameters" in text
    assert "held-out 2.60 bits/byte ↓" in last
    assert "225k tokens" in last
    assert re.search(r"sympy +ok +61\.4k +1\.80 +3\.00 ↓ +12 MB +16 MB", last)
    assert "[red]boom[/red]" in text
    assert "\x1b[31m\n" not in stream.getvalue()
    assert "finished  4 rounds" in text


def test_terminal_view_with_a_prefix_leaves_one_line(tmp_path: Path, make_run: Callable[..., None]) -> None:
    console = results(file=io.StringIO(), force_terminal=True, width=80, height=24, record=True)
    with view(console, "demo", prefix="alone pip") as shown:
        make_run(tmp_path / "run", "alone", ("pip",), listeners=(shown,))
    assert not re.search(r"\b(up|down)\b", console.export_text(clear=False))  # nothing travels
    assert "alone pip  finished  4 rounds  81.9k tokens  40s  held-out 2.60 bits/byte" in console.export_text()


def test_comparison_table(comparison_folder: Path) -> None:
    console = results(file=io.StringIO(), width=100, record=True)
    console.print(comparison_table(summary_table(read_comparison(comparison_folder))))
    rows = [re.findall(r"[^\s│┃]+", line) for line in console.export_text().splitlines()]
    assert ["numpy", "2.700", "2.500", "-7.4%", "2.300", "2.700", "numpy"] in rows
    assert ["sympy", "2.900", "3.000", "+3.4%", "2.800", "2.900", "sympy"] in rows
    assert ["union", "-", "2.600", "-13.3%", "2.400", "3.000", "pip"] in rows
