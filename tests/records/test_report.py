from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from potluck.errors import CheckpointError, MissingExtra, RunFolderError
from potluck.records.curves import comparison_headline, read_comparison, read_run, summary_table
from potluck.records.events import read_events
from potluck.records.report import write_report


def test_summary_of_known_numbers(comparison_folder: Path) -> None:
    summary = summary_table(read_comparison(comparison_folder))
    assert summary["finished"]
    assert summary["together_below_best_alone"]
    assert [(row["text"], row["alone"], row["together"], row["pooled"]) for row in summary["rows"]] == [
        ("numpy", 2.7, 2.5, 2.3), ("pip", 2.2, 2.0, 1.9), ("sympy", 2.9, 3.0, 2.8),
    ]  # fmt: skip
    assert [(row["best_alone"], row["best_alone_by"]) for row in (*summary["rows"], summary["union"])] == [
        (2.7, "numpy"), (2.2, "pip"), (2.9, "sympy"), (3.0, "pip"),
    ]  # fmt: skip
    assert (summary["better_together"], summary["compared"]) == (2, 3)
    assert summary["gain"] == pytest.approx(0.4)
    assert summary["behind_pooled"] == pytest.approx(0.2)
    words = comparison_headline(summary)
    assert "2 of 3" in words
    assert "2.600 bits per byte, below the 3.000" in words
    assert "0.200 behind the 2.400" in words
    json.dumps(summary, allow_nan=False)


def test_summary_of_a_comparison_under_way(comparison_folder: Path) -> None:
    log = comparison_folder / "alone" / "pip" / "events.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:1]))
    (comparison_folder / "pooled" / "events.jsonl").write_bytes(b"")
    summary = summary_table(read_comparison(comparison_folder))
    assert not summary["finished"]
    assert summary["rows"][1]["alone"] is None
    assert summary["union"]["pooled"] is None
    assert (summary["better_together"], summary["compared"]) == (1, 2)
    assert summary["union"]["best_alone_by"] == "numpy"
    assert "Not every run is finished" in write_report(comparison_folder).read_text()


def test_report_data_agrees_with_the_events(run_folder: Path) -> None:
    write_report(run_folder)
    data = json.loads((run_folder / "report.json").read_text())
    events = list(read_events(run_folder / "events.jsonl"))
    for key in ("down_bytes", "up_bytes"):
        assert data[key] == sum(event[key] for event in events if event["event"] == "contribution")
    assert data["total_tokens"] == events[-1]["total_tokens"] == 11 * 20 * 1024
    assert data["seconds"] == pytest.approx({"local_steps": 22.2, "evaluation": 2.5, "other": 15.3, "total": 40.0})
    sympy = next(item for item in data["participants"] if item["name"] == "sympy")
    assert (sympy["ok"], sympy["failed"], sympy["trained_tokens"], sympy["train_documents"]) == (3, 1, 61_440, 32)
    assert [item["union"]["bits_per_byte"] for item in data["evaluations"]] == pytest.approx([8, 6.65, 5.3, 3.95, 2.6])
    assert data["evaluations"][2]["tokens"] == 5 * 20 * 1024
    assert data["training_loss"][0]["nats_per_token"] == pytest.approx(4.9)
    assert data["recipe"] == (run_folder / "recipe.toml").read_text()


class Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.targets += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]


@pytest.mark.parametrize("fixture", ["run_folder", "comparison_folder"])
def test_page_stands_alone(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    page = write_report(request.getfixturevalue(fixture)).read_text()
    parser = Collector()
    parser.feed(page)
    assert "svg" in parser.tags
    assert not {"script", "link", "iframe", "img", "image", "object", "embed", "base", "b", "form"} & parser.tags
    assert all(target and target.startswith("#") for target in parser.targets)
    assert not re.search(r"@import|DOCTYPE svg|url\((?!#)", page)
    assert "&lt;script src=//evil.example/x.js&gt;" in page
    assert "\x1b" not in page
    assert str(tmp_path) not in page
    charts = {"run_folder": 2, "comparison_folder": 3}[fixture]
    for size in ("broad", "narrow"):  # each for a wide screen and for a phone
        assert page.count(f'class="chart {size}" role="img" aria-label="') == charts
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("fixture", ["run_folder", "comparison_folder"])
def test_tables_tell_what_they_hold(fixture: str, request: pytest.FixtureRequest) -> None:
    page = write_report(request.getfixturevalue(fixture)).read_text()
    tables = re.findall(r"<table>.*?</table>", page, re.DOTALL)
    assert len(tables) > 2
    for table in tables:
        assert table.startswith("<table><caption>")
        assert not re.search(r"<th(?! scope=\"(row|col)\")[ >]", table)
        rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table)
        assert all(row.startswith('<th scope="') for row in rows)
        wide = rows[0].count("</th>") > 4
        hint = "Wider than this screen"
        assert (hint in page[: page.index(table)][-220:]) == wide
    assert page.count('<div class="wide" tabindex="0" role="region" aria-label="') == len(tables)
    narrow = page[page.index("@media (max-width: 40rem)") : page.index("@media print")]
    assert ".chart.broad { display: none; }" in narrow and ".hint, .chart.narrow { display: block; }" in narrow


def test_phones_get_letters_that_can_be_read(run_folder: Path) -> None:
    """10 points stay 10 or more on a screen of 390 px: the drawing is as wide as the screen, or less."""
    page = write_report(run_folder).read_text()
    widths = [float(w) for w in re.findall(r'viewBox="0 0 ([0-9.]+) [0-9.]+"[^>]*chart narrow', page)]
    widths += [float(w) for w in re.findall(r'chart narrow"[^>]*viewBox="0 0 ([0-9.]+) ', page)]
    assert len(widths) == 2 and max(widths) <= 390 - 2 * 16


def test_bold_is_the_best_of_what_is_shown(comparison_folder: Path) -> None:
    page = write_report(comparison_folder).read_text()
    assert re.findall(r'class="best">([0-9.]+)<', page) == ["2.300", "1.900", "2.800", "2.400"]
    shutil.rmtree(comparison_folder / "pooled")
    page = write_report(comparison_folder).read_text()
    assert re.findall(r'class="best">([0-9.]+)<', page) == ["2.500", "2.000", "2.900", "2.900", "2.600"]


def test_a_run_alone_reports_no_traffic(comparison_folder: Path) -> None:
    page = write_report(comparison_folder / "alone" / "pip").read_text()
    data = json.loads((comparison_folder / "alone" / "pip" / "report.json").read_text())
    assert data["up_bytes"] is data["down_bytes"] is data["participants"][0]["up_bytes"] is None
    assert "nothing: it is alone" in page
    assert not re.search(r">(up|down|sent up|sent down)<", page)


def test_recipe_is_escaped(run_folder: Path) -> None:
    assert "# &lt;b&gt;&amp;&lt;/b&gt;" in write_report(run_folder).read_text()


def test_the_same_events_give_the_same_bytes(run_folder: Path) -> None:
    first = write_report(run_folder).read_bytes()
    assert write_report(run_folder).read_bytes() == first
    assert not list(run_folder.glob("*.tmp"))


def test_a_log_cut_in_its_last_line_still_reports(run_folder: Path) -> None:
    log = run_folder / "events.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    assert "not finished" in write_report(run_folder).read_text()
    assert not json.loads((run_folder / "report.json").read_text())["finished"]


def test_a_run_that_has_only_started_reports(run_folder: Path) -> None:
    log = run_folder / "events.jsonl"
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    assert "0 of 4" in write_report(run_folder).read_text()


def test_values_that_are_not_finite_report(run_folder: Path) -> None:
    log = run_folder / "events.jsonl"
    log.write_text(re.sub(r'"(nats|bits_per_byte|loss)":[0-9.]+', r'"\1":null', log.read_text()))
    assert "<td>-</td>" in write_report(run_folder).read_text()


def test_an_evaluation_without_an_answer(run_folder: Path) -> None:
    log = run_folder / "events.jsonl"
    *head, evaluation, checkpoint, finished = log.read_text().splitlines(keepends=True)
    event = json.loads(evaluation)
    del event["participants"]["pip"]
    event |= {"union": {**event["union"], "bits_per_byte": 2.75}, "missing": {"pip": "<i>gone</i>"}}
    log.write_text("".join([*head, json.dumps(event) + "\n", checkpoint, finished]))
    page = write_report(run_folder).read_text()
    assert "&lt;i&gt;gone" in page
    assert "The held-out text of 2 of 3 participants, those who evaluated last, fell from 8.000 to 2.750" in page


def test_folders_that_are_no_runs(tmp_path: Path, run_folder: Path) -> None:
    for read in (read_run, read_comparison, write_report):
        with pytest.raises(RunFolderError, match="not a") as caught:
            read(tmp_path)
        assert caught.value.hint
    log = run_folder / "events.jsonl"
    whole = log.read_text()
    log.write_text(whole.replace('"schema":1', '"schema":2'))
    with pytest.raises(RunFolderError, match="schema 2"):
        read_run(run_folder)
    log.write_text(whole.replace('"total_tokens"', '"other"'))
    with pytest.raises(CheckpointError, match="total_tokens"):
        read_run(run_folder)


def test_matplotlib_is_an_extra(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra) as caught:
        write_report(run_folder)
    assert caught.value.hint == "pip install 'potluck[report]'"
